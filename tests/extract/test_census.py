"""A few architectures of each way in, as the census measures them all: `make census` is the whole."""

import pytest

from tests.census.census import EXACT, FALLBACK, REFUSED, WITHOUT, Making, _compared, entry

SEEN = {
    "bert": (EXACT, ("sdpa",)),
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
    found = entry(model_type)
    assert (found.outcome, found.ways) == SEEN[model_type], found.reason
    assert found.compared


def test_the_stream_of_images_that_a_tower_packs_together_is_measured_image_by_image():
    assert entry("pixtral").residual == "measured"


def test_what_cannot_be_measured_is_refused_by_name():
    found = entry("pegasus_x")  # whose queries look at global tokens of the model's own as well
    assert found.outcome == REFUSED
    assert "encoder.layers.0.self_attn looks at something besides the tokens" in found.reason


@pytest.mark.parametrize("model_type", ["mamba", "resnet"])
def test_a_model_without_attention_is_none_that_was_missed(model_type):
    assert _compared(Making(model_type)).outcome == WITHOUT
