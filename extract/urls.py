"""URLs of object stores, as users name them."""

from __future__ import annotations

from urllib.parse import urlsplit

from attlas.extract.errors import Refusal

# of these, what stands before the @ names a container
_CONTAINER_BEFORE_HOST = ("abfs", "abfss", "wasb", "wasbs")


def is_url(text: str) -> bool:
    return "://" in text


def refuse_unsafe_url(url: str) -> None:
    """Raise Refusal for a URL with credentials in it, which messages and manifests would repeat, or with a broken path."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    has_user = "@" in host and scheme not in _CONTAINER_BEFORE_HOST
    has_password = ":" in rest.rpartition("@")[0]  # which may have a slash in it
    if has_user or has_password or "?" in rest or "#" in rest:
        raise Refusal(
            f"the URL of an object store has no credentials, query or fragment; one that starts with {scheme}:// has; "
            "set credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if any(part in ("", ".", "..") for part in path.rstrip("/").split("/")) and path:
        raise Refusal(f"the path in a URL has a name between any two slashes; {url} has not; correct it")


def url_name(url: str) -> str:
    """The last part of a URL's path; empty if it names a whole bucket."""
    return urlsplit(url).path.rstrip("/").rpartition("/")[2]
