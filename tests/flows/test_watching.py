"""Nights that are compared with a pinned baseline: what is measured, what is said, and that nobody is told twice."""

import json
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attlas.analysis.dataset import Dataset
from attlas.extract.errors import Refusal
from attlas.extract.store import open_storage
from attlas.flows.config import Run
from attlas.flows.interrupts import Stopped
from attlas.flows.nights import Nights, folder_name
from attlas.flows.places import Place, inside
from attlas.flows.watching import Night, Watch, night_named, watch_night
from tests.extract.checkpoints import enlarge_queries
from tests.extract.runs import complete_run

FIRST = datetime(2026, 3, 1, 2, 0, 0, tzinfo=UTC)
TEXT = "The cat sat on the mat and looked at the moon, number {}, for a long time before it slept again."


@dataclass
class House:
    """A model, a corpus and nights, in folders or an object store."""

    folder: Path
    model: Path
    place: Place  # of corpus and nights
    measured: list[Run] = field(default_factory=list)

    def add(self, *numbers: int) -> None:
        storage = open_storage(inside(self.place, "corpus"))
        for number in numbers:
            storage.put(f"{number}.txt", TEXT.format(number).encode())

    def night(self, day: int, **watch) -> Night:
        run = Run(
            model=str(self.model),
            corpus=str(inside(self.place, "corpus")),
            out=inside(self.nights.root, folder_name(FIRST + timedelta(days=day))),
            max_length=16,
            engine="reference",
        )
        settings = Watch(**{"alerts": ("alerts.jsonl",), "columns": ("entropy_nats", "update_ratio")} | watch)
        return watch_night(run, settings, folder=self.folder, measure=self._measure)

    def _measure(self, run: Run) -> None:
        complete_run(run.options())
        self.measured.append(run)

    def perturb(self) -> None:
        """Another checkpoint: the queries of one layer's heads are larger."""
        enlarge_queries(self.model, 200)

    def night_killed_at(self, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A baseline, and a night with another checkpoint that ends when it calls `step`."""

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        self.night(0, accept=True)
        self.perturb()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, killed)
            self.night(1)
        assert self.alerts == []

    @property
    def nights(self) -> Nights:
        return Nights(inside(self.place, "nights"))

    @property
    def alerts(self) -> list[dict]:
        file = self.folder / "alerts.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def house(model: Path, tmp_path: Path) -> House:
    return new_house(model, tmp_path, tmp_path)


def new_house(model: Path, folder: Path, place: Place) -> House:
    shutil.copytree(model, folder / "model")
    house = House(folder, folder / "model", place)
    house.add(*range(12))
    return house


def test_the_first_night_needs_a_baseline_or_becomes_it(house: House) -> None:
    with pytest.raises(Refusal, match="has none yet; give --baseline DIR, or --accept"):
        house.night(0)
    assert not house.measured
    night = house.night(0, accept=True)
    assert night.message == "2026-03-01T02-00-00Z@1 is measured; it is the baseline from now on"
    assert str(house.nights.baseline) == f"{house.nights.root}/2026-03-01T02-00-00Z@1"
    assert house.alerts == []


def test_without_anything_new_nothing_is_measured_or_said(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.night(0, accept=True)
    monkeypatch.setattr(House, "_measure", None)
    night = house.night(1)
    assert (night.message, night.dataset, night.has_drift) == ("nothing is new since 2026-03-01T02-00-00Z", None, False)


def test_a_grown_corpus_gives_a_generation_that_is_compared_with_the_pinned_one(house: House) -> None:
    house.night(0, accept=True)
    for day in (1, 2):
        house.add(100 + day)
        night = house.night(day)
        assert str(night.dataset) == f"{house.nights.root}/2026-03-01T02-00-00Z@{day + 1}"
        assert night.message.startswith(f"2026-03-01T02-00-00Z@{day + 1} against 2026-03-01T02-00-00Z@1: ")
    assert str(house.nights.baseline) == f"{house.nights.root}/2026-03-01T02-00-00Z@1"
    assert len(house.nights.finished) == 1
    facts = Dataset.open(house.nights.finished[0]).manifest["generation"]
    assert (facts["number"], facts["added"]) == (3, 1)
    page = house.nights.finished[0] / "comparison.html"
    assert night.page == page and page.exists()


def test_another_checkpoint_drifts_and_is_told_exactly_once(house: House) -> None:
    house.night(0, accept=True)
    house.perturb()
    night = house.night(1)
    assert str(night.dataset) == f"{house.nights.root}/2026-03-02T02-00-00Z@1" and night.has_drift
    told = house.alerts
    assert "drift: heads" in {alert["finding"] for alert in told}
    heads = next(alert for alert in told if alert["finding"] == "drift: heads")
    assert "heads changed: " in heads["summary"]
    assert heads["details"]["baseline"] == "2026-03-01T02-00-00Z@1"
    assert {place["layer"] for place in heads["details"]["places"]} >= {0}
    # the same night again, and its files read anew: the same dataset, and nobody is told again
    (house.nights.root / ".attlas-schedule.json").unlink()
    again = house.night(1)
    assert again.has_drift and house.alerts == told
    # a later night of the same state, measured anew, is the same dataset
    shutil.rmtree(house.nights.root / "2026-03-02T02-00-00Z")
    (house.nights.root / ".attlas-schedule.json").unlink()
    third = house.night(2)
    assert third.dataset is not None and third.has_drift and house.alerts == told
    # accepted, it is what later nights are compared with
    accepted = house.night(2, accept=True)
    assert accepted.message.endswith("; it is the baseline from now on")
    house.add(50)
    assert not house.night(3).has_drift
    assert house.alerts == told


@pytest.mark.parametrize("step", ["attlas.analysis.compare.compare", "attlas.flows.outbox.Outbox.add"])
def test_a_night_that_ends_before_its_alerts_are_written_is_made_up_for(
    house: House, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    house.night_killed_at(step, monkeypatch)
    house.measured.clear()
    assert house.night(2).has_drift
    assert "drift: heads" in {alert["finding"] for alert in house.alerts}
    assert [run.out for run in house.measured] == [
        house.nights.finished[1]
    ]  # which is there: nothing is measured again


# as soon as the night is measured, or when it is noted that it is
@pytest.mark.parametrize("step", ["attlas.flows.nights.Nights.add", "attlas.flows.outbox.Outbox.add"])
def test_a_night_that_ends_before_its_alerts_are_written_is_made_up_for_although_the_next_checkpoint_is_another(
    house: House, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    house.night_killed_at(step, monkeypatch)
    enlarge_queries(house.model, 5)
    night = house.night(2)
    assert night.has_drift and "; made up for: 2026-03-02T02-00-00Z@1 against " in night.message
    drifted = [alert["details"]["current"] for alert in house.alerts if alert["finding"] == "drift: heads"]
    assert drifted == ["2026-03-02T02-00-00Z@1", "2026-03-03T02-00-00Z@1"]


def test_a_dataset_that_cannot_be_compared_any_more_is_told_of_and_holds_nobody_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.night_killed_at("attlas.flows.nights.Nights.add", monkeypatch)
    for part in Path(str(house.nights.finished[1])).rglob("*.parquet"):
        part.write_bytes(b"no Parquet")
    enlarge_queries(house.model, 5)
    assert house.night(2).has_drift
    failed = [alert["details"]["night"] for alert in house.alerts if alert["finding"] == "failed night"]
    assert failed == ["2026-03-02T02-00-00Z"]


def test_a_night_that_fails_is_told_of_once_until_one_has_succeeded(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.night(0, accept=True)
    house.add(20)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(House, "_measure", fail)
        for day in (1, 2):
            with pytest.raises(OSError, match="the disk is full"):
                house.night(day)
    (alert,) = house.alerts
    assert (alert["finding"], alert["summary"]) == ("failed night", "OSError: the disk is full")
    assert alert["details"] == {"night": "2026-03-02T02-00-00Z"}
    assert house.night(3).dataset is not None
    (house.folder / "corpus").rename(house.folder / "elsewhere")
    with pytest.raises(Refusal, match="a corpus"):
        house.night(4)
    assert [alert["summary"].partition(";")[0] for alert in house.alerts][1:] == [
        "a corpus is demo, random-repeats, needle, hub:NAME, a file, a folder or a glob"
    ]


def test_a_night_that_its_user_stops_is_no_alert(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.night(0, accept=True)
    house.add(20)

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(House, "_measure", stop)
    with pytest.raises(Stopped):
        house.night(1)
    assert house.alerts == []


def test_a_late_night_tells_nobody_and_is_not_the_latest(house: House) -> None:
    house.night(5, accept=True)
    house.perturb()
    late = house.night(3)
    assert str(late.dataset) == f"{house.nights.root}/2026-03-04T02-00-00Z@1"
    assert late.message.endswith("; it is late, and a later night stands: no alert")
    assert late.has_drift and house.alerts == []
    assert (house.nights.root / "latest").resolve().name == "2026-03-06T02-00-00Z"


def test_a_night_whose_clock_was_ahead_is_told_of_until_it_has_come(house: House) -> None:
    house.night(0, accept=True)
    ahead = (datetime.now(UTC) - FIRST).days + 400
    house.perturb()
    (problem,) = house.night(ahead).problems
    name = folder_name(FIRST + timedelta(days=ahead))
    assert problem.startswith(
        f"{name} is yet to come, by the clock of this machine, and until then every night counts as late"
    )
    house.perturb()
    late = house.night(1)
    assert late.has_drift and late.problems == (problem,)
    shutil.rmtree(house.nights.root / name)
    assert house.night(1).problems == ()


def test_a_baseline_is_pinned_to_its_generation(house: House, tmp_path: Path) -> None:
    house.night(0, accept=True)
    dataset = house.nights.finished[0]
    for _ in range(2):
        house.add(200 + _)
        house.night(1 + _, baseline=str(dataset))  # given every night, as a schedule does
        assert str(house.nights.baseline) == f"{dataset}@1"
    house.night(3, baseline=f"{dataset}@2")
    assert str(house.nights.baseline) == f"{dataset}@2"
    with pytest.raises(Refusal, match=r"a baseline is a dataset that stays the same; .*latest is a link"):
        house.night(4, baseline=str(house.nights.root / "latest"))
    with pytest.raises(Refusal, match="has no 9"):
        house.night(4, baseline=f"{dataset}@9")
    other = tmp_path / "elsewhere"
    shutil.copytree(dataset, other)
    house.night(4, baseline=str(other))
    assert str(house.nights.baseline) == f"{other}@3"


def test_a_baseline_that_is_gone_is_refused_before_anything_is_measured(house: House, tmp_path: Path) -> None:
    house.night(0, accept=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(house.nights.finished[0], elsewhere)
    house.night(1, baseline=str(elsewhere))
    shutil.rmtree(elsewhere)
    house.add(77)
    house.measured.clear()
    with pytest.raises(Refusal, match="there is none at"):
        house.night(2)
    assert not house.measured
    (house.nights.root / ".attlas-baseline.json").write_text("{")
    with pytest.raises(Refusal, match="it is damaged; give --baseline again"):
        house.night(2)
    assert not house.measured
    dataset = house.nights.finished[0]
    house.night(2, baseline=str(dataset))
    assert str(house.nights.baseline) == f"{dataset}@1"


def test_the_baseline_is_kept_whatever_its_age(house: House) -> None:
    house.night(0, accept=True)
    for day in (1, 2, 3):
        house.perturb()
        house.night(day)
    gone = house.nights.keep(1)
    assert [dataset.name for dataset in gone] == ["2026-03-02T02-00-00Z", "2026-03-03T02-00-00Z"]
    assert [d.name for d in house.nights.finished] == ["2026-03-01T02-00-00Z", "2026-03-04T02-00-00Z"]


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2999-01-01"])
def test_a_night_is_a_time_that_has_been(text: str) -> None:
    with pytest.raises(Refusal, match="--night is a"):
        night_named(text)


def test_a_night_without_a_zone_is_in_utc() -> None:
    assert night_named("2026-03-01T02:00") == FIRST == night_named("2026-03-01T03:00+01:00")
