"""The token classes of a vocabulary: what kind of token each id is, from the tokenizer alone."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from extract.statistics.attention import TOKEN_CLASSES


def token_classes(tokenizer: Any) -> np.ndarray:
    """Class of every id, int8[vocabulary], an index into TOKEN_CLASSES.

    Special tokens come first (bos, separator, other), then the token's own text decides: punctuation if all its
    characters are Unicode P or S, number if it has a digit, else whether it begins a word for this tokenizer.
    """
    tokens = _tokens(tokenizer)
    texts, begins = _texts_and_beginnings(tokenizer, tokens)
    classes = np.fromiter(
        (TOKEN_CLASSES.index(_class_of(t, b)) for t, b in zip(texts, begins, strict=True)), np.int8, len(tokens)
    )
    for ids, name in (
        (tokenizer.all_special_ids, "special"),
        ((tokenizer.sep_token_id, tokenizer.eos_token_id), "separator"),
        ((tokenizer.cls_token_id, tokenizer.bos_token_id), "bos"),
    ):
        for i in ids:
            if i is not None and i < len(classes):
                classes[i] = TOKEN_CLASSES.index(name)
    return classes


def _tokens(tokenizer: Any) -> list[str]:
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    tokens = [""] * size
    for token, i in tokenizer.get_vocab().items():
        tokens[i] = token
    return tokens


def _class_of(text: str, begins_word: bool) -> str:
    if text and all(unicodedata.category(c)[0] in "PS" for c in text):
        return "punctuation"
    if any(c.isdigit() for c in text):
        return "number"
    return "word_start" if begins_word else "subword"


def _texts_and_beginnings(tokenizer: Any, tokens: Sequence[str]) -> tuple[list[str], list[bool]]:
    """The visible text of each token and whether it begins a word, by the marks of its kind of vocabulary."""
    kind, prefix = _marks(tokenizer)
    if kind == "continuation":  # WordPiece: the pieces after the first are marked
        marked = [t.startswith(prefix) for t in tokens]
        return [t.removeprefix(prefix) for t in tokens], [not m for m in marked]
    if (
        kind == "suffix"
    ):  # a mark at a word's last piece: pieces without one begin or continue, the vocabulary can't say
        return [t.removesuffix(prefix) for t in tokens], [t.endswith(prefix) for t in tokens]
    if kind == "bytes":
        table = _byte_of_character()
        raw = [bytes(table.get(c, 32) for c in t).decode("utf-8", "replace") for t in tokens]
        return [t.strip() for t in raw], [t[:1].isspace() for t in raw]
    return [t.strip("▁ ") for t in tokens], [t.startswith(("▁", " ")) for t in tokens]


def _marks(tokenizer: Any) -> tuple[str, str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        wordpiece = any(t.startswith("##") for t in tokenizer.get_vocab())
        return ("continuation", "##") if wordpiece else ("metaspace", "▁")
    facts = json.loads(backend.to_str())
    model = facts.get("model", {})
    if model.get("continuing_subword_prefix"):
        return "continuation", model["continuing_subword_prefix"]
    if model.get("end_of_word_suffix"):
        return "suffix", model["end_of_word_suffix"]
    described = json.dumps([facts.get("pre_tokenizer"), facts.get("decoder")])
    return ("bytes", "") if '"ByteLevel"' in described else ("metaspace", "▁")


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2 (Radford 2019): printable bytes stand for themselves, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    hidden = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(hidden)}
