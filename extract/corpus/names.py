r"""File names as text: a byte that is not UTF-8 is written `\xff`, and the name can be had back.

Python holds such a byte as a lone surrogate, which no table, manifest or terminal takes.
"""

import os
import re

_ESCAPED_BYTE = re.compile(r"\\x[0-9a-f]{2}")


def readable_name(name: str) -> str:
    r"""A name or path as valid text, different for different names.

    Backslashes are doubled where one could be taken for that of an escaped byte; other valid names stay as they are.
    """
    raw = os.fsencode(name)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw.replace(b"\\", rb"\\").decode(errors="backslashreplace")
    return text.replace("\\", r"\\") if _ESCAPED_BYTE.search(text) else text


def real_name(readable: str) -> str:
    """The name or path that `readable_name` made readable, as the file system knows it."""
    if not _ESCAPED_BYTE.search(readable):
        return readable
    return os.fsdecode(re.sub(rb"\\(\\|x[0-9a-f]{2})", _unescaped, readable.encode()))


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    return b"\\" if escape == b"\\" else bytes.fromhex(escape[1:].decode())
