"""Labels of tokens, patches and positions, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attlas.extract.engines.patches import Grid
from attlas.extract.model.vocabulary import VocabularyEntry, special_ids, vocabulary_entries
from attlas.extract.printable import printable
from attlas.extract.view.content import Axis

_LONGEST = 40
_WHITE_SPACE = {" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥"}


def text_axis(ids: Sequence[int], tokenizer: Any) -> Axis:
    """The axis of a text's tokens; labelled by their ids without a tokenizer."""
    if tokenizer is None:
        return _plain_axis("tokens", [f"#{number}" for number in ids])
    entries, special = vocabulary_entries(tokenizer), special_ids(tokenizer)
    of_ids = [entries[number] if number < len(entries) else VocabularyEntry(f"#{number}", True) for number in ids]
    is_special = tuple(number in special for number in ids)
    return Axis(
        "tokens", tuple(token_label(entry.text) for entry in of_ids), _continuations(of_ids, is_special), is_special
    )


def token_label(text: str) -> str:
    """The text of a token without the space before it; white space and bytes that form no character are shown by signs."""
    visible = text.strip(" ") or text
    if not visible:
        return "∅"
    if visible.isspace():
        shown = "".join(_WHITE_SPACE.get(character, "␣") for character in visible)
    else:
        shown = "".join(map(_visible, visible))
    return printable(shown, limit=_LONGEST)


def _visible(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as a lone surrogate
        return f"⟨{ord(character) - 0xDC00:02X}⟩"
    return _WHITE_SPACE.get(character, character) if character != " " else character


def _continuations(entries: Sequence[VocabularyEntry], special: Sequence[bool]) -> tuple[bool, ...]:
    """Which tokens go on with the word of the token before."""
    return tuple(
        number > 0
        and not entry.begins_word
        and entry.text[:1].isalnum()
        and not special[number - 1]
        and entries[number - 1].text[-1:].isalnum()
        for number, entry in enumerate(entries)
    )


def grid_axis(grid: Grid) -> Axis:
    """The axis of an image's tokens: patches by row and column, and those before and after them."""
    before = ["class"] if grid.prefix == 1 else [f"extra {n}" for n in range(grid.prefix)]
    patches = [f"r{n // grid.columns} c{n % grid.columns}" for n in range(grid.patches)]
    after = [f"extra {grid.prefix + n}" for n in range(grid.tokens - grid.end)]
    special = [True] * len(before) + [False] * len(patches) + [True] * len(after)
    return Axis("patches", (*before, *patches, *after), (False,) * grid.tokens, tuple(special), grid)


def position_axis(size: int) -> Axis:
    """An axis of which nothing but the positions is known."""
    return _plain_axis("positions", [str(n) for n in range(size)])


def _plain_axis(kind: str, labels: Sequence[str]) -> Axis:
    return Axis(kind, tuple(labels), (False,) * len(labels), (False,) * len(labels))
