"""`attlas.measure` on the GPU: the numbers of the CPU for models of several kinds, and the same bytes again."""

from typing import Any

import pyarrow as pa
import pytest
import torch

import attlas
from tests.extract.checkpoints import model_of
from tests.gpu.machine import DEVICE, IS_REHEARSAL, demo_folder, to_device
from tests.gpu.tables import assert_tables_agree

pytestmark = pytest.mark.gpu

ENGINE = "reference" if IS_REHEARSAL else "auto"
TOKENS = 20 if IS_REHEARSAL else 90
# grouped heads; soft-caps and windows; a causal model; a bias for distances; scores that the model computes itself
FAMILIES = ("bert", "llama", "gemma2", "gpt2", "t5", "modernbert", "mpnet")


def inputs_of(vocabulary: int, *, padding: str = "right") -> dict[str, torch.Tensor]:
    """Three sequences, the second and third shorter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (3, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for sequence, length in ((1, TOKENS * 2 // 3), (2, TOKENS // 4)):
        mask[sequence, : TOKENS - length] = 0
        if padding == "right":
            mask[sequence] = mask[sequence].flip(0)
    return {"input_ids": ids.where(mask > 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_measure_gives_the_numbers_of_the_cpu(family: str) -> None:
    changes = {"use_cache": False} if family in ("llama", "gemma2", "gpt2") else {}
    model, inputs = model_of(family, "T5EncoderModel" if family == "t5" else "AutoModel", **changes), inputs_of(80)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17 leaves out the soft-cap otherwise, and is refused
    expected = attlas.measure(model, engine="reference", **inputs)
    got = attlas.measure(model.to(DEVICE), engine=ENGINE, **to_device(inputs))
    assert_tables_agree(got, expected, absolute=1e-3)


def test_a_left_padded_batch_gives_the_numbers_of_the_cpu() -> None:
    model, inputs = demo_model(torch.float32), inputs_of(30_000, padding="left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    expected = attlas.measure(model, engine="reference", **inputs)
    got = attlas.measure(model.to(DEVICE), engine=ENGINE, **to_device(inputs))
    assert_tables_agree(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_batch_gives_the_same_bytes(dtype: torch.dtype) -> None:
    model, inputs = demo_model(dtype).to(DEVICE), to_device(inputs_of(30_000))
    first = attlas.measure(model, engine=ENGINE, **inputs)
    for _ in range(3):
        again = attlas.measure(model, engine=ENGINE, **inputs)
        assert {name: _bytes(table) for name, table in again.items()} == {
            name: _bytes(table) for name, table in first.items()
        }


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def demo_model(dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(demo_folder(), dtype=dtype, attn_implementation="sdpa").eval()
