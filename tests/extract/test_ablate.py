"""`--ablate`: which parts are left out, and parts set to their mean against hooks of our own."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from torch import nn

from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.capture.runtime import ablation as ablations
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.measurement import layout_of
from attlas.extract.options import RunOptions, check_options
from attlas.extract.run import finish, measure_shard, open_worker, plan_run
from attlas.extract.store import Store
from attlas.extract.tables.ablations import ablate_option
from tests.extract.models import tiny
from tests.extract.runs import complete_run, contents
from tests.extract.test_ablations import PLACES, change, grouped_language_model, ids_of, rows_of
from tests.extract.test_workers import WORKER

Replace = Callable[[torch.Tensor], None]


def mean_of(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten(0, -2) for v in vectors]).double().mean(0).float()


class Places:
    """What goes into the output projections of a model and comes out of its sublayers, with hooks of torch alone."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self.model = model
        self.attention, self.mlp = PLACES[family]

    def run(self, inputs: dict, *, layer: int, part: str, edit: Replace) -> Any:
        """A pass in which a part's vectors are given to a function that may change them."""
        module = self.model.get_submodule((self.mlp if part == "mlp" else self.attention).format(layer))

        def before(_module: nn.Module, args: Any) -> Any:
            contexts = args[0].clone()
            edit(contexts)
            return (contexts,)

        def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            edit(changed)
            return changed

        with ExitStack() as stack, torch.inference_mode():
            register = module.register_forward_pre_hook if part == "head" else module.register_forward_hook
            stack.callback(register(before if part == "head" else after).remove)
            return self.model(**inputs)

    def mean(self, sequences: list[dict], *, layer: int, part: str) -> torch.Tensor:
        shown: list[torch.Tensor] = []
        for inputs in sequences:
            self.run(inputs, layer=layer, part=part, edit=lambda vectors: shown.append(vectors.clone()))
        return mean_of(shown)

    def ablated(self, inputs: dict, mean: torch.Tensor, *, layer: int, part: str, head: int, heads: int = 4) -> Any:
        """The pass in which a part is its mean at every token."""
        width = len(mean) // heads
        span = slice(head * width, (head + 1) * width) if part == "head" else slice(None)

        def edit(vectors: torch.Tensor) -> None:
            vectors[..., span] = mean[span]

        return self.run(inputs, layer=layer, part=part, edit=edit)


def parts_of(layers: int) -> list[tuple[int, str, int]]:
    return [
        (layer, part, head)
        for layer in range(layers)
        for part, heads in (("head", range(4)), ("attention", (-1,)), ("mlp", (-1,)))
        for head in heads
    ]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_part_at_its_mean_is_what_hooks_that_set_it_give(family):
    model = tiny(family)
    ids, mask = ids_of(), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    rows = rows_of(measure(model, ablate="mean", input_ids=ids, attention_mask=mask))
    places, sequences = Places(model, family), [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}]
    assert len(rows) == 2 * len(parts_of(3))
    for layer, part, head in parts_of(3):
        mean = places.mean(sequences, layer=layer, part=part)
        for number, inputs in enumerate(sequences):
            with torch.inference_mode():
                plain = model(**inputs).last_hidden_state
            ablated = places.ablated(inputs, mean, layer=layer, part=part, head=head).last_hidden_state
            row = rows[number, layer, part, head]
            found = (row["final_change"], row["final_norm_change"])
            assert found == pytest.approx(change(plain, ablated), abs=1e-5), (layer, part, head)


def test_the_loss_of_a_model_of_grouped_heads_changes_as_with_hooks():
    model, ids = grouped_language_model(), ids_of()
    rows = rows_of(measure(model, ablate="heads,mean", input_ids=ids))
    places = Places(model.model, "llama")
    sequences = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]

    def loss(states: torch.Tensor, of: torch.Tensor) -> float:
        logits = model.lm_head(states)
        return float(nn.functional.cross_entropy(logits[0, :-1].double(), of[0, 1:]))

    with torch.inference_mode():
        for layer in range(2):
            mean = places.mean(sequences, layer=layer, part="head")
            for head in range(4):
                for number, inputs in enumerate(sequences):
                    plain = model.model(**inputs).last_hidden_state
                    ablated = places.ablated(inputs, mean, layer=layer, part="head", head=head).last_hidden_state
                    expected = loss(ablated, inputs["input_ids"]) - loss(plain, inputs["input_ids"])
                    row = rows[number, layer, "head", head]
                    assert row["loss_change_nats"] == pytest.approx(expected, abs=1e-5)
                    assert row["final_change"] == pytest.approx(change(plain, ablated)[0], abs=1e-5)


def test_a_head_that_gives_the_same_to_every_token_loses_nothing_at_its_mean():
    """Its values are a bias alone, so that its contexts are equal at all tokens."""
    model, ids = tiny("bert"), ids_of()
    value = model.encoder.layer[1].attention.self.value
    with torch.no_grad():
        value.weight[8:16] = 0
        value.bias[8:16] = torch.linspace(-2, 2, 8)
    changes = {
        how: rows_of(measure(model, tables=(), ablate=f"heads,{how}", input_ids=ids))[0, 1, "head", 1]["final_change"]
        for how in ("zero", "mean")
    }
    assert changes["mean"] == pytest.approx(0, abs=1e-9)
    assert changes["zero"] > 1e-3


@pytest.mark.parametrize(
    ("ablate", "parts"),
    [
        ("heads", {"head"}),
        ("attention,mlp", {"attention", "mlp"}),
        (["mlp", "mean"], {"mlp"}),
        ("zero", {"head", "attention", "mlp"}),
    ],
)
def test_only_the_parts_that_are_named_are_left_out(ablate, parts):
    rows = rows_of(measure(tiny("bert"), tables=(), ablate=ablate, input_ids=ids_of()))
    assert {part for _, _, part, _ in rows} == parts


def test_parts_that_are_not_named_cost_no_passes(monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny("bert"), ids_of(batch=1)
    monkeypatch.setattr(ablations, "_TOKENS", 1)  # a pass for each part
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    measure(model, tables=(), ablate="heads", input_ids=ids)  # examines the model
    model.register_forward_hook(count)
    measure(model, tables=(), ablate="heads", input_ids=ids)
    passes = 0
    measure(model, tables=(), ablate="heads", input_ids=ids)
    # the measured pass, the plain one, and one for each head
    assert passes == 1 + 1 + 3 * 4
    passes = 0
    measure(model, tables=(), ablate="heads,mean", input_ids=ids)
    assert passes == 1 + 1 + 1 + 3 * 4


def test_zero_is_what_ablations_are_without_the_option():
    model, ids = tiny("llama"), ids_of()
    plain = measure(model, tables=("ablations",), input_ids=ids)["ablations"]
    assert measure(model, tables=(), ablate="zero", input_ids=ids)["ablations"].equals(plain)
    assert measure(model, ablate="heads,zero,attention,mlp", input_ids=ids)["ablations"].equals(plain)
    assert "ablations" not in measure(model, input_ids=ids)


WINDOWED = {"swin": transformers.SwinConfig, "swinv2": transformers.Swinv2Config}


def windowed(family: str, window: int) -> nn.Module:
    torch.manual_seed(0)
    config = WINDOWED[family](
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=window
    )
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("family", WINDOWED)
def test_heads_over_windows_are_left_out_of_all_windows_of_their_sequence(family, how):
    model = windowed(family, 4)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = rows_of(measure(model, tables=(), ablate=f"heads,{how}", pixel_values=pixels))
    assert len(rows) == 2 * (2 * 2 + 2 * 4)
    projection = layout_of(model, {"pixel_values": pixels}).attentions[3].projection
    assert projection is not None
    dense = model.get_submodule(projection)
    shown: list[torch.Tensor] = []
    with ExitStack() as stack, torch.inference_mode():
        stack.callback(dense.register_forward_pre_hook(lambda _m, args: shown.append(args[0])).remove)
        plain = model(pixels).last_hidden_state
    mean = mean_of(shown) if how == "mean" else torch.zeros(32)

    def edit(_module: nn.Module, args: Any) -> Any:
        contexts = args[0].clone()
        contexts[..., 8:16] = mean[8:16]
        return (contexts,)

    with ExitStack() as stack, torch.inference_mode():
        stack.callback(dense.register_forward_pre_hook(edit).remove)
        ablated = model(pixels).last_hidden_state
    for image in range(2):
        expected = change(plain[image], ablated[image])[0]
        assert rows[image, 3, "head", 1]["final_change"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_heads_over_padded_windows_have_no_mean():
    pixels = torch.randn(1, 3, 32, 32)
    rows = rows_of(measure(windowed("swin", 5), tables=(), ablate="mean", pixel_values=pixels))
    assert {part for _, _, part, _ in rows} == {"attention", "mlp"}


# --- refused


@pytest.mark.parametrize(
    ("ablate", "message"),
    [
        ("head", "ablate takes heads, attention, mlp, zero, mean, separated by commas; got 'head'; did you mean heads"),
        ("mlp,meen", "got 'meen'; did you mean mean"),
        ("1", "got '1'; use one or several of these"),
        ("zero,heads,mean", "ablate has both; leave one out, or make two runs"),
        ("", "got ''"),
    ],
)
def test_other_words_are_refused(ablate, message):
    with pytest.raises(Refusal, match=message):
        ablate_option(ablate)
    with pytest.raises(Refusal, match=message):
        measure(tiny("bert"), ablate=ablate, input_ids=ids_of())
    with pytest.raises(Refusal, match=message):
        check_options(RunOptions(model="demo", corpus="demo", out="/nowhere", ablate=ablate))


# --- runs


@pytest.fixture
def options(model: Path, tmp_path: Path) -> RunOptions:
    corpus = tmp_path / "text.txt"
    text = "what a part gives on average is no loss if it is all that it gives"
    corpus.write_text("\n".join(text[: 7 * n + 9] for n in range(8)))
    return RunOptions(
        model=str(model), corpus=str(corpus), out=tmp_path / "out", max_length=12, unit="line", shard_sequences=3, sample=2,
        engine="reference", ablate="mean", tokens="ids",
    )  # fmt: skip


def test_a_run_takes_the_mean_over_the_sample_of_all_shards(options: RunOptions, model: Path):
    complete_run(replace(options, batch_tokens=64))
    out = Path(str(options.out))
    rows = pl.read_parquet(out / "ablations" / "*.parquet")
    sampled = pl.read_parquet(out / "sequences" / "*.parquet").filter(pl.col("sequence_id") % 3 < 2)
    assert set(rows["sequence_id"]) == set(sampled["sequence_id"]) and sampled["shard"].n_unique() > 2
    bert = transformers.AutoModel.from_pretrained(model).eval()
    ids = {r["sequence_id"]: {"input_ids": torch.tensor([r["token_ids"]])} for r in sampled.to_dicts()}
    places, last = Places(bert, "bert"), max(ids)
    assert ids[last]["input_ids"].shape != ids[0]["input_ids"].shape
    for layer, part, head in ((0, "head", 3), (2, "head", 0), (1, "attention", -1), (1, "mlp", -1)):
        mean = places.mean([*ids.values()], layer=layer, part=part)
        for sequence in (0, last):
            with torch.inference_mode():
                plain = bert(**ids[sequence]).last_hidden_state
            ablated = places.ablated(ids[sequence], mean, layer=layer, part=part, head=head).last_hidden_state
            found = rows.filter(sequence_id=sequence, layer=layer, part=part, head=head)["final_change"].item()
            assert found == pytest.approx(change(plain, ablated)[0], abs=1e-5)
    manifest = Store.at(options.out).manifest
    assert manifest is not None and manifest["run"]["ablate"] == "mean"
    assert not (out / "_work").exists()
    assert verify(out) == []


def test_workers_in_any_order_write_the_same_means_and_bytes(options: RunOptions, tmp_path: Path):
    complete_run(replace(options, out=tmp_path / "alone"))
    planned = plan_run(options)
    shards = planned.remaining
    Path(options.corpus).unlink()  # a worker does not read it
    with subprocess.Popen([sys.executable, "-c", WORKER, *map(str, shards[1::2])], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        pickle.dump(options, process.stdin)
        process.stdin.close()
        for shard in reversed(shards[::2]):
            measure_shard(planned.open_worker(), shard)
    assert process.returncode == 0
    finish(options.out)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


KILLED = """
import os, pickle, sys
from attlas.extract.run import plan_run
plan_run(pickle.load(sys.stdin.buffer))
os._exit(9)
"""


def test_a_driver_killed_after_the_means_goes_on_with_them(
    options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    complete_run(replace(options, out=tmp_path / "alone"))
    killed = subprocess.run([sys.executable, "-c", KILLED], input=pickle.dumps(options), check=False)
    assert killed.returncode == 9
    assert {"means.json", "means.arrow"} <= {file.name for file in (tmp_path / "out" / "_work").iterdir()}
    stages: list[str] = []
    planned = plan_run(options, progress=lambda stage, _done, _total: stages.append(stage))
    assert "plan" in stages and "means" not in stages
    for shard in planned.remaining:
        measure_shard(planned.open_worker(), shard)
    finish(options.out)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("name", ["means.json", "means.arrow"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_means_are_refused_by_workers_and_made_again_by_the_driver(
    options: RunOptions, tmp_path: Path, name: str, damage: str
):
    planned = plan_run(options)
    instrument = planned.instrument
    measure_shard(planned.open_worker(), 0)
    file = tmp_path / "out" / "_work" / name
    before = file.read_bytes()
    file.write_bytes(before[:-9]) if damage == "cut" else file.unlink()
    with pytest.raises(Damaged, match=r"means\.json is missing or not as it was written; the same command makes it"):
        open_worker(options, instrument=instrument)
    del planned
    stages: list[tuple[str, int, int | None]] = []
    again = plan_run(options, instrument=instrument, progress=lambda *stage: stages.append(stage))
    assert file.read_bytes() == before
    sampled = [stage for stage in stages if stage[0] == "means"]
    assert sampled[0][1] == 0 and sampled[-1][1] == sampled[-1][2] == len(sampled) - 1
    assert 0 not in again.remaining  # measured with the same means


def test_shards_measured_with_other_means_are_measured_again(options: RunOptions, tmp_path: Path):
    planned = plan_run(options)
    instrument = planned.instrument
    measure_shard(planned.open_worker(), 0)
    del planned
    again = plan_run(options, instrument=instrument)
    assert 0 not in again.remaining
    # as if a plan of another corpus had been made meanwhile, which has the same first shard
    record = Store.at(options.out).read_record(0)
    assert record is not None
    Store.at(options.out).write_record(replace(record, spool=again.plan.spools[0] if again.plan else ""))
    del again
    assert 0 in plan_run(options, instrument=instrument).remaining


def test_a_worker_that_would_ablate_otherwise_is_refused(options: RunOptions):
    planned = plan_run(options)
    with pytest.raises(Refusal, match="ablate: there 'mean', asked 'heads,mean'"):
        open_worker(replace(options, ablate="mean,heads"), instrument=planned.instrument)


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ({"ablate": None}, None),
        ({"ablate": None, "statistics": "ablations"}, None),
        ({"ablate": "zero"}, None),
        ({"ablate": ("mlp", "attention", "heads")}, None),
        ({"ablate": "mlp,heads"}, "heads,mlp"),
        ({"ablate": "heads , mean"}, "heads,mean"),
    ],
)
def test_the_option_is_part_of_a_run_only_where_it_changes_it(options: RunOptions, asked: dict, recorded: str | None):
    planned = plan_run(replace(options, **asked))
    recipe = planned.identity.recipe
    assert recipe.get("ablate") == recorded and ("ablate" in recipe) == (recorded is not None)
    is_measured = asked != {"ablate": None}
    assert ("ablations" in recipe["statistics"]) == is_measured
    assert ("ablations" in planned.instrument.columns) == is_measured
    has_means = recorded is not None and "mean" in recorded
    assert (Path(str(options.out)) / "_work" / "means.json").exists() == has_means
