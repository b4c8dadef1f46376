"""Terminal tables that never truncate a number or a column name.

When the terminal is too narrow, text cells are wrapped first, then numeric cells are split at spaces, then optional
columns are dropped. A table that still does not fit is printed wider than the terminal.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

UNLIMITED = 1_000_000  # width of an output that is not a terminal
_GAP = 2
_MIN_TEXT_WIDTH = 24  # of a text column, however narrow the terminal
Breaks = Literal["never", "at spaces", "anywhere"]


@dataclass(frozen=True)
class WrappedText:
    """Text wrapped at ordinary spaces only; Rich itself would also break `10 517` at its thin space."""

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
    """A column: its name, its cells, and how it may shrink when there is too little room."""

    name: str
    cells: Sequence[str | Text]
    right: bool = False
    breaks: Breaks = "never"
    optional: bool = False

    @property
    def texts(self) -> Iterator[str]:
        yield self.name
        yield from (str(cell) for cell in self.cells)

    @property
    def full_width(self) -> int:
        """Width of the widest cell or of the name, unwrapped."""
        return max(map(cell_len, self.texts))

    @property
    def min_width(self) -> int:
        """Smallest width at which no number, word or name is truncated."""
        if self.breaks == "never":
            return self.full_width
        if self.breaks == "anywhere":
            return max(cell_len(self.name), min(self.full_width, _MIN_TEXT_WIDTH))
        return max(cell_len(word) for text in self.texts for word in text.split(" "))

    def split(self) -> Column:
        """A copy with one word per line in every cell and in the name."""
        cells = [Text(c.replace(" ", "\n")) if isinstance(c, str) else c for c in self.cells]
        return replace(self, name=self.name.replace(" ", "\n"), cells=cells)


@dataclass(frozen=True)
class FittedTable:
    """A table that adapts to the available width without truncating numbers."""

    columns: Sequence[Column]
    title: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self.columns)
        while _total_width(c.min_width for c in columns) > options.max_width and any(c.optional for c in columns):
            columns.remove(next(c for c in reversed(columns) if c.optional))
        widths, columns = _fit_widths(columns, options.max_width)
        if self.title:
            yield WrappedText(Text(self.title, style="bold"))
        yield from console.render(
            _rich_table(columns, widths), options.update(width=max(_total_width(widths), options.max_width))
        )
        dropped = [c.name for c in self.columns[::-1] if c.optional][: len(self.columns) - len(columns)]
        note_on_dropped = f"no room for {', '.join(reversed(dropped))}: widen the terminal" if dropped else ""
        for note in filter(None, (note_on_dropped, self.caption)):
            yield WrappedText(Text(note, style="dim italic"))


def _fit_widths(columns: list[Column], room: int) -> tuple[list[int], list[Column]]:
    """Column widths, and the columns, with numeric cells split at spaces if they do not fit on one line."""
    texts = [c.breaks == "anywhere" or (c.breaks == "at spaces" and not c.right) for c in columns]
    narrow = [c.min_width if text else c.full_width for c, text in zip(columns, texts, strict=True)]
    if _total_width(narrow) > room:
        narrow = [c.min_width for c in columns]
        columns = [c.split() if c.right and c.breaks == "at spaces" else c for c in columns]
    spare = max(0, room - _total_width(narrow))
    widths = []
    for column, width in zip(columns, narrow, strict=True):
        extra = 0 if column.right else min(spare, column.full_width - width)
        widths.append(width + extra)
        spare -= extra
    return widths, columns


def _total_width(widths: Iterable[int]) -> int:
    widths = list(widths)
    return sum(widths) + _GAP * max(0, len(widths) - 1)


def _rich_table(columns: Sequence[Column], widths: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column.name), justify="right" if column.right else "left", width=width, overflow="fold")
    for row in zip(*(c.cells for c in columns), strict=True):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def console_for(stream: object) -> Console:
    """A console as wide as the terminal, or of unlimited width if the stream is not a terminal."""
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    return Console(file=stream, width=None if is_terminal else UNLIMITED, highlight=False)  # pyright: ignore[reportArgumentType]


def printed(pieces: Iterable[RenderableType], stream: object) -> bytes:
    """What a stream shows of pieces one below the other, in its encoding."""
    console = console_for(stream if isinstance(stream, io.TextIOBase) else io.StringIO())
    with console.capture() as capture:
        for piece in pieces:
            console.print(piece, crop=False)
    return capture.get().encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
