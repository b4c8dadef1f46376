"""Packed texts are measured as separate sequences if the model keeps them apart."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attlas.extract import measure
from attlas.extract.errors import Refusal
from tests import oracles
from tests.extract.models import eager_patterns, tiny
from tests.extract.test_heads import assert_columns

LENGTHS = ([5, 9, 1, 5, 2], [7, 3, 12, 0, 0])
TOKENS = sum(LENGTHS[0])


def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(4, 60, (rows, TOKENS), generator=torch.Generator().manual_seed(3))


def positions(rows: int = 1, *, first: int = 0) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in LENGTHS[row]]) + first for row in range(rows)])


def blocks(rows: int = 1, *, causal: bool = False) -> torch.Tensor:
    text = torch.stack([torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS[row])) for row in range(rows)])
    pairs = text[:, :, None] == text[:, None]
    return (pairs.tril() if causal else pairs)[:, None]


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def assert_separated(model: Any, inputs: dict[str, Any], eager: dict[str, Any]) -> None:
    """Assert that each sequence is measured as its block of the model's eager pattern for the whole row."""
    patterns = eager_patterns(model, **eager)
    rows = measure(model, **inputs)["heads"].to_pylist()
    places = [(row, n, length) for row in range(len(inputs["input_ids"])) for n, length in enumerate(LENGTHS[row])]
    places = [(row, sum(LENGTHS[row][:n]), length) for row, n, length in places if length]
    assert {r["sequence_id"] for r in rows} == {*range(len(places))}
    assert len(rows) == len(places) * len(patterns) * 4
    for r in rows:
        row, start, length = places[r["sequence_id"]]
        block = slice(start, start + length)
        queries = patterns[r["layer"]][row, r["head"], block]
        assert float(queries[:, block].sum()) == pytest.approx(length), "the model itself keeps them apart"
        visible = torch.ones(length, length, dtype=torch.bool)
        visible = (visible.tril() if r["stack"] == "decoder" else visible).numpy()
        expected = oracles.head_columns(queries[:, block].numpy(), visible=visible)
        columns = {name: value for name, value in expected.items() if value is not None and name in r}
        assert len(columns) > 15
        assert_columns(r, columns, f"sequence {r['sequence_id']} L{r['layer']}H{r['head']}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_position_ids_that_start_again_start_a_sequence(family, rows):
    inputs: dict[str, Any] = {"input_ids": ids(rows), "position_ids": positions(rows), "use_cache": False}
    assert_separated(tiny(family), inputs, inputs)


def test_inputs_for_attention_kernels_are_not_needed():
    inputs: dict[str, Any] = {"input_ids": ids(), "position_ids": positions(), "use_cache": False}
    ends = torch.tensor([0, *LENGTHS[0]]).cumsum(0).int()
    kernel_inputs: dict[str, Any] = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    assert_separated(tiny("llama"), {**inputs, **kernel_inputs}, inputs)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra"])
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_each_block_of_a_mask_is_a_sequence(family, form):
    mask = blocks(2)
    first = 2 if family == "roberta" else 0
    given: dict[str, Any] = {"input_ids": ids(2), "position_ids": positions(2, first=first)}
    mask_given = mask if form == "boolean" else additive(mask)
    assert_separated(tiny(family), {**given, "attention_mask": mask_given}, {**given, "attention_mask": additive(mask)})


def test_each_block_of_a_causal_mask_is_a_sequence():
    mask = blocks(2, causal=True)
    given: dict[str, Any] = {"input_ids": ids(2), "position_ids": positions(2)}
    assert_separated(tiny("llama"), {**given, "attention_mask": mask}, {**given, "attention_mask": additive(mask)})


def test_padding_of_a_packed_row_is_not_a_sequence():
    given: dict[str, Any] = {"input_ids": ids(), "position_ids": positions()}
    mask = blocks(causal=True)
    mask[..., -2:, :] = mask[..., :, -2:] = False  # the last sequence is padding
    rows = measure(tiny("llama"), **given, attention_mask=mask)["heads"].to_pylist()
    assert {r["sequence_id"] for r in rows} == {0, 1, 2, 3}
    assert {r["query_rows"] for r in rows} <= {5, 9, 1}


def test_the_residual_stream_is_measured_per_sequence():
    model = tiny("llama")
    given: dict[str, Any] = {"input_ids": ids(), "position_ids": positions(), "use_cache": False}
    packed = measure(model, **given)["residual"].to_pylist()
    by_sequence = [[r for r in packed if r["sequence_id"] == n] for n in range(5)]
    start = 0
    for number, length in enumerate(LENGTHS[0]):
        alone = measure(model, input_ids=ids()[:, start : start + length])["residual"].to_pylist()
        for row, expected in zip(by_sequence[number], alone, strict=True):
            assert (row.pop("sequence_id"), expected.pop("sequence_id")) == (number, 0)
            keys = [(r.pop("stack"), r.pop("site"), r["layer"]) for r in (row, expected)]
            assert keys[0] == keys[1]
            assert_columns(row, expected, f"sequence {number} {keys[0]}")
        start += length


class Leaking(nn.Module):
    """Attends within sequences, but sums states over the whole row, as a recurrent layer unaware of packing does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        of = (position_ids == 0).cumsum(-1)
        x = self.embed(input_ids).cumsum(1)
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mask = (of[:, :, None] == of[:, None])[:, None]
        return x + self.out(scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2))


def test_a_row_that_the_model_does_not_separate_is_one_sequence_with_a_warning():
    for model in (tiny("bert"), tiny("llama"), Leaking().eval()):  # with its cache, llama does not check for packing
        with pytest.warns(UserWarning, match="does not keep them apart, so each row is measured as one sequence"):
            rows = measure(model, input_ids=ids(2), position_ids=positions(2))["heads"].to_pylist()
        assert {r["sequence_id"] for r in rows} == {0, 1} and {r["query_rows"] for r in rows} == {TOKENS}


def test_a_model_that_ignores_position_ids_does_not_keep_packed_texts_apart():
    with pytest.warns(UserWarning, match="DistilBertModel does not keep them apart"):
        rows = measure(tiny("distilbert"), input_ids=ids(), attention_mask=blocks())["heads"].to_pylist()
    assert {r["sequence_id"] for r in rows} == {0}


def test_positions_with_an_offset_are_not_packing(recwarn):
    rows = measure(tiny("llama"), input_ids=ids(), position_ids=torch.arange(7, 7 + TOKENS)[None])["heads"].to_pylist()
    assert {r["sequence_id"] for r in rows} == {0} and not recwarn


def test_a_boolean_mask_that_eager_attention_would_add_is_refused():
    import transformers

    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    config = transformers.Gemma2Config(vocab_size=60, num_key_value_heads=2, **sizes)
    config._attn_implementation = "eager"
    model = transformers.Gemma2Model(config).eval()
    given: dict[str, Any] = {"input_ids": ids(), "position_ids": positions()}
    with pytest.warns(UserWarning, match="apart"), pytest.raises(Refusal, match=r"would hide nothing; give 0"):
        measure(model, **given, attention_mask=blocks(causal=True))
    packed = measure(model, **given, attention_mask=additive(blocks(causal=True)))["heads"].to_pylist()
    assert {r["sequence_id"] for r in packed} == {0, 1, 2, 3, 4}
