"""Invalid input gives one clear line on standard error and exit code 2, and writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT, Ended


def refused(ended: Ended, *words: str) -> None:
    code, out, err = ended
    assert code == 2, err
    assert out == ""
    assert err.startswith("attlas: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_help_lists_the_commands(attlas: Callable[..., Ended]) -> None:
    code, out, _ = attlas("--help")
    assert code == 0
    commands = "run finish report compare trend findings query open export push redact info log gc verify stats view doctor serve watch"
    for command in commands.split():
        assert f"  {command} " in out


def test_a_misspelled_option_is_refused_with_a_suggestion(attlas: Callable[..., Ended]) -> None:
    code, _, err = attlas("run", "--max-lenght", "3")
    assert code == 2
    assert "--max-length" in err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--limit", -1, "limit must be at least 1; got -1"),
        ("--stride", -1, "stride must be at least 0; got -1"),
        ("--max-length", 0, "max_length must be at least 1; got 0"),
        ("--tokens", "all", "tokens must be one of none, classes, ids, text; got 'all'"),
        ("--corpus", "nowhere", "there is no 'nowhere'"),
        ("--corpus", "nowhere/*.txt", "'nowhere/*.txt' has none"),
        ("--delimiter", ";", "delimiter applies to CSV and TSV only; this corpus is demo"),
        ("--delimiter", ";;", "delimiter must be one character other than a quote or line end; got ';;'"),
        ("--encoding", "utf-9", "encoding must be auto or a text encoding of Python; got 'utf-9'"),
        ("--model", "./nowhere", "there is no folder ./nowhere"),
        ("--model", "a/b/c", "there is no folder a/b/c"),
        ("--digest-key", "nowhere", "there is none at nowhere"),
        ("--out", "s3:/bucket/x", "got 's3:/bucket/x'; write a URL as text, with two slashes"),
        ("--out", "nothing://bucket/x", "nothing://bucket/x can't be opened"),
        ("--out", "s3://bucket//x", "the path in a URL has a name between any two slashes"),
        (
            "--out",
            "s3://key:secret@bucket/x",
            "the URL of an object store has no credentials, query or fragment; one that",
        ),
    ],
)
def test_an_invalid_value_is_refused_before_any_work(
    attlas: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: object,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    valid = {"--model": "demo", "--corpus": "demo", "--out": "out"}
    arguments = [part for pair in {**valid, option: value}.items() for part in pair]
    refused(attlas("run", *arguments), words)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_the_run_file_is_refused_with_a_suggestion(
    attlas: Callable[..., Ended], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "out"\nmax_lenght = 3\n')
    refused(attlas("run", file), "run.toml has no option 'max_lenght'", "did you mean 'max_length'?")
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_with_other_files_is_refused_and_not_changed(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(
        attlas("run", "--model", "demo", "--corpus", "demo", "--out", tmp_path), "holds something else", "thesis.tex"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_instead_of_an_output_folder_is_refused(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    refused(attlas("run", "--model", "demo", "--corpus", "demo", "--out", tmp_path / "out"), "is a file")


def test_a_digest_key_inside_the_dataset_is_refused(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "_work").mkdir(parents=True)
    (out / "key").write_text("secret")
    arguments = ("--model", "demo", "--corpus", "demo", "--out", out, "--digest-key", out / "key")
    refused(attlas("run", *arguments), "must stay out of the dataset")


# refusals of extraction

BAD_CORPORA = {
    "empty.txt": (b"", "empty"),
    "blank.jsonl": (b'{"text": ""}\n{"text": ""}\n', "empty"),
    "column.csv": (b"title,body\na,b\n", "title"),
    "column.jsonl": (b'{"body": "words"}\n', "body"),
}


@pytest.mark.parametrize("name", ["column.csv", "column.jsonl"])
def test_invalid_files_are_refused_before_loading_a_model_or_starting_a_server(tmp_path: Path, name: str) -> None:
    from attlas.extract.errors import Refusal
    from attlas.flows.checks import refuse_bad_paths
    from attlas.flows.config import Run

    content, words = BAD_CORPORA[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=words):
        refuse_bad_paths(Run(model="demo", corpus=str(tmp_path / name), out=tmp_path / "out"))


@pytest.mark.usefixtures("test_server")
@pytest.mark.parametrize("name", BAD_CORPORA)
def test_a_corpus_without_documents_is_refused(attlas: Callable[..., Ended], tmp_path: Path, name: str) -> None:
    content, words = BAD_CORPORA[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    code, _, err = attlas("run", "--model", "demo", "--corpus", tmp_path / name, "--out", out)
    assert code == 2, err
    assert words in err
    assert not out.exists()


@pytest.mark.usefixtures("test_server")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bytes.txt", b"good words \xff and more", ("bytes.txt", "11")),
        ("lines.jsonl", b'{"text": "fine"}\n{"text": \n', ("lines.jsonl", "2")),
    ],
)
def test_strict_refuses_the_first_invalid_document_with_its_position(
    attlas: Callable[..., Ended], tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    code, _, err = attlas("run", "--model", "demo", "--corpus", tmp_path / name, "--out", out, "--strict")
    assert code == 2, err
    for word in words:
        assert word in err
    assert not out.exists()


@pytest.mark.usefixtures("test_server")
@pytest.mark.parametrize(("length", "words"), [(4096, "512"), (2, "special")])
def test_an_impossible_length_is_refused(
    attlas: Callable[..., Ended], tmp_path: Path, corpus: Path, length: int, words: str
) -> None:
    out = tmp_path / "out"
    code, _, err = attlas("run", "--model", "demo", "--corpus", corpus, "--out", out, "--max-length", length)
    assert code == 2, err
    assert str(length) in err
    assert words in err
    assert not out.exists()


@pytest.mark.usefixtures("test_server")
@pytest.mark.parametrize(("file", "words"), [(None, "config.json"), ("pytorch_model.bin", "pickled weights")])
def test_a_folder_without_safetensors_is_refused(
    attlas: Callable[..., Ended], tmp_path: Path, corpus: Path, file: str | None, words: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    if file:
        (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
        (model / file).write_bytes(b"\x80\x04")
    code, _, err = attlas("run", "--model", model, "--corpus", corpus, "--out", out)
    assert code == 2, err
    assert words in err
    assert not out.exists()


@pytest.mark.parametrize("command", ["info", "verify", "report", "findings"])
def test_a_folder_without_a_dataset_is_refused(attlas: Callable[..., Ended], tmp_path: Path, command: str) -> None:
    refused(attlas(command, tmp_path), "no manifest.json")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    refused(attlas("query", tmp_path, "select 1", "--format", "xml"), "table, csv, json, parquet", "'xml'")
    refused(attlas("findings", tmp_path, "--format", "xml"), "table, csv, json, parquet", "'xml'")
    refused(attlas("findings", tmp_path, "--fail-on", "drift"), "--fail-on must be defects or findings; got 'drift'")


def test_stats_shows_the_catalogue(attlas: Callable[..., Ended]) -> None:
    code, out, _ = attlas("stats")
    assert code == 0
    for line in ("heads: one row per", "entropy_nats", "residual: one row per"):
        assert line in out


def test_stats_of_a_column_says_what_it_is(attlas: Callable[..., Ended]) -> None:
    code, out, _ = attlas("stats", "entropy_nats")
    assert code == 0
    for word in ("heads.entropy_nats: sharpness", "formula", "unit", "nats", "bounds", "causal uniform: ln(n!)/n"):
        assert word in out
    assert "measured   by every run" in out and "elsewhere  mean over rows of scipy.stats.entropy(p)" in out
    assert 'example    attlas query DIR "SELECT stack, layer, head, SUM(entropy_nats * query_rows)' in out


def test_the_readme_shows_what_stats_prints(attlas: Callable[..., Ended]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"$ attlas stats mass_previous\n{attlas('stats', 'mass_previous')[1]}```" in readme


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gini", "on request, for the first sequences of each shard (--sample): --statistics gini"),
        (
            "pattern_effective_rank",
            "only if named, for the first sequences of each shard (--sample): --statistics pattern_effective_rank",
        ),
        ("query_norm", "on request: --statistics query_norm"),
        ("retrieval_score", "on request, on the corpus needle alone: --statistics retrieval_score"),
        ("token_ids", "if the tokens themselves are asked for: --tokens ids or text"),
        ("heads.mass_previous", 'TransformerLens\' head detector (error_measure "mul"): previous_token_head'),
        ("residual.kurtosis", "one-hot tokens: d"),
    ],
)
def test_stats_says_what_a_column_costs_and_who_else_has_it(
    attlas: Callable[..., Ended], name: str, words: str
) -> None:
    code, out, _ = attlas("stats", name)
    assert code == 0 and words in out


def test_stats_of_a_file_are_its_columns(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from attlas.statistics import column\n"
        '@column(table="heads", formula="2 · entropy_nats", unit="nats", bounds=(0, None))\n'
        'def twice(o):\n    """Twice as much."""\n    return 2 * o.mean("entropy")\n'
    )
    code, out, _ = attlas("stats", file)
    assert code == 0
    for line in (
        "heads.twice",
        "formula    2 · entropy_nats",
        "meaning    Twice as much.",
        "origin     mine.py sha256:",
    ):
        assert line in out
    (column,) = json.loads(attlas("stats", file, "--format", "json")[1])
    assert column["name"] == "twice" and column["bounds"] == [0, None]
    refused(attlas("stats", tmp_path / "other.py"), "are in a Python file; there is none at", "other.py")


def test_a_run_that_ablates_something_unknown_is_refused_at_once(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    asked = ("run", "--model", "demo", "--corpus", "demo", "--out", tmp_path / "out")
    refused(attlas(*asked, "--ablate", "head"), "ablate takes heads, attention, mlp, zero, mean", "did you mean heads")
    refused(attlas(*asked, "--ablate", "zero,mean"), "ablate has both; leave one out, or make two runs")
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_missing_file_of_statistics_is_refused_at_once(
    attlas: Callable[..., Ended], tmp_path: Path
) -> None:
    asked = ("run", "--model", "demo", "--corpus", "demo", "--out", tmp_path / "out")
    refused(attlas(*asked, "--statistics", f"all,{tmp_path}/mine.py"), "there is none at", "mine.py; check the path")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.py").write_text("")
    refused(
        attlas(*asked, "--statistics", f"{tmp_path}/out/mine.py"), "the file of statistics must stay out of the dataset"
    )


def test_stats_for_machines_is_a_list_of_columns(attlas: Callable[..., Ended]) -> None:
    every = json.loads(attlas("stats", "--format", "json")[1])
    heads = json.loads(attlas("stats", "heads", "--format", "json")[1])
    (one,) = json.loads(attlas("stats", "heads.max_weight", "--format", "json")[1])
    assert one in heads and all(column in every for column in heads)
    assert one["bounds"] == ["1/n", 1] and one["known"]["uniform"] == "1/n"
    of_sequences = json.loads(attlas("stats", "sequence_id", "--format", "json")[1])
    assert {"sequences", "heads", "residual"} <= {column["table"] for column in of_sequences}
    refused(attlas("stats", "--format", "yaml"), "--format must be one of text, json; got 'yaml'")


def test_stats_of_an_unknown_column_suggests(attlas: Callable[..., Ended]) -> None:
    refused(attlas("stats", "entropy_nat"), "entropy_nats")


@pytest.mark.usefixtures("prefect_environment")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--cron or --interval; got neither"),
        (("--cron", "0 2 * * *", "--interval", "60"), "got both"),
        (("--cron", "at night"), "five fields"),
        (("--interval", "0"), "at least 1 second"),
        (("--cron", "0 2 * * *", "--timezone", "Mars/Olympus"), "Mars/Olympus"),
    ],
)
def test_a_schedule_that_is_none_is_refused(
    attlas: Callable[..., Ended], tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "out"\n')
    refused(attlas("serve", file, *options), words)
    assert list(tmp_path.iterdir()) == [file]
