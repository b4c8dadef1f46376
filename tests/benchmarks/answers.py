"""answers/*: analyses of a large dataset, against a bare scan of the same columns by Polars.

Ratios are of seconds, so less is better. The dataset is generated once, into the folder ATTLAS_BENCH (a temporary one by default).
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import polars as pl

from attlas.analysis.compare import compare
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_estimates
from attlas.analysis.inference import estimates
from attlas.analysis.report import report
from attlas.analysis.summaries import averaged_columns, summarize_rows
from tests.benchmarks.harness import Result, time_alternately
from tests.benchmarks.large import HEADS, LAYERS, write_large
from tests.benchmarks.memory import MIB, peak_growth


@cache
def _dataset(rows: int) -> Path:
    folder = Path(os.environ.get("ATTLAS_BENCH") or tempfile.mkdtemp(prefix="attlas-bench-"))
    return write_large(folder / f"heads-{rows}", rows)


def bare_scan(dataset: Dataset, *, keep: pl.Expr | None = None) -> pl.DataFrame:
    """The unweighted mean of every column by head, as a Polars user without attlas writes it."""
    rows = pl.scan_parquet([dataset.storage.source(p.path, p.bytes) for p in dataset.parts("heads")])  # pyright: ignore[reportArgumentType]
    means = pl.col(averaged_columns(dataset, "heads")).mean()
    return (rows if keep is None else rows.filter(keep)).group_by(HEAD).agg(means).collect(engine="streaming")


def means(rows: int, repeats: int) -> Result:
    """Means and intervals of all heads and columns, from summaries."""
    return _timed(rows, lambda dataset: head_estimates(dataset), repeats)


def means_of_source(rows: int, repeats: int) -> Result:
    """The same of the documents of one source, which summaries can't answer: from the rows."""
    return _timed(rows, _estimates_of_source, repeats)


def _estimates_of_source(dataset: Dataset) -> pl.DataFrame:
    documents = (
        dataset.scan("documents").filter(pl.col("source").str.starts_with("a.")).select("document_id").collect().lazy()
    )
    sums = summarize_rows(
        dataset,
        "heads",
        averaged_columns(dataset, "heads"),
        HEAD,
        prepare=lambda r: r.join(documents, on="document_id", how="semi"),
    )
    return estimates(sums, HEAD).collect()


def paired_comparison(rows: int, repeats: int) -> Result:
    """A paired comparison of all heads and columns, against two bare scans."""
    return _timed(rows, lambda dataset: compare(dataset, dataset), repeats, scans=2)


def report_page(rows: int, repeats: int) -> Result:
    """The report: all its analyses, and the page."""
    return _timed(rows, lambda dataset: report(dataset.storage.place()).html, repeats)


def _timed(rows: int, ours: Callable[[Dataset], object], repeats: int, *, scans: int = 1) -> Result:
    dataset = Dataset.open(_dataset(rows))
    peak = peak_growth(lambda: ours(dataset)) / MIB
    seconds = time_alternately(
        lambda: ours(dataset), lambda: [bare_scan(dataset) for _ in range(scans)], repeats=repeats
    )
    paired = tuple(a / b for a, b in zip(seconds.ours, seconds.theirs, strict=True))
    return Result(min(seconds.ours), min(seconds.theirs), "s", paired, note=f"{peak:,.0f} MiB")


def one_head_bytes(sequences: int) -> Result:
    """Bytes of a part that a filter on one head reads, footer included, against the whole part."""
    import pyarrow.dataset as arrow
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        root = write_large(Path(folder) / "large", LAYERS * HEADS * sequences, sequences=sequences)
        path = root / "heads" / "shard-00000.parquet"
        with _CountingFile(path) as file:
            fragment = arrow.ParquetFileFormat().make_fragment(file)
            rows = arrow.FileSystemDataset([fragment], pq.read_schema(path), fragment.format)
            found = rows.to_table(filter=(arrow.field("layer") == 3) & (arrow.field("head") == 5))
            assert found.num_rows == sequences
            return Result(file.bytes_read / 1024, path.stat().st_size / 1024, "KiB")


class _CountingFile(io.FileIO):
    """A file that counts what is read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.bytes_read += len(content)
        return content
