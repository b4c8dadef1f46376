"""A schedule under everything at once, for an hour: `python -m tests.soak --minutes 60`.

`attlas watch --interval 60`, started by a real Prefect server, measures a corpus in an object store that fails, into the same store.
Meanwhile documents are added and rewritten, checkpoints replace each other, and all processes of the schedule are killed at random
moments and started again. Afterwards every dataset must be whole and say what the corpus holds, nothing that had its record was measured
again, and each drift was told once. Prints what happened as JSON; exits with 1 if anything is not as it should be.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import psutil

from attlas.flows.nights import Generation, Nights
from attlas.flows.outbox import Alert
from attlas.flows.watching import FAILED_NIGHT, digest_of
from tests.extract.checkpoints import enlarge_queries
from tests.flows.conftest import PROSE, ROOT, ask, started_prefect_server
from tests.flows.webhook import Hook, started_hook
from tests.object_store.proxy import FAULTS, Proxy, Request, started_proxy
from tests.object_store.server import BUCKET, environment, started_server
from tests.waiting import wait_until

WORDS = " ".join(PROSE).split()
NIGHTS, CORPUS = f"s3://{BUCKET}/nights", f"s3://{BUCKET}/corpus"
INTERVAL_S = 60
# seconds between events of a kind
DOCUMENT_S, CHECKPOINT_S, KILL_S = (10, 30), (240, 420), (60, 240)
FAULT_RATE, LISTING_DELAY_S = 0.03, 0.3
HOOK_TAKES = 0.75  # of the alerts that it is sent
PART = re.compile(rf"PUT /{BUCKET}/nights/([^/]+)/(\w+)/shard-(\d+)[^/]*\.parquet")
RECORD = re.compile(rf"PUT /{BUCKET}/nights/([^/]+)/_work/records/(\d+)\.json")
MANIFEST = re.compile(rf"PUT /{BUCKET}/nights/([^/]+)/manifest\.json")


class Schedule:
    """A corpus, checkpoints, and the processes of `attlas watch --interval`."""

    def __init__(self, folder: Path, environment: dict[str, str], chance: random.Random) -> None:
        self.folder, self._environment, self._chance = folder, environment, chance
        self.texts: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.alerts = folder / "alerts.jsonl"
        self.log = folder / "log"
        self._run_file = folder / "soak.toml"
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """A first corpus, a tiny model, and a first night that is the baseline."""
        from attlas.extract.model.encoder import load_encoder
        from tests.extract.models import save_with_tokenizer

        save_with_tokenizer(load_encoder("demo", device="cpu").tokenizer, self.folder / "model")
        settings = {"model": "model", "corpus": CORPUS, "out": NIGHTS, "engine": "reference"}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        self._run_file.write_text("\n".join([*lines, "max_length = 32", "shard_sequences = 8"]))
        for _ in range(20):
            self.add_document()
        subprocess.run([*self._command(), "--accept"], env=self._environment, cwd=ROOT, check=True, stdout=sys.stderr)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "attlas.flows.cli", "watch", str(self._run_file)]

    def start(self) -> None:
        alerts = [f"--alert={name}" for name in (self.alerts, "webhook:HOOK", "prefect")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command(), *alerts, f"--interval={INTERVAL_S}"],
                env=self._environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.counts["starts"] += 1

    def kill(self) -> None:
        """SIGKILL to the process and all that it has started."""
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            of_process = psutil.Process(self._process.pid)
            for process in [of_process, *of_process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    self.counts["killed processes"] += 1
        self._process.wait()
        self.counts["kills"] += 1

    def kill_and_start(self) -> None:
        self.kill()
        time.sleep(self._chance.uniform(0, 5))
        self.start()

    def change_document(self) -> None:
        """Mostly a new document; else one that is rewritten."""
        if self._chance.random() < 0.85:
            self.add_document()
        else:
            self._write(self._chance.choice(sorted(self.texts)), "rewritten")

    def add_document(self) -> None:
        self._write(f"{len(self.texts):05}.txt", "added")

    def _write(self, name: str, what: str) -> None:
        from attlas.extract.store import open_storage

        self.texts[name] = f"{name}: " + " ".join(self._chance.choices(WORDS, k=self._chance.randint(20, 120)))
        open_storage(CORPUS).put(name, self.texts[name].encode())
        self.counts[f"documents {what}"] += 1

    def change_checkpoint(self) -> None:
        enlarge_queries(self.folder / "model", self._chance.choice((3, 10, 30)))
        self.counts["checkpoints"] += 1

    def flow_runs(self) -> list[dict[str, Any]]:
        """The runs that Prefect has started, the oldest first."""
        wanted = {"deployments": {"name": {"any_": ["soak"]}}, "sort": "START_TIME_ASC"}
        found: list[dict[str, Any]] = []
        while len(page := ask(self._environment, "flow_runs", **wanted, offset=len(found), limit=200)):
            found += page
        return [run for run in found if run["start_time"]]

    def is_at_rest_since(self, time: datetime) -> bool:
        """Whether a night that began later has found nothing new, and has delivered whatever the webhook had refused before."""
        runs = [run for run in self.flow_runs() if datetime.fromisoformat(run["start_time"]) > time]
        states = [run["state"] for run in runs if run["state_name"] == "Unchanged"]
        return any("alerts wait" not in state["message"] for state in states)


def soak(schedule: Schedule, proxy: Proxy, chance: random.Random, minutes: float) -> None:
    """Let everything happen at once, for so many minutes."""
    began = time.monotonic()
    events = {
        schedule.change_document: DOCUMENT_S,
        schedule.change_checkpoint: CHECKPOINT_S,
        schedule.kill_and_start: KILL_S,
    }
    due = {event: began + pause[0] / 2 for event, pause in events.items()}
    proxy.rate, proxy.list_delay_s = FAULT_RATE, LISTING_DELAY_S
    schedule.start()
    told = began
    while (now := time.monotonic()) < began + 60 * minutes:
        event = min(due, key=lambda event: due[event])
        time.sleep(max(0, min(due[event] - now, 1)))
        if time.monotonic() >= due[event]:
            event()
            due[event] = time.monotonic() + chance.uniform(*events[event])
        if now - told > 60:
            told = now
            counts = dict(schedule.counts) | {"faults": sum(proxy.injected.values())}
            print(f"{(now - began) / 60:.0f} minutes: {counts}", file=sys.stderr, flush=True)
    proxy.rate = proxy.list_delay_s = 0


def measured_twice(requests: Sequence[Request]) -> list[str]:
    """Parts that were written again although the record of their shard said that they were there, but for what finishing concludes."""
    from attlas.extract.tables import TABLES

    concluded = {name for name, table in TABLES.items() if table.conclude is not None}
    recorded: set[tuple[str, int]] = set()
    again = []
    for request in requests:
        asked = f"{request.method} {unquote(request.path)}"
        if part := PART.match(asked):
            is_again = part[2] not in concluded and (part[1], int(part[3])) in recorded
            again += [asked] if is_again else []
        elif record := RECORD.match(asked):
            recorded.add((record[1], int(record[2])))
        elif manifest := MANIFEST.match(asked):
            recorded = {(night, shard) for night, shard in recorded if night != manifest[1]}
    return again


def problems_of_dataset(place: str, texts: Mapping[str, str] | None) -> Iterator[str]:
    """What is wrong with a dataset. texts: what its newest generation should have measured, by name."""
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.verify import verify

    yield from (f"{place}: {finding}" for finding in verify(place))
    documents = Dataset.open(place).scan("documents").filter(pl.col("sequences") > 0).collect()
    found = dict(documents.select("source", "characters").iter_rows())
    if len(found) != documents.height:
        yield f"{place}: documents were measured twice"
    if texts is not None and found != {name: len(text) for name, text in texts.items()}:
        yield f"{place}: its documents are not those of the corpus"


def expected_alerts(nights: Nights) -> dict[str, dict[str, str]]:
    """The findings of each generation of each night against the baseline, by their keys: dataset, generation, finding."""
    from attlas.analysis.compare import compare
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.drift import find_drift
    from attlas.extract.store import generation_of

    assert nights.baseline is not None
    old = Dataset.open(str(nights.baseline))
    expected = {}
    for place in nights.finished:
        for number in range(1, generation_of(Dataset.open(place).manifest) + 1):
            new = Dataset.open(f"{place}@{number}")
            for drift in find_drift(compare(old, new), old, new):
                key = Alert(digest_of(old.manifest), digest_of(new.manifest), drift.name, "").key
                expected[key] = {"dataset": str(place), "generation": str(number), "finding": drift.name}
    return expected


def problems_of_alerts(nights: Nights, told: Sequence[str], by_hook: set[str]) -> Iterator[str]:
    """What is wrong with what was told. told: the keys in the file, in order. by_hook: those that the webhook took."""
    expected = expected_alerts(nights)
    yield from (f"told {number} times: {expected.get(key)}" for key, number in Counter(told).items() if number > 1)
    yield from (f"told of nothing that was found: {key}" for key in {*told} - expected.keys())
    yield from (f"the webhook has not been told: {expected.get(key)}" for key in {*told} - by_hook)
    yield from (f"only the webhook was told: {expected.get(key)}" for key in by_hook - {*told})
    yield from (f"nobody was told: {expected[key]}" for key in expected.keys() - {*told})


def keys_of_drift(alerts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all alerts but those of failed nights, which nothing that stays tells of."""
    return [alert["key"] for alert in alerts if alert["finding"] != FAILED_NIGHT]


def copied_here(folder: Path) -> Nights:
    """The nights in a local folder, where the checks read each file once instead of asking the store again and again."""
    from attlas.extract.store import open_storage

    there, here = open_storage(NIGHTS), open_storage(folder)
    for key in there.list():
        here.put(key, there.get(key) or b"")
    return Nights(folder)


def outcome(schedule: Schedule, proxy: Proxy, hook: Hook, *, is_at_rest: bool) -> dict[str, Any]:
    """What happened, and `problems`."""
    runs, nights = schedule.flow_runs(), copied_here(schedule.folder / "nights")
    lines = schedule.alerts.read_text().splitlines() if schedule.alerts.exists() else []
    alerts = [json.loads(line) for line in lines]
    told = keys_of_drift(alerts)
    problems = [] if is_at_rest else ["the last state of the corpus was not measured, or not all alerts were delivered"]
    finished = nights.finished
    for place in finished:
        problems += problems_of_dataset(str(place), schedule.texts if place == finished[-1] else None)
    problems += [f"measured twice: {request}" for request in measured_twice(proxy.requests)]
    problems += problems_of_alerts(nights, told, {*keys_of_drift(hook.received)})
    problems += ["a traceback in the log"] if b"Traceback" in schedule.log.read_bytes() else []
    return {
        **schedule.counts,
        "requests": len(proxy.requests),
        "faults of the store": dict(proxy.injected),
        "runs": Counter(run["state_name"] for run in runs),
        "failed runs": Counter(run["state"]["message"] for run in runs if run["state_type"] in ("FAILED", "CRASHED")),
        "datasets": len(finished),
        "generations": sum(Generation.now(place).number for place in finished),
        "alerts": {"of drift and defects": len(told), "of failed nights": len(alerts) - len(told)},
        "answers of the webhook": {"taken": len(hook.received), "refused": hook.refused},
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for log, alerts and datasets, which then stays")
    arguments = parser.parse_args()
    chance, of_hook = random.Random(arguments.seed), random.Random(arguments.seed)
    with ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        proxy = Proxy(stack.enter_context(started_server()), seed=arguments.seed, faults=FAULTS)
        stack.enter_context(started_proxy(proxy))
        hook = stack.enter_context(started_hook(lambda: 200 if of_hook.random() < HOOK_TAKES else 503))
        settings = environment(proxy.port) | {"HOOK": hook.address, "PREFECT_HOME": str(folder / "prefect")}
        settings |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        os.environ.update(settings)
        schedule = Schedule(folder, stack.enter_context(started_prefect_server(dict(os.environ))), chance)
        schedule.prepare()
        is_at_rest = False
        try:
            soak(schedule, proxy, chance, arguments.minutes)
            ended = datetime.now(UTC)
            with suppress(TimeoutError):
                is_at_rest = wait_until(lambda: schedule.is_at_rest_since(ended), seconds=600, pause_s=5)
        finally:
            schedule.kill()
        found = outcome(schedule, proxy, hook, is_at_rest=is_at_rest)
    print(json.dumps({"minutes": arguments.minutes, **found}, indent=1))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
