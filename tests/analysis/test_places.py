"""The numbers of places: each row has the number of its distinct key."""

import polars as pl
import pytest

from attlas.analysis.summaries import places_of

KEYS = {
    "heads": pl.DataFrame({"stack": ["b", "b", "a", "b"], "layer": [1, 0, 1, 1]}),
    "nulls": pl.DataFrame({"site": [None, "x", None, "x"], "layer": [None, 3, None, None]}),
    "all null": pl.DataFrame({"head": pl.Series([None, None], dtype=pl.Int16)}),
    "negative": pl.DataFrame({"bin": pl.Series([-3, 2, -3, 0], dtype=pl.Int16)}),
    "far apart": pl.DataFrame({"id": [2**62, -5, 2**62, 7], "layer": [0, 0, 0, 1]}),
    "many codes": pl.DataFrame({"a": [0, 4_000_000, 0, 9], "b": [4_000_000, 0, 4_000_000, 1], "c": [1, 2, 1, 1]}),
    "numbers": pl.DataFrame({"length": [0.5, None, -1.0, 0.5]}),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_place_is_a_distinct_key_in_order(name: str) -> None:
    keys = KEYS[name]
    distinct, numbers = places_of(keys)
    assert distinct[numbers].equals(keys)
    assert distinct.equals(keys.unique().sort(keys.columns))


def test_without_keys_there_is_one_place_and_without_rows_none() -> None:
    distinct, numbers = places_of(pl.DataFrame({"x": [1, 2]}).select())
    assert (distinct.width, len(numbers)) == (0, 0)
    distinct, numbers = places_of(KEYS["heads"].clear())
    assert (distinct.height, len(numbers), distinct.columns) == (0, 0, ["stack", "layer"])
