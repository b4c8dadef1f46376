"""A run in memory: what was asked for, the model that is measured, and the plan of its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attlas.extract.engines import Engine
from attlas.extract.model.encoder import Encoder
from attlas.extract.model.measured_model import MeasuredModel, Stacks
from attlas.extract.plan import Plan, read_shard
from attlas.extract.store import Location, Lock, Store
from attlas.extract.tables import Table

if TYPE_CHECKING:
    import pyarrow as pa

    from attlas.extract.capture.layout import Layout

TokenMode = Literal["none", "classes", "ids", "text"]
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user asks for; the same options give the same dataset, byte for byte, on machines of the same kind."""

    model: str
    corpus: str
    out: Location
    max_length: int | None = None  # default: the model's own, at most 512
    stride: int = 0
    limit: int | None = None
    tokens: TokenMode = "classes"
    stacks: Stacks = "encoder"  # of an encoder–decoder model
    text_column: str = "text"
    unit: Literal["document", "paragraph", "line"] = "document"
    delimiter: str | None = None  # default: a comma for CSV, a tab for TSV
    encoding: str = "auto"  # what a byte order mark says, else UTF-8
    shard_sequences: int = 256
    batch_tokens: int | None = None  # default: the run's own where it was begun, else what fits into memory
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "auto"
    digest_key: Path | None = None
    strict: bool = False
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Job:
    """A prepared run: the model in memory, the plan in the store."""

    options: RunOptions
    encoder: Encoder
    engine: Engine
    store: Store
    run: Mapping[str, Any]
    measured_model: MeasuredModel
    tables: tuple[Table, ...] = ()  # that are recorded
    plan: Plan | None = None  # None: the dataset is finished
    lock: Lock | None = None  # on the folder, until the dataset is finished or the job is forgotten

    @property
    def layout(self) -> Layout:
        return self.measured_model.layout

    @property
    def complete(self) -> bool:
        return self.plan is None

    @property
    def shards(self) -> int:
        return self._count("shards")

    @property
    def sequences(self) -> int:
        return self._count("sequences")

    @property
    def documents(self) -> int:
        return self._count("documents")

    @property
    def tokens(self) -> int:
        return self._count("tokens")

    @property
    def remaining(self) -> list[int]:
        """Shards without a record."""
        if self.plan is None:
            return []
        return [s for s in range(self.plan.shards) if self.store.read_record(s) is None]

    def tokens_in(self, shard: int) -> int:
        return sum(self.planned(shard)[0]["tokens"].to_pylist())

    def documents_in(self, shard: int) -> int:
        return self.planned(shard)[1].num_rows

    def planned(self, shard: int) -> tuple[pa.Table, pa.Table]:
        """(sequences, documents) of a shard, as they were planned. Raises Damaged."""
        assert self.plan is not None, "a finished dataset has no plan"
        return read_shard(self.store.storage, shard, digest=self.plan.spools[shard])

    def _count(self, name: str) -> int:
        if self.plan is not None:
            return getattr(self.plan, name)
        manifest = self.store.manifest or {}
        return manifest["corpus"][name] if name in manifest["corpus"] else manifest[name]

    @cached_property
    def token_classes(self) -> np.ndarray | None:
        from attlas.extract.model.token_classes import token_classes

        if self.options.tokens == "none" or self.encoder.tokenizer is None:
            return None
        return token_classes(self.encoder.tokenizer)
