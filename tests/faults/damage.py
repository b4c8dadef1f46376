"""Kinds of damage to a file on disk."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def rewrite_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def flip_bit(content: bytes, *, at: float) -> bytes:
    """The content with one bit flipped, at this fraction of the file."""
    flipped = bytearray(content)
    flipped[min(int(len(content) * at), len(content) - 1)] ^= 1
    return bytes(flipped)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_by_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


BYTE_DAMAGES: dict[str, Damage] = {
    "empty": rewrite_bytes(lambda _: b""),
    "cut off": rewrite_bytes(lambda content: content[: len(content) // 2]),
    "last byte lost": rewrite_bytes(lambda content: content[:-1]),
    "longer": rewrite_bytes(lambda content: content + b"\0"),
    "null bytes": rewrite_bytes(lambda content: bytes(len(content))),
    "not UTF-8": rewrite_bytes(lambda content: b"\xff\xfe" + content[2:]),
    "bit flipped early": rewrite_bytes(lambda content: flip_bit(content, at=0.1)),
    "bit flipped in the middle": rewrite_bytes(lambda content: flip_bit(content, at=0.5)),
    "bit flipped late": rewrite_bytes(lambda content: flip_bit(content, at=0.93)),
    "another file": rewrite_bytes(lambda _: b'{"shards": 3}'),
    "gone": Path.unlink,
    "a directory": replace_by_directory,
    "a pipe": replace_by_pipe,
    "a loop of links": replace_by_link_loop,
    "a link to nothing": replace_by_broken_link,
}


def edit_json(change: Callable[[Any], Any]) -> Damage:
    """Replace the file by other, valid JSON."""
    return rewrite_bytes(lambda content: json.dumps(change(json.loads(content))).encode())


def increment_integers(value: Any) -> Any:
    """The value with every integer in it, at any depth, increased by one."""
    if isinstance(value, dict):
        return {key: increment_integers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [increment_integers(entry) for entry in value]
    return value + 1 if type(value) is int else value


JSON_DAMAGES: dict[str, Damage] = {
    "a list": edit_json(lambda value: [value]),
    "null": edit_json(lambda _: None),
    "a number": edit_json(lambda _: 7),
    "nested": edit_json(lambda _: json.loads("[" * 400 + "]" * 400)),
    "no keys": edit_json(lambda _: {}),
    "another key": edit_json(lambda value: value | {"more": 1}),
    "first key lost": edit_json(lambda value: dict(list(value.items())[1:])),
    "last key lost": edit_json(lambda value: dict(list(value.items())[:-1])),
    "all null": edit_json(lambda value: dict.fromkeys(value)),
    "all text": edit_json(lambda value: {key: str(entry) for key, entry in value.items()}),
    "all lists": edit_json(lambda value: {key: [entry] for key, entry in value.items()}),
    "all negative": edit_json(lambda value: dict.fromkeys(value, -1)),
    "beyond 64 bits": edit_json(lambda value: dict.fromkeys(value, 1 << 70)),
    "another schema": edit_json(lambda value: value | {"schema_version": 99}),
    "numbers one more": edit_json(increment_integers),
}


def damages(path: Path) -> Iterator[tuple[str, Damage]]:
    """Name and function of every damage that applies to the file."""
    yield from BYTE_DAMAGES.items()
    if path.suffix == ".json":
        yield from JSON_DAMAGES.items()
