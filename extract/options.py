"""The options of a run, and the checks that need neither the model nor the documents."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attlas.extract.card import Card
from attlas.extract.corpus import Corpus, open_corpus_of
from attlas.extract.corpus.generated import Generation, generation_of
from attlas.extract.corpus.options import MAX_DOCUMENT_BYTES
from attlas.extract.errors import Refusal
from attlas.extract.model.folder import check_model_name
from attlas.extract.model.measured_model import Stacks
from attlas.extract.store import Location, Store
from attlas.extract.tables import Columns, measured_columns, statistics_named
from attlas.extract.tables.ablations import TABLE as ABLATIONS
from attlas.extract.tables.ablations import AblateOption, ablate_option

TokenMode = Literal["none", "classes", "ids", "text"]
Progress = Callable[[str, int, int | None], None]  # stage, done, total


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
    statistics: str | Collection[str] = (
        "core"  # core, all, or names of tables, columns and .py files to measure as well
    )
    ablate: str | Collection[str] | None = None  # the table ablations: which parts are left out, and how
    sample: int = 8  # sequences of each shard for which sampled columns are measured
    edges: int = 8  # strongest keys of each query, if the table edges is asked for
    stacks: Stacks = "encoder"  # of an encoder–decoder model
    seed: int | None = None  # of a generated corpus, as the next three
    blocks: int | None = None  # documents; of needle, at each depth
    length: int | None = None  # tokens of a block, or of a haystack
    depths: str | Collection[int] | None = None  # where needles are, in percent
    text_column: str = "text"
    unit: Literal["document", "paragraph", "line"] = "document"
    delimiter: str | None = None  # default: a comma for CSV, a tab for TSV
    encoding: str = "auto"  # by a byte order mark, else UTF-8
    max_document_bytes: int = MAX_DOCUMENT_BYTES  # longer documents are dropped, longer lines refused
    shard_sequences: int = 256
    batch_tokens: int | None = None  # default: as the run was begun, or else what fits into memory
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "auto"
    digest_key: Path | None = None
    strict: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    card: Card | None = None  # for the dataset card

    @property
    def columns(self) -> Columns:
        """The columns to measure of each table. Raises Refusal."""
        ablations = () if self.ablate is None else (ABLATIONS.name,)
        return measured_columns([*statistics_named(self.statistics), *ablations], corpus=self.corpus)

    @property
    def ablation(self) -> AblateOption:
        """What the table ablations leaves out, and how. Raises Refusal."""
        return ablate_option(self.ablate)

    @property
    def generation(self) -> Generation | None:
        """How the corpus is made, if it is a generated one. Raises Refusal."""
        return generation_of(self.corpus, seed=self.seed, blocks=self.blocks, length=self.length, depths=self.depths)


def check_options(options: RunOptions, *, is_loaded: bool = False) -> Corpus:
    """Check everything that can be checked before the model is loaded; returns the opened corpus. Raises Refusal.

    is_loaded: the model is there already, and its name need not lead to it.
    """
    for name, lowest in (
        ("max_length", 1),
        ("stride", 0),
        ("limit", 1),
        ("shard_sequences", 1),
        ("batch_tokens", 1),
        ("sample", 1),
        ("edges", 1),
        ("max_document_bytes", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise Refusal(f"{name} must be at least {lowest}; got {value}; give a larger number")
    _ = options.ablation, options.columns  # refused if they can't be
    if not is_loaded:
        check_model_name(options.model, trust_remote_code=options.trust_remote_code)
    read_key(options.digest_key)
    store = Store.at(options.out)
    store.refuse_foreign()
    store.refuse_busy()
    corpus = open_corpus_of(options.corpus, options)
    if corpus.has_images:
        _refuse_text_options(options)
    if corpus.generation is not None:
        _refuse_window_options(options)
    return corpus


def read_key(path: Path | None) -> bytes | None:
    """The secret for document digests, if there is one. Raises Refusal."""
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


def _refuse_window_options(options: RunOptions) -> None:
    """Raise Refusal for options about windows, which a generated corpus does not have."""
    given = [f"--{name.replace('_', '-')}" for name in ("max_length", "stride") if getattr(options, name)]
    if given:
        raise Refusal(
            f"a document of {options.corpus} is one sequence, whose length is that of the corpus; {', '.join(given)} can't be "
            "asked of it; use --length"
        )


def _refuse_text_options(options: RunOptions) -> None:
    """Raise Refusal for options that a corpus of images does not have."""
    text_options = {
        "--max-length": options.max_length is not None,
        "--stride": options.stride > 0,
        f"--tokens {options.tokens}": options.tokens in ("ids", "text"),
        "--stacks all": options.stacks == "all",
    }
    given = [name for name, is_given in text_options.items() if is_given]
    if given:
        raise Refusal(
            f"an image is one sequence, without ids, text or tokens for a decoder; {', '.join(given)} can't be asked of "
            f"{options.corpus}; leave it out"
        )
