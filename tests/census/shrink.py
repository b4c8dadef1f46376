"""Tiny configurations of any architecture, which run in milliseconds."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEADS, LAYERS, VOCABULARY = 4, 2, 128
MAX_KINDS = 6  # a list with more different values is not a list of layer kinds

# every tower gets the same width, so that projections between them fit; sizes of zero or None are kept
EXACTLY = """
    32 hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim model_dim hidden_dim
    32 projection_dim out_hidden_size text_hidden_size encoder_hidden_size decoder_hidden_size projector_hidden_size
    32 cross_attention_hidden_size cross_hidden_size backbone_hidden_size moe_hidden_size hidden_size_per_layer_input
    32 pronunciation_embed_dim shape_embed_dim vision_hidden_size audio_hidden_size image_hidden_size text_embed_dim
    32 entity_emb_size d_embed embedding_dim encoder_dim decoder_dim attention_hidden_size lru_width text_dim vision_dim
"""

# upper limits: a model with two heads or one key-value head keeps them
AT_MOST = """
    64 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner mlp_dim intermediate_dim mlp_hidden_size
    64 shared_intermediate_size dense_intermediate_size intermediate_size_mlp ffn_hidden_size ffn_intermediate_size
    64 decoder_intermediate_size encoder_intermediate_size mlp_intermediate_size
    32 moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size
    32 expert_ffn_size moe_shared_expert_intermediate_size expert_intermediate_size moe_latent_size expert_dim
    4 num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
    4 decoder_num_attention_heads encoder_num_attention_heads num_linear_attention_heads num_encoder_attention_heads
    4 num_decoder_attention_heads cross_num_attention_heads linear_num_value_heads mamba_num_heads mamba_n_heads
    4 swa_num_attention_heads encoder_num_heads
    2 num_key_value_heads num_kv_heads kv_n_heads encoder_num_key_value_heads decoder_num_key_value_heads n_head_kv
    2 num_linear_key_value_heads linear_num_key_heads index_n_heads num_global_key_value_heads num_query_groups
    2 swa_num_key_value_heads cross_num_key_value_heads multi_query_group_num
    8 head_dim d_kv attention_head_dim attention_head_size kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim
    8 qk_head_dim global_head_dim linear_key_head_dim linear_value_head_dim index_head_dim swa_head_dim swa_v_head_dim
    8 cross_head_dim d_head kv_dim key_dim linear_head_dim query_pre_attn_scalar attention_key_size head_size
    8 size_per_head rotary_dim ssm_state_size state_size mamba_d_state
    2 num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers
    2 num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers encoder_depth decoder_depth
    128 max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_source_positions seq_length
    128 max_target_positions max_length original_max_position_embeddings max_encoder_position_embeddings
    128 max_2d_position_embeddings max_decoder_position_embeddings relative_attention_max_distance
    128 vocab_size decoder_vocab_size encoder_vocab_size text_vocab_size src_vocab_size tgt_vocab_size
    128 vocab_size_per_layer_input entity_vocab_size shape_vocab_size pronunciation_vocab_size
    8 sliding_window window_size attention_window attention_window_size index_topk chunk_size mamba_chunk_size
    8 attention_chunk_size
    4 num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts num_experts_in_group
    2 num_experts_per_tok moe_topk moe_k top_k num_experts_per_token experts_per_token n_group num_expert_group
    2 moe_top_k top_k_experts
    1 topk_group first_k_dense_replace mlp_only_layers num_dense_layers moe_layer_start_index
    16 kv_lora_rank q_lora_rank o_lora_rank
"""

FIXED: dict[str, Any] = {"use_cache": False, "router_aux_loss_coef": 0.0}

# special tokens are below FIRST_ID, where ordinary ids start; a name has the same id in every sub-config
FIRST_ID = 32
TOKENS = {"bos": 0, "pad": 1, "eos": 2, "decoder_start": 2, "sep": 2, "image": 3, "video": 4, "audio": 5, "unk": 6}


def shrink_config(
    model_type: str, exceptions: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Any]
) -> PreTrainedConfig:
    """A tiny configuration of `model_type`, with the overrides of `exceptions[model_type]`."""
    return _shrink(CONFIG_MAPPING[model_type], {}, {}, exceptions, sizes)


def _shrink(cls, given: Mapping[str, Any], preset: Mapping[str, Any], exceptions, sizes) -> PreTrainedConfig:
    defaults = {**_defaults(cls), **preset}
    wanted = deepcopy({**exceptions.get(cls.model_type, {}), **given})  # configurations modify their arguments
    values = {name: value for name in defaults if (value := _size(name, defaults[name], sizes)) is not None}
    values |= _heads(defaults) | _tokens(defaults)
    for name, spec in cls.sub_configs_defaults.items():
        if not spec.optional or name in wanted:
            values[name] = _shrink(*_part(spec, wanted.get(name)), exceptions, sizes)
    wanted = {name: value for name, value in wanted.items() if name not in cls.sub_configs_defaults}
    return cls(**{**preset, **values, **_layers(cls, wanted), **wanted})


def _defaults(cls) -> dict[str, Any]:
    """Every field and its default; transformers' `default_config_fields` omits those that are None."""
    defaults = {f.name: f.default for f in fields(cls) if f.init}
    return {name: None if default is MISSING else default for name, default in defaults.items()}


def _part(spec, given: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """A sub-config's class, its overrides, and its parent's presets, which are shrunk like defaults."""
    given = dict(given or {})
    preset = {name: value for name, value in spec.init_kwargs.items() if name != "model_type"}
    model_type = given.pop("model_type", spec.model_type)
    named = issubclass(spec.config_class, PreTrainedConfig)
    cls = spec.config_class if named else CONFIG_MAPPING[model_type]
    return cls, given, preset if model_type == spec.model_type else {}


def _size(name: str, default: Any, sizes: Mapping[str, Any]) -> Any:
    if name in sizes and default is not None and isinstance(default, (list, tuple)) == isinstance(sizes[name], list):
        return sizes[name]
    if name in FIXED:
        return FIXED[name]
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return None
    if name in (exactly := _table(EXACTLY)) and default:
        return exactly[name]
    return min(default, at_most[name]) if name in (at_most := _table(AT_MOST)) else None


@cache
def _table(text: str) -> dict[str, int]:
    return {name: int(size) for size, *names in map(str.split, text.strip().splitlines()) for name in names}


def _heads(defaults: Mapping[str, Any]) -> dict[str, int]:
    """As many key-value heads as heads if that is the default."""
    heads, shared = defaults.get("num_attention_heads"), defaults.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and shared >= heads:
        return {"num_key_value_heads": min(heads, HEADS)}
    return {}


def _tokens(defaults: Mapping[str, Any]) -> dict[str, int]:
    tokens, other = {}, max(TOKENS.values()) + 1
    for name, default in sorted(defaults.items()):
        stem, _, end = name.rpartition("_token_")
        if end not in ("id", "index", "ids") or default is None:
            continue
        if stem not in TOKENS:
            other += 1
        tokens[name] = TOKENS.get(stem, other)
    return tokens


def _layers(cls, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind if the default configuration lists the kinds of its layers, but at least LAYERS."""
    default_config, defaults = cls(), _defaults(cls)
    depth, name = (
        getattr(default_config, "num_hidden_layers", None),
        cls.attribute_map.get("num_hidden_layers", "num_hidden_layers"),
    )
    lists = {
        n: v
        for n, v in vars(default_config).items()
        if n in defaults and isinstance(v, (list, tuple)) and len(v) == depth
    }
    kept = {kinds.index(kind) for kinds in lists.values() if len(_kinds(kinds)) <= MAX_KINDS for kind in _kinds(kinds)}
    if name in wanted or not depth or not kept:
        return {}
    spare = (layer for layer in reversed(range(depth)) if layer not in kept)
    while len(kept) < min(LAYERS, depth):
        kept.add(next(spare))
    return {n: type(v)(v[i] for i in sorted(kept)) for n, v in lists.items()} | {name: len(kept)}


def _kinds(kinds) -> list[Any]:
    return [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
