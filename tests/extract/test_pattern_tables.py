"""`pairs`, `queries`, `edges`, `tokens` and `rollout` against the formulas in float64, on the model's own eager patterns."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.reference import rows_of
from attlas.extract.engines.rows import ScoredCall
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from attlas.extract.options import RunOptions
from attlas.extract.tables.pairs import MOST_ROWS
from tests import oracles
from tests.extract.models import eager_patterns, tiny
from tests.extract.runs import complete_run
from tests.extract.test_residual import states

ON_REQUEST = "queries,edges,tokens,rollout"


@pytest.fixture(scope="module", params=["llama", "bert"])
def measured(request):
    """A model, two sequences of which one is padded, its eager patterns by layer and sequence, and the tables."""
    model = tiny(request.param)
    with torch.no_grad():  # sharper patterns than random weights give
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                weight *= 5
    ids = torch.randint(2, 60, (2, 90), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    lengths = mask.sum(-1).tolist()
    patterns = [
        [layer[sequence, :, :n, :n].numpy() for sequence, n in enumerate(lengths)]
        for layer in eager_patterns(model, **inputs)
    ]
    return model, inputs, patterns, measure(model, statistics=ON_REQUEST, **inputs)


def test_pairs_equal_the_sums_over_evenly_spaced_rows(measured):
    _, _, patterns, tables = measured
    pairs = {
        ((r["layer"], r["head"]), (r["other_layer"], r["other_head"])): r
        for r in pl.DataFrame(tables["pairs"]).to_dicts()
    }
    heads = [(layer, head) for layer in range(len(patterns)) for head in range(4)]
    assert set(pairs) == {(a, b) for a in heads for b in heads if a <= b}
    for (one, other), row in pairs.items():
        expected = np.zeros(4)
        for sequence, of_sequence in enumerate(patterns[0]):
            n = of_sequence.shape[-1]
            chosen = range(n) if n <= MOST_ROWS else [(2 * k + 1) * n // (2 * MOST_ROWS) for k in range(MOST_ROWS)]
            for i in chosen:
                p, q = (patterns[layer][sequence][head, i] for layer, head in (one, other))
                divergence = oracles.entropy((p + q) / 2) - (oracles.entropy(p) + oracles.entropy(q)) / 2
                expected += [float(np.sqrt(p * q).sum()), float((p * q).sum()), divergence, 1]
        found = [row[name] for name in ("bhattacharyya", "product", "jensen_shannon_nats", "rows")]
        if one[0] != other[0]:
            assert found[2] is None
            found[2] = expected[2]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert row["rows"] == MOST_ROWS + 12


def test_a_row_of_queries_is_what_its_row_of_the_pattern_says(measured):
    _, _, patterns, tables = measured
    queries = pl.DataFrame(tables["queries"])
    assert queries.height == len(patterns) * 4 * (90 + 12)
    for (layer, head, sequence), rows in queries.group_by("layer", "head", "sequence_id"):
        p = patterns[layer][sequence][head]
        rows, n = rows.sort("query"), len(p)
        assert rows["query"].to_list() == list(range(n))
        d = np.arange(n)[None, :] - np.arange(n)[:, None]
        expected = {
            "entropy_nats": [oracles.entropy(row) for row in p],
            "collision_probability": (p**2).sum(1),
            "max_weight": p.max(1),
            "distance_tokens": (p * abs(d)).sum(1),
            "offset_tokens": (p * d).sum(1),
            "mass_self": np.diag(p),
            "mass_first": p[:, 0],
        }
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=2e-5, err_msg=name)
        largest = p[np.arange(n), rows["max_key"].to_numpy()]
        np.testing.assert_allclose(largest, p.max(1), rtol=1e-5)
        assert rows["mass_sink"].null_count() == n


def test_queries_average_to_their_heads(measured):
    _, _, _, tables = measured
    by = ("sequence_id", "layer", "head")
    names = ["entropy_nats", "max_weight", "output_norm", "context_norm", "mass_self", "offset_std_tokens"]
    means = pl.DataFrame(tables["queries"]).group_by(by).agg(pl.col(names).mean())
    joined = pl.DataFrame(tables["heads"]).join(means, on=by)
    assert joined.height == means.height
    for name in names:
        np.testing.assert_allclose(joined[f"{name}_right"], joined[name], rtol=1e-4, atol=1e-5)


def test_edges_are_the_strongest_keys_in_their_order(measured):
    _, _, patterns, tables = measured
    edges = pl.DataFrame(tables["edges"])
    for (layer, head, sequence), rows in edges.group_by("layer", "head", "sequence_id"):
        p = patterns[layer][sequence][head]
        for (query,), of_query in rows.group_by("query"):
            of_query = of_query.sort("rank")
            expected = sorted((float(w) for w in p[query] if w > 0), reverse=True)[:8]
            assert of_query["rank"].to_list() == list(range(len(expected)))
            np.testing.assert_allclose(of_query["weight"], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(p[query, of_query["key"].to_numpy()], of_query["weight"], rtol=1e-4, atol=1e-6)
            assert of_query["key"].n_unique() == of_query.height
            assert of_query["write_norm"].null_count() == 0


def test_rollout_is_the_product_of_the_mixed_layers(measured):
    _, _, patterns, tables = measured
    rollout = pl.DataFrame(tables["rollout"])
    assert rollout.height == 2 * len(patterns)
    for sequence in range(2):
        n = patterns[0][sequence].shape[-1]
        total = np.eye(n)
        for layer, pattern in enumerate(patterns):
            total = (pattern[sequence].mean(0) + np.eye(n)) / 2 @ total
            (row,) = rollout.filter(layer=layer, sequence_id=sequence).to_dicts()
            distance = abs(np.arange(n)[None, :] - np.arange(n)[:, None])
            assert row["rollout_entropy_nats"] == pytest.approx(np.mean([oracles.entropy(r) for r in total]), rel=1e-4)
            assert row["rollout_distance_tokens"] == pytest.approx((total * distance).sum() / n, rel=1e-4)
            assert row["rollout_mass_first"] == pytest.approx(total[:, 0].mean(), rel=1e-4)


def test_tokens_have_what_they_receive_and_the_norms_of_their_states(measured):
    model, inputs, patterns, tables = measured
    tokens, is_llama = pl.DataFrame(tables["tokens"]), model.config.model_type == "llama"
    for layer, of_layer in enumerate(patterns):
        base = f"layers.{layer}" if is_llama else f"encoder.layer.{layer}"
        after = "norm" if layer == len(patterns) - 1 else f"layers.{layer + 1}.input_layernorm"
        names = {
            "attention_update_norm": f"{base}.self_attn.o_proj>" if is_llama else f"{base}.attention.output.dense>",
            "mlp_update_norm": f"{base}.mlp.down_proj>" if is_llama else f"{base}.output.dense>",
            "stream_norm": f"{after}<" if is_llama else f"{base}.output.LayerNorm<",
        }
        held = states(model, names, **inputs)
        for sequence, pattern in enumerate(of_layer):
            rows = tokens.filter(layer=layer, sequence_id=sequence)
            n = pattern.shape[-1]
            assert rows["token"].to_list() == list(range(n))
            for name in names:
                expected = oracles.norms(held[name][sequence, :n])
                np.testing.assert_allclose(rows[name], expected, rtol=1e-4, err_msg=name)
            np.testing.assert_allclose(rows["max_abs"], abs(held["stream_norm"][sequence, :n]).max(-1), rtol=1e-4)
            received = pattern.sum(1) / n
            np.testing.assert_allclose(rows["received_mass"], received.mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(rows["received_max"], received.max(0), rtol=1e-4, atol=1e-6)
            entropies = np.mean([[oracles.entropy(row) for row in head] for head in pattern], axis=0)
            np.testing.assert_allclose(rows["entropy_nats"], entropies, rtol=1e-4, atol=2e-5)


# --- known pairs


def pattern_of(scores: torch.Tensor, *, sinks: torch.Tensor | None = None) -> HeadObservation:
    """An observed attention call with these scores [head, query, key]."""
    heads, n, _ = scores.shape
    axis = Axis(torch.zeros(1, dtype=torch.long), torch.full((1,), n), n)
    seen = visibility_from_mask(None, causal=False, queries=axis, keys=axis)
    call = ScoredCall(scores[None], torch.randn(1, heads, n, 2), seen, sinks=sinks)
    rows = rows_of(call, torch.zeros(1, heads, n, 2), {"entropy", *(("sink",) if sinks is not None else ())})
    return HeadObservation(rows, seen, call=call)


def compared(o: HeadObservation) -> np.ndarray:
    from attlas.extract.tables.pairs import _compare

    rows = o.chosen_rows(MOST_ROWS)
    assert rows is not None
    return _compare([rows]).numpy()


def test_equal_heads_have_no_divergence_and_disjoint_ones_ln_2():
    far = torch.full((5, 5), -1e9)
    looks_at = [far.clone() for _ in range(2)]
    looks_at[0][:, 1], looks_at[1][:, 3] = 0, 0
    alike, product, divergence, rows = compared(pattern_of(torch.stack([looks_at[0], looks_at[0], looks_at[1]])))
    assert (rows == 5).all()
    np.testing.assert_allclose(alike, [[5, 5, 0], [5, 5, 0], [0, 0, 5]], atol=1e-5)
    np.testing.assert_allclose(product, [[5, 5, 0], [5, 5, 0], [0, 0, 5]], atol=1e-5)
    np.testing.assert_allclose(divergence, np.array([[0, 0, 5], [0, 0, 5], [5, 5, 0]]) * math.log(2), atol=1e-5)


def test_a_learned_sink_is_one_more_key_of_a_pair():
    """Two heads without a key in common that leave half of their mass to the sink."""
    scores = torch.full((2, 4, 4), -1e9)
    scores[0, :, 0], scores[1, :, 2] = 0, 0
    alike, product, divergence, _ = compared(pattern_of(scores, sinks=torch.zeros(1, 2, 4)))
    assert alike[0, 1] == pytest.approx(4 * 0.5) and product[0, 1] == pytest.approx(4 * 0.25)
    assert divergence[0, 1] == pytest.approx(4 * 0.5 * math.log(2))
    assert alike[0, 0] == pytest.approx(4)


def test_rows_that_are_not_measured_are_in_no_pair():
    scores = torch.zeros(2, 6, 6)
    scores[0, 2] = torch.nan
    *_, rows = compared(pattern_of(scores))
    assert rows.tolist() == [[5, 5], [5, 6]]


# --- runs


@pytest.fixture(scope="module")
def dataset(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patterns")
    text = folder / "text.txt"
    text.write_text("Heads look at one another's keys. " * 40)
    options = {"model": "demo", "corpus": str(text), "max_length": 24, "shard_sequences": 6, "device": "cpu"}
    complete_run(RunOptions(out=folder / "out", statistics=f"all,{ON_REQUEST}", sample=2, edges=3, **options))
    return folder / "out"


def test_a_run_has_the_rows_of_the_sample_of_each_shard_alone(dataset: Path):
    sequences = pl.read_parquet(dataset / "sequences" / "*.parquet")
    shards = sequences["shard"].n_unique()
    assert shards > 1
    sampled = (
        sequences.group_by("shard").agg(pl.col("sequence_id").sort().head(2)).explode("sequence_id")["sequence_id"]
    )
    for table in ON_REQUEST.split(","):
        rows = pl.read_parquet(dataset / table / "*.parquet")
        assert sorted(rows["sequence_id"].unique()) == sorted(sampled), table
    pairs = pl.read_parquet(dataset / "pairs" / "*.parquet")
    assert pairs.height == shards * 72 * 73 // 2
    edges = pl.read_parquet(dataset / "edges" / "*.parquet")
    assert edges["rank"].max() == 2


def test_a_run_with_every_table_is_verified(dataset: Path):
    assert verify(dataset) == []


def test_the_sample_of_a_run_has_the_numbers_of_the_same_sequences_measured_alone(dataset: Path, demo):
    rows = pl.read_parquet(dataset / "rollout" / "*.parquet").filter(pl.col("sequence_id") < 2)
    text = "Heads look at one another's keys. " * 40
    ids = demo.tokenizer(text, add_special_tokens=False)["input_ids"][:22]
    inputs = {"input_ids": torch.tensor([[101, *ids, 102]])}
    alone = pl.DataFrame(measure(demo.model, tables=("rollout",), **inputs)["rollout"])
    first = rows.filter(sequence_id=0).sort("layer")
    for name in ("rollout_entropy_nats", "rollout_mass_first"):
        np.testing.assert_allclose(first[name], alone.sort("layer")[name], rtol=1e-5)
