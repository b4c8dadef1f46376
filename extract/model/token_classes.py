"""The class of each token of a vocabulary, determined from the tokenizer alone."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from jaxtyping import Int8

from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.model.vocabulary import special_ids, vocabulary_entries


def token_classes(tokenizer: Any) -> Int8[np.ndarray, " vocabulary"]:
    """The class of every id, as an index into TOKEN_CLASSES.

    Special tokens come first: bos, separator, other. All other tokens are classified by their text: whitespace if it is
    nothing else, punctuation if all its visible characters are of Unicode category P or S, number if it has a digit, and
    else word_start or subword by whether the tokenizer begins a word with it.
    """
    entries = vocabulary_entries(tokenizer)
    index = {name: number for number, name in enumerate(TOKEN_CLASSES)}
    classes = np.fromiter((index[_text_class(*entry)] for entry in entries), np.int8, len(entries))
    for ids, name in (
        (special_ids(tokenizer), "special"),
        ((tokenizer.sep_token_id, tokenizer.eos_token_id), "separator"),
        ((tokenizer.cls_token_id, tokenizer.bos_token_id), "bos"),
    ):
        for i in ids:
            if i is not None and i < len(classes):
                classes[i] = index[name]
    return classes


def class_sizes(tokenizer: Any, classes: Int8[np.ndarray, " vocabulary"]) -> dict[str, int]:
    """The number of tokens of the vocabulary in each class."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    sizes = np.bincount(classes[ids], minlength=len(TOKEN_CLASSES))
    return dict(zip(TOKEN_CLASSES, sizes.tolist(), strict=True))


def _text_class(text: str, begins_word: bool) -> str:
    visible = text.strip()
    if visible.isalpha():  # nearly all tokens
        return "word_start" if begins_word else "subword"
    if text and not visible:
        return "whitespace"
    if visible and all(unicodedata.category(c)[0] in "PS" for c in visible if not c.isspace()):
        return "punctuation"
    if any(c.isdigit() for c in visible):
        return "number"
    return "word_start" if begins_word else "subword"
