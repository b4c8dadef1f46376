"""What attlas finds in a real causal language model: sinks, massive activations, and the heads of its induction circuit."""

from pathlib import Path

import polars as pl
import pytest

from attlas.analysis.verify import verify
from attlas.extract.options import RunOptions
from tests.extract.runs import complete_run
from tests.smollm import build

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens, twice in a row, and the ablations of one sequence."""
    folder = tmp_path_factory.mktemp("smollm")
    options = {
        "model": str(build(folder / "model")),
        "corpus": "random-repeats",
        "blocks": 4,
        "length": 32,
        "sample": 1,
    }
    complete_run(RunOptions(out=folder / "out", statistics="ablations,max_abs_token,value_ratio_first", **options))
    return folder / "out"


def means(dataset: Path, *names: str) -> pl.DataFrame:
    heads = pl.read_parquet(dataset / "heads" / "*.parquet")
    return heads.group_by("layer", "head").agg(pl.col(*names).mean())


def test_the_dataset_is_verified(dataset: Path):
    assert verify(dataset) == []


def test_from_the_middle_on_most_heads_rest_on_the_first_token(dataset: Path):
    heads = means(dataset, "mass_first", "value_ratio_first")
    sinks = heads.filter(pl.col("mass_first") > 0.3)
    assert sinks.filter(pl.col("layer") < 2).is_empty()
    assert sinks.filter(pl.col("layer") >= 12).height > 0.7 * 18 * 9
    # and most of them write little there
    assert sinks["value_ratio_first"].median() < 0.5


def test_one_token_has_massive_activations_and_it_is_the_first(dataset: Path):
    stream = pl.read_parquet(dataset / "residual" / "*.parquet").filter(site="mlp")
    before, after = stream.filter(pl.col("layer") < 10), stream.filter(pl.col("layer").is_between(11, 28))
    assert before["max_abs"].max() < 1_000 and after["max_abs"].min() > 5_000
    assert (after["max_abs_token"] == 0).all()


def test_previous_token_and_induction_heads_stand_out(dataset: Path):
    heads = means(dataset, "mass_previous", "mass_induction")
    previous, induction = (heads.sort(name, descending=True) for name in ("mass_previous", "mass_induction"))
    assert previous["mass_previous"][0] > 0.8
    # half of the rows have an earlier copy, so that half is the most
    assert induction["mass_induction"][0] > 0.4
    assert heads["mass_induction"].median() < 0.02


def test_repetition_is_worth_less_without_the_circuit_of_induction(dataset: Path):
    """The strongest previous-token head, and above it the strongest induction head, are among those that most is lost without."""
    heads = means(dataset, "mass_previous", "mass_induction")
    ablated = pl.read_parquet(dataset / "ablations" / "*.parquet").filter(part="head").join(heads, on=("layer", "head"))
    by_loss = ablated.sort("repeat_gain_change_nats", descending=True)
    (previous,) = heads.top_k(1, by="mass_previous").select("layer", "head").rows()
    (induction,) = heads.top_k(1, by="mass_induction").select("layer", "head").rows()
    assert induction[0] > previous[0]
    ranks = {(layer, head): rank for rank, (layer, head) in enumerate(by_loss.select("layer", "head").rows())}
    assert ranks[previous] < 5
    assert ranks[induction] < 0.05 * len(ranks)
    above = by_loss.filter(pl.col("layer") > previous[0])
    assert above.height > 100 and induction in above.select("layer", "head").head(3).rows()
