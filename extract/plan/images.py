"""Plan a corpus of images: each is one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from attlas.extract.corpus import Document, refuse_unreadable
from attlas.extract.model.images import ImagePreprocessing, Unreadable, read_image_file
from attlas.extract.plan.known import KnownCorpus
from attlas.extract.plan.shards import Read
from attlas.extract.plan.spool import Spool, image_facts
from attlas.extract.plan.stored import Plan, Progress, clear_plan, write_plan
from attlas.extract.store import Storage


def make_image_plan(
    corpus: Iterable[Document],
    preprocessing: ImagePreprocessing,
    *,
    storage: Storage,
    shard_sequences: int,
    digest_key: bytes | None,
    strict: bool = False,
    known: KnownCorpus | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Read the images once, write the spool of each shard, then the plan. Raises Refusal.

    A spool names the image files, which are read again when they are measured. Every image is preprocessed here too, so that
    unusable ones are known before the model runs. `progress` receives the documents and tokens so far. known: as of `make_plan`.
    """
    clear_plan(storage)
    spool = Spool(storage, shard_sequences, digest_key, known=known)
    for document in corpus:
        content, reason = _read_image(document, preprocessing)
        if known is not None and known.is_known(document, content):
            spool.pass_over(content)
            continue
        if strict:
            refuse_unreadable(replace(document, dropped_reason=reason))
        spool.add_image(document, content, reason, tokens=preprocessing.tokens, special=preprocessing.special)
        if progress is not None:
            progress(spool.documents, spool.tokens)
    spool.replace_shards(partial(_read_again, corpus, preprocessing))
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


def _read_again(
    corpus: Iterable[Document], preprocessing: ImagePreprocessing, known: KnownCorpus, numbers: set[int]
) -> Iterator[tuple[int, Read]]:
    """Some images of the corpus by their numbers, each with what its sequence says of it."""
    for number, document in known.again(corpus, numbers):
        content, _ = _read_image(document, preprocessing)
        known.check(number, document, content)
        facts = image_facts(document, content or b"")
        yield number, lambda _row, facts=facts: (facts, None)


def _read_image(document: Document, preprocessing: ImagePreprocessing) -> tuple[bytes | None, str | None]:
    """The bytes of a usable image and None, or None and the reason to drop it."""
    assert document.file is not None, "a document of an image corpus is a file"
    try:
        content = read_image_file(document.file)
        preprocessing.pixels(content)
    except OSError as error:
        return None, f"unreadable: {type(error).__name__}"
    except Unreadable as error:
        return None, str(error)
    return content, None
