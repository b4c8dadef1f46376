"""Every command that takes a dataset takes the URL of one."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.extract.options import RunOptions
from attlas.extract.store import REPORT, open_storage
from tests.conftest import Ended
from tests.extract.runs import complete_run
from tests.object_store.conftest import copied
from tests.object_store.proxy import Proxy, unconditional
from tests.object_store.server import SECRET

SQL = "SELECT avg(entropy_nats) AS entropy FROM heads WHERE layer = 1 AND head = 2"


@pytest.fixture(scope="module")
def dataset(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("commands") / "out"
    complete_run(
        RunOptions(
            model=str(model),
            corpus="demo",
            out=out,
            limit=8,
            max_length=32,
            shard_sequences=1024,
            device="cpu",
            engine="cpu",
        )
    )
    return out


def test_what_is_asked_there_is_answered_as_of_the_folder(
    attlas: Callable[..., Ended], url: str, dataset: Path
) -> None:
    copied(dataset, url)
    for command, *options in (
        ("query", SQL, "--format", "json"),
        ("info", "--format", "json"),
        ("verify", "--format", "json"),
        ("findings", "--format", "json"),
    ):
        there, here = attlas(command, url, *options), attlas(command, dataset, *options)
        assert there[0] == here[0] == 0, there
        assert there[1].replace(url, "PLACE") == here[1].replace(str(dataset), "PLACE")


@pytest.mark.slow
def test_reports_comparisons_and_exports_are_made_of_it(
    attlas: Callable[..., Ended], url: str, dataset: Path, tmp_path: Path
) -> None:
    a, b = f"{url}/a", f"{url}/b"
    storage = copied(dataset, a)
    copied(dataset, b)
    code, out, err = attlas("report", a)
    assert (code, f"report   {a}/report.html" in out) == (0, True), err
    assert b"<html" in (storage.get(REPORT) or b"")
    code, out, err = attlas("report", a, b)
    assert (code, f"report   {b}/comparison.html" in out) == (0, True), err
    assert b"<html" in (open_storage(b).get("comparison.html") or b"")
    for arguments in (("compare", a, b), ("compare", dataset, b), ("trend", a, b), ("trend", f"{url}/*")):
        code, _, err = attlas(*arguments, "--format", "json", "--output", tmp_path / "answer.json")
        assert (code, json.loads((tmp_path / "answer.json").read_text()) != []) == (0, True), err
    assert attlas("export", a, "--output", tmp_path / "there.csv")[0] == 0
    assert attlas("export", dataset, "--output", tmp_path / "here.csv")[0] == 0
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    code, out, err = attlas("open", a, "--tool", "polars")
    assert f"pl.scan_parquet('{a}/heads/*.parquet')" in out
    assert attlas("finish", a)[0] == 0


def test_polars_reads_it_by_the_lines_that_open_prints(attlas: Callable[..., Ended], url: str, dataset: Path) -> None:
    copied(dataset, url)
    code, out, err = attlas("open", url, "--tool", "polars")
    assert code == 0, err
    opened: dict[str, pl.LazyFrame] = {}
    exec(out, {}, opened)
    rows = {name: table["rows"] for name, table in Dataset.open(dataset).manifest["tables"].items()}
    assert {name: opened[name].select(pl.len()).collect().item() for name in rows} == rows


def test_a_query_of_one_head_fetches_its_columns_and_groups_only(proxy: Proxy, url: str, dataset: Path) -> None:
    from attlas.analysis.query import query

    storage = copied(dataset, url)
    heads = [storage.size(key) or 0 for key in storage.list("heads")]
    everything = sum(storage.size(key) or 0 for key in storage.list())
    proxy.requests.clear()
    by_duckdb = query(url, SQL)["entropy"].to_pylist()
    requests, sent = len(proxy.requests), proxy.bytes_sent
    assert all("/heads/" in r.path or r.path.endswith("manifest.json") for r in proxy.requests)
    assert requests <= 2 + 6 * len(heads)
    proxy.requests.clear()
    rows = Dataset.open(url).scan("heads").filter(layer=1, head=2)
    by_polars = rows.select(pl.col("entropy_nats").mean()).collect().item()
    assert by_duckdb == pytest.approx([by_polars])
    # two ends of each part, in which the footers are, and the column
    for fetched in (sent, proxy.bytes_sent):
        assert fetched < min(everything / 2, 2 * 65536 * len(heads) + sum(heads) / 4 + 50_000)


@pytest.mark.parametrize("command", ["info", "verify", "report", "finish", "doctor", "open", "export"])
def test_a_url_with_credentials_is_refused_without_them(
    attlas: Callable[..., Ended], proxy: Proxy, command: str, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "x.csv") if command == "export" else ()
    for address in (f"s3://key:{SECRET}@bucket/run", f"s3://bucket/run?X-Amz-Signature={SECRET}"):
        code, out, err = attlas(command, address, *output)
        assert code in (2, 3)
        assert "has no credentials, query or fragment" in out + err
        assert SECRET not in out + err and "key:" not in out + err


def test_doctor_says_whether_a_store_can_be_used(attlas: Callable[..., Ended], proxy: Proxy, url: str) -> None:
    _, out, _ = attlas("doctor", url)
    assert f"{url}: can be written, and creates an object only once" in out
    proxy.asked = unconditional
    code, out, _ = attlas("doctor", url)
    assert (code, "If-None-Match" in out) == (3, True)
    assert list(open_storage(url).list()) == []


def test_a_push_uploads_copies_of_what_the_manifest_names(url: str, dataset: Path) -> None:
    from attlas.flows.push import local_files

    copied(dataset, url)
    with local_files(Dataset.open(url)) as folder:
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {p.relative_to(dataset).as_posix(): p.read_bytes() for p in dataset.rglob("*") if p.is_file()}
    assert not folder.exists()
