"""Frames written one after the other to a CSV or Parquet file, so that no more than one is in memory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from attlas.analysis.csv_cells import without_formulas
from attlas.analysis.output import answer_file, write_whole
from attlas.extract.store import Refusal

Frames = Iterator[pl.DataFrame]


def refuse_other_suffix(path: Path) -> None:
    """Raise Refusal for a file that is neither CSV nor Parquet."""
    if path.suffix not in _CHUNKS:
        raise Refusal(f"--output ends in {' or '.join(_CHUNKS)}, which is its format; got {path}; give it that suffix")


def write_frames(frames: Frames, path: Path) -> None:
    """Write at least one frame, all with the same columns, to a file in the format of its suffix. It appears whole or not at all.

    Raises Refusal if the file can't be written, before the first frame is asked for, and OutputError if writing fails.
    """
    refuse_other_suffix(path)
    with answer_file(path) as stream:
        write_whole(_CHUNKS[path.suffix](frames), stream)


def _csv_chunks(frames: Frames) -> Iterator[bytes]:
    for number, frame in enumerate(frames):
        yield without_formulas(frame).write_csv(include_header=number == 0).encode()


def _parquet_chunks(frames: Frames) -> Iterator[bytes]:
    return parquet_chunks(map(_arrow, frames))


def parquet_chunks(tables: Iterator[pa.Table]) -> Iterator[bytes]:
    """The bytes of a Parquet file with a row group for each table, of which there is at least one."""
    first = next(tables)
    sink = _Pending()
    with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


def _arrow(frame: pl.DataFrame) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())  # older readers have no string views


class _Pending(io.RawIOBase):
    """A file in memory of which what has been written so far can be taken."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, piece: object) -> int:
        content = bytes(memoryview(piece))  # pyright: ignore[reportArgumentType]
        self._pieces.append(content)
        self._size += len(content)
        return len(content)

    def tell(self) -> int:
        return self._size

    def take(self) -> bytes:
        """What has been written since the last time."""
        taken, self._pieces = b"".join(self._pieces), []
        return taken


_CHUNKS: dict[str, Callable[[Frames], Iterator[bytes]]] = {".csv": _csv_chunks, ".parquet": _parquet_chunks}
