"""Inputs and exceptions for architectures that take text, and for the few that take a series of numbers."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.census.shrink import FIRST_ID, TOKENS, VOCABULARY

BATCH, LENGTH, PADDED, DECODED, CODEBOOKS = 2, 24, 7, 17, 4

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2}

# What the common sizes get wrong, by model_type; a sub-config's own model_type counts too.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Time series: a window and a forecast have no defaults.
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "patchtst": {"context_length": 24, "num_input_channels": 2},
    "patchtsmixer": {"num_input_channels": 2},
    "timesfm": {"patch_length": 8, "context_length": 64, "horizon_length": 8},
    "timesfm2_5": {"patch_length": 8, "context_length": 64, "horizon_length": 8, "output_quantile_len": 8},
    # Sizes whose default is None, though the model needs them.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 7},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "global_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    # Rotary embeddings of several axes: the sections add up to half a head.
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm4v_moe_text": {"rope_parameters": MROPE, "head_dim": 16},
    "glm_image_text": {"rope_parameters": MROPE},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "hunyuan_vl_text": {"rope_parameters": MROPE, "head_dim": 8},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    # Layers of which each kind should occur, where the configuration gives a period.
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 4,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    # Widths tied to one another by a rule of their own.
    # in blocks they change for good to full attention at the first short sequence, and are refused
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bros": {"hidden_size": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}
    },  # the model reads it where the configuration does not have it
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "funnel": {"architectures": ["FunnelModel"]},  # of two AutoModel knows, and asks which
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "gemma4_text": {"global_head_dim": 16},
    "kyutai_speech_to_text": {"codebook_vocab_size": VOCABULARY, "num_codebooks": CODEBOOKS},
    "lilt": {"hidden_size": 48},
    "longt5": {"local_radius": 4, "global_block_size": 4},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2]},
    "muse_glimmer_assistant": {"target_layer_ids": [0, 1]},
    "vits": {
        "vocab_size": VOCABULARY,
        "flow_size": 32,
        "spectrogram_bins": 17,
        "upsample_initial_channel": 32,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "duration_predictor_filter_channels": 32,
        "posterior_encoder_num_wavenet_layers": 2,
    },
    "esmc": {"vocab_size": VOCABULARY},
    "glm5_next_text": {"index_kpool": 4, "linear_num_heads": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "moshi": {"num_codebooks": 2, "depth_decoder_config": {"num_codebooks": 2}},  # no more than its small codec has
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron_h": {"mamba_head_dim": 16, "n_groups": 2},
    "reformer": {"axial_pos_shape": [4, 6], "axial_pos_embds_dim": [16, 16], "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
}


def inputs(model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """Two rows of ids, the second padded on the right where the model takes a mask; or what INPUTS says."""
    return INPUTS.get(model_type, _text)(model)


def _text(model: Any) -> dict[str, Tensor]:
    names = inspect.signature(model.forward).parameters
    built = {"input_ids": ids(LENGTH)}
    if "attention_mask" in names:
        built["attention_mask"] = mask(LENGTH)
        built["input_ids"] = built["input_ids"].where(built["attention_mask"].bool(), pad_of(model))
    if "decoder_input_ids" in names:
        built["decoder_input_ids"] = ids(DECODED)
    if "bbox" in names:
        built["bbox"] = boxes(LENGTH)
    return built


def _glyphs(model: Any) -> dict[str, Tensor]:
    """With a shape and a sound to each sign; left out, they are the same for all and drown the differences."""
    return _text(model) | {"input_shape_ids": ids(LENGTH), "input_pronunciation_ids": ids(LENGTH)}


def _table_cells(model: Any) -> dict[str, Tensor]:
    """With a segment, row, column, … to each token; left out, they are the same for all and drown the differences."""
    kinds = [torch.randint(0, size, (BATCH, LENGTH)) for size in model.config.type_vocab_sizes]
    return _text(model) | {"token_type_ids": torch.stack(kinds, dim=-1)}


def _codebooks(model: Any) -> dict[str, Tensor]:
    """A token of text and one of every codebook at each place."""
    return {"input_ids": torch.stack([ids(LENGTH) for _ in range(CODEBOOKS + 1)], dim=-1)}


def _dia(model: Any) -> dict[str, Tensor]:
    channels = model.config.decoder_config.num_channels
    return _text(model) | {"decoder_input_ids": torch.stack([ids(DECODED) for _ in range(channels)], dim=-1)}


def _series(model: Any) -> dict[str, Tensor]:
    past = model.config.context_length + max(model.config.lags_sequence)
    future, features = model.config.prediction_length, model.config.num_time_features
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, future),
        "future_time_features": torch.randn(BATCH, future, features),
    }


def _patch_series(model: Any) -> dict[str, Tensor]:
    return {"past_values": torch.randn(BATCH, model.config.context_length, model.config.num_input_channels)}


def _timesfm(model: Any) -> dict[str, Tensor]:
    length = model.config.context_length
    built = {"past_values": torch.randn(BATCH, length), "past_values_padding": torch.zeros(BATCH, length).long()}
    freq = {"freq": torch.zeros(BATCH, 1).long()}
    return built | freq if "freq" in inspect.signature(model.forward).parameters else built


def _decisions(model: Any) -> dict[str, Tensor]:
    """Returns, states and actions of each step stand in one sequence: three places to a step."""
    steps = LENGTH // 3
    return {
        "states": torch.randn(BATCH, steps, model.config.state_dim),
        "actions": torch.randn(BATCH, steps, model.config.act_dim),
        "returns_to_go": torch.randn(BATCH, steps, 1),
        "timesteps": torch.arange(steps).repeat(BATCH, 1),
    }


def _draft_block(model: Any) -> dict[str, Tensor]:
    """A block of noise to be denoised after what another model's layers made of the text before it."""
    block, width = model.config.block_size, model.config.hidden_size
    return {
        "attention_mask": mask(LENGTH).flip(1),
        "noise_embeds": torch.randn(BATCH, block, width),
        "context_hidden_states": torch.randn(BATCH, LENGTH - block, width * len(model.config.target_layer_ids)),
    }


INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "autoformer": _series,
    "decision_transformer": _decisions,
    "dia": _dia,
    "informer": _series,
    "kyutai_speech_to_text": _codebooks,
    "muse_glimmer_assistant": _draft_block,
    "patchtsmixer": _patch_series,
    "patchtst": _patch_series,
    "roc_bert": _glyphs,
    "tapas": _table_cells,
    "time_series_transformer": _series,
    "timesfm": _timesfm,
    "timesfm2_5": _timesfm,
}


def boxes(length: int) -> Tensor:
    """Left, top, right, bottom of each word on its page."""
    start = torch.randint(0, 60, (BATCH, length, 2))
    return torch.cat([start, start + torch.randint(1, 60, (BATCH, length, 2))], dim=-1)


def ids(length: int, high: int = VOCABULARY) -> Tensor:
    """Two rows of ids, none special and none twice in a row."""
    return torch.stack([torch.randperm(high - FIRST_ID)[:length] + FIRST_ID for _ in range(BATCH)])


def mask(length: int) -> Tensor:
    """Ones, and zeros at the end of the second row."""
    ones = torch.ones(BATCH, length, dtype=torch.long)
    ones[1, -PADDED:] = 0
    return ones


def pad_of(model: Any) -> int:
    """The model's padding id; the table's where it has none."""
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else TOKENS["pad"]
