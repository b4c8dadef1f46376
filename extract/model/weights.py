"""A folder's safetensors files: which of them are the model's weights, and whether they are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.errors import Refusal

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_VARIANT = re.compile(
    r"model\.(?P<file>(?!.*-of-)[\w-]+)\.safetensors|model\.safetensors\.index\.(?P<index>[\w-]+)\.json"
)
_LFS = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Weights:
    """The file that transformers opens first, the weights or an index of them, and its variant (`fp16`), if any."""

    entry: Path
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        return self.entry.suffix == ".json"


def find_weights(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The weights of a model folder. Raises Refusal where it has none, several variants, or other files only."""
    stated = config.get("transformers_weights")
    if stated is not None:
        return Weights(_stated(folder, stated))
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
        raise Refusal(_without_weights(folder))
    ((variant, entry),) = variants.items()
    return Weights(entry, variant)


def check_weights(weights: Weights) -> None:
    """Refuse files that are missing, cut off or no safetensors; nothing but their headers is read."""
    if not weights.sharded:
        check_file(weights.entry)
        return
    index, places = weights.entry.name, _weight_map(weights.entry)
    shards = sorted(set(places.values()))
    missing = [s for s in shards if not (weights.entry.parent / s).is_file()]
    if missing:
        raise Refusal(
            f"every shard that {index} names must be there; {weights.entry.parent} lacks {len(missing)} of "
            f"{len(shards)}: {_some(missing)}; copy or download {'it' if len(missing) == 1 else 'them'} into it"
        )
    held = {shard: check_file(weights.entry.parent / shard) for shard in shards}
    lacking = [name for name, shard in places.items() if name not in held[shard]]
    if lacking:
        raise Refusal(
            f"a shard holds the weights that {index} says it holds; {places[lacking[0]]} in {weights.entry.parent} lacks "
            f"{_some(lacking)}; copy or download the shards and the index again, from one place"
        )


def check_file(file: Path) -> frozenset[str]:
    """The names of the weights in a safetensors file, which must be as long as its header says. Raises Refusal."""
    if not file.is_file():
        raise Refusal(f"weights are a file; there is none at {file}, a link to nothing; {_AGAIN}")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(max(8, len(_LFS)))
        if start.startswith(_LFS):
            raise Refusal(f"weights must be there themselves; {file} is a pointer of Git LFS to them; run git lfs pull")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise Refusal(f"weights are in the safetensors format; {file} ({size:,} bytes) is not; {_AGAIN}")
        if size < 8 + length:
            raise Refusal(_cut_off(file, size, f"its header alone takes {8 + length:,}"))
        opened.seek(8)
        header = _header(file, opened.read(length))
    ends = [described["data_offsets"][1] for described in header.values()]
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise Refusal(_cut_off(file, size, f"its header says {whole:,}"))
    _open(file)
    return frozenset(header)


def _header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        assert all(int(described["data_offsets"][1]) >= 0 for described in header.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise Refusal(
            f"a safetensors file begins with a header in JSON; that of {file} is not one; {_AGAIN}"
        ) from error
    return header


def _open(file: Path) -> None:
    """Let the library judge what is left to judge: types, shapes, gaps, bytes too many."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refusal(f"weights are in the safetensors format; {file} is damaged ({error}); {_AGAIN}") from error


def _cut_off(file: Path, size: int, whole: str) -> str:
    return (
        f"a safetensors file is as long as its header says; {file} is cut off: it has {size:,} bytes, {whole}; {_AGAIN}"
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, which must be an object. Raises Refusal."""
    try:
        held = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise Refusal(f"{file.name} must be JSON; {file} can't be read ({error}); {_AGAIN}") from error
    if not isinstance(held, dict):
        raise Refusal(f"{file.name} must be a JSON object; {file} holds a {type(held).__name__}; {_AGAIN}")
    return held


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(s, str) for s in places.values()):
        raise Refusal(f"{index.name} must have a weight_map, from weights to shards; {index} has none; {_AGAIN}")
    others = sorted({s for s in places.values() if not s.endswith(".safetensors")})
    if others:
        raise Refusal(
            f"weights are read from safetensors alone; {index} names {_some(others)}; "
            "save the model again with save_pretrained"
        )
    return places


def _stated(folder: Path, name: Any) -> Path:
    ends = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or not name.endswith(ends) or not (folder / name).is_file():
        raise Refusal(
            f"transformers_weights in config.json names a safetensors file of the folder; {folder} says {name!r}; "
            "take that line out, or name the file"
        )
    return folder / name


def _without_weights(folder: Path) -> str:
    held = _held(folder)
    if held.startswith("shards"):
        return (
            f"shards need the index that names them; {folder} holds {held} and no {INDEX}; copy or download it as well"
        )
    return (
        f"weights are read from safetensors alone, {WEIGHTS} or the shards of {INDEX}; {folder} holds {held}; "
        "save the model again with save_pretrained(…, safe_serialization=True)"
    )


def _held(folder: Path) -> str:
    tensors = sorted(p.name for p in folder.glob("*.safetensors"))
    pickled = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    shards = [t for t in tensors if re.search(r"-\d+-of-\d+", t)]
    if shards:
        return f"shards ({_some(shards)})"
    if tensors:
        return f"others ({_some(tensors)})"
    return f"only pickled weights ({_some(pickled)})" if pickled else "no weights"


def _some(names: Sequence[str], *, most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
