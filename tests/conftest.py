"""What every test may rely on: no network, no telemetry, the demo model loaded once."""

import os

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", TQDM_DISABLE="1")

import subprocess
import sys

import pytest

# fixtures that start a server of Prefect: tests that ask for one share a worker, so that it starts once
SERVERS = {"test_server": "test server", "real_server": "real server"}


def pytest_configure(config: pytest.Config) -> None:
    """Compile the engine before the workers start, since each would compile it for itself."""
    if getattr(config.option, "numprocesses", None):
        subprocess.run(
            [sys.executable, "-c", "from extract.engines import choose; choose('cpu').make_ready()"],
            check=True,
            cwd=config.rootpath,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that need the same server into the same group."""
    for item in items:
        for fixture, group in SERVERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(group))


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
