"""Columns of the user's own, in a file that is named by its path."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from attlas.analysis.dataset import Dataset
from attlas.analysis.info import describe
from attlas.analysis.query import query
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, open_worker, plan_run
from attlas.extract.tables import TABLES
from attlas.extract.tables.own_files import load_own_file
from tests.extract.models import eager_patterns
from tests.extract.runs import complete_run
from tests.files import read_json, write_json

ROOT = Path(__file__).parents[2]
IMPORT = "from attlas.statistics import column, row_quantity\n"
NEAR = """
@column(table="heads", formula="mass_self + mass_previous", bounds=(0, {high}))
def mass_near(o):
    return o.mean("self") + o.mean("previous")
"""


def example() -> str:
    """The file that README.md shows."""
    (block,) = re.findall(r"```python\n(# mine\.py\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    return block


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def options(tmp_path: Path, model: Path, *statistics: str, **changes) -> RunOptions:
    corpus = tmp_path / "text.txt"
    corpus.write_text("A column of one's own is a function in a file. " * 6)
    values = {"out": tmp_path / "out", "max_length": 24, "shard_sequences": 2, "engine": "reference"}
    return RunOptions(**{"model": str(model), "corpus": str(corpus), "statistics": statistics} | values | changes)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_the_readme_s_file_measures_what_it_says(demo, tmp_path: Path, engine: str) -> None:
    inputs = demo.tokenizer(["whatever a user wants to know", "briefly"], padding=True, return_tensors="pt")
    tables = measure(demo.model, engine=engine, statistics=written(tmp_path, example()), **inputs)
    heads = pl.DataFrame(tables["heads"])
    for layer, pattern in enumerate(eager_patterns(demo.model, **inputs)):
        for sequence, n in enumerate(inputs["attention_mask"].sum(-1).tolist()):
            p = pattern[sequence, :, :n, :n]
            largest = p.sort(-1, descending=True).values
            found = heads.filter(sequence_id=sequence, layer=layer).sort("head")
            np.testing.assert_allclose(found["weight_lead"], (largest[..., 0] - largest[..., 1]).mean(-1), atol=1e-6)
    near = heads["mass_self"] + heads["mass_previous"]
    np.testing.assert_allclose(heads["mass_near"], near, atol=1e-6)
    found = pl.DataFrame(tables["residual"]).filter(layer=1, site="mlp", sequence_id=0)["stream_l1"].item()
    assert found == pytest.approx(norm_input(demo.model, inputs)[0].abs().sum(-1).mean().item(), rel=1e-5)


def norm_input(model, inputs) -> torch.Tensor:
    """The stream after the second MLP, which is what its norm reads."""
    read: list[torch.Tensor] = []
    norm = model.encoder.layer[1].output.LayerNorm
    hook = norm.register_forward_hook(lambda module, given, wrote: read.append(given[0]))
    with torch.inference_mode():
        model(**inputs)
    hook.remove()
    return read[0]


@pytest.fixture(scope="module")
def dataset(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the columns of README's file, which is gone."""
    folder = tmp_path_factory.mktemp("own")
    path = written(folder / "code", example())
    complete_run(options(folder, model, "query_norm", path))
    Path(path).unlink()
    return folder / "out"


def test_a_dataset_is_read_and_verified_without_the_file(dataset: Path) -> None:
    assert verify(dataset) == []
    for table, name in (("heads", "weight_lead"), ("heads", "mass_near"), ("residual", "stream_l1")):
        values = Dataset.open(dataset).scan(table).collect()[name]
        assert values.null_count() == 0 and (values >= 0).all()
        assert query(dataset, f"SELECT max({name}) FROM {table}").num_rows == 1
    shown = dict(dict(describe(Dataset.open(dataset).manifest))["Your own statistics"])
    assert shown["heads.weight_lead"].startswith("mean of the largest p less the second largest, by mine.py sha256:")
    page = Path(str(write_report(dataset))).read_text()
    assert "heads.weight_lead" in page and "mean of the largest p less the second largest" in page


def test_the_manifest_and_the_parquet_metadata_say_where_a_column_comes_from(dataset: Path) -> None:
    manifest = read_json(dataset / "manifest.json")
    (origin,) = manifest["run"]["own_statistics"]
    assert re.fullmatch(r"mine\.py sha256:[0-9a-f]{64}", origin)
    assert [(c["table"], c["name"]) for c in manifest["own_statistics"]] == [
        ("heads", "weight_lead"),
        ("heads", "mass_near"),
        ("residual", "stream_l1"),
    ]
    assert manifest["run"]["statistics"] == [
        "heads.mass_near",
        "heads.query_norm",
        "heads.weight_lead",
        "residual.stream_l1",
    ]
    field = pq.read_schema(dataset / "heads" / "shard-00000.parquet").field("weight_lead")
    assert field.metadata[b"origin"].decode() == origin and field.metadata[b"bounds"] == b"[0, 1]"
    assert origin in (dataset / "README.md").read_text()


def test_a_manifest_that_describes_a_column_otherwise_than_its_parts_is_found(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    manifest = read_json(copy / "manifest.json")
    manifest["own_statistics"][1]["bounds"] = [0, 0.001]
    write_json(copy / "manifest.json", manifest)
    assert {finding.check for finding in verify(copy)} == {"schema"}


@pytest.mark.parametrize(
    "changes", [{"name": "entropy_nats"}, {"name": "a b"}, {"table": "nothing"}, {"bounds": [0]}, {"bounds": [[], 1]}]
)
def test_a_manifest_with_an_impossible_column_is_refused(dataset: Path, tmp_path: Path, changes: dict) -> None:
    manifest = read_json(dataset / "manifest.json")
    manifest["own_statistics"][0] |= changes
    (tmp_path / "forged").mkdir()
    write_json(tmp_path / "forged" / "manifest.json", manifest)
    with pytest.raises(Refusal, match=r"a manifest is as attlas wrote it; .*own_statistics\.0"):
        Dataset.open(tmp_path / "forged")


def heads_column(body: str, *, name: str = "mine", bounds: str = "(None, None)", table: str = "heads") -> str:
    decorator = f'@column(table="{table}", formula="…", bounds={bounds})'
    return f"{IMPORT}{decorator}\ndef {name}(o):\n    {body}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"defines at least one column; mine\.py defines none; decorate"),
        ("import nowhere_to_be_found\n", r"must run; it of mine\.py, line 1: ModuleNotFoundError"),
        ("def f(:\n", r"must run; it of mine\.py, line 1: SyntaxError"),
        (heads_column("return o['entropy']", name="entropy_nats"), r"heads\.entropy_nats .* the name of one of attlas"),
        (heads_column("return o['entropy']", name="layer"), r"heads\.layer .* the name of one of attlas"),
        (heads_column("return o['entropy']", table="profiles"), r"is of heads or residual; mine .* is of 'profiles'"),
        (
            heads_column("return o['entropi']"),
            r"asks for the head quantity 'entropi'; there is none; did you mean entropy",
        ),
        (
            heads_column("return o['entropy'].mean()"),
            r"mine .* must give \[sequence, head\], here \[2, 3\]; it gave \[\]",
        ),
        (heads_column("return 1.0"), r"made of head quantities; mine of mine\.py asks for none"),
        (heads_column("return o.mean('entropy') / nothing"), r"mine of mine\.py, line 4: NameError: .*; fix that line"),
        (heads_column("return o.mean('entropy')", bounds="(0, 'm')"), r"a bound is a number, None, or one of n, .*'m'"),
        (
            heads_column("return o.after.sum(-1)", table="residual"),
            r"must give \[batch\], here \[2\]; it gave \[2, 4\]",
        ),
        (
            f"{IMPORT}@row_quantity(formula='…')\ndef entropy(block):\n    return block.largest\n"
            + heads_column("return o.mean('entropy')"),
            r"the row quantity entropy of mine\.py has the name of one of attlas",
        ),
        (
            f"{IMPORT}@row_quantity(formula='…')\ndef lead(block):\n    return block.pattern\n"
            + heads_column("return o.mean('lead')"),
            r"lead of mine\.py must give \[batch, head, row\], here \[2, 3, 4\]; it gave \[2, 3, 4, 4\]",
        ),
    ],
)
def test_a_file_that_can_t_be_used_is_refused_and_nothing_is_written(
    model: Path, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        plan_run(options(tmp_path, model, written(tmp_path / "code", text)))
    assert not (tmp_path / "out").exists()


def test_a_row_quantity_may_be_of_the_sample_and_need_what_a_call_lacks(model: Path, tmp_path: Path) -> None:
    text = (
        f"{IMPORT}@row_quantity(formula='max p', sampled=True)\ndef top(block):\n    return block.pattern.amax(-1)\n"
        "@row_quantity(formula='1', needs=('sink',))\ndef never(block):\n    return block.measured.float()\n"
        + heads_column("return o.mean('top')").removeprefix(IMPORT)
        + heads_column("return o.mean('never')", name="nothing").removeprefix(IMPORT)
    )
    asked = options(tmp_path, model, written(tmp_path / "code", text), sample=1)
    complete_run(asked)
    heads = pl.read_parquet(tmp_path / "out" / "heads" / "*.parquet")
    in_sample = pl.col("sequence_id") % 2 == 0
    assert heads.filter(~in_sample)["mine"].null_count() == heads.filter(~in_sample).height > 0
    sampled = heads.filter(in_sample)
    np.testing.assert_allclose(sampled["mine"], sampled["max_weight"], atol=1e-6)
    assert heads["nothing"].null_count() == heads.height
    assert verify(tmp_path / "out") == []
    with pytest.raises(Refusal, match=r"needs some of queries, scores, .*; top of mine\.py needs position; correct it"):
        load_own_file(written(tmp_path / "typo", text.replace("sampled=True", "needs=('position',)")), TABLES)


def test_a_missing_file_and_a_column_that_two_files_define_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"are in a Python file; there is none at nowhere/mine\.py; check the path"):
        plan_run(options(tmp_path, model, "nowhere/mine.py"))
    one = written(tmp_path / "one", heads_column("return o['entropy']"))
    two = written(tmp_path / "two", heads_column("return o['collision']"), "other.py")
    with pytest.raises(Refusal, match=r"heads\.mine of other\.py has the name of another in mine\.py"):
        plan_run(options(tmp_path, model, one, two))
    assert set(load_own_file(one, TABLES).columns) == {"heads"}
    plan_run(options(tmp_path, model, one, one))


def test_a_value_beyond_its_bounds_is_refused_with_its_place_when_it_is_made(model: Path, tmp_path: Path) -> None:
    asked = options(tmp_path, model, written(tmp_path / "code", IMPORT + NEAR.format(high=0.01)))
    planned = plan_run(asked)
    place = r"mass_near of mine\.py has \[0, 0\.01\] and is 0\.\d+ at sequence_id 0, stack encoder, layer 0, head \d"
    with pytest.raises(Refusal, match=f"a column keeps its bounds; {place}; correct the function or its bounds"):
        measure_shard(planned.open_worker(), 0)
    assert list((tmp_path / "out").rglob("*.parquet")) == []
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(Refusal, match="a column keeps its bounds"):
        measure(planned.instrument.measured_model.model, statistics=asked.statistics, **inputs)


def test_a_changed_file_is_another_run_and_another_worker(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "code", IMPORT + NEAR.format(high=1))
    asked = options(tmp_path, model, path)
    planned = plan_run(asked)
    measure_shard(open_worker(asked), 0)
    written(tmp_path / "code", IMPORT + NEAR.format(high=2))
    with pytest.raises(Refusal, match=r"was planned otherwise \(own_statistics: there \['mine\.py sha256:"):
        open_worker(asked)
    assert planned.lock is not None
    planned.lock.release()
    with pytest.raises(Refusal, match=r"own_statistics: there \['mine\.py sha256:"):
        plan_run(asked)
    written(tmp_path / "code", IMPORT + NEAR.format(high=1))
    worker = open_worker(asked)
    for shard in plan_run(asked).remaining:
        measure_shard(worker, shard)
    finish(asked.out)
    assert verify(tmp_path / "out") == []


def test_an_exception_on_real_values_names_the_line(model: Path, tmp_path: Path) -> None:
    body = "assert len(o['rows']) != 1, 'one sequence'\n    return o.mean('entropy')"
    path = written(tmp_path, heads_column(body))
    with pytest.raises(Refusal, match=r"mine of mine\.py, line 4: AssertionError: one sequence; fix that line"):
        plan = plan_run(options(tmp_path, model, path, limit=1, max_length=512))
        measure_shard(plan.open_worker(), 0)


@pytest.fixture(autouse=True)
def _forgets_row_quantities() -> Iterator[None]:
    """Row quantities of these files would be known to all tests after them."""
    from attlas.extract.engines.quantities import ROW_QUANTITIES
    from attlas.extract.engines.reference import OF_BLOCKS
    from attlas.extract.tables import own_files

    yield
    for names in (ROW_QUANTITIES, OF_BLOCKS):
        for name in [name for name in names if ":" in name]:
            del names[name]
    own_files._load.cache_clear()
