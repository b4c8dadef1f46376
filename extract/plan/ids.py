"""Plan a generated corpus: each document is one sequence of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

from attlas.extract.corpus.generated import IdDocument
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.plan.spool import Encoded, Spool
from attlas.extract.plan.stored import Plan, Progress, clear_plan, write_plan
from attlas.extract.store import Storage


def make_id_plan(
    documents: Iterable[IdDocument],
    tokenizer: Any,
    *,
    limit: int | None,
    storage: Storage,
    shard_sequences: int,
    digest_key: bytes | None,
    keep_text: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Make the documents, write the spool of each shard, then the plan. `limit`: the maximum number of documents."""
    clear_plan(storage)
    spool = Spool(storage, shard_sequences, digest_key, special_tokens(tokenizer), keep_text)
    for document in islice(documents, limit):
        spool.add_ids(document, Encoded(document.ids, partial(_text, tokenizer, document) if keep_text else None))
        if progress is not None:
            progress(spool.documents, spool.tokens)
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


def _text(tokenizer: Any, document: IdDocument, first: int, last: int) -> str:
    return str(tokenizer.decode(document.ids[first:last]))
