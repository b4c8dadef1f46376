"""Datasets and corpora in the stores of Google and Azure."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.options import RunOptions
from attlas.extract.store import LocalFolder, open_storage
from tests.conftest import Ended
from tests.extract.runs import complete_run
from tests.flows.test_watching import new_house
from tests.object_store.azure import CONTAINER, PROGRAM, started_azurite
from tests.object_store.conftest import contents
from tests.object_store.google import started_google
from tests.object_store.server import BUCKET

pytestmark = pytest.mark.slow
WITH_AZURITE = pytest.mark.skipif(PROGRAM is None, reason="needs npm's package azurite")


@pytest.fixture(params=["gs", pytest.param("az", marks=WITH_AZURITE)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder in an empty store that the environment refers to."""
    is_google = request.param == "gs"
    with started_google() if is_google else started_azurite(tmp_path / "azurite") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield f"gs://{BUCKET}/folder" if is_google else f"az://{CONTAINER}/folder"


def test_objects_are_written_once_listed_read_in_ranges_and_deleted(place: str) -> None:
    storage = open_storage(place)
    storage.put("a/b", b"hello")
    assert (storage.get("a/b"), storage.get("none"), storage.size("a/b")) == (b"hello", None, 5)
    assert (list(storage.list()), storage.names(), storage.get_range("a/b", 1, 3)) == (["a/b"], ["a"], b"ell")
    assert [storage.put_if_absent("c", content) for content in (b"ours", b"theirs")] == [True, False]
    assert storage.get("c") == b"ours"
    content = os.urandom(20 << 20)
    with storage.writing("large") as file:
        file.write(content)
    assert storage.get("large") == content
    release = storage.try_lock("lock")
    assert release is not None and storage.try_lock("lock") is None
    release()
    storage.clear("")
    assert list(storage.list()) == []


def test_a_run_there_gives_the_bytes_of_a_run_of_the_folder(
    attlas: Callable[..., Ended], place: str, model: Path, tmp_path: Path
) -> None:
    storage = open_storage(f"{place}/corpus")
    (tmp_path / "corpus").mkdir()
    for number in range(12):
        text = f"The cat sat on mat {number} and looked at the moon for a long time before it slept again."
        storage.put(f"{number}.txt", text.encode())
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    for here in (tmp_path, place):
        complete_run(
            RunOptions(
                model=str(model),
                corpus=f"{here}/corpus",
                out=f"{here}/out" if here == place else tmp_path / "out",  # pyright: ignore[reportArgumentType]
                max_length=16,
                shard_sequences=4,
                engine="reference",
            )
        )
    assert contents(open_storage(f"{place}/out")) == contents(LocalFolder(tmp_path / "out"))
    assert verify(f"{place}/out") == []
    code, out, err = attlas("query", f"{place}/out", "SELECT count(*) AS n FROM sequences", "--format", "csv")
    assert (code, out.splitlines()[0]) == (0, "n"), err


@pytest.mark.exhaustive
def test_nights_there_are_compared_and_told_of(model: Path, tmp_path: Path, place: str) -> None:
    house = new_house(model, tmp_path, place)
    house.night(0, accept=True)
    house.add(100)
    assert str(house.night(1).dataset) == f"{place}/nights/2026-03-01T02-00-00Z@2"
    house.perturb()
    assert house.night(2).has_drift
    assert "drift: heads" in {alert["finding"] for alert in house.alerts}
    assert open_storage(f"{place}/nights").get("latest") == b"2026-03-03T02-00-00Z\n"
