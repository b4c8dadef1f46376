"""The beginning of a run, or of the rest of it: the folder is taken, the plan made, and what is there is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attlas.extract.errors import Refusal
from attlas.extract.plan import Plan, read_plan
from attlas.extract.planning import make_image_plan, make_plan

if TYPE_CHECKING:
    from attlas.extract.corpus import Corpus
    from attlas.extract.job import Job, Progress


def begin_or_resume(job: Job, corpus: Corpus, max_length: int, say: Progress) -> Job:
    """The job with its folder taken and locked and its shards planned; without a plan where all is done."""
    store, was_there = job.store, job.store.exists
    store.refuse_another(job.run)
    if store.manifest is not None and not store.has_work:
        return job
    lock = store.lock()
    try:
        is_new = store.claim(job.run)
        if store.manifest is not None:
            store.clear_work()
            lock.release()
            return job
        try:
            plan = _plan(job, corpus, max_length, say)
        except Refusal:
            if is_new:
                store.clear_work()
            raise
    except BaseException:
        lock.release()
        if not was_there:
            store.storage.remove_if_empty()
        raise
    return replace(job, plan=plan, lock=lock)


def _plan(job: Job, corpus: Corpus, max_length: int, say: Progress) -> Plan:
    """The plan, read or made, and of what an earlier run has left only what is as it was written."""
    store = job.store
    store.clear_obstacles()
    was_begun = store.has_records
    plan = read_plan(store.storage)
    if plan is None:
        plan = _planned(job, corpus, max_length, lambda done, _: say("plan", done, None))
    say("plan", plan.documents, plan.documents)
    store.discard_beyond(plan.shards)
    for shard, spool in enumerate(plan.spools):
        store.discard_damaged(shard, spool=spool)
        if was_begun:
            say("check", shard + 1, plan.shards)
    return plan


def _planned(job: Job, corpus: Corpus, max_length: int, progress: Callable[[int, int], None]) -> Plan:
    options, images = job.options, job.measured_model.images
    for_any: dict[str, Any] = {
        "storage": job.store.storage,
        "shard_sequences": options.shard_sequences,
        "digest_key": read_key(options.digest_key),
        "strict": options.strict,
        "progress": progress,
    }
    if images is not None:
        return make_image_plan(corpus, images.preprocessing, **for_any)
    return make_plan(
        corpus,
        job.encoder.tokenizer,
        max_length=max_length,
        stride=options.stride,
        keep_text=options.tokens == "text",
        **for_any,
    )


def read_key(path: Path | None) -> bytes | None:
    """The secret of document digests, if there is one."""
    if path is None:
        return None
    if not path.is_file():
        raise Refusal(
            f"--digest-key names a file with a secret in it; there is none at {path}; make one of 32 random bytes"
        )
    key = path.read_bytes()
    if len(key) < 16:
        raise Refusal(f"a digest key has at least 16 bytes; {path} has {len(key)}; make one of 32 random bytes")
    return key
