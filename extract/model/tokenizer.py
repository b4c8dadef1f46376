"""A model's tokenizer, and why there is none."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from extract.errors import Refusal
from extract.model.loading import in_short

if TYPE_CHECKING:
    from extract.model.text_settings import TextSettings

# how transformers says that a package is missing
_NEEDS = re.compile(
    r"need to install ([\w-]+)|requires the ([\w-]+) library|`([\w-]+)` is required|pip install [`\"']?([\w-]+)|No module named '([\w-]+)",
    re.IGNORECASE,
)
_MODULE_OF = {"protobuf": "google.protobuf", "g2p-en": "g2p_en"}
_TOGETHER = {"sentencepiece": ("sentencepiece", "protobuf")}  # transformers reads such a file with both
_MOST_SHOWN = 3


def load_tokenizer(name: str, path: str, options: Mapping[str, Any], settings: TextSettings) -> Any:
    """The tokenizer of a folder or of the hub, as the settings want it. Raises Refusal where there is none."""
    from transformers import AutoTokenizer

    asked = {**settings.tokenizer_options, **options}
    if settings.max_length is not None:
        asked["model_max_length"] = settings.max_length
    try:
        with _its_reports_silenced():
            tokenizer = AutoTokenizer.from_pretrained(path, **asked)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises no type of its own
        raise _why_none(name, Path(path), error) from error
    # without the files of its vocabulary transformers makes one that knows no word
    known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.added_tokens_encoder)
    if len(known) <= 1:
        raise _without_tokenizer(name, f"{type(tokenizer).__name__} without its vocabulary, only special tokens")
    if settings.lower_case:
        _lower_case_first(tokenizer)
    return tokenizer


def check_vocabulary(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; a table with rows to spare is usual."""
    rows = _embedding_rows(model)
    beyond = {} if rows is None else {i: t for t, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        first, last = min(beyond), max(beyond)
        raise Refusal(
            f"a tokenizer's ids are rows of the model's embedding table; {name} has {rows} rows, and its tokenizer ids up "
            f"to {last} ({len(beyond)} beyond, from {beyond[first]!r}); take the added tokens out, or give the model a row "
            f"for each (resize_token_embeddings({last + 1})), and save both again"
        )


def _embedding_rows(model: nn.Module) -> int | None:
    """None where the model does not say which table its ids are rows of."""
    try:
        table: Any = model.get_input_embeddings()  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _lower_case_first(tokenizer: Any) -> None:
    """Lower-case texts before all else that the tokenizer does, as sentence-transformers does it."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        if hasattr(tokenizer, "basic_tokenizer"):
            tokenizer.basic_tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    own = json.loads(backend.to_str()).get("normalizer") or {}
    if "Lowercase" in {own.get("type"), *(step.get("type") for step in own.get("normalizers", []))}:
        return
    steps = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _why_none(name: str, folder: Path, error: Exception) -> Refusal:
    packages = _missing_packages(folder, error)
    if packages:
        verb = "is" if len(packages) == 1 else "are"
        return Refusal(
            f"a tokenizer needs the packages that it is written with; {' and '.join(packages)}, for that of {name}, {verb} "
            f"not installed; pip install {' '.join(packages)}"
        )
    if "Couldn't instantiate the backend tokenizer" in str(error):
        return _without_tokenizer(name, _what_it_lacks(folder))
    held = sorted(file.name for pattern in ("tokenizer.json", "vocab*", "*.model") for file in folder.glob(pattern))
    if held:
        return Refusal(
            f"a model comes with its tokenizer; {_some(held)} of {name} can't be read as one "
            f"({type(error).__name__}: {in_short(error)}); copy or save it again"
        )
    return _without_tokenizer(name, f"{type(error).__name__}: {in_short(error)}")


def _without_tokenizer(name: str, reason: str) -> Refusal:
    return Refusal(
        f"a model comes with its tokenizer; none could be loaded from {name} ({reason}); save it into the same folder"
    )


def _missing_packages(folder: Path, error: BaseException) -> list[str]:
    """What to install: of a SentencePiece model other than transformers' last guess, a reader of tiktoken files."""
    named = ["sentencepiece"] if any(_is_sentencepiece(file) for file in folder.glob("*.*")) else []
    if not named or isinstance(error, ImportError):
        named = [name.lower() for said in _chain(error) for name in _packages_in(str(said))] or named
    packages = [package for name in named for package in _TOGETHER.get(name, (name,))]
    missing = [p for p in dict.fromkeys(packages) if not _is_installed(p)]
    return missing if _chain_is_about_imports(error) else []


def _packages_in(message: str) -> Iterator[str]:
    for groups in _NEEDS.findall(message):
        yield from (name for name in groups if name)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _chain_is_about_imports(error: BaseException) -> bool:
    return any(isinstance(said, ImportError) for said in _chain(error))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(_MODULE_OF.get(package, package.replace("-", "_"))) is not None
    except ImportError:
        return False


def _is_sentencepiece(file: Path) -> bool:
    """Whether a file is a SentencePiece model: a message of pieces, the first of which begins with its length."""
    if file.suffix not in (".model", ".spm", ".vocab") or not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(3)
    return len(start) == 3 and start[0] == 0x0A and start[2] == 0x0A


def _what_it_lacks(folder: Path) -> str:
    """Why transformers finds nothing to make a tokenizer of, where it can only guess."""
    import transformers

    file = folder / "tokenizer_config.json"
    stated = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    kind = stated.get("tokenizer_class")
    if stated.get("auto_map"):
        return "its tokenizer is code of its own, which runs only with --trust-remote-code"
    if isinstance(kind, str) and not hasattr(transformers, kind):
        return f"tokenizer_config.json names {kind}, which transformers {transformers.__version__} does not have"
    return "there is neither a tokenizer.json nor the files of a vocabulary"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _its_reports_silenced() -> Iterator[None]:
    """transformers logs each way that it tries; what is said here is which package is missing."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)
