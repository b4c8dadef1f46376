"""Find the model in a folder and check its files before any of it is loaded.

The supported layouts are those of the hub: the folder itself; one subfolder with the model (`0_Transformer`,
`text_encoder`); a sentence-transformers folder, whose modules.json locates the transformer; a model's folder in the hub's
cache.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attlas.extract.errors import Refusal
from attlas.extract.model.configuration import check_configuration
from attlas.extract.model.text_settings import MODULES, TextSettings, folder_lookup, read_text_settings
from attlas.extract.model.user_code import check_user_code, is_user_code
from attlas.extract.model.weights import (
    Weights,
    check_weights,
    find_weights,
    json_text,
    read_json_object,
    refuse_special_files,
)

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_OTHER_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_MAX_REVISION_BYTES = 200
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: the folders of its configuration and weights and of its tokenizer."""

    name: str  # the folder's name, with the subfolder if the model is in one
    path: Path
    tokenizer: Path
    weights: Weights
    settings: TextSettings


def check_model_name(name: str, *, trust_remote_code: bool = False) -> None:
    """Raise Refusal for what the files alone show: no folder, no weights, damage, an unknown architecture, pickles."""
    if is_user_code(name):
        check_user_code(name)
    elif is_local_path(name):
        find_model(Path(name), trust_remote_code=trust_remote_code)


def is_local_path(name: str) -> bool:
    """Whether a model's name is a path, existing or not, and not a hub name."""
    if name == "demo":
        return False
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def find_model(folder: Path, *, trust_remote_code: bool) -> ModelFolder:
    """Find the model in a folder and check its files. Raises Refusal."""
    folder = folder.expanduser()
    if folder.is_file():
        raise Refusal(f"a model is a folder with {_CONFIG} and safetensors; {folder} is a file; give its folder")
    if not folder.is_dir():
        raise Refusal(f"a model is demo, a folder or a hub name; there is no folder {folder}; check the path")
    path = _config_folder(folder)
    config = read_json_object(path / _CONFIG)
    check_configuration(config, str(path / _CONFIG), trust_remote_code=trust_remote_code)
    _check_architecture(path, config, trust_remote_code=trust_remote_code)
    if (path / _ADAPTER).exists():
        raise Refusal(
            f"a model folder holds a complete model; {path} also holds an adapter ({_ADAPTER}); "
            "merge it into the model (merge_and_unload) and save that, or remove the adapter's files"
        )
    tokenizer = _tokenizer_folder(folder, path)
    for place in dict.fromkeys((path, tokenizer)):
        refuse_special_files(place)
    for file in {place / name for place in (path, tokenizer) for name in _OTHER_JSON_FILES}:
        if file.is_file():
            read_json_object(file)
    weights = find_weights(path, config)
    check_weights(weights)
    top = folder.resolve().name if folder.name in ("", "..") else folder.name
    name = "/".join((top, *path.relative_to(folder).parts))
    root = folder_lookup(folder if (folder / MODULES).is_file() else path)
    return ModelFolder(name, path, tokenizer, weights, read_text_settings(folder_lookup(path), root))


def _config_folder(folder: Path) -> Path:
    """The folder with the model's config.json: the given one, or one inside it."""
    if (folder / MODULES).is_file():
        return _transformer_folder(folder)
    if (folder / _CONFIG).is_file():
        return folder
    if (folder / "snapshots").is_dir():
        return _snapshot_folder(folder)
    with_config = sorted(p.parent for p in folder.glob(f"*/{_CONFIG}"))
    candidates = [f for f in with_config if _may_be_model(f)] or with_config
    if len(candidates) > 1:
        raise Refusal(
            f"a model folder has a {_CONFIG}; {folder} has none, and {len(candidates)} of its subfolders have one; "
            f"give one of them: {', '.join(str(f) for f in candidates)}"
        )
    if not candidates:
        adapter = f" but an {_ADAPTER}: merge the adapter into its model" if (folder / _ADAPTER).exists() else ""
        raise Refusal(
            f"a model folder has a {_CONFIG}; {folder} has none{adapter}; give the folder that save_pretrained wrote"
        )
    return candidates[0]


def _may_be_model(folder: Path) -> bool:
    """Whether a config.json is a model's, rather than a pooling layer's; a damaged one might be."""
    try:
        config = json.loads(json_text(folder / _CONFIG))
    except (ValueError, OSError, RecursionError):
        return True
    return isinstance(config, dict) and bool({"model_type", "architectures", "auto_map"} & set(config))


def _transformer_folder(folder: Path) -> Path:
    """The folder of the transformer in a sentence-transformers folder, as modules.json states it."""
    try:
        modules = json.loads(json_text(folder / MODULES))
        paths = [str(m["path"]) for m in modules if str(m["type"]).endswith("Transformer")]
        kinds = ", ".join(str(m["type"]).rpartition(".")[2] for m in modules)
    except (ValueError, OSError, TypeError, KeyError, RecursionError) as error:
        raise Refusal(
            f"{MODULES} must be a JSON list of modules, each with a type and a path; that of {folder} is not ({error}); "
            "copy or download it again"
        ) from error
    if len(paths) != 1:
        raise Refusal(
            f"a sentence-transformers folder has exactly one Transformer module; {MODULES} of {folder} has "
            f"{len(paths)} among {kinds or 'none'}; give the folder of one transformer"
        )
    path = folder / paths[0]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Refusal(f"a module must be inside its folder; {MODULES} of {folder} names {paths[0]!r}; correct the path")
    if not (path / _CONFIG).is_file():
        adapter = (path / _ADAPTER).is_file()
        content = f"an adapter ({_ADAPTER}) and no {_CONFIG}" if adapter else f"no {_CONFIG}"
        remedy = "merge it into its model (merge_and_unload) and save that" if adapter else "copy it again"
        raise Refusal(f"{MODULES} of {folder} names {path} as its transformer; there is {content}; {remedy}")
    return path


def _snapshot_folder(folder: Path) -> Path:
    """The snapshot in a folder of the hub's cache: the one that `main` refers to, or the only one."""
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size <= _MAX_REVISION_BYTES:
        revision = main.read_text("utf-8", errors="replace").strip()
        if Path(revision).name == revision and (folder / "snapshots" / revision / _CONFIG).is_file():
            return folder / "snapshots" / revision
    snapshots = sorted(p.parent for p in (folder / "snapshots").glob(f"*/{_CONFIG}"))
    if len(snapshots) == 1:
        return snapshots[0]
    raise Refusal(
        f"a model's folder in the hub's cache has one snapshot, or states which is main; {folder} has "
        f"{len(snapshots)} with a {_CONFIG}; give one of its snapshots' folders"
    )


def _tokenizer_folder(folder: Path, path: Path) -> Path:
    """The tokenizer's folder: that of the weights, one of its own, or the one around them."""
    sibling = path.parent / path.name.replace("text_encoder", "tokenizer")
    places = [path, path / "tokenizer", sibling, path.parent / "tokenizer", *([folder] if folder != path else [])]
    return next(
        (p for p in places if any(f for pattern in _TOKENIZER_FILES for f in p.glob(pattern) if f.is_file())), path
    )


def _check_architecture(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a model_type or an architecture that transformers lacks, and remote code without the user's consent."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    remote_code, model_type = config.get("auto_map"), config.get("model_type")
    if remote_code and trust_remote_code:
        return
    unknown = _unknown_classes(config.get("architectures") or [])
    if remote_code and (model_type not in list(CONFIG_MAPPING.keys()) or unknown):
        raise Refusal(
            f"a model's own code runs only with your consent; {path} needs it; add --trust-remote-code if you trust it"
        )
    if model_type not in list(CONFIG_MAPPING.keys()):
        raise Refusal(_unknown_name_message(path, "model_type", model_type, CONFIG_MAPPING.keys()))
    if unknown:
        message = _unknown_name_message(path, "architectures", unknown[0], _class_names())
        raise Refusal(f"{message}, or remove it if the weights are those of a plain {model_type}")


def _unknown_classes(architectures: Any) -> list[Any]:
    names = architectures if isinstance(architectures, list) else [architectures]
    existing = _class_names()
    return [name for name in names if name not in existing]


def _class_names() -> list[str]:
    library: Any = importlib.import_module("transformers")
    return [name for name in library.__all__ if name[:1].isupper()]  # its dir() takes half a second


def _unknown_name_message(path: Path, key: str, value: Any, existing: Iterable[str]) -> str:
    import transformers

    near = difflib.get_close_matches(str(value), list(existing), n=3, cutoff=0.6) if value else []
    hint = f"correct it (similar: {', '.join(near)})" if near else "use a newer transformers or another model"
    content = "has none" if value is None else f"has {value!r}"
    return (
        f"{key} in {_CONFIG} must be one that transformers {transformers.__version__} knows; {path} {content}; {hint}"
    )
