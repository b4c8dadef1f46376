"""A few architectures of each capture method, as the census measures them all: `make census` is the whole."""

import ast
from pathlib import Path

import pytest
import torch

from tests.census import census
from tests.census.census import EXACT, FALLBACK, REFUSED, WITHOUT, Making, compared, entry, judged
from tests.census.judge import verdict_on
from tests.census.own import each_alone, head_counts, is_of_heads, is_pattern, readings, returned_patterns
from tests.census.through_run import AS_IN_A_BATCH, DRAWS, NO_IDS, YES, through_run
from tests.census.tiny import Built, build

SEEN = {
    "bert": (EXACT, ("sdpa",)),
    "llama4": (EXACT, ("sdpa",)),
    "t5": (EXACT, ("sdpa",)),
    "gemma2": (EXACT, ("interface",)),
    "gpt_oss": (EXACT, ("interface",)),
    "deberta-v2": (FALLBACK, ("softmax",)),
    "xlnet": (FALLBACK, ("softmax",)),
    "prophetnet": (FALLBACK, ("softmax",)),
    "informer": (FALLBACK, ("replay", "softmax")),
    "led": (FALLBACK, ("replay", "softmax")),
    "longformer": (FALLBACK, ("replay",)),
    "longt5": (FALLBACK, ("interface", "replay")),
    "reformer": (FALLBACK, ("replay",)),
    "diffusion_gemma": (EXACT, ("sdpa",)),
    "vit": (EXACT, ("sdpa",)),
    "swin": (EXACT, ("sdpa",)),
    "qwen3_vl_vision": (EXACT, ("sdpa",)),
    "wav2vec2": (EXACT, ("sdpa",)),
}


@pytest.mark.parametrize("model_type", SEEN)
def test_every_pattern_of_the_model_is_measured(model_type):
    found = judged(model_type)
    assert (found.outcome, found.ways) == SEEN[model_type], found.reason
    assert found.compared


def test_the_stream_of_images_that_a_tower_packs_together_is_measured_image_by_image():
    assert compared(Making("pixtral")).residual == "measured"


def test_what_cannot_be_measured_is_refused_by_name():
    found = compared(Making("pegasus_x"))  # whose queries look at global tokens of the model's own as well
    assert found.outcome == REFUSED
    assert "encoder.layers.0.self_attn looks at something besides the tokens" in found.reason


@pytest.mark.parametrize("model_type", ["mamba", "resnet"])
def test_a_model_without_attention_is_none_that_was_missed(model_type):
    assert compared(Making(model_type)).outcome == WITHOUT


# --- the judgement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["own", "judge", "blocks", "shrink", "tiny"])
def test_what_judges_imports_nothing_of_what_is_judged(module):
    tree = ast.parse((Path(census.__file__).parent / f"{module}.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or alias.name for node in imports for alias in node.names]
    assert names and not [name for name in names if name.split(".")[0] == "attlas"]


def shares(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_a_pattern_has_rows_of_shares_and_a_sink_may_take_some():
    assert is_pattern(shares(2, 4, 5, 5))
    assert is_pattern(0.3 * shares(2, 4, 5, 5))
    assert not is_pattern(1.01 * shares(2, 4, 5, 5)), "more than the whole"
    assert not is_pattern(shares(2, 4, 5, 5).log()), "scores"
    assert not is_pattern(shares(5, 5)), "no heads"
    assert not is_pattern(shares(2, 4, 5, 5) * torch.nan)


def test_weights_of_sampled_points_are_no_pattern_over_keys():
    assert is_of_heads(shares(2, 4, 5, 9), {4})
    assert is_of_heads(shares(8, 5, 5), {4}), "batch and heads in one"
    assert not is_of_heads(shares(2, 9, 4, 3), {4}), "[batch, query, head, point]"
    levels = shares(2, 9, 4, 6).unflatten(-1, (2, 3))
    assert not is_of_heads(levels, {4, 9}), "[batch, query, head, level, point]"


def test_numbers_of_heads_are_those_of_every_tower():
    built = build("blip-2")
    assert isinstance(built, Built)
    assert 4 in head_counts(built.model)
    assert head_counts(torch.nn.MultiheadAttention(30, 5)) == {5}


def test_patterns_are_what_an_output_names_attentions_in_its_towers_too():
    one, other = shares(1, 2, 3, 3), shares(1, 2, 4, 4)
    output = {"logits": one, "attentions": (one, None), "vision": {"cross_attentions": [(other,)], "states": one}}
    assert [p is q for p, q in zip(returned_patterns(output), (one, other), strict=True)] == [True, True]


def test_each_sequence_alone_has_its_own_images_and_no_padding():
    grid = torch.tensor([[1, 2, 2], [1, 2, 3]])
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"pixel_values": torch.arange(10.0)[:, None], "image_grid_thw": grid, "input_ids": ids}
    first, second = each_alone({**inputs, "attention_mask": mask})
    assert first["pixel_values"].flatten().tolist() == [0, 1, 2, 3]
    assert second["pixel_values"].flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert second["image_grid_thw"].tolist() == [[1, 2, 3]]
    assert (first["input_ids"].tolist(), second["input_ids"].tolist()) == ([[0, 1, 2, 3, 4]], [[5, 6, 7]])


@pytest.mark.parametrize("column", ["entropy_nats", "distance_tokens", "max_weight", "received_max"])
def test_a_number_that_is_off_by_a_thousandth_and_a_layer_that_is_left_out_are_found(column):
    built = build("bert")
    assert isinstance(built, Built)
    eager = build("bert", attention="eager")
    assert isinstance(eager, Built)
    own, rows = next(readings(eager)), census.measured(built)["heads"].to_pylist()
    layers = census.claimed(built, built.inputs)
    assert layers is not None
    assert verdict_on(own, layers.attentions, rows).rank == (True, 2)
    off = [{**row, column: row[column] * 1.001} if row["layer"] == 1 and row["head"] == 2 else row for row in rows]
    wrong = verdict_on(own, layers.attentions, off)
    assert wrong.compared == 1 and column in wrong.missed[0]
    without = verdict_on(own, layers.attentions[:1], rows)
    assert without.compared == 1 and "no layer is left" in without.missed[0]


# --- through attlas run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5", "longformer", "canine", "convbert"])
def test_a_model_that_was_saved_runs_as_the_command_runs_it(model_type):
    assert through_run(model_type) == YES


@pytest.mark.parametrize(("model_type", "said"), [("deepseek_v32", AS_IN_A_BATCH), ("diffusion_gemma", DRAWS)])
def test_a_model_that_gives_other_numbers_in_a_batch_or_each_time_is_told(model_type, said):
    assert through_run(model_type) == said


def test_a_model_without_ids_of_a_tokenizer_is_not_asked():
    assert through_run("vit") == NO_IDS
    assert entry("vit").through_run == NO_IDS


def test_a_model_that_the_command_does_not_measure_says_why():
    assert "MambaModel showed none" in through_run("mamba")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("clip", "CLIPModel fails without other inputs (AttributeError: "),
        ("align", "AlignModel fails without other inputs (ValueError: You have to specify pixel_values)"),
        ("bros", "BrosModel fails without other inputs (ValueError: You have to specify bbox)"),
    ],
)
def test_a_model_that_needs_more_than_ids_is_refused_in_words(model_type, said):
    found = through_run(model_type)
    assert found.startswith("a run gives a text model input_ids alone; ") and said in found
    assert "save the part of it that reads text" in found
