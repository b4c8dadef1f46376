"""Inputs and exceptions for architectures that take sound: waveforms or features of frames."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[Any], dict[str, Tensor]]
BATCH, SAMPLES, FRAMES, BINS, DECODED = 2, 1920, 96, 16, 11

# What configurations of audio towers share.
SIZES: dict[str, Any] = {
    "num_mel_bins": BINS,
    "conv_dim": [16, 32],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feature_projection_input_dim": BINS,
    "subsampling_conv_channels": 16,
    "codebook_size": 32,
    "codebook_dim": 16,
    "num_filters": 4,
}

WHOLE = {"max_source_positions": FRAMES // 2}  # these take spectrograms of one length only
DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "hidden_size": 32}
MIMI = {"upsample_groups": 32, "vector_quantization_hidden_dimension": 16, "num_quantizers": 4, "sliding_window": 8}
POCKET = {"upsample_groups": 32, "sliding_window": 8}
SEMANTIC = {"encoder_hidden_size": 4, "quantization_dim": 64}
VIBEVOICE = {"depths": [1] * 4, "downsampling_ratios": [4, 5, 8]}
SEAMLESS = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 64,
    "t2u_vocab_size": 128,
    "t2u_encoder_layers": 2,
    "t2u_encoder_ffn_dim": 64,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_layers": 2,
    "t2u_decoder_ffn_dim": 64,
    "t2u_decoder_attention_heads": 4,
    "t2u_max_position_embeddings": 128,
    "upsample_initial_channel": 32,
    "unit_hifi_gan_vocab_size": 128,
    **dict.fromkeys(("unit_embed_dim", "lang_embed_dim", "spkr_embed_dim"), 16),
}

# What the common sizes get wrong, by model_type; a sub-config's own model_type counts too.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": FRAMES, "frequency_stride": 4, "time_stride": 8},
    "audioflamingo3_encoder": WHOLE,
    "clap_audio_model": {
        "spec_size": 64,
        "num_mel_bins": BINS,
        "window_size": 4,
        "patch_size": 4,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "num_classes": 8,
    },
    "dac": DAC,
    "fun_asr_nano_encoder": {"num_timestamp_prediction_layers": 1, "num_stacked_frames": 1},
    "gemma3n_audio": {
        "input_feat_size": BINS,
        "sscp_conv_channel_size": [8, 4],
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 2,
        "conf_attention_chunk_size": 8,
        "conf_attention_context_left": 9,
        "conf_reduction_factor": 2,
    },
    "gemma4_audio": {
        "subsampling_conv_channels": [BINS, 4],
        "attention_chunk_size": 8,
        "attention_context_left": 9,
        "output_proj_dims": 32,
    },
    **dict.fromkeys(("mimi", "mimi_encoder", "mimi_decoder"), MIMI),
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[4, 2], [4, 0]]},
    "moss_transcribe_diarize_audio": WHOLE,
    "muse_spark_audio": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "nemotron_asr_streaming_encoder": {"sliding_window": 5, "default_num_lookahead_tokens": 1},  # or some see no key
    "neucodec": SEMANTIC,
    "pe_audio_encoder": {"dac_config": {"codebook_dim": 16}},
    **dict.fromkeys([f"pocket_tts_audio_tokenizer{part}" for part in ("", "_encoder", "_decoder")], POCKET),
    "qwen2_audio_encoder": WHOLE,
    "qwen3_asr_encoder": {"downsample_hidden_size": 8, "n_window": 50, "n_window_infer": 100, "output_dim": 32},
    "seamless_m4t": SEAMLESS,
    "seamless_m4t_v2": SEAMLESS,
    "speech_to_text": {"conv_channels": 32},
    "speecht5": {
        "speech_decoder_prenet_units": 32,
        "speaker_embedding_dim": 32,
        "speech_decoder_postnet_units": 32,
        "encoder_max_relative_position": 16,
    },
    "univnet": {"kernel_predictor_hidden_channels": 8, "model_hidden_channels": 8, "model_in_channels": 8},
    "vibevoice_acoustic_tokenizer": VIBEVOICE,
    "vibevoice_acoustic_tokenizer_decoder": VIBEVOICE,
    "vibevoice_acoustic_tokenizer_encoder": VIBEVOICE,
    "voxtral_encoder": WHOLE,
    "whisper": WHOLE,
    "xcodec": {
        "acoustic_model_config": DAC,
        "semantic_model_config": {  # the same 320 samples to a frame as the acoustic model
            "conv_dim": [16] * 7,
            "conv_stride": [5, 2, 2, 2, 2, 2, 2],
            "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        },
    },
    "xcodec2": SEMANTIC,
}


def inputs(model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """Two different sounds, the second shorter where the architecture takes a mask."""
    from tests.census.tiny import forward_parameters

    config, names = model.config, forward_parameters(type(model))
    if model_type in MAKERS:
        return MAKERS[model_type](config)
    built = masked_features(config, names) if "input_features" in names else masked_waveforms(config, names)
    return {**built, **decoder_ids(names)}


def decoder_ids(names: tuple[str, ...]) -> dict[str, Tensor]:
    """The ids a decoder starts from."""
    return {"decoder_input_ids": torch.randint(32, 128, (BATCH, DECODED))} if "decoder_input_ids" in names else {}


def masked_features(config: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Spectrograms: batch bin frame, or batch frame bin."""
    kinds = set(towers(config))
    frames = CHUNKS if CHUNKED & kinds else FRAMES
    bins = field(config, "feature_projection_input_dim", "num_mel_bins", "input_feat_size", *BIN_NAMES) or BINS
    bins *= 4 if STACKED & kinds else 1
    shape = (BATCH, bins, frames) if BINS_FIRST & kinds else (BATCH, frames, bins)
    return {
        "input_features": torch.randn(shape),
        **mask([n for n in names if n != "attention_mask" or not UNMASKED & kinds], frames),
    }


def masked_waveforms(config: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Waveforms: batch sample, or batch channel sample."""
    codecs = CODECS & set(towers(config))
    samples = CODEC_SAMPLES if codecs else SAMPLES
    shape = (BATCH, 1, samples) if codecs else (BATCH, samples)
    return {"input_values": torch.randn(shape), **mask(names, samples)}


def mask(names: Sequence[str], length: int) -> dict[str, Tensor]:
    """Ones, and zeros for the last quarter of the second row, under the name the architecture gives it."""
    ones = torch.ones(BATCH, length, dtype=torch.long)
    ones[1, -length // 4 :] = 0
    own = ("input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask")
    return {name: ones for name in (*own, *(() if "input_ids" in names else ("attention_mask",))) if name in names}


def towers(config: Any) -> list[str]:
    """The model_type of a configuration and of its audio tower."""
    parts = [config, getattr(config, "audio_config", None), getattr(config, "audio_tokenizer_config", None)]
    return [part.model_type for part in parts if part is not None]


def field(config: Any, *names: str) -> Any:
    """The first of these fields that the configuration or one of its towers has."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for tower in ("audio_config", "encoder_config", "semantic_model_config", "asr_config"):
        part = getattr(config, tower, None)
        if part is not None and (value := field(part, *names)) is not None:
            return value
    return None


def spectrogram(config: Any) -> dict[str, Tensor]:
    """batch frame bin, under the name of a waveform."""
    return {"input_values": torch.randn(BATCH, FRAMES, BINS)}


def mel(config: Any) -> dict[str, Tensor]:
    """Spectrograms with a mask that is required."""
    ones = torch.zeros(BATCH, FRAMES, dtype=torch.bool)
    ones[1, -FRAMES // 4 :] = True  # true where there is padding
    return {"audio_mel": torch.randn(BATCH, FRAMES, BINS), "audio_mel_mask": ones}


def states(config: Any) -> dict[str, Tensor]:
    """An encoder's states."""
    return {"inputs_embeds": torch.randn(BATCH, 24, config.hidden_size), **mask(("attention_mask",), 24)}


def speech_to_speech(config: Any) -> dict[str, Tensor]:
    """States in front of an encoder and a decoder, whose own first layers belong to its tasks."""
    return {
        "input_values": torch.randn(BATCH, 24, config.hidden_size),
        **mask(("attention_mask",), 24),
        "decoder_input_values": torch.randn(BATCH, DECODED, config.hidden_size),
    }


def speech_translation(config: Any) -> dict[str, Tensor]:
    """Features, of speech only, and the ids of its translation."""
    features = torch.randn(BATCH, FRAMES, BINS)
    return {"input_features": features, **mask(("attention_mask",), FRAMES), **decoder_ids(("decoder_input_ids",))}


def waveform_and_features(config: Any) -> dict[str, Tensor]:
    """What an acoustic and a semantic encoder take of one sound."""
    return {
        "input_values": torch.randn(BATCH, 1, 320 * 48),
        "input_features": torch.randn(BATCH, 48, BINS),
    }


def waveform(config: Any) -> dict[str, Tensor]:
    """batch channel sample, under the name of states."""
    return {"hidden_states": torch.randn(BATCH, 1, CODEC_SAMPLES)}


def frames(config: Any) -> dict[str, Tensor]:
    """batch channel frame"""
    return {"hidden_states": torch.randn(BATCH, config.hidden_size, 4)}


def latents(config: Any) -> dict[str, Tensor]:
    """What a codec's encoder made."""
    return {"latents": torch.randn(BATCH, 32, 12)}


CODEC_SAMPLES = 38400  # a codec's frames are thousands of samples long
CHUNKS = 200  # windows that convolutions assume are of 100 frames
CHUNKED = {"qwen3_asr_encoder", "qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"}
STACKED = {"granite_speech5_ctc", "granite_speech5_encoder"}
# These take a mask of scores, not of frames.
UNMASKED = {"qwen2_audio_encoder", "voxtral_encoder", "moss_transcribe_diarize_audio", "voxtral_realtime_encoder"}
BIN_NAMES = ("input_feat_per_channel", "input_dim", "feature_size")
CODECS = {
    "dac",
    "encodec",
    "mimi",
    "mimi_encoder",
    "pe_audio_encoder",
    "pocket_tts_audio_tokenizer",
    "pocket_tts_audio_tokenizer_encoder",
    "vibevoice_acoustic_tokenizer",
    "xcodec",
}

# Spectrograms whose first axis is the frequency's.
BINS_FIRST = {
    "audioflamingo3_encoder",
    "glmasr_encoder",
    "moss_transcribe_diarize_audio",
    "qwen2_audio_encoder",
    "qwen3_asr_encoder",
    "qwen2_5_omni_audio_encoder",
    "qwen3_omni_moe_audio_encoder",
    "voxtral_encoder",
    "voxtral_realtime_encoder",
    "whisper",
}

MAKERS: dict[str, Maker] = {
    "audio-spectrogram-transformer": spectrogram,
    "gemma3n_audio": mel,
    "mimi_decoder": latents,
    "nemotron3_5_transcribe_word_timestamp": states,
    "neucodec": waveform_and_features,
    "pocket_tts_audio_tokenizer_decoder": latents,
    "speecht5": speech_to_speech,
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), speech_translation),
    "vibevoice_acoustic_tokenizer_decoder": frames,
    "vibevoice_acoustic_tokenizer_encoder": waveform,
    "xcodec2": waveform_and_features,
}
