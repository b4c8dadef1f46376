"""The environment of all tests: no network, no telemetry, and the demo model loaded once."""

import os

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", TQDM_DISABLE="1")
# interpret kernels, unless there is a GPU to run them; Triton reads this when it is first imported, for example by torch.compile
if os.environ.get("ATTLAS_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

from tests.chromium import started_browser
from tests.properties import QUICK, THOROUGH
from tests.shapes import check_shapes

# a shell's job in the background ignores Ctrl-C, and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# fixtures that take long to make: the tests of all files that use the first share a worker, and those of each file that uses another
COSTLY_FOR_ALL, COSTLY = "test_server", ("real_server", "smollm")


def pytest_configure(config: pytest.Config) -> None:
    """Enable shape checks, choose the number of property cases, and compile the engine once before workers start."""
    if find_spec("beartype") is not None:  # a machine with a GPU may lack it
        check_shapes()
    settings.load_profile(THOROUGH if _is_exhaustive_tier(config) else QUICK)
    if getattr(config.option, "numprocesses", None) and os.environ.get("ATTLAS_GPU") != "1":
        subprocess.run([sys.executable, "-m", "tests.compile_engine"], check=True, cwd=config.rootpath)


def _is_exhaustive_tier(config: pytest.Config) -> bool:
    asked = config.getoption("markexpr") or ""
    return "exhaustive" in asked.replace("not exhaustive", "")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put property tests in the exhaustive tier too, and there the other cases of a test of which `sample(n)` leaves n in its own."""
    cases = defaultdict(list)
    for item in items:
        if _is_exhaustive_tier(config) and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.exhaustive)
        for marker in item.iter_markers("sample"):
            cases[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, kept), of_test in cases.items():
        for item in random.Random(0).sample(of_test, max(0, len(of_test) - kept)):
            item.add_marker(pytest.mark.exhaustive)


@pytest.hookimpl(optionalhook=True)  # xdist may be absent
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests one by one, except files that need the same costly fixture (pytest-xdist 3.8 breaks its own groups).

    Those that need a GPU by xdist's own scheduler, which does not repeat the test under which a worker died.
    """
    if config.getoption("markexpr") == "gpu":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def text_of(file: str) -> str:
        return (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if COSTLY_FOR_ALL in text_of(file):
                return COSTLY_FOR_ALL
            return file if any(fixture in text_of(file) for fixture in COSTLY) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _unchanged_threads() -> Iterator[None]:
    """Fail a test that changes torch's number of threads, which would affect the next one."""
    torch = sys.modules.get("torch")
    before = torch and torch.get_num_threads()
    yield
    if torch:
        assert torch.get_num_threads() == before, "the test changed torch's number of threads"


@pytest.fixture(scope="session", autouse=True)
def _demo_is_loaded_once() -> Iterator[None]:
    """All runs of this process measure one demo encoder for each way of loading it, and examine it once."""
    from attlas.extract import instrument

    load, loaded = instrument.load_encoder, {}

    def load_once(name: str, **options: Any) -> Any:
        if name != "demo":
            return load(name, **options)
        way = tuple(sorted(options.items()))
        if way not in loaded:
            loaded[way] = load(name, **options)
        return loaded[way]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instrument, "load_encoder", load_once)
        yield


@pytest.fixture(scope="session")
def demo():
    """The demo encoder, in float32 on the CPU."""
    from attlas.extract.model.encoder import load_encoder

    return load_encoder("demo", device="cpu")


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the demo's tokenizer, in a folder."""
    from tests.extract.models import save_with_tokenizer

    return save_with_tokenizer(demo.tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium."""
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """The documents of the built-in corpus, real prose."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


Ended = tuple[int, str, str]


@pytest.fixture
def attlas(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the command line in this process; returns exit code, standard output and standard error."""
    from attlas.flows.cli import exit_code

    def run(*arguments: object) -> Ended:
        code = exit_code([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
