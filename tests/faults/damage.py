"""Ways in which a file on disk comes to harm."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def flipped(content: bytes, *, at: float) -> bytes:
    """One bit changed, at this share of the file."""
    changed = bytearray(content)
    changed[min(int(len(content) * at), len(content) - 1)] ^= 1
    return bytes(changed)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_loop_of_links(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


OF_BYTES: dict[str, Damage] = {
    "empty": rewritten(lambda _: b""),
    "cut off": rewritten(lambda content: content[: len(content) // 2]),
    "last byte lost": rewritten(lambda content: content[:-1]),
    "longer": rewritten(lambda content: content + b"\0"),
    "null bytes": rewritten(lambda content: bytes(len(content))),
    "not UTF-8": rewritten(lambda content: b"\xff\xfe" + content[2:]),
    "bit flipped early": rewritten(lambda content: flipped(content, at=0.1)),
    "bit flipped in the middle": rewritten(lambda content: flipped(content, at=0.5)),
    "bit flipped late": rewritten(lambda content: flipped(content, at=0.93)),
    "another file": rewritten(lambda _: b'{"shards": 3}'),
    "gone": Path.unlink,
    "a directory": a_directory,
    "a pipe": a_pipe,
    "a loop of links": a_loop_of_links,
    "a link to nothing": a_link_to_nothing,
}


def edited(change: Callable[[Any], Any]) -> Damage:
    """Valid JSON, and other than what was written."""
    return rewritten(lambda content: json.dumps(change(json.loads(content))).encode())


def one_more(value: Any) -> Any:
    """The value with every integer in it, however deep, one larger."""
    if isinstance(value, dict):
        return {key: one_more(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [one_more(entry) for entry in value]
    return value + 1 if type(value) is int else value


OF_JSON: dict[str, Damage] = {
    "a list": edited(lambda value: [value]),
    "null": edited(lambda _: None),
    "a number": edited(lambda _: 7),
    "nested": edited(lambda _: json.loads("[" * 400 + "]" * 400)),
    "no keys": edited(lambda _: {}),
    "another key": edited(lambda value: value | {"more": 1}),
    "first key lost": edited(lambda value: dict(list(value.items())[1:])),
    "last key lost": edited(lambda value: dict(list(value.items())[:-1])),
    "all null": edited(lambda value: dict.fromkeys(value)),
    "all text": edited(lambda value: {key: str(entry) for key, entry in value.items()}),
    "all lists": edited(lambda value: {key: [entry] for key, entry in value.items()}),
    "all negative": edited(lambda value: dict.fromkeys(value, -1)),
    "beyond 64 bits": edited(lambda value: dict.fromkeys(value, 1 << 70)),
    "another schema": edited(lambda value: value | {"schema_version": 99}),
    "numbers one more": edited(one_more),
}


def damages(path: Path) -> Iterator[tuple[str, Damage]]:
    """Every damage that makes sense for a file of that name."""
    yield from OF_BYTES.items()
    if path.suffix == ".json":
        yield from OF_JSON.items()
