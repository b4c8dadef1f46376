"""Digests of documents: keyed, so that nobody without the key can test whether a text is in a corpus."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any


def content_digest(content: bytes, key: bytes) -> str:
    """The digest of a document as the dataset has it, in hexadecimal."""
    return new_digest(content, key).hexdigest()


def new_digest(content: bytes, key: bytes | None) -> Any:
    """The SHA-256 of the content, or its HMAC if there is a key."""
    return hashlib.sha256(content) if key is None else hmac.new(key, content, hashlib.sha256)
