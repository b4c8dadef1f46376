"""The special tokens that a tokenizer adds around a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.errors import Refusal

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "The quick brown fox", "one 2, three!")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens before and after a text, and the token types of a sequence.

    `types` holds those of the tokens before, the one of all tokens of the text, and those of the tokens after; None for a
    tokenizer without token types.
    """

    before: Int[np.ndarray, " before"]
    after: Int[np.ndarray, " after"]
    types: tuple[Sequence[int], int, Sequence[int]] | None = None

    @property
    def count(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: np.ndarray) -> np.ndarray:
        """The sequence of these ids: with the special tokens before and after."""
        return np.concatenate([self.before, ids, self.after])

    def types_of(self, tokens: int) -> Int[np.ndarray, " token"]:
        """The token types of a sequence of this many tokens, special ones included."""
        assert self.types is not None, "the tokenizer has token types"
        before, text, after = self.types
        return np.array([*before, *[text] * (tokens - self.count), *after], np.int64)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a tokenizer, learnt by encoding texts, because no method gives them. Raises Refusal."""
    places: set[int] | None = None
    encoded: Any = {}
    whole: list[int] = []
    content: list[int] = []
    for probe in _PROBES:
        encoded = tokenizer(probe, verbose=False)
        whole = encoded["input_ids"]
        content = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        matches = {n for n in range(len(whole) - len(content) + 1) if whole[n : n + len(content)] == content}
        # a special token that is also a probe's own id can match at two places, in one probe but not in all
        places = matches if places is None else places & matches
    if places is None or len(places) != 1:
        raise Refusal(
            f"special tokens must stand before and after a text; where {type(tokenizer).__name__} puts them is not clear; "
            "use a model with another tokenizer"
        )
    place = places.pop()
    end = place + len(content)
    types = encoded.get("token_type_ids")
    return SpecialTokens(
        np.array(whole[:place], np.int32),
        np.array(whole[end:], np.int32),
        None if types is None else (types[:place], _type_of_text(tokenizer, types[place:end]), types[end:]),
    )


def _type_of_text(tokenizer: PreTrainedTokenizerBase, types: Sequence[Any]) -> int:
    if len(set(map(str, types))) != 1 or not isinstance(types[0], int):
        raise Refusal(
            f"all tokens of a text have one token type; {type(tokenizer).__name__} gives several ({types}); "
            "use a model with another tokenizer"
        )
    return types[0]
