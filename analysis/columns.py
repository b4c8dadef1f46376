"""Tables for a terminal in which no number and no name of a column is ever cut.

Where the terminal is too narrow for whole cells, texts go over several lines, then numbers part from what stands beside
them, then columns that may be left out are; what is still too wide is printed wider than the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

UNLIMITED = 1_000_000  # columns of what is no terminal
_GAP = 2
_FOLDED = 24  # columns that a text keeps however narrow the terminal is
Breaks = Literal["never", "at spaces", "anywhere"]


@dataclass(frozen=True)
class Lines:
    """A text over as many lines as it needs, broken at ordinary spaces only: Rich would break 10 517 at its thin one."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width)
        lines = textwrap.wrap(self.text.plain, width, break_long_words=False, break_on_hyphens=False)
        start = 0
        for line in lines:
            start = self.text.plain.index(line, start)
            yield self.text[start : start + len(line)]
            start += len(line)


@dataclass(frozen=True)
class Column:
    """A column: its name, its cells, and what becomes of it where there is no room."""

    name: str
    cells: Sequence[str | Text]
    right: bool = False
    breaks: Breaks = "never"
    may_go: bool = False

    @property
    def texts(self) -> Iterator[str]:
        yield self.name
        yield from (str(cell) for cell in self.cells)

    @property
    def whole(self) -> int:
        """The width of the widest text."""
        return max(map(cell_len, self.texts))

    @property
    def least(self) -> int:
        """The width below which a number, a word or the name would be cut."""
        if self.breaks == "never":
            return self.whole
        if self.breaks == "anywhere":
            return max(cell_len(self.name), min(self.whole, _FOLDED))
        return max(cell_len(word) for text in self.texts for word in text.split(" "))

    def split(self) -> Column:
        """With every cell, and the name, over as many lines as it has words."""
        cells = [Text(c.replace(" ", "\n")) if isinstance(c, str) else c for c in self.cells]
        return replace(self, name=self.name.replace(" ", "\n"), cells=cells)


@dataclass(frozen=True)
class Fitted:
    """A table that takes the width that it is given, as far as its numbers allow."""

    columns: Sequence[Column]
    title: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self.columns)
        while _sum(c.least for c in columns) > options.max_width and any(c.may_go for c in columns):
            columns.remove(next(c for c in reversed(columns) if c.may_go))
        widths, columns = _widths(columns, options.max_width)
        if self.title:
            yield Lines(Text(self.title, style="bold"))
        yield from console.render(_table(columns, widths), options.update(width=max(_sum(widths), options.max_width)))
        gone = [c.name for c in self.columns[::-1] if c.may_go][: len(self.columns) - len(columns)]
        left_out = f"no room for {', '.join(reversed(gone))}: widen the terminal" if gone else ""
        for note in filter(None, (left_out, self.caption)):
            yield Lines(Text(note, style="dim italic"))


def _widths(columns: list[Column], room: int) -> tuple[list[int], list[Column]]:
    """A width for each column, the numbers over two lines where they don't fit into one."""
    texts = [c.breaks == "anywhere" or (c.breaks == "at spaces" and not c.right) for c in columns]
    narrow = [c.least if text else c.whole for c, text in zip(columns, texts, strict=True)]
    if _sum(narrow) > room:
        narrow = [c.least for c in columns]
        columns = [c.split() if c.right and c.breaks == "at spaces" else c for c in columns]
    left = max(0, room - _sum(narrow))
    widths = []
    for column, width in zip(columns, narrow, strict=True):
        more = 0 if column.right else min(left, column.whole - width)
        widths.append(width + more)
        left -= more
    return widths, columns


def _sum(widths: Sequence[int] | Iterator[int]) -> int:
    found = list(widths)
    return sum(found) + _GAP * max(0, len(found) - 1)


def _table(columns: Sequence[Column], widths: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column.name), justify="right" if column.right else "left", width=width, overflow="fold")
    for row in zip(*(c.cells for c in columns), strict=True):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def console_for(stream: object) -> Console:
    """A console as wide as the terminal; without one, as wide as what is printed."""
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    return Console(file=stream, width=None if is_terminal else UNLIMITED, highlight=False)  # pyright: ignore[reportArgumentType]
