"""What every test may rely on: no network, no telemetry, the demo model loaded once."""

import os

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", TQDM_DISABLE="1")

import pytest


@pytest.fixture(scope="session")
def demo():
    """The demo encoder, in float32 on the CPU."""
    from extract.encoder import load_encoder

    return load_encoder("demo", device="cpu")


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """Real prose: the documents of the built-in corpus."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
