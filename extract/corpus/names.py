r"""File names as valid text, reversibly: a byte that is not UTF-8 becomes the escape `\xff`.

Python represents such a byte as a lone surrogate, which can't be written to tables, manifests or terminals.
"""

import os
import re

_ESCAPED_BYTE = re.compile(r"\\x[0-9a-f]{2}")


def readable_name(name: str) -> str:
    r"""A name or path as valid text, unique for each name.

    Backslashes are doubled in names with something that looks like an escaped byte; other valid names do not change.
    """
    raw = os.fsencode(name)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw.replace(b"\\", rb"\\").decode(errors="backslashreplace")
    return text.replace("\\", r"\\") if _ESCAPED_BYTE.search(text) else text


def real_name(readable: str) -> str:
    """The name or path in the file system for the result of `readable_name`."""
    if not _ESCAPED_BYTE.search(readable):
        return readable
    return os.fsdecode(re.sub(rb"\\(\\|x[0-9a-f]{2})", _unescaped, readable.encode()))


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    return b"\\" if escape == b"\\" else bytes.fromhex(escape[1:].decode())
