"""Google's object store, as far as its XML interface is that of S3: moto's server behind a proxy that translates headers."""

import contextlib
import json
from collections.abc import Iterator

from tests.object_store.proxy import Headers, Proxy, started_proxy
from tests.object_store.server import KEY, started_server

_GOOGLE, _AMAZON = "x-goog-meta-", "x-amz-meta-"
# moto looks who asks, and at no signature
_SIGNED = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def to_amazon(headers: Headers) -> Headers:
    """The headers of a request to Google, as S3 has them."""
    kept = {name.lower().replace(_GOOGLE, _AMAZON): value for name, value in headers}
    if (generation := kept.pop("x-goog-if-generation-match", None)) is not None:
        assert generation == "0", "S3 knows no generations of objects"
        kept["if-none-match"] = "*"
    return [*(kept | {"authorization": _SIGNED}).items()]


def to_google(headers: Headers) -> Headers:
    """The headers of an answer of S3, as Google has them."""
    return [(name.lower().replace(_AMAZON, _GOOGLE), value) for name, value in headers]


@contextlib.contextmanager
def started_google() -> Iterator[dict[str, str]]:
    """The environment that refers to a store with the bucket `BUCKET`."""
    with started_server() as port, started_proxy(Proxy(port, asked=to_amazon, answered=to_google)) as proxy:
        account = {"gcs_base_url": f"http://127.0.0.1:{proxy.port}", "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        yield {
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account),
            "GOOGLE_ALLOW_HTTP": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
