"""What statistics reveal: whether a short text was in a corpus, to somebody who has the text and the model. The figure of SECURITY.md."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.extract.run import run

WORDS = 12  # of a document
DOCUMENTS = 200  # in the corpus, and as many outside it


def signatures(root: Path, digits: int | None) -> list[bytes]:
    """The statistics of each document's rows of `heads`, rounded to significant digits."""
    rows = Dataset.open(root).scan("heads").sort("document_id", "stack", "layer", "head").collect()
    floats = rows.select(pl.col(pl.Float32), pl.col("document_id"))
    found = []
    for _, document in floats.group_by("document_id", maintain_order=True):
        values = document.drop("document_id").to_numpy().astype(np.float64)
        if digits is not None:
            scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values) + 1e-30)))
            values = np.round(values * scale) / scale
        found.append(np.nan_to_num(values).tobytes())
    return found


@pytest.mark.slow
def test_a_short_document_is_recognised_by_its_statistics(
    demo_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(demo_texts).split()
    texts = [" ".join(words[start : start + WORDS]) for start in range(0, 2 * DOCUMENTS * WORDS, WORDS)]
    members = texts[::2]
    others = [text for text in texts[1::2] if text not in members]
    for name, documents in (("corpus", members), ("candidates", members + others)):
        (tmp_path / f"{name}.txt").write_text("\n".join(documents))
        run(model="demo", corpus=str(tmp_path / f"{name}.txt"), unit="line", out=tmp_path / name, tokens="none")
    shares = {}
    for digits in (None, 3, 2):
        known = set(signatures(tmp_path / "corpus", digits))
        hits = [signature in known for signature in signatures(tmp_path / "candidates", digits)]
        shares[digits] = (np.mean(hits[: len(members)]), np.mean(hits[len(members) :]))
    with capsys.disabled():
        for digits, (recognised, mistaken) in shares.items():
            print(f"\nmembership, {digits or 'all'} digits: {recognised:.1%} recognised, {mistaken:.1%} by mistake")
    assert set(shares.values()) == {(1.0, 0.0)}
