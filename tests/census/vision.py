"""Inputs and exceptions for architectures that take images or video."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, IMAGE, PATCHES, FRAMES = 2, 32, 4, 4
Maker = Callable[[Any], dict[str, Tensor]]

# What configurations of vision towers share: 4 x 4 patches.
SIZES: dict[str, Any] = {
    "image_size": IMAGE,
    "patch_size": 8,
    "num_queries": 8,
    "num_frames": FRAMES,
    "num_position_embeddings": 64,
    "num_denoising": 0,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
}

# Pyramids halve their resolution three times: they start from 64 x 64 pixels, and from windows smaller than that.
PYRAMID = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
REDUCED = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 4, 4]}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
HGNET = {
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 32, 32],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 32, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    **CONVOLUTIONS,
    "hidden_sizes": [16, 32, 32, 32],
}
RESNET = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}
DETECTOR = {
    "encoder_in_channels": [32, 32, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_hidden_dim": 32,
    "feat_strides": [8, 16, 32],
}
# A pyramid of three maps of 8 x 8, 4 x 4 and 2 x 2 patches for SAM's neck.
HIERA = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 4],
    "window_size_per_stage": [4, 2, 2, 2],
    "global_attention_blocks": [3],
}
SAM_NECK = {
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 32,
}

SWIN = {"model_type": "swin", "depths": [2, 1, 1, 1], "embed_dim": 8, "num_heads": [1, 2, 4, 4]}
DINO = {"model_type": "dinov2", "image_size": IMAGE, "patch_size": 8, "out_indices": None}
SAM_VIT = {"window_size": 2, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16}
SAM3_VIT = {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": IMAGE}
SAM_PROMPT = {"image_size": IMAGE, "patch_size": 8, "mask_input_channels": 4}
SAM_VIDEO = {
    "image_size": IMAGE,
    "mask_downsampler_total_stride": 8,
    **dict.fromkeys(("memory_attention_hidden_size", "memory_encoder_hidden_size", "memory_fuser_embed_dim"), 32),
    "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32,
    "memory_attention_num_layers": 2,
    "memory_fuser_intermediate_dim": 32,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [4, 4],
}
WINDOWED = {"window_size": 32}  # in pixels: two merged patches
DETR_BACKBONE = {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}
STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}

# What the common sizes get wrong, by model_type; a sub-config's own model_type counts too.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bit": {**CONVOLUTIONS, "num_groups": 4},
    "conditional_detr": DETR_BACKBONE,
    "convnext": {**STAGES, "image_size": 64, "patch_size": 4},
    "convnextv2": {**STAGES, "image_size": 64, "patch_size": 4},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "d_fine": DETECTOR,
    "dab-detr": DETR_BACKBONE,
    "deformable_detr": {"backbone_config": RESNET, "encoder_n_points": 2, "num_feature_levels": 3},
    "deimv2": DETECTOR,
    "depth_pro": {
        "patch_size": IMAGE,
        "image_model_config": DINO,
        "patch_model_config": DINO,
        "fov_model_config": DINO,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [16, 16, 16],
        "fusion_hidden_size": 16,
        "merge_padding_value": 1,
    },
    "detr": DETR_BACKBONE,
    "dinov3_convnext": STAGES,
    "donut-swin": PYRAMID,
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1, 1],
        "out_features": [16, 16, 16, 32],
        "num_attention_layers": 2,
        "num_attention_heads": 8,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "exaone4_5_vision": WINDOWED,
    "focalnet": {**PYRAMID, "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 16},
    "glpn": REDUCED,
    "hgnet_v2": HGNET,
    "hiera": {"embed_dim": 8, "image_size": [64, 64], "patch_size": [7, 7], "depths": [1, 1, 1, 1]},
    "inkling2_vision": {"posemb_grid_size": 8, "projection_hidden_dim": 32},
    **{
        name: {"image_size": [IMAGE, IMAGE], "patch_size": [8, 8]} for name in ("internvl_vision", "qianfan_ocr_vision")
    },
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "levit": {
        "image_size": 128,
        "patch_size": 16,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 4, 6],
        "depths": [1, 1, 1],
    },
    "lightglue": {"descriptor_dim": 32},
    "lw_detr": {"projector_scale_factors": [1.0], "projector_out_channels": 32, "group_detr": 2},
    "lw_detr_vit": {
        "image_size": 64,
        "pretrain_image_size": 64,
        "window_block_indices": [0],
        "num_windows": 4,
        "out_indices": [1, 2],
    },
    "mask2former": {
        "backbone_config": SWIN,
        "feature_size": 32,
        "mask_feature_size": 32,
        "encoder_feedforward_dim": 64,
    },
    "maskformer": {"backbone_config": SWIN, "fpn_feature_size": 32, "mask_feature_size": 32},
    "maskformer-swin": PYRAMID,
    "mgp-str": {"image_size": [32, 64], "num_bpe_labels": 64, "num_wordpiece_labels": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
    },
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "base_attn_unit_dims": [16, 24, 32], "width_multiplier": 0.25},
    "oneformer": {
        "task_seq_len": 9,
        "text_encoder_width": 32,
        "text_encoder_context_length": 9,
        "text_encoder_num_layers": 2,
        "text_encoder_vocab_size": 128,
        "text_encoder_n_ctx": 4,
        "backbone_config": SWIN,
        "conv_dim": 32,
        "mask_dim": 32,
        "encoder_feedforward_dim": 64,
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "poolformer": STAGES,
    "pp_doclayout_v3": {**DETECTOR, "x4_feat_dim": 16, "mask_feature_channels": [16, 16], "num_prototypes": 8},
    "pp_doclayout_v4": DETECTOR,
    "pp_lcnet_v3": {"scale": 0.25},
    "pp_lcnet_v4": {"scale": 0.25},
    "pp_ocrv5_mobile_rec": {"head_out_channels": 64},
    "pp_ocrv5_server_rec": {"head_out_channels": 64},
    "pp_ocrv6_small_det": {"layer_list_out_channels": [16, 32, 64, 128]},
    "pp_ocrv6_small_rec": {"head_out_channels": 64},
    "pp_ocrv6_tiny_rec": {"head_out_channels": 64},
    "pvt": {**REDUCED, "image_size": 64},
    "pvt_v2": {**REDUCED, "image_size": [64, 64]},
    "qwen2_5_vl_vision": WINDOWED,
    "qwen2_5_omni_vision_encoder": WINDOWED,
    "regnet": {**CONVOLUTIONS, "groups_width": 8},
    "resnet": {**CONVOLUTIONS, "layer_type": "basic"},
    "rf_detr": {"backbone_config": {"model_type": "rf_detr_dinov2"}, "group_detr": 2},
    "rf_detr_dinov2": {"image_size": 64, "num_windows": 2, "window_block_indexes": [0], "out_indices": [1, 2]},
    "rt_detr": DETECTOR,
    "rt_detr_resnet": {**CONVOLUTIONS, "layer_type": "basic"},
    "rt_detr_v2": DETECTOR,
    "sam2_hiera_det_model": HIERA,
    "sam2_vision_model": SAM_NECK,
    "sam2_video": SAM_VIDEO,
    "sam3_tracker_video": SAM_VIDEO,
    "edgetam_video": {
        **SAM_VIDEO,
        "perceiver_resampler_num_latents": 8,
        "perceiver_resampler_num_latents_2d": 4,
        "perceiver_resampler_hidden_size": 16,
        "perceiver_resampler_attention_head_dim": 16,
        "perceiver_resampler_mlp_intermediate_size": 32,
    },
    "sam3_vision_model": {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_vit_model": SAM3_VIT,
    **dict.fromkeys(("sam_vision_model", "sam_hq_vision_model"), SAM_VIT),
    **dict.fromkeys(
        [
            f"{sam}_prompt_encoder"
            for sam in (
                "sam",
                "sam_hq",
                "sam2",
                "sam2_video",
                "sam3_tracker",
                "sam3_tracker_video",
                "edgetam",
                "edgetam_video",
            )
        ],
        SAM_PROMPT,
    ),
    "sam_hq_mask_decoder": {"vit_dim": 32},
    "sapiens2": {
        "num_key_value_heads_per_layer": [4, 2],
        "num_key_value_attention_heads": 2,
        "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 0,
    },
    "segformer": REDUCED,
    "seggpt": {
        "image_size": [64, 32],
        "pretrain_image_size": 32,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [0, 1],
    },
    "superpoint": {
        "encoder_hidden_sizes": [16, 16, 16, 16],
        "descriptor_decoder_dim": 32,
        "max_keypoints": 12,
        "keypoint_threshold": 0.0,
        "border_removal_distance": 1,
    },
    "swiftformer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "image_size": 64},
    "swin": PYRAMID,
    "swin2sr": {**PYRAMID, "image_size": 16, "patch_size": 1},
    "swinv2": {**PYRAMID, "pretrained_window_sizes": [0, 0]},
    "table-transformer": DETR_BACKBONE,
    "textnet": {"hidden_sizes": [8, 8, 16, 16, 32], "stem_out_channels": 8, "image_size": [64, 64]},
    "uvdoc": {
        "backbone_config": {"out_features": [f"stage{i + 1}" for i in range(6)]},
        "bridge_connector": [16, 16],
        "out_point_positions2D": [[16, 8], [8, 2]],
    },
    "uvdoc_backbone": {
        "resnet_head": [[3, 8], [8, 8]],
        "resnet_configs": [[[8, 8, 1, False]], [[8, 16, 1, True]], [[16, 16, 1, True]]],
        "stage_configs": [[[16, 1]], [[16, 2]], [[16, 5]], [[16, 8]], [[16, 12]], [[16, 18]]],
    },
    "videoprism_vision_model": {"tubelet_size": [1, 8, 8], "num_spatial_layers": 2, "num_temporal_layers": 2},
    "vitdet": {"window_size": 2, "window_block_indices": [0], "pretrain_image_size": IMAGE},
    "vivit": {"tubelet_size": [2, 8, 8]},
    "vjepa2": {
        "crop_size": IMAGE,
        "frames_per_clip": FRAMES,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "num_pooler_layers": 1,
    },
    "yolos": {"image_size": [32, 48], "num_detection_tokens": 5},
}


def inputs(model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """Two different images or videos, as the architecture takes them."""
    from tests.census.tiny import forward_parameters

    config, names = model.config, forward_parameters(type(model))
    if model_type in NOT_BUILT:
        raise NotImplementedError(NOT_BUILT[model_type])
    if model_type in MAKERS:
        return MAKERS[model_type](config)
    if "grid_thw" in names:
        return rename_inputs(flat_patches(config), names)
    if "pixel_values_videos" in names:
        return {"pixel_values_videos": video(config)}
    return {"pixel_values": image(config)}


def rename_inputs(made: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Patches end to end under the names an architecture has for them, without what it does not take."""
    others = {"pixel_values": "hidden_states", "grid_thw": "image_grid_thw", "merge_sizes": "image_merge_sizes"}
    others["pixel_position_ids"] = "image_position_ids"
    taken = {name if name in names else others.get(name, name): value for name, value in made.items()}
    return {name: value for name, value in taken.items() if name in names}


def image(config: Any) -> Tensor:
    """batch channel height width"""
    height, width = resolution(config)
    return torch.randn(BATCH, channels(config), height, width)


def video(config: Any) -> Tensor:
    """batch frame channel height width"""
    height, width = resolution(config)
    frames = field(config, "num_frames", "frames_per_clip") or FRAMES
    return torch.randn(BATCH, frames, channels(config), height, width)


def flat_patches(config: Any) -> dict[str, Tensor]:
    """Two images, of 4 x 4 and of 4 x 6 patches, end to end, as towers of varying resolution take them."""
    side, frames = pair(field(config, "patch_size"))[0], field(config, "temporal_patch_size", "patch_temporal") or 1
    grid = torch.tensor([[1, PATCHES, PATCHES], [1, PATCHES, PATCHES + 2]])
    patches = torch.randn(int(grid.prod(-1).sum()), channels(config) * frames * side**2)
    return {"pixel_values": patches, "grid_thw": grid, "merge_sizes": torch.full((BATCH,), 2)}


def resolution(config: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    return pair(field(config, "image_size", "crop_size", "input_size") or 64)


def channels(config: Any) -> int:
    """The number of channels of an image."""
    count = field(config, "num_channels", "in_channels", "in_chans")
    return count if isinstance(count, int) else 3


def field(config: Any, *names: str) -> Any:
    """The first of these fields that the configuration or one of its towers has."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for tower in ("vision_config", "backbone_config", "encoder_config", "image_config", "encoder", "vlm_config"):
        part = getattr(config, tower, None)
        if part is not None and (value := field(part, *names)) is not None:
            return value
    return None


def pair(value: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (value, value) if isinstance(value, int) else tuple(value)[-2:]


def pair_of_images(config: Any) -> dict[str, Tensor]:
    """Two pairs of images whose points are matched."""
    return {"pixel_values": torch.rand(BATCH, 2, 3, 128, 128)}


def padded_patches(config: Any) -> dict[str, Tensor]:
    """Images as rows of patches, the second image smaller and padded."""
    side = field(config, "patch_size")
    mask = torch.ones(BATCH, PATCHES**2, dtype=torch.long)
    mask[1, PATCHES * 2 :] = 0
    return {
        "pixel_values": torch.randn(BATCH, PATCHES**2, 3 * side**2),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[PATCHES, PATCHES], [2, PATCHES]]),
    }


def placed_patches(config: Any) -> dict[str, Tensor]:
    """Images as rows of patches with each patch's column and row."""
    side = field(config, "patch_size")
    rows, columns = torch.meshgrid(torch.arange(PATCHES), torch.arange(PATCHES), indexing="ij")
    positions = torch.stack([columns.flatten(), rows.flatten()], -1).repeat(BATCH, 1, 1)
    return {"pixel_values": torch.rand(BATCH, PATCHES**2, 3 * side**2), "pixel_position_ids": positions}


def strip_of_patches(config: Any) -> dict[str, Tensor]:
    """All images' patches side by side in one strip, with each image's size in patches."""
    side = field(config, "patch_size")
    return {
        "pixel_values": torch.randn(1, 3, side, side * BATCH * PATCHES**2),
        "target_sizes": torch.tensor([[PATCHES, PATCHES]] * BATCH),
    }


def square_patches(config: Any) -> dict[str, Tensor]:
    """Two images' patches end to end, each patch a small image."""
    side = field(config, "patch_size")
    return {
        "pixel_values": torch.randn(BATCH * PATCHES**2, 3, side, side),
        "grid_thw": torch.tensor([[1, PATCHES, PATCHES]] * BATCH),
    }


def token_patches(config: Any) -> dict[str, Tensor]:
    """Two images' patches end to end, as many as tokens of a language model, channels last."""
    side = field(config, "patch_size") * field(config, "spatial_merge_size")
    return {
        "pixel_values": torch.rand(BATCH * PATCHES**2, side, side, 3) * 2 - 1,
        "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]] * BATCH),
    }


def image_prompt(config: Any) -> dict[str, Tensor]:
    """An image, and an image and its segmentation to imitate."""
    height, width = resolution(config)
    shape = BATCH, 3, height // 2, width
    return {name: torch.randn(shape) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def image_and_noise(config: Any) -> dict[str, Tensor]:
    """Images with the noise that chooses the patches to hide, which would be random otherwise."""
    return {"pixel_values": image(config), "noise": torch.rand(BATCH, PATCHES**2)}


def latents(config: Any) -> dict[str, Tensor]:
    """Features that latents attend to."""
    mask = torch.ones(BATCH, 24, dtype=torch.long)
    mask[1, -7:] = 0
    return {"inputs": torch.randn(BATCH, 24, config.d_model), "attention_mask": mask}


def queries(config: Any) -> dict[str, Tensor]:
    """Queries that attend to themselves and to an encoder's states."""
    config = config
    return {
        "query_embeds": torch.randn(BATCH, 5, config.hidden_size),
        "encoder_hidden_states": torch.randn(BATCH, 9, config.encoder_hidden_size),
    }


def points(config: Any) -> dict[str, Tensor]:
    """Images with two points each that say what to segment."""
    return {
        "pixel_values": image(config),
        "input_points": torch.rand(BATCH, 1, 2, 2) * IMAGE,
        "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.long),
    }


def image_and_task(config: Any) -> dict[str, Tensor]:
    """Images with the words of a task."""
    return {"pixel_values": image(config), "task_inputs": torch.randint(2, 128, (BATCH, config.task_seq_len))}


def tall_image(config: Any) -> dict[str, Tensor]:
    """A line of text, high enough for five halvings and a window of three."""
    return {"pixel_values": torch.randn(BATCH, 3, 96, 96)}


def classes_and_tasks(config: Any) -> dict[str, Tensor]:
    """Images with the names of one and of two classes to find in them."""
    ones = torch.ones(3, 7, dtype=torch.long)
    return {
        "pixel_values": image(config),
        "classes_input_ids": torch.randint(32, 128, (3, 7)),
        "classes_attention_mask": ones,
        "tasks_input_ids": torch.randint(32, 128, (BATCH, 7)),
        "tasks_attention_mask": ones[:BATCH],
        "classes_structure": torch.tensor([1, 2]),
    }


SESSION = "takes a session with a video's memory, not tensors"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_video"), SESSION),
}

# Architectures whose forward pass takes something of its own.
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("timesformer", "videomae", "vivit"), lambda config: {"pixel_values": video(config)}),
    **dict.fromkeys(("lightglue", "efficientloftr"), pair_of_images),
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_7_vision"), strip_of_patches),
    **dict.fromkeys(("sam", "sam_hq", "sam2", "sam3_tracker"), points),
    "blip_2_qformer": queries,
    "depth_pro": lambda config: {"pixel_values": torch.randn(BATCH, 3, 4 * IMAGE, 4 * IMAGE)},
    "gemma4_vision": placed_patches,
    "inkling2_vision": token_patches,
    "kimi_k25_vision": square_patches,
    "omdet-turbo": classes_and_tasks,
    "oneformer": image_and_task,
    "perceiver": latents,
    "pp_ocrv5_mobile_rec": tall_image,
    "seggpt": image_prompt,
    "siglip2_vision_model": padded_patches,
    "vit_mae": image_and_noise,
}
