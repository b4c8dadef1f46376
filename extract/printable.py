"""Text from data, made safe to show: a name can neither forge a line nor steer the terminal."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # scripts and emoji need them, and they move nothing
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_ASCII = re.compile(r"[ -~]*")


def printable(text: object, *, limit: int | None = None) -> str:
    r"""The text on one line, with every control character visible as its escape (`\x1b`, `\n`, `\u202e`).

    Escaped are the C0 and C1 controls, line and paragraph separators, lone surrogates (of file names that are not valid
    text) and invisible format characters, those that turn the direction of text among them. Beyond `limit` characters
    the middle is left out.
    """
    shown = str(text)
    if not _ASCII.fullmatch(shown):
        shown = "".join(map(_visible, shown))
    return shown if limit is None else shorten(shown, limit)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning and the end, with … between them."""
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
