"""What a sentence-transformers folder says, beside its tokenizer, of how texts become ids.

sentence-transformers reads these files (6.2, `base/modules/transformer.py` and `base/model.py`): a settings file beside the
transformer, config_sentence_transformers.json and modules.json. What changes ids or the encoder is honoured, or refused by
name; what belongs to a single call of theirs, such as a prompt, is not applied and said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from extract.errors import Refusal
from extract.model.weights import read_json_object

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
# options of the library's own, each under its name of today, and those of earlier versions
_SECTIONS = {"tokenizer_args": "processor_kwargs", "model_args": "model_kwargs", "config_args": "config_kwargs"}
_OF_LOADING = {
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
# how weights are held and attention is computed: an attlas run says that itself
_OF_RUNNING = {
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
_OF_PADDING = {
    "logits_to_keep",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
    "truncation",
}
_NEVER_FROM_A_FOLDER = {"auto_map", "gguf_file", "quantization_config", "subfolder", "transformers_weights"}
_PER_CALL = ("query_length", "document_length", "query_expansion")
_WITHOUT_EFFECT = {"module_output_name", "transformer_task", "unpad_inputs", "backend", *_PER_CALL, *_OF_LOADING}
Lookup = Callable[[str], Path | None]


@dataclass(frozen=True)
class TextSettings:
    """How texts become ids. `theirs`: the folder is one of sentence-transformers."""

    theirs: bool = False
    lower_case: bool = False
    max_length: int | None = None
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    config_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the folder says and attlas does not do


def in_folder(folder: Path) -> Lookup:
    """Files of a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def read_text_settings(of_model: Lookup, of_root: Lookup) -> TextSettings:
    """The settings, from the files beside the transformer and those of the whole folder. Raises Refusal."""
    modules = of_root(MODULES)
    file = next((found for name in SETTINGS if (found := of_model(name)) is not None), None)
    notes = tuple(_notes_of_prompts(of_root(PROMPTS)))
    if file is None:
        return TextSettings(theirs=modules is not None, notes=notes)
    held = {_SECTIONS.get(name, name): value for name, value in read_json_object(file).items()}
    sections = {name: _section(file, held.pop(name, None), name) for name in _SECTIONS.values()}
    processing = _of_processing(file, _section(file, held.pop("processing_kwargs", None), "processing_kwargs"))
    lower_case, length = held.pop("do_lower_case", False), held.pop("max_seq_length", None)
    _check(file, "do_lower_case", lower_case, isinstance(lower_case, bool | None), "true or false")
    _refuse_model_options(file, sections["model_kwargs"])
    if held.pop("tokenizer_name_or_path", None):
        _refuse(file, "tokenizer_name_or_path", "a tokenizer lies in its model's folder", "copy it there")
    length = next((n for n in (processing, sections["processor_kwargs"].get("model_max_length"), length) if n), None)
    _check(file, "max_seq_length", length, length is None or (type(length) is int and length > 0), "a whole number")
    return TextSettings(
        theirs=True,
        lower_case=bool(lower_case),
        max_length=length,
        tokenizer_options=_passed_on(file, "processor_kwargs", sections["processor_kwargs"], {"model_max_length"}),
        config_options=_passed_on(file, "config_kwargs", sections["config_kwargs"], _OF_RUNNING),
        notes=(*notes, *_notes_of_settings(file, held)),
    )


def _section(file: Path, held: Any, name: str) -> dict[str, Any]:
    _check(file, name, held, held is None or isinstance(held, dict), "a JSON object")
    return dict(held or {})


def _of_processing(file: Path, sections: Mapping[str, Any]) -> int | None:
    """The longest text that options of the tokenizer's call say, refusing those that change ids otherwise."""
    length = None
    for name in ("common", "text"):
        options = _section(file, sections.get(name), name)
        length = options.pop("max_length", None) or length
        for option in sorted(set(options) - _OF_PADDING):
            _refuse(file, f"processing_kwargs.{name}.{option}", "attlas makes ids as the tokenizer does", "take it out")
    return length


def _refuse_model_options(file: Path, options: Mapping[str, Any]) -> None:
    for name in sorted(set(options) - _OF_LOADING - _OF_RUNNING):
        _refuse(
            file,
            f"model_kwargs.{name}",
            "a model is what its config.json and its weights say",
            "write it into config.json",
        )


def _passed_on(file: Path, section: str, options: Mapping[str, Any], unused: set[str]) -> dict[str, Any]:
    """The options that transformers is given, without those that say where and how to load."""
    kept = {name: value for name, value in options.items() if name not in _OF_LOADING | unused}
    for name in sorted(kept):
        if name in _NEVER_FROM_A_FOLDER or name.endswith(("_file", "_path", "_class", "_type")):
            _refuse(file, f"{section}.{name}", "a folder's settings name no other files or classes", "take it out")
    return kept


def _notes_of_settings(file: Path, held: Mapping[str, Any]) -> Iterator[str]:
    if "message" in (held.get("modality_config") or {}):
        yield f"{file.name} puts texts into a chat template; attlas measures them as they are"
    asked = [name for name in _PER_CALL if held.get(name)]
    if asked:
        yield f"{file.name} says {', '.join(asked)}, of a single call; attlas measures every text alike"
    unknown = sorted(set(held) - _WITHOUT_EFFECT - {"modality_config"})
    if unknown:
        yield f"{file.name} says {', '.join(unknown)}, which attlas does not know and leaves out"


def _notes_of_prompts(file: Path | None) -> Iterator[str]:
    held = {} if file is None else read_json_object(file)
    name, prompts = held.get("default_prompt_name"), held.get("prompts") or {}
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    if name is not None and prompt:
        yield (
            f"{PROMPTS} puts the prompt {name!r}, {json.dumps(prompt, ensure_ascii=False)}, before every text; "
            "attlas measures texts as they are; write it into the documents to measure it too"
        )


def _check(file: Path, name: str, came: Any, right: bool, kind: str) -> None:
    if not right:
        raise Refusal(f"{name} in {file.name} is {kind}; that of {file.parent} says {came!r}; mend that place")


def _refuse(file: Path, name: str, rule: str, remedy: str) -> NoReturn:
    raise Refusal(f"{rule}; {file} says {name}; {remedy}")
