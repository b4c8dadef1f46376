"""The token classes of a vocabulary: what kind of token each id is, from the tokenizer alone."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from jaxtyping import Int8

from extract.model.vocabulary import special_ids, vocabulary_entries
from extract.statistics.attention import TOKEN_CLASSES


def token_classes(tokenizer: Any) -> Int8[np.ndarray, " vocabulary"]:
    """Class of every id, an index into TOKEN_CLASSES.

    Special tokens come first (bos, separator, other), then the text that the token stands for decides: white space if it
    is nothing else, punctuation if all its visible characters are Unicode P or S, number if it has a digit, else whether
    it begins a word for this tokenizer.
    """
    entries = vocabulary_entries(tokenizer)
    places = {name: place for place, name in enumerate(TOKEN_CLASSES)}
    classes = np.fromiter((places[_class_of(*entry)] for entry in entries), np.int8, len(entries))
    for ids, name in (
        (special_ids(tokenizer), "special"),
        ((tokenizer.sep_token_id, tokenizer.eos_token_id), "separator"),
        ((tokenizer.cls_token_id, tokenizer.bos_token_id), "bos"),
    ):
        for i in ids:
            if i is not None and i < len(classes):
                classes[i] = places[name]
    return classes


def class_sizes(tokenizer: Any, classes: Int8[np.ndarray, " vocabulary"]) -> dict[str, int]:
    """How many tokens of the vocabulary each class has."""
    held = np.bincount(classes[sorted(set(tokenizer.get_vocab().values()))], minlength=len(TOKEN_CLASSES))
    return dict(zip(TOKEN_CLASSES, held.tolist(), strict=True))


def _class_of(text: str, begins_word: bool) -> str:
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
