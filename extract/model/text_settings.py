"""Read the settings in a sentence-transformers folder that determine how texts become ids.

sentence-transformers 6.2 reads the same files (`base/modules/transformer.py`, `base/model.py`): a settings file beside the
transformer, config_sentence_transformers.json and modules.json. attlas follows the settings that change ids or the encoder,
or refuses them by name. Settings that apply to a single call there, such as a prompt, are not applied and become notes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from attlas.extract.errors import Refusal
from attlas.extract.model.weights import read_json_object

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# sections of options: earlier names and today's
_SECTIONS = {"tokenizer_args": "processor_kwargs", "model_args": "model_kwargs", "config_args": "config_kwargs"}
_LOADING_OPTIONS = {
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
}
# how weights are stored and attention is computed, which attlas decides itself
_RUNTIME_OPTIONS = {
    "add_pooling_layer",
    "attn_implementation",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "output_attentions",
    "output_hidden_states",
    "torch_dtype",
    "use_cache",
    "use_safetensors",
}
_PADDING_OPTIONS = {
    "logits_to_keep",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
    "truncation",
}
# what from_pretrained takes for itself: other files, code of the hub, and where weights are put
_FORBIDDEN_OPTIONS = {
    "adapter_kwargs",
    "adapter_name",
    "allow_all_kernels",
    "auto_map",
    "device_mesh",
    "distributed_config",
    "generation_config",
    "gguf_file",
    "kernel_config",
    "key_mapping",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "quantization_config",
    "state_dict",
    "subfolder",
    "tp_plan",
    "tp_size",
    "tqdm_class",
    "transformers_weights",
    "use_kernels",
    "variant",
}
_PER_CALL_SETTINGS = ("query_length", "document_length", "query_expansion")
_IGNORED_SETTINGS = {
    "module_output_name",
    "transformer_task",
    "unpad_inputs",
    "backend",
    *_PER_CALL_SETTINGS,
    *_LOADING_OPTIONS,
}
FileLookup = Callable[[str], Path | None]


@dataclass(frozen=True)
class TextSettings:
    """How texts become ids: the options of a sentence-transformers folder, or none for any other model."""

    from_sentence_transformers: bool = False
    lower_case: bool = False
    max_length: int | None = None
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    config_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # settings that attlas does not apply


def folder_lookup(folder: Path) -> FileLookup:
    """Look up files in a folder by name."""
    return lambda name: folder / name if (folder / name).is_file() else None


def read_text_settings(model_files: FileLookup, root_files: FileLookup) -> TextSettings:
    """Read the settings beside the transformer and in the root of its folder. Raises Refusal."""
    modules = root_files(MODULES)
    file = next((path for name in SETTINGS if (path := model_files(name)) is not None), None)
    notes = tuple(_prompt_notes(root_files(PROMPTS)))
    if file is None:
        return TextSettings(from_sentence_transformers=modules is not None, notes=notes)
    settings = {_SECTIONS.get(name, name): value for name, value in read_json_object(file).items()}
    sections = {name: _section(file, settings.pop(name, None), name) for name in _SECTIONS.values()}
    processing = _section(file, settings.pop("processing_kwargs", None), "processing_kwargs")
    lengths = (
        _processing_length(file, processing),
        sections["processor_kwargs"].get("model_max_length"),
        settings.pop("max_seq_length", None),
    )
    lower_case = settings.pop("do_lower_case", False)
    _check(file, "do_lower_case", lower_case, isinstance(lower_case, bool | None), "true or false")
    _refuse_model_options(file, sections["model_kwargs"])
    if settings.pop("tokenizer_name_or_path", None):
        _refuse(file, "tokenizer_name_or_path", "a tokenizer must be in its model's folder", "copy it there")
    length = next((n for n in lengths if n), None)
    _check(file, "max_seq_length", length, length is None or (type(length) is int and length > 0), "a whole number")
    return TextSettings(
        from_sentence_transformers=True,
        lower_case=bool(lower_case),
        max_length=length,
        tokenizer_options=_forwarded_options(
            file, "processor_kwargs", sections["processor_kwargs"], {"model_max_length"}
        ),
        config_options=_forwarded_options(file, "config_kwargs", sections["config_kwargs"], _RUNTIME_OPTIONS),
        notes=(*notes, *_settings_notes(file, settings)),
    )


def _section(file: Path, value: Any, name: str) -> dict[str, Any]:
    _check(file, name, value, value is None or isinstance(value, dict), "a JSON object")
    return dict(value or {})


def _processing_length(file: Path, sections: Mapping[str, Any]) -> int | None:
    """The maximum length in the options for the tokenizer's call; refuses options that change ids in other ways."""
    length = None
    for name in ("common", "text"):
        options = _section(file, sections.get(name), name)
        length = options.pop("max_length", None) or length
        for option in sorted(set(options) - _PADDING_OPTIONS):
            _refuse(
                file,
                f"processing_kwargs.{name}.{option}",
                "attlas uses the tokenizer's own defaults",
                "remove the option",
            )
    return length


def _refuse_model_options(file: Path, options: Mapping[str, Any]) -> None:
    for name in sorted(set(options) - _LOADING_OPTIONS - _RUNTIME_OPTIONS):
        _refuse(
            file,
            f"model_kwargs.{name}",
            "config.json and the weights alone define the model",
            "move the option to config.json",
        )


def _forwarded_options(file: Path, section: str, options: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """The options to pass on to transformers, without those about where and how to load."""
    forwarded = {name: value for name, value in options.items() if name not in _LOADING_OPTIONS | ignored}
    for name in sorted(forwarded):
        if name in _FORBIDDEN_OPTIONS or name.endswith(
            ("_file", "_path", "_class", "_type", "_implementation", "_internal")
        ):
            _refuse(
                file, f"{section}.{name}", "a folder's settings can't name other files or classes", "remove the option"
            )
    return forwarded


def _settings_notes(file: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    if "message" in (settings.get("modality_config") or {}):
        yield f"{file.name} puts texts into a chat template; attlas measures them without it"
    per_call = [name for name in _PER_CALL_SETTINGS if settings.get(name)]
    if per_call:
        yield f"{file.name} sets {', '.join(per_call)} for single calls; attlas treats all texts alike"
    unknown = sorted(set(settings) - _IGNORED_SETTINGS - {"modality_config"})
    if unknown:
        yield f"{file.name} sets {', '.join(unknown)}, which attlas does not know and ignores"


def _prompt_notes(file: Path | None) -> Iterator[str]:
    settings = {} if file is None else read_json_object(file)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    if name is not None and prompt:
        yield (
            f"{PROMPTS} puts the prompt {name!r}, {json.dumps(prompt, ensure_ascii=False)}, before every text; "
            "attlas measures texts without it; add it to the documents to measure it too"
        )


def _check(file: Path, name: str, value: Any, valid: bool, kind: str) -> None:
    if not valid:
        raise Refusal(f"{name} in {file.name} must be {kind}; that of {file.parent} is {value!r}; correct it")


def _refuse(file: Path, name: str, rule: str, remedy: str) -> NoReturn:
    raise Refusal(f"{rule}; {file} sets {name}; {remedy}")
