"""Inputs and exceptions for architectures that take images or sound together with text."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.census import audio, vision
from tests.census.shrink import FIRST_ID, VOCABULARY
from tests.census.vision import BATCH, Maker

BEFORE, AFTER = 5, 11  # tokens of text around what stands for an image

SIZES: dict[str, Any] = {}

SWIN = {**vision.SWIN, "out_indices": [2, 3, 4]}
GROUNDING = {"backbone_config": SWIN, "num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
TILES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
VQ = {
    "embed_dim": 32,
    "num_embeddings": 16,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CODES = 40  # ids from here on stand for the codes of an image
OCR_SAM = {**vision.SAM_VIT, "image_size": 64, "downsample_channels": [32, 32]}
GEMMA4 = {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}}
FLOW = {"flow_head_config": {"condition_dim": 32, "hidden_size": 32, "latent_dim": 8}, "latent_dim": 8}

# What the common sizes get wrong, by model_type; a sub-config's own model_type counts too.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    **{key: {"image_token_index": 3, "num_query_tokens": 6} for key in ("blip-2", "instructblip")},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    **{key: {"hidden_size_global": 32} for key in ("blt_local_encoder", "blt_local_decoder")},
    "clvp_encoder": {"vocab_size": 256, "hidden_size": 128},  # rotates at least 32 of a head's dimensions
    "bridgetower": {"hidden_size": 64},
    "bridgetower_text_model": {"hidden_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 3,
            **{f"IMGIMG{''.join(chr(65 + int(c)) for c in str(i))}Z": CODES + i for i in range(16)},
        }
    },
    "chameleon_vqgan": {**VQ, "resolution": 32},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "deepseek_ocr2_sam_vision_model": OCR_SAM,
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "embedding_gemma2": GEMMA4,
    "emu3": {
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 7,
            **{f"<|visual token {i:06d}|>": CODES + i for i in range(16)},
        }
    },
    "emu3_vqgan": {**VQ, "codebook_size": 16, "attn_resolutions": [8]},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [32, 32],
    },
    "fastspeech2_conformer": {
        "vocab_size": 128,
        **dict.fromkeys(("encoder_linear_units", "decoder_linear_units"), 64),
        **{f"{part}_predictor_channels": 32 for part in ("duration", "energy", "pitch")},
        "speech_decoder_postnet_units": 32,
    },
    "fastspeech2_conformer_hifigan": {"upsample_initial_channel": 32, "model_in_dim": 16},
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": GEMMA4,
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16, "pooling_kernel_size": 2}
    },
    "glm_image_vqmodel": {"latent_channels": 32, "num_embeddings": 64},
    "got_ocr2_vision": OCR_SAM,
    "gradium_phonon_tts": {**FLOW, "audio_prompt_dim": 16, "duration_delta_embedding_dim": 8},
    "granite4_vision": {
        **TILES,
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    **{key: {"window_size": 15, "downsample_rate": 5} for key in ("granite_speech", "granite_speech_plus")},
    "granite_speech_encoder": {"input_dim": 16, "dim_head": 8, "output_dim": 16, "context_size": 8},
    "granite_speech_plus_encoder": {"input_dim": 16, "dim_head": 8, "output_dim": 16, "context_size": 8},
    "grounding-dino": GROUNDING,
    "mm-grounding-dino": GROUNDING,
    "janus_vqgan": {**VQ, "num_patches": 8, "image_token_embed_dim": 32},
    "kimi_k25": {"projection_hidden_size": 32},
    "kosmos_2_text_model": {"layers": 2},
    "kosmos_2_5_text_model": {"layers": 2},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "llama4_vision_model": {
        "intermediate_size": 128,  # four patches side by side
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), TILES),
    "lxmert": {"l_layers": 2, "x_layers": 2, "r_layers": 2, "visual_feat_dim": 24},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 2},
    "mllama_vision_model": {
        "num_global_layers": 1,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "neomme": {"head_dim": 16},
    "molmo2": {"image_patch_id": 3, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
    "omdet-turbo": {
        "backbone_config": SWIN,
        "apply_layernorm_after_vision_backbone": False,  # which is for channels last
        "image_size": 64,
        "d_model": 16,
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [16, 32, 64],
        "vision_features_channels": [16, 16, 16],
        "text_projection_in_dim": 32,
        **dict.fromkeys(("text_projection_out_dim", "class_embed_dim", "task_encoder_hidden_dim"), 32),
        "decoder_hidden_dim": 16,  # other than that of classes, or a layer is missing
        **dict.fromkeys(("encoder_dim_feedforward", "decoder_dim_feedforward"), 64),
        "decoder_num_heads": 4,
        "decoder_num_layers": 2,
    },
    "ovis2": {"visual_indicator_token_ids": [20, 21, 22, 23, 24]},
    "ovis2_vision": {"vocab_size": 64},
    "paddleocr_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "pi0": {"chunk_size": 7},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 16,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "num_blocks": 2,
        "input_size": 16,
        "nemo_final_size": 2,
        "bias_max_distance": 20,
    },
    "phi4_multimodal_vision": {"crop_size": 32},
    "pocket_tts": FLOW,
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 8, "n_window_infer": 100, "output_dim": 32},
    **{key: {"vision_start_token_id": 20} for key in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "qwen2_5_omni_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "inkling_vision": {"patch_size": 8, "temporal_patch_size": 2},
    "instructblipvideo": {"video_token_index": 4, "num_query_tokens": 6},
    "voxtral": {"audio_token_id": 5},
    "qwen2_5_omni_audio_encoder": {"n_window": 50, "output_dim": 32},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 16, "num_frames": 2},
    "unlimited_ocr_sam_vision_model": OCR_SAM,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xclip_vision_model": {"mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 4},
}


def inputs(model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """Text around the places of an image or a sound in each row, the second row shorter by some text."""
    if model_type in MAKERS:
        return MAKERS[model_type](model.config)
    from tests.census.tiny import forward_parameters

    names = forward_parameters(type(model))
    if "input_ids" not in names or model_type in audio.MAKERS:  # an encoder with a decoder of text
        return audio.inputs(model_type, model)
    media = images(model_type, model.config, names) | sounds(model_type, model.config, names)
    return media | text(model.config, names, places(model, media))


def images(model_type: str, config: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """One image to a row, as the architecture takes them."""
    if model_type in IMAGES:
        return vision.rename_inputs(IMAGES[model_type](config), names)
    if "image_grid_thw" in names:
        return vision.rename_inputs(vision.flat_patches(config), names)
    if "pixel_values" in names:
        return {"pixel_values": vision.image(config)}
    if "pixel_values_videos" in names:
        return {"pixel_values_videos": vision.video(config)}
    return {}


def sounds(model_type: str, config: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """One sound to a row, the second shorter where the architecture takes a mask."""
    if model_type in SOUNDS:
        return SOUNDS[model_type](config)
    if "input_features" in names:
        return audio.masked_features(config, names)
    if "input_values" in names:
        return audio.masked_waveforms(config, names)
    return {}


def places(model: nn.Module, media: dict[str, Tensor]) -> list[list[int]]:
    """The ids that stand for media in each row, as many as the model makes features; none where it needs none."""
    ids: list[list[int]] = [[], []]
    for kind in MEDIA:
        token = next((t for n in ("id", "index") if (t := getattr(model.config, f"{kind}_token_{n}", None))), None)
        counts = features_of(model, kind, media) if token is not None else (0, 0)
        for row, count in zip(ids, counts, strict=True):
            row += [token] * count
    return ids


def features_of(model: nn.Module, kind: str, media: dict[str, Tensor]) -> tuple[int, int]:
    """How many features the model makes of each row's images or sound."""
    fixed = COUNTS.get((kind, str(getattr(model.config, "model_type", ""))))
    features = getattr(model, f"get_{kind}_features", None)
    if fixed or features is None:
        return fixed or (0, 0)
    taken = inspect.signature(features).parameters
    given = {name: value for name, value in media.items() if name in taken}
    if not any(name in given for name in MEDIA[kind]):
        return 0, 0
    with torch.no_grad():
        both = rows(features(**given))
        # Images may lie end to end: their own grids say how much of it is the first's.
        if kind == "audio":
            first = rows(features(**{name: value[:1] for name, value in given.items()}))
        else:
            first = int(both * share(given))
    return first, both - first


def share(given: dict[str, Tensor]) -> float:
    """The first image's part of all patches."""
    grids = next((given[n] for n in ("image_grid_thw", "spatial_shapes", "target_sizes") if n in given), None)
    return 1 / BATCH if grids is None else float(grids[0].prod() / grids.prod(-1).sum())


def rows(features: Any) -> int:
    """How many vectors a tower made of all media."""
    if not isinstance(features, (Tensor, list, tuple)):
        features = features.pooler_output if features.pooler_output is not None else features.last_hidden_state
    if isinstance(features, (list, tuple)):
        return sum(rows(part) for part in features)
    return features.numel() // features.shape[-1]


def text(config: Any, names: tuple[str, ...], media: list[list[int]]) -> dict[str, Tensor]:
    """batch token; the media's ids inside, padding at the end of the second row."""
    length = BEFORE + max(map(len, media)) + AFTER
    high = min(VOCABULARY, getattr(config, "vocab_size", None) or VOCABULARY)
    ids, mask = torch.randint(FIRST_ID, high, (BATCH, length)), torch.ones(BATCH, length, dtype=torch.long)
    places = torch.zeros(BATCH, length, dtype=torch.long)
    for row, tokens in enumerate(media):
        ids[row, BEFORE : BEFORE + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        places[row, BEFORE : BEFORE + len(tokens)] = 1
    mask[1, BEFORE + len(media[1]) + AFTER // 2 :] = 0
    built = {"input_ids": ids}
    if "attention_mask" in names:
        built["attention_mask"] = mask
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            built[name] = places
    if "decoder_input_ids" in names:
        built["decoder_input_ids"] = torch.randint(FIRST_ID, VOCABULARY, (BATCH, AFTER))
    return built


def one_image_each(config: Any) -> dict[str, Tensor]:
    """batch image channel height width"""
    return {"pixel_values": vision.image(config)[:, None]}


def masked_tiles(config: Any) -> dict[str, Tensor]:
    """batch tile channel height width, the first image of one tile only."""
    height, width = vision.resolution(config)
    mask = torch.tensor([[True, False], [True, True]])
    return {"pixel_values": torch.randn(BATCH, 2, 3, height, width), "pixel_attention_mask": mask}


def tiles(config: Any) -> dict[str, Tensor]:
    """batch tile channel height width: the whole image and its two halves."""
    height, width = vision.resolution(config)
    sizes = torch.tensor([[height, 2 * width]] * BATCH)
    return {"pixel_values": torch.randn(BATCH, 3, 3, height, width), "image_sizes": sizes}


def sized_images(config: Any) -> dict[str, Tensor]:
    """Images with their height and width in pixels."""
    pixels = vision.image(config)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(pixels.shape[2:])] * BATCH)}


def two_resolutions(config: Any) -> dict[str, Tensor]:
    """Each image for a tower of low and one of high resolution."""
    return {"pixel_values": vision.image(config), "high_res_pixel_values": vision.image(config)}


def patch_rows(config: Any) -> dict[str, Tensor]:
    """batch patch value"""
    side = vision.field(config, "patch_size")
    return {"pixel_values": torch.randn(BATCH, 16, 3 * side**2)}


def pooled_positions(config: Any) -> dict[str, Tensor]:
    """Patches of pooled patches with each one's column and row."""
    config = config.vision_config
    side = config.patch_size * config.pooling_kernel_size
    places = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).expand(BATCH, -1, -1)
    return {"pixel_values": torch.rand(BATCH, 4, 3 * side**2), "image_position_ids": places}


def patches_end_to_end(config: Any) -> dict[str, Tensor]:
    """patch value"""
    return {"pixel_values": patch_rows(config)["pixel_values"].flatten(0, 1)}


def with_targets(config: Any) -> dict[str, Tensor]:
    """The patches of an image, and the grids of it and of the image that is to be made of it, for each row."""
    patches_ = vision.flat_patches(config)
    grids = patches_["grid_thw"].repeat_interleave(2, 0)
    return {
        "pixel_values": patches_["pixel_values"],
        "image_grid_thw": grids,
        "images_per_sample": torch.tensor([2, 2]),
    }


def pooled_patches(config: Any) -> dict[str, Tensor]:
    """Crops as rows of patches, and which four patches make each token."""
    side = vision.field(config, "patch_size")
    corner = torch.tensor([0, 2, 8, 10])
    pools = torch.stack([corner, corner + 1, corner + 4, corner + 5], -1)
    return {
        "pixel_values": torch.randn(BATCH, 16, 3 * side**2),
        "image_token_pooling": torch.cat([pools, pools + 16]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * BATCH),
        "image_num_crops": torch.ones(BATCH, dtype=torch.long),
    }


def folded_patches(config: Any) -> dict[str, Tensor]:
    """patch frame row column channel"""
    side, frames = vision.field(config, "patch_size"), vision.field(config, "temporal_patch_size")
    return {"pixel_values": torch.randn(BATCH * 4, frames, side, side, 3)}


def whole_sounds(config: Any) -> dict[str, Tensor]:
    """Spectrograms of one length."""
    return {
        "input_features": torch.randn(BATCH, audio.FRAMES, audio.BINS),
        "input_features_mask": torch.ones(BATCH, audio.FRAMES, dtype=torch.bool),
    }


def short_waveforms(config: Any) -> dict[str, Tensor]:
    """Waveforms of frames of 160 samples, the second shorter; encoded without the noise that is drawn otherwise."""
    mask = audio.mask(("padding_mask",), 3840)["padding_mask"].bool()
    return {"input_values": torch.randn(BATCH, 1, 3840), "padding_mask": mask, "sample": torch.tensor(False)}


def chunks(config: Any) -> dict[str, Tensor]:
    """Spectrograms, batch bin frame, with the number of samples of each."""
    lengths = torch.tensor([audio.FRAMES, audio.FRAMES * 3 // 4]) * 160
    bins = config.audio_config.feature_size
    return {"input_features": torch.randn(BATCH, bins, audio.FRAMES), "chunk_sample_lengths": lengths}


def masked_with_waveform(config: Any) -> dict[str, Tensor]:
    """Spectrograms with their mask and that of the waveforms they were made of."""
    built = {"input_features": torch.randn(BATCH, audio.BINS, audio.FRAMES)}
    return (
        built | audio.mask(("input_features_mask",), audio.FRAMES) | audio.mask(("padding_mask",), audio.FRAMES * 160)
    )


def windowed_spectrograms(config: Any) -> dict[str, Tensor]:
    """Spectrograms, and which of the features that windows of 15 frames make are of sound."""
    mask = torch.ones(BATCH, 21, dtype=torch.bool)
    mask[1, 16:] = False
    return {"input_features": torch.randn(BATCH, audio.FRAMES, audio.BINS), "input_features_mask": mask}


def spectrogram_per_token(config: Any) -> dict[str, Tensor]:
    """A token to every eight frames of sound."""
    words = text(config, ("attention_mask",), [[], []])
    return {"input_features": torch.randn(BATCH, audio.BINS, 8 * words["input_ids"].shape[1])} | words


MEDIA = {
    "image": ("pixel_values",),
    "audio": ("input_features", "input_values", "audio_input_ids"),
    "video": ("pixel_values_videos",),
}


def image_and_question(config: Any) -> dict[str, Tensor]:
    """Images, a question to the querying tower, and places for its queries in the text."""
    tokens = [config.image_token_index] * config.num_query_tokens
    return (
        {"pixel_values": vision.image(config)}
        | qformer_question(config)
        | text(config, ("attention_mask",), [tokens, tokens])
    )


def video_and_question(config: Any) -> dict[str, Tensor]:
    """Two frames each, with places for each frame's queries."""
    height, width = vision.resolution(config)
    tokens = [config.video_token_index] * config.num_query_tokens * 2
    video = {"pixel_values": torch.randn(BATCH, 2, 3, height, width)}
    return video | qformer_question(config) | text(config, ("attention_mask",), [tokens, tokens])


def qformer_question(config: Any) -> dict[str, Tensor]:
    """A question, where the querying tower takes one."""
    if config.model_type == "blip-2":
        return {}
    question = text(config, ("attention_mask",), [[], []])
    return {"qformer_" + name: value for name, value in question.items()}


def spectrogram_image_and_text(config: Any) -> dict[str, Tensor]:
    """A spectrogram as an image of one channel, and text."""
    sound = torch.randn(BATCH, 1, 256, 16)
    return {"input_features": sound, "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)} | text(
        config, ("attention_mask",), [[], []]
    )


def speech_and_text(config: Any) -> dict[str, Tensor]:
    """Speech as batch bin frame, of the bins its decoder takes, and text."""
    return {"input_features": torch.randn(BATCH, 80, 24)} | text(config, ("attention_mask",), [[], []])


def cross_attended_image(config: Any) -> dict[str, Tensor]:
    """Images that every token may attend to, in layers of their own."""
    words = text(config, ("attention_mask",), [[], []])
    seen = torch.ones(*words["input_ids"].shape, 1, dtype=torch.long)
    return one_image_each(config) | words | {"image_attention_mask": seen}


def cross_attended_tiles(config: Any) -> dict[str, Tensor]:
    """An image of two tiles and one of one, that some layers attend to."""
    words = text(config, ("attention_mask",), [[], []])
    height, width = vision.resolution(config)
    mask = torch.tensor([[[1, 1]], [[1, 0]]])
    return words | {
        "pixel_values": torch.randn(BATCH, 1, 2, 3, height, width),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": mask,
        "cross_attention_mask": mask[:, None].expand(-1, words["input_ids"].shape[1], -1, -1).contiguous(),
    }


def latent_queries(config: Any) -> dict[str, Tensor]:
    """An image whose latent queries replace the first tokens after the first."""
    words = text(config, ("attention_mask",), [[], []])
    mask = torch.zeros_like(words["input_ids"], dtype=torch.bool)
    mask[:, 1 : 1 + config.latent_query_num] = True
    if config.model_type == "kosmos-2":
        return words | {"pixel_values": vision.image(config), "image_embeds_position_mask": mask}
    rows, columns = torch.meshgrid(torch.arange(4.0) + 1, torch.arange(4.0) + 1, indexing="ij")
    patches = torch.randn(BATCH, 16, 3 * 16 * 16)
    places = torch.stack([rows.flatten(), columns.flatten()], -1).expand(BATCH, -1, -1)
    return words | {"flattened_patches": torch.cat([places, patches], -1), "image_embeds_position_mask": mask}


def words_and_boxes(config: Any) -> dict[str, Tensor]:
    """Words with their boxes on the page, and the page."""
    words = text(config, ("attention_mask", *(("decoder_input_ids",) if config.is_encoder_decoder else ())), [[], []])
    corner = torch.rand(*words["input_ids"].shape, 2) / 2
    box = torch.cat([corner, corner + torch.rand_like(corner) / 2], -1)
    if config.model_type != "udop":
        return words | {"bbox": (box * 100).long(), "pixel_values": vision.image(config)}
    return words | {"bbox": box, "pixel_values": vision.image(config)}


def regions(config: Any) -> dict[str, Tensor]:
    """Features and places of an image's regions, and text."""
    shape = BATCH, 6, config.visual_feat_dim
    return {"visual_feats": torch.randn(shape), "visual_pos": torch.rand(BATCH, 6, 4)} | text(
        config, ("attention_mask",), [[], []]
    )


def robot_state(config: Any) -> dict[str, Tensor]:
    """What a robot sees and is told, and its state and the actions to come."""
    pixels = vision.image(config)[:, None]
    token = config.vlm_config.image_token_id
    words = text(config, ("attention_mask",), [[token] * 16] * 2)
    return words | {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "action_embeds": torch.randn(BATCH, 8, config.dit_config.hidden_size),
    }


def frames_and_text(config: Any) -> dict[str, Tensor]:
    """batch frame channel height width, and text."""
    height, width = vision.resolution(config)
    frames = vision.field(config, "num_frames") or 2
    built = {"pixel_values": torch.randn(BATCH, frames, 3, height, width)} | text(config, ("attention_mask",), [[], []])
    # Its column embeddings are viewed as one of each row, which fails for more rows than one.
    return {name: value[:1] for name, value in built.items()} if config.model_type == "tvp" else built


def codebook_tokens(config: Any) -> dict[str, Tensor]:
    """batch token codebook"""
    return {"input_ids": torch.randint(0, 32, (BATCH, 16, config.num_codebooks))}


IMAGES: dict[str, Maker] = {
    **dict.fromkeys(("idefics", "idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert"), one_image_each),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), tiles),
    **dict.fromkeys(("lighton_ocr", "mistral3", "mistral_large4"), sized_images),
    **dict.fromkeys(("lfm2_vl", "siglip2"), vision.padded_patches),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), vision.strip_of_patches),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), vision.square_patches),
    **dict.fromkeys(("gemma4", "embedding_gemma2"), vision.placed_patches),
    "deepseek_vl_hybrid": two_resolutions,
    "emu3": sized_images,
    "granite_docling": masked_tiles,
    "fuyu": patch_rows,
    "gemma4_unified": pooled_positions,
    "glm_image": with_targets,
    "inkling2": vision.token_patches,
    "inkling_mm_model": folded_patches,
    "molmo2": pooled_patches,
    "neomme": patches_end_to_end,
}
SOUNDS: dict[str, Maker] = {
    **dict.fromkeys(("gemma4", "embedding_gemma2"), whole_sounds),
    **dict.fromkeys(("vibevoice", "vibevoice_asr"), short_waveforms),
    **dict.fromkeys(("granite_speech", "granite_speech_plus"), windowed_spectrograms),
    "dots3_note": chunks,
    "gemma4_unified": lambda config: {},  # images only: a configuration has either tower or neither
    "moss_transcribe_diarize": masked_with_waveform,
}

# How many tokens stand for media in each row, where the model's features can't be had beforehand.
COUNTS = {
    **dict.fromkeys((("audio", "granite_speech"), ("audio", "granite_speech_plus")), (21, 16)),
    ("audio", "musicflamingo"): (24, 18),
    ("audio", "qwen2_audio"): (24, 18),
    **dict.fromkeys((("audio", "vibevoice"), ("audio", "vibevoice_asr")), (24, 18)),
    ("image", "glm_image"): (16, 24),
    ("image", "hunyuan_vl"): (8, 10),
    ("image", "granite4_vision"): (14, 14),
    ("image", "t5gemma2"): (4, 4),
}
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("blip-2", "instructblip"), image_and_question),
    "instructblipvideo": video_and_question,
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), latent_queries),
    **dict.fromkeys(("layoutlmv3", "udop"), words_and_boxes),
    **dict.fromkeys(("tvp", "xclip"), frames_and_text),
    "clap": spectrogram_image_and_text,
    "clvp": speech_and_text,
    "csm": codebook_tokens,
    "idefics": cross_attended_image,
    "lxmert": regions,
    "mllama": cross_attended_tiles,
    "pi0": robot_state,
    "voxtral_realtime": spectrogram_per_token,
}
