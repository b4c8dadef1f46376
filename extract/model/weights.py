"""Find the safetensors files with a model's weights, and check that they are complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attlas.extract.errors import Refusal, shortlist
from attlas.extract.files import open_regular

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_VARIANT = re.compile(
    r"model\.(?P<file>(?!.*-of-)[\w-]+)\.safetensors|model\.safetensors\.index\.(?P<index>[\w-]+)\.json"
)
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # limit of the format
_MAX_TENSORS = 100_000  # in one file; the largest models have fewer in all of theirs, and each costs time to match
_MAX_JSON_BYTES = 1 << 28  # many times the largest vocabulary
_COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Weights:
    """The file that transformers opens first, which is the weights or their index, and its variant, such as `fp16`."""

    entry: Path
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        return self.entry.suffix == ".json"


def find_weights(folder: Path, config: Mapping[str, Any]) -> Weights:
    """Find the weights of a model folder. Raises Refusal if there are none, several variants, or only other formats."""
    configured = config.get("transformers_weights")
    if configured is not None:
        return Weights(_configured_file(folder, configured))
    for name in (WEIGHTS, INDEX):
        if (folder / name).exists() or (folder / name).is_symlink():
            return Weights(folder / name)
    variants = {m["file"] or m["index"]: p for p in sorted(folder.iterdir()) if (m := _VARIANT.fullmatch(p.name))}
    if len(variants) > 1:
        raise Refusal(
            f"a model folder has one set of weights; {folder} has the variants {', '.join(variants)} and no {WEIGHTS}; "
            f"rename the one to measure to {WEIGHTS}"
        )
    if not variants:
        raise Refusal(_missing_weights_message(folder))
    ((variant, entry),) = variants.items()
    return Weights(entry, variant)


def check_weights(weights: Weights) -> None:
    """Raise Refusal for files that are missing, cut off or not safetensors. Only their headers are read."""
    if not weights.sharded:
        tensor_names(weights.entry)
        return
    folder, index = weights.entry.parent, weights.entry.name
    shard_of = _weight_map(weights.entry)
    shards = sorted(set(shard_of.values()))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise Refusal(
            f"all shards that {index} names must exist; {folder} lacks {len(missing)} of {len(shards)}: "
            f"{shortlist(missing)}; copy or download {'it' if len(missing) == 1 else 'them'} into it"
        )
    names = {shard: tensor_names(folder / shard) for shard in shards}
    lacking = [name for name, shard in shard_of.items() if name not in names[shard]]
    if lacking:
        raise Refusal(
            f"a shard must hold the weights that {index} assigns to it; {shard_of[lacking[0]]} in {folder} lacks "
            f"{shortlist(lacking)}; copy or download the shards and the index again, from the same source"
        )


def stored_bytes(weights: Weights) -> int:
    """The size of all files of weights."""
    folder = weights.entry.parent
    files = [folder / s for s in set(_weight_map(weights.entry).values())] if weights.sharded else [weights.entry]
    return sum(file.stat().st_size for file in files)


def tensor_names(file: Path) -> frozenset[str]:
    """The names of the tensors in a safetensors file. Raises Refusal if the file is damaged or cut off."""
    if not file.is_file():
        what = "something else" if file.exists() else "a broken link"
        raise Refusal(f"weights are a file; {file} is {what}; {_COPY_AGAIN}")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(max(8, len(_LFS_POINTER)))
        if start.startswith(_LFS_POINTER):
            raise Refusal(f"weights must be the files themselves; {file} is a Git LFS pointer; run git lfs pull")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise Refusal(f"weights must be in the safetensors format; {file} ({size:,} bytes) is not; {_COPY_AGAIN}")
        if size < 8 + length:
            raise Refusal(_cut_off_message(file, size, f"its header alone takes {8 + length:,}"))
        opened.seek(8)
        header = _parsed_header(file, opened.read(length))
    if len(header) > _MAX_TENSORS:
        raise Refusal(
            f"a safetensors file holds at most {_MAX_TENSORS:,} tensors; {file} states {len(header):,}; use another model"
        )
    ends = [entry["data_offsets"][1] for entry in header.values()]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise Refusal(_cut_off_message(file, size, f"its header says {expected:,}"))
    _check_with_safetensors(file)
    return frozenset(header)


def _parsed_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        assert all(int(entry["data_offsets"][1]) >= 0 for entry in header.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise Refusal(
            f"a safetensors file begins with a header in JSON; that of {file} is not valid; {_COPY_AGAIN}"
        ) from error
    return header


def _check_with_safetensors(file: Path) -> None:
    """Let the library check the rest: types, shapes, gaps, trailing bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refusal(
            f"weights must be in the safetensors format; {file} is damaged ({error}); {_COPY_AGAIN}"
        ) from error


def _cut_off_message(file: Path, size: int, expected: str) -> str:
    return (
        f"a safetensors file is as long as its header says; {file} is cut off: it has {size:,} bytes, {expected}; "
        f"{_COPY_AGAIN}"
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises Refusal."""
    try:
        content = json.loads(json_text(file))
    except (ValueError, OSError, RecursionError) as error:
        raise Refusal(f"{file.name} must be JSON; {file} can't be read ({error}); {_COPY_AGAIN}") from error
    if not isinstance(content, dict):
        raise Refusal(f"{file.name} must be a JSON object; {file} holds a {type(content).__name__}; {_COPY_AGAIN}")
    return content


def json_text(file: Path) -> str:
    """The text of a JSON file of a model. Raises ValueError for one that is too large, OSError for what is not a file."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {_MAX_JSON_BYTES:,}")
        return opened.read().decode("utf-8")


def refuse_special_files(folder: Path) -> None:
    """Raise Refusal for a FIFO, socket or device in a folder of a model: reading one may never end."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise Refusal(
                f"a model's folder holds files; {path} is something else (a pipe, socket or device); remove it"
            )


def _refuse_outside(named: Iterable[str], by: Path) -> None:
    """Raise Refusal for names of weights that lead out of the folder of the file that has them."""
    outside = [name for name in named if name.startswith("/") or ".." in re.split(r"[/\\]", name) or ":" in name]
    if outside:
        raise Refusal(
            f"a model's weights lie in its folder; {by} names {shortlist([repr(name) for name in outside])}; "
            "copy them into the folder and correct the names"
        )


def _weight_map(index: Path) -> dict[str, str]:
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(s, str) for s in shard_of.values()):
        raise Refusal(f"{index.name} must have a weight_map, from weights to shards; {index} has none; {_COPY_AGAIN}")
    others = sorted({s for s in shard_of.values() if not s.endswith(".safetensors")})
    if others:
        raise Refusal(
            f"attlas reads weights from safetensors only; {index} names {shortlist(others)}; "
            "save the model again with save_pretrained"
        )
    _refuse_outside(sorted(set(shard_of.values())), index)
    return shard_of


def _configured_file(folder: Path, name: Any) -> Path:
    suffixes = (".safetensors", ".safetensors.index.json")
    if isinstance(name, str):
        _refuse_outside([name], folder / "config.json")
    if not isinstance(name, str) or not name.endswith(suffixes) or not (folder / name).is_file():
        raise Refusal(
            f"transformers_weights in config.json must name a safetensors file of the folder; {folder} has {name!r}; "
            "remove the entry, or name the file"
        )
    return folder / name


def _missing_weights_message(folder: Path) -> str:
    shards = sorted(p.name for p in folder.glob("*.safetensors") if re.search(r"-\d+-of-\d+", p.name))
    if shards:
        return (
            f"shards need their index; {folder} holds shards ({shortlist(shards)}) and no {INDEX}; "
            "copy or download it as well"
        )
    return (
        f"attlas reads weights from safetensors only, {WEIGHTS} or the shards of {INDEX}; {folder} holds "
        f"{_other_weights(folder)}; save the model again with save_pretrained(…, safe_serialization=True)"
    )


def _other_weights(folder: Path) -> str:
    tensors = sorted(p.name for p in folder.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in _PICKLE_PATTERNS for p in folder.glob(pattern))
    if tensors:
        return f"others ({shortlist(tensors)})"
    return f"only pickled weights ({shortlist(pickles)})" if pickles else "no weights"
