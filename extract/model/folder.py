"""What a user names as a model, checked before any of it is loaded: a folder in each layout that the hub uses.

Layouts: the folder itself; one subfolder with the model (`0_Transformer`, `text_encoder`); a sentence-transformers
folder, whose modules.json says where its transformer lies; a model's folder in the hub's cache.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.errors import Refusal
from extract.model.text_settings import MODULES, TextSettings, in_folder, read_text_settings
from extract.model.user_code import check_model_code, is_model_code
from extract.model.weights import Weights, check_weights, find_weights, read_json_object

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_READ_WITH_THE_MODEL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this disk: where its configuration and weights lie, and where its tokenizer."""

    name: str  # the folder as named, and the subfolder that was taken
    path: Path
    tokenizer: Path
    weights: Weights
    settings: TextSettings


def check_model_name(name: str, *, trust_remote_code: bool = False) -> None:
    """Refuse what the files alone show: no folder, no weights, damaged files, an unknown architecture, pickles."""
    if is_model_code(name):
        check_model_code(name)
    elif is_path(name):
        find_model(Path(name), trust_remote_code=trust_remote_code)


def is_path(name: str) -> bool:
    """Whether a model's name is a folder's, there or not, and no hub name."""
    if name == "demo":
        return False
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def find_model(given: Path, *, trust_remote_code: bool) -> ModelFolder:
    """The model in a folder, its files checked. Raises Refusal."""
    given = given.expanduser()
    if given.is_file():
        raise Refusal(f"a model is a folder with {_CONFIG} and safetensors; {given} is a file; give its folder")
    if not given.is_dir():
        raise Refusal(f"--model takes demo, a folder or a hub name; there is no folder {given}; check the path")
    path = _place(given)
    config = read_json_object(path / _CONFIG)
    _check_architecture(path, config, trust_remote_code=trust_remote_code)
    if (path / _ADAPTER).exists():
        raise Refusal(
            f"a model folder holds a whole model; {path} holds an adapter too ({_ADAPTER}); "
            "merge it into the model (merge_and_unload) and save that, or take the adapter's files away"
        )
    tokenizer = _tokenizer_place(given, path)
    for file in {folder / name for folder in (path, tokenizer) for name in _READ_WITH_THE_MODEL}:
        if file.is_file():
            read_json_object(file)
    weights = find_weights(path, config)
    check_weights(weights)
    top = given.resolve().name if given.name in ("", "..") else given.name
    name = "/".join((top, *path.relative_to(given).parts))
    root = in_folder(given if (given / MODULES).is_file() else path)
    return ModelFolder(name, path, tokenizer, weights, read_text_settings(in_folder(path), root))


def _place(given: Path) -> Path:
    """The folder whose config.json is the model's: the given one, or one within it."""
    if (given / MODULES).is_file():
        return _transformer_of(given)
    if (given / _CONFIG).is_file():
        return given
    if (given / "snapshots").is_dir():
        return _snapshot(given)
    folders = sorted(p.parent for p in given.glob(f"*/{_CONFIG}"))
    found = [f for f in folders if _is_model(f)] or folders
    if len(found) > 1:
        raise Refusal(
            f"a model folder has a {_CONFIG}; {given} has none, and {len(found)} of its folders have one; "
            f"give one of them: {', '.join(str(f) for f in found)}"
        )
    if not found:
        adapter = f" but an {_ADAPTER}: merge the adapter into its model" if (given / _ADAPTER).exists() else ""
        raise Refusal(
            f"a model folder has a {_CONFIG}; {given} has none{adapter}; give the folder that save_pretrained wrote"
        )
    return found[0]


def _is_model(folder: Path) -> bool:
    """Whether a config.json is a model's: pooling layers and parts of pipelines have one too. A damaged one may be."""
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
    except (ValueError, OSError, RecursionError):
        return True
    return isinstance(config, dict) and bool({"model_type", "architectures", "auto_map"} & set(config))


def _transformer_of(given: Path) -> Path:
    """Where a sentence-transformers folder says that its transformer lies."""
    try:
        modules = json.loads((given / MODULES).read_text("utf-8"))
        places = [str(m["path"]) for m in modules if str(m["type"]).endswith("Transformer")]
        kinds = ", ".join(str(m["type"]).rpartition(".")[2] for m in modules)
    except (ValueError, OSError, TypeError, KeyError, RecursionError) as error:
        raise Refusal(
            f"{MODULES} must be a JSON list of modules, each with a type and a path; that of {given} is not ({error}); "
            "copy or download it again"
        ) from error
    if len(places) != 1:
        raise Refusal(
            f"one module of a sentence-transformers folder is its Transformer; {MODULES} of {given} has "
            f"{len(places)} among {kinds or 'none'}; give the folder of one transformer"
        )
    path = given / places[0]
    if not path.resolve().is_relative_to(given.resolve()):
        raise Refusal(f"a module lies inside its folder; {MODULES} of {given} names {places[0]!r}; mend that place")
    if not (path / _CONFIG).is_file():
        adapter = (path / _ADAPTER).is_file()
        held = f"an adapter ({_ADAPTER}) and no {_CONFIG}" if adapter else f"no {_CONFIG}"
        remedy = "merge it into its model (merge_and_unload) and save that" if adapter else "copy it again"
        raise Refusal(f"{MODULES} of {given} names {path} as its transformer; there is {held}; {remedy}")
    return path


def _snapshot(given: Path) -> Path:
    """The revision that a folder of the hub's cache has: its `main`, or the only one."""
    main = given / "refs" / "main"
    if main.is_file() and (found := given / "snapshots" / main.read_text("utf-8").strip() / _CONFIG).is_file():
        return found.parent
    snapshots = sorted(p.parent for p in (given / "snapshots").glob(f"*/{_CONFIG}"))
    if len(snapshots) == 1:
        return snapshots[0]
    raise Refusal(
        f"a model's folder in the hub's cache has one snapshot, or says which is main; {given} has "
        f"{len(snapshots)} with a {_CONFIG}; give one of its snapshots' folders"
    )


def _tokenizer_place(given: Path, path: Path) -> Path:
    """Where the tokenizer lies: beside the weights, or in a folder of its own, or in the folder around."""
    beside = path.parent / path.name.replace("text_encoder", "tokenizer")
    places = [path, path / "tokenizer", beside, path.parent / "tokenizer", *([given] if given != path else [])]
    return next((p for p in places if any(f for pattern in _TOKENIZERS for f in p.glob(pattern) if f.is_file())), path)


def _check_architecture(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a model_type or an architecture that transformers doesn't have, and code that was not asked for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own, kind, classes = config.get("auto_map"), config.get("model_type"), config.get("architectures") or []
    if own and trust_remote_code:
        return
    unknown = _unknown_classes(classes)
    if own and (kind not in list(CONFIG_MAPPING.keys()) or unknown):
        raise Refusal(
            f"a model's own code runs only when asked for by name; {path} needs it; add --trust-remote-code if you trust it"
        )
    if kind not in list(CONFIG_MAPPING.keys()):
        raise Refusal(_not_known(path, "model_type", kind, CONFIG_MAPPING.keys()))
    if unknown:
        refused = _not_known(path, "architectures", unknown[0], _class_names())
        raise Refusal(f"{refused}, or take it out if the weights are those of a plain {kind}")


def _unknown_classes(classes: Any) -> list[Any]:
    names = classes if isinstance(classes, list) else [classes]
    known = _class_names()
    return [name for name in names if name not in known]


def _class_names() -> list[str]:
    library: Any = importlib.import_module("transformers")
    return [name for name in library.__all__ if name[:1].isupper()]  # its dir() takes half a second


def _not_known(path: Path, key: str, came: Any, known: Iterable[str]) -> str:
    import transformers

    near = difflib.get_close_matches(str(came), list(known), n=3, cutoff=0.6) if came else []
    hint = f"write the right one (near it: {', '.join(near)})" if near else "use a newer transformers or another model"
    said = "names none" if came is None else f"says {came!r}"
    return f"{key} in {_CONFIG} must be one that transformers {transformers.__version__} knows; {path} {said}; {hint}"
