"""Every `heads` column and profile against the float64 oracle, on the patterns of the model's own eager attention."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from attlas.extract import measure
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.quantities import ROW_QUANTITIES, TOKEN_CLASSES, known_quantities
from attlas.extract.engines.reference import rows_of
from attlas.extract.engines.rows import AttentionCall
from attlas.extract.engines.sums import head_sums
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from attlas.extract.measurement import layout_of
from attlas.extract.model.token_classes import token_classes
from attlas.extract.tables import TABLES, needs_of
from attlas.extract.tables.heads import HeadQuantities
from tests import oracles
from tests.extract.models import eager_patterns, tiny
from tests.patterns import CLOSED_FORMS, PATTERNS

HEADS = TABLES["heads"]

# the catalogue's tolerance for float32 models
ABSOLUTE, RELATIVE = 1e-5, 1e-4


def assert_columns(got: dict, expected: dict, where: str) -> None:
    for name, value in expected.items():
        if name == "received_max_key" and value is not None and got[name] != value:
            continue  # ties in float64 may be broken otherwise in float32; received_max itself is compared
        if value is None:
            assert got[name] is None, f"{where} {name}: {got[name]} is not null"
        else:
            assert got[name] == pytest.approx(value, abs=ABSOLUTE, rel=RELATIVE), f"{where} {name}"


def real_batch(demo, texts, *, side: str = "right"):
    demo.tokenizer.padding_side = side
    try:
        return demo.tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
    finally:
        demo.tokenizer.padding_side = "right"


@pytest.fixture(scope="module")
def observed(demo, demo_texts):
    """Queries, keys and values of every layer of the demo model on real sequences, and the measured tables."""
    texts = [demo_texts[0][:500], demo_texts[30][:220], "Hi!"]
    inputs = real_batch(demo, texts)
    seen: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}

    def keep(name):
        return lambda module, read, wrote: seen[name].append(wrote.double())

    handles = [
        module.register_forward_hook(keep(name.rsplit(".", 1)[-1]))
        for name, module in demo.model.named_modules()
        if name.endswith(("self.query", "self.key", "self.value"))
    ]
    patterns = eager_patterns(demo.model, **inputs)
    for handle in handles:
        handle.remove()
    tables = measure(demo.model, tokenizer=demo.tokenizer, statistics="all,pattern_effective_rank", **inputs)
    return inputs, patterns, seen, tables


def test_every_column_equals_the_oracle_on_the_eager_patterns_of_real_sequences(demo, observed):
    inputs, patterns, seen, tables = observed
    got = {(r["sequence_id"], r["layer"], r["head"]): r for r in tables["heads"].to_pylist()}
    classes = token_classes(demo.tokenizer)
    compared = 0
    for layer, pattern in enumerate(patterns):
        w_o = demo.model.encoder.layer[layer].attention.output.dense.weight.double().numpy().T
        for sequence in range(pattern.shape[0]):
            n = int(inputs["attention_mask"][sequence].sum())
            ids = inputs["input_ids"][sequence, :n].numpy()
            for head in range(pattern.shape[1]):
                span = slice(head * 32, head * 32 + 32)
                q, k, v = (seen[name][layer][sequence, :n, span].numpy() for name in ("query", "key", "value"))
                p = pattern[sequence, head, :n, :n].numpy()
                expected = oracles.head_columns(
                    p / p.sum(-1, keepdims=True),
                    q @ k.T / math.sqrt(32),
                    q=q,
                    k=k,
                    v=v,
                    w_o=w_o[span],
                    tokens=ids,
                    classes=[TOKEN_CLASSES[c] for c in classes[ids]],
                ) | oracles.sample_columns(p / p.sum(-1, keepdims=True), v=v, w_o=w_o[span])
                expected["mass_massive"] = 0  # of this model; see test_mass_on_massive_keys…
                assert set(expected) == {c.name for c in HEADS.facts if not c.corpus}
                assert_columns(got[sequence, layer, head], expected, f"sequence {sequence} L{layer}H{head}")
                compared += 1
    assert compared == 3 * 6 * 12


def test_every_profile_equals_the_oracle(observed):
    inputs, patterns, _, tables = observed
    lengths = inputs["attention_mask"].sum(-1).tolist()
    got = pl.DataFrame(tables["profiles"])
    of = {
        "offset": oracles.offset_profile,
        "entropy": oracles.entropy_histogram,
        "max_weight": oracles.max_weight_histogram,
        "entropy_by_position": oracles.entropy_by_position,
        "distance_by_position": oracles.distance_by_position,
        "received_by_position": oracles.received_by_position,
    }
    assert {*of, "class_flow"} == set(got["profile"].cast(pl.String).unique())
    for layer in (0, 5):
        for head in (0, 7):
            for name, profile in of.items():
                expected: dict[int, tuple[float, float]] = {}
                for n, pattern in zip(lengths, patterns[layer][:, head], strict=True):
                    p = pattern[:n, :n].numpy()
                    for b, (total, count) in profile(p / p.sum(-1, keepdims=True)).items():
                        before = expected.get(b, (0.0, 0))
                        expected[b] = (before[0] + total, before[1] + count)
                found = got.filter(
                    (pl.col("layer") == layer) & (pl.col("head") == head) & (pl.col("profile").cast(pl.String) == name)
                )
                assert set(found["bin"]) == set(expected), name
                for b, total, count in found.select("bin", "sum", "count").rows():
                    tolerance = (
                        1.0 if name in ("entropy", "max_weight") else 1e-4
                    )  # a row on an edge may fall either side
                    assert total == pytest.approx(expected[b][0], abs=tolerance, rel=1e-4), (name, b)
                    assert count == pytest.approx(expected[b][1], abs=tolerance if tolerance == 1.0 else 0), (name, b)


def test_class_flow_equals_the_oracle_and_comes_to_the_masses_of_its_classes(demo, observed):
    inputs, patterns, _, tables = observed
    of_ids = token_classes(demo.tokenizer)
    flow = pl.DataFrame(tables["profiles"]).filter(pl.col("profile").cast(pl.String) == "class_flow")
    expected: dict[tuple[str, str], list[float]] = {}
    for sequence, n in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        classes = [TOKEN_CLASSES[c] for c in of_ids[inputs["input_ids"][sequence, :n].numpy()]]
        for pair, (total, count) in oracles.class_flow(patterns[3][sequence, 5, :n, :n].numpy(), classes).items():
            held = expected.setdefault(pair, [0.0, 0])
            held[0], held[1] = held[0] + total, held[1] + count
    found = {
        (TOKEN_CLASSES[r["bin"] // 8], TOKEN_CLASSES[r["bin"] % 8]): (r["sum"], r["count"])
        for r in flow.filter(layer=3, head=5).to_dicts()
    }
    assert found.keys() == expected.keys()
    for pair, (total, count) in expected.items():
        assert found[pair] == (pytest.approx(total, rel=1e-4, abs=1e-4), count), pair
    heads = pl.DataFrame(tables["heads"])
    by_key = flow.group_by("layer", "head", number=pl.col("bin") % 8).agg(pl.col("sum").sum())
    for number, name in enumerate(TOKEN_CLASSES):
        masses = heads.group_by("layer", "head").agg(mass=(pl.col(f"mass_{name}") * pl.col("query_rows")).sum())
        joined = by_key.filter(number=number).join(masses, on=("layer", "head"))
        np.testing.assert_allclose(joined["sum"], joined["mass"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "albert", "electra", "gpt2", "llama", "mistral", "qwen2"]
)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_pattern_columns_equal_the_oracle_in_every_family(family, padding):
    model = tiny(family)
    torch.manual_seed(1)
    ids = torch.randint(2, 60, (3, 14))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 9:] = mask[2, 1:] = 0
    if padding == "left":
        mask[1, :5] = mask[2, :13] = 0
    patterns = eager_patterns(model, input_ids=ids, attention_mask=mask)
    tables = measure(model, statistics="all,pattern_effective_rank", input_ids=ids, attention_mask=mask)
    got = {(r["sequence_id"], r["layer"], r["head"]): r for r in tables["heads"].to_pylist()}
    assert len(got) == 3 * len(patterns) * 4
    for (sequence, layer, head), row in got.items():
        real = mask[sequence].bool()
        p = patterns[layer][sequence, head][real][:, real].numpy()
        n = len(p)
        visible = np.tril(np.ones((n, n), bool)) if row["stack"] == "decoder" else np.ones((n, n), bool)
        if family == "mistral":
            visible &= np.triu(np.ones((n, n), bool), -5)
        expected = oracles.head_columns(
            p / p.sum(-1, keepdims=True), visible=visible, tokens=ids[sequence][real].numpy()
        ) | oracles.sample_columns(p / p.sum(-1, keepdims=True), visible=visible)
        known = {k: v for k, v in expected.items() if not k.startswith("score_") and k in row and _from_pattern(k)}
        assert_columns(row, known, f"{family} {padding} sequence {sequence} L{layer}H{head}")


def _from_pattern(name: str) -> bool:
    return (
        not name.endswith("_norm")
        and not name.startswith("norm_")
        and name not in ("value_weighted_first", "value_ratio_first")
    )


@pytest.mark.parametrize("letter", "UCIPF")
@pytest.mark.parametrize("n", [2, 3, 7, 32])
def test_known_patterns_give_their_closed_forms(letter, n):
    columns = columns_of_pattern(*PATTERNS[letter](n))
    checked = 0
    for name, closed in CLOSED_FORMS.items():
        if letter not in closed or name not in columns:
            continue
        expected, got = closed[letter](n), columns[name]
        if expected is None or (isinstance(expected, float) and math.isnan(expected)):
            assert math.isnan(got), name
        else:
            assert got == pytest.approx(expected, abs=1e-6, rel=1e-6), name
        checked += 1
    assert checked >= 12


def columns_of_pattern(pattern: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """The columns of a pattern whose rows are even: scores are 0 where it has mass, and −10⁴ where it has none, so that softmax
    gives it back (the mask hides nothing else).
    """
    n = len(pattern)
    scores = torch.where(torch.tensor(pattern) > 0, 0.0, -1e4)[None, None].float()
    zeros = torch.zeros(1, dtype=torch.int64)
    mask = torch.where(torch.tensor(visible), scores, torch.finfo(torch.float32).min)
    seen = visibility_from_mask(mask, causal=False, queries=Axis(zeros, zeros + n, n))
    flat = torch.zeros(1, 1, n, 4)
    call = AttentionCall(flat, flat, flat, seen, 1.0)
    rows = rows_of(call, flat, known_quantities(ROW_QUANTITIES, call.facts))
    names = needs_of({"heads": HEADS.facts}).head_names
    observed = head_sums(HeadObservation(rows, seen), names, profiles=False)
    quantities = HeadQuantities(names, observed.values.numpy())
    return {c.name: float(c.compute(quantities).item()) for c in HEADS.facts if c.compute is not None}


def test_a_single_token_has_no_normalised_entropy_and_no_distance_ratio(demo):
    ids = torch.tensor([[2023]])
    (row, *_) = measure(demo.model, input_ids=ids)["heads"].to_pylist()
    undefined = {"entropy_normalized", "distance_vs_uniform", "distance_patches", "mass_patches", "mass_sink"}
    assert {name for name, value in row.items() if value is None} == undefined
    assert row["mass_self"] == row["max_weight"] == row["attended_keys"] == 1 and row["entropy_nats"] == 0


def test_a_sequence_measures_the_same_alone_in_a_batch_and_under_either_padding(demo, demo_texts):
    texts = [t[:300] for t in demo_texts[:4]]
    together = measure(demo.model, tokenizer=demo.tokenizer, **real_batch(demo, texts))
    padded = real_batch(demo, [*texts, demo_texts[5][:600]], side="left")
    # absolute positions are an input of the model: without these, left padding is another computation
    position_ids = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    left = measure(demo.model, tokenizer=demo.tokenizer, **padded, position_ids=position_ids)
    for n, text in enumerate(texts):
        alone = measure(demo.model, tokenizer=demo.tokenizer, **real_batch(demo, [text]))
        for table in ("heads", "residual"):
            for other in (together, left):
                of_sequence = pl.DataFrame(other[table]).filter(pl.col("sequence_id") == n)
                assert_frames_agree(pl.DataFrame(alone[table]), of_sequence)


def assert_frames_agree(a: pl.DataFrame, b: pl.DataFrame) -> None:
    assert a.height == b.height
    for name in a.columns:
        x, y = a[name], b[name]
        if x.dtype != pl.Float32:
            if name not in ("sequence_id", "received_max_key", "outlier_dim"):
                assert x.equals(y, check_dtypes=False) or (x.cast(pl.String) == y.cast(pl.String)).all(), name
            continue
        assert (x.is_null() == y.is_null()).all(), name
        x, y = x.fill_null(0).to_numpy(), y.fill_null(0).to_numpy()
        np.testing.assert_allclose(x, y, rtol=RELATIVE, atol=ABSOLUTE, err_msg=name)


def test_class_masses_sum_to_one_and_directions_too(observed):
    frame = pl.DataFrame(observed[3]["heads"])
    classes = frame.select(pl.sum_horizontal([f"mass_{c}" for c in TOKEN_CLASSES])).to_series()
    np.testing.assert_allclose(classes.to_numpy(), 1, atol=1e-5)
    ways = frame.select(pl.sum_horizontal("mass_self", "mass_backward", "mass_forward")).to_series()
    np.testing.assert_allclose(ways.to_numpy(), 1, atol=1e-5)


def test_received_and_offset_profiles_sum_to_the_rows(observed):
    tables = observed[3]
    rows_of = pl.DataFrame(tables["heads"]).group_by("layer", "head").agg(pl.col("query_rows").sum())
    sums = (
        pl.DataFrame(tables["profiles"])
        .filter(pl.col("profile").cast(pl.String).is_in(["offset", "received_by_position"]))
        .group_by("layer", "head", "profile")
        .agg(pl.col("sum").sum())
        .join(rows_of, on=["layer", "head"])
    )
    assert sums.height == 6 * 12 * 2
    np.testing.assert_allclose(sums["sum"].to_numpy(), sums["query_rows"].to_numpy(), rtol=1e-5)


def test_layout_is_found_once(demo):
    assert layout_of(demo.model) is layout_of(demo.model)
