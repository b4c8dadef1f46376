"""Load a model's tokenizer, and explain why one can't be loaded."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from attlas.extract.errors import Refusal, causes, shortlist
from attlas.extract.model.loading import short_message
from attlas.extract.model.text_settings import TextSettings
from attlas.extract.model.weights import read_json_object

# how transformers reports a missing package
_MISSING_PACKAGE = re.compile(
    r"need to install ([\w-]+)|requires the ([\w-]+) library|`([\w-]+)` is required|pip install [`\"']?([\w-]+)|No module named '([\w-]+)",
    re.IGNORECASE,
)
_MAX_GROWTH = 64
_MODULE_OF = {"protobuf": "google.protobuf", "g2p-en": "g2p_en"}
_PACKAGES_FOR = {"sentencepiece": ("sentencepiece", "protobuf")}  # transformers needs both to read such a file


def load_tokenizer(name: str, path: str, options: Mapping[str, Any], settings: TextSettings) -> Any:
    """Load the tokenizer of a folder or hub model and apply the settings. Raises Refusal if there is none."""
    from transformers import AutoTokenizer

    _refuse_growth(name, Path(path) / "tokenizer.json")
    arguments = {**settings.tokenizer_options, **options}
    if settings.max_length is not None:
        arguments["model_max_length"] = settings.max_length
    try:
        with _logging_silenced():
            tokenizer = AutoTokenizer.from_pretrained(path, **arguments)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise _loading_refusal(name, Path(path), error) from error
    # without vocabulary files transformers returns a tokenizer that has no words
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.added_tokens_encoder)
    if len(words) <= 1:
        raise _no_tokenizer(name, f"{type(tokenizer).__name__} without its vocabulary, only special tokens")
    if settings.lower_case:
        _lower_case_first(tokenizer)
    return tokenizer


def _refuse_growth(name: str, file: Path) -> None:
    """Raise Refusal for a tokenizer whose replacements, one after the other, would make a text many times as long."""
    if not file.is_file():
        return
    growth = _growth(read_json_object(file).get("normalizer"))
    if growth > _MAX_GROWTH:
        raise Refusal(
            f"a tokenizer makes a text at most {_MAX_GROWTH} times as long before it splits it; the replacements in tokenizer.json of {name} "
            f"make it {growth:.3g} times as long; repair it, or take another model"
        )


def _growth(normalizer: Any) -> float:
    """How many times as long a text can become by the replacements of a normalizer."""
    if not isinstance(normalizer, dict):
        return 1.0
    steps = normalizer.get("normalizers")
    if isinstance(steps, list):
        return math.prod(map(_growth, steps))
    pattern, content = normalizer.get("pattern"), normalizer.get("content")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    replaced = pattern.get("String")
    # a regular expression may match a single character
    return max(1.0, len(content) / max(1, len(replaced) if isinstance(replaced, str) else 1))


def check_vocabulary(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding table; a table with spare rows is common."""
    rows = _embedding_rows(model)
    beyond = {} if rows is None else {i: t for t, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        first, last = min(beyond), max(beyond)
        raise Refusal(
            f"the model's embedding table must have a row for every id of its tokenizer; that of {name} has {rows} rows, and "
            f"the ids go up to {last} ({len(beyond)} too many, from {beyond[first]!r}); remove the added tokens, or enlarge "
            f"the table (resize_token_embeddings({last + 1})), and save both again"
        )


def _embedding_rows(model: nn.Module) -> int | None:
    """The number of rows of the input embeddings; None if the model does not expose them."""
    try:
        table: Any = model.get_input_embeddings()  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _lower_case_first(tokenizer: Any) -> None:
    """Make the tokenizer lower-case texts before its own steps, as sentence-transformers does."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        if hasattr(tokenizer, "basic_tokenizer"):
            tokenizer.basic_tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    normalizer = json.loads(backend.to_str()).get("normalizer") or {}
    if "Lowercase" in {normalizer.get("type"), *(step.get("type") for step in normalizer.get("normalizers", []))}:
        return
    steps = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _loading_refusal(name: str, folder: Path, error: Exception) -> Refusal:
    packages = _missing_packages(folder, error)
    if packages:
        verb = "is" if len(packages) == 1 else "are"
        return Refusal(
            f"a tokenizer needs the packages it is written with; {' and '.join(packages)}, for that of {name}, {verb} not "
            f"installed; pip install {' '.join(packages)}"
        )
    if "Couldn't instantiate the backend tokenizer" in str(error):
        return _no_tokenizer(name, _missing_files(folder))
    files = sorted(file.name for pattern in ("tokenizer.json", "vocab*", "*.model") for file in folder.glob(pattern))
    if files:
        return Refusal(
            f"a model comes with its tokenizer; {shortlist(files)} of {name} can't be loaded "
            f"({type(error).__name__}: {short_message(error)}); copy or save it again"
        )
    return _no_tokenizer(name, f"{type(error).__name__}: {short_message(error)}")


def _no_tokenizer(name: str, reason: str) -> Refusal:
    return Refusal(
        f"a model comes with its tokenizer; none could be loaded from {name} ({reason}); save it to the same folder"
    )


def _missing_packages(folder: Path, error: BaseException) -> list[str]:
    """The packages to install, if one is missing.

    For a SentencePiece model, transformers' own message names the reader of tiktoken files that it tried last.
    """
    if not any(isinstance(cause, ImportError) for cause in causes(error)):
        return []
    names = ["sentencepiece"] if any(_is_sentencepiece(file) for file in folder.glob("*.*")) else []
    if not names or isinstance(error, ImportError):
        names = [name.lower() for cause in causes(error) for name in _packages_in(str(cause))] or names
    packages = [package for name in names for package in _PACKAGES_FOR.get(name, (name,))]
    return [p for p in dict.fromkeys(packages) if not _is_installed(p)]


def _packages_in(message: str) -> Iterator[str]:
    for groups in _MISSING_PACKAGE.findall(message):
        yield from (name for name in groups if name)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(_MODULE_OF.get(package, package.replace("-", "_"))) is not None
    except ImportError:
        return False


def _is_sentencepiece(file: Path) -> bool:
    """Whether a file is a SentencePiece model, a protocol buffer that begins with the length of its first piece."""
    if file.suffix not in (".model", ".spm", ".vocab") or not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(3)
    return len(start) == 3 and start[0] == 0x0A and start[2] == 0x0A


def _missing_files(folder: Path) -> str:
    """Why there is nothing to build a tokenizer from."""
    import transformers

    file = folder / "tokenizer_config.json"
    config = read_json_object(file) if file.is_file() else {}
    name = config.get("tokenizer_class")
    if config.get("auto_map"):
        return "its tokenizer has its own code, which runs only with --trust-remote-code"
    if isinstance(name, str) and not hasattr(transformers, name):
        return f"tokenizer_config.json names {name}, which transformers {transformers.__version__} does not have"
    return "it has neither a tokenizer.json nor vocabulary files"


@contextmanager
def _logging_silenced() -> Iterator[None]:
    """Silence transformers, which logs every tokenizer format it tries; the refusal names the missing package instead."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)
