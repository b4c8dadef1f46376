"""The options of a run, shared by the run file and the command line."""

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer.main

from attlas.extract.errors import Refusal
from attlas.flows.cli import app
from attlas.flows.config import FILE_ONLY, CardSettings, Run, read_run
from tests.flows.conftest import ROOT

DEMO = ROOT / "flows" / "runs" / "demo.toml"
REQUIRED = {"model": "demo", "corpus": "demo", "out": "out"}


def test_the_command_has_exactly_the_options_of_a_run() -> None:
    command = typer.main.get_group(app).commands["run"]
    options = {p.name for p in command.params if p.param_type_name == "option"} - {"help"}
    # the last three say how it is run, which changes no byte
    assert options == (set(Run.model_fields) - set(FILE_ONLY)) | {"shards", "workers", "runner"}


def test_the_example_lists_every_option_with_its_default() -> None:
    text = DEMO.read_text()
    options, card = text.split("# [card]\n")
    assert set(re.findall(r"^(?:# )?(\w+) = ", options, re.M)) == set(Run.model_fields) - set(FILE_ONLY)
    assert set(re.findall(r"^# (\w+) = ", card, re.M)) == set(CardSettings.model_fields)
    for name, value in re.findall(r"^# (\w+) = (\"[^\"]*\"|\S+)", options, re.M):
        default = Run.model_fields[name].default
        if default not in (None, False):
            assert str(default) == value.strip('"')


def test_the_example_is_a_valid_run() -> None:
    run = read_run(DEMO, {})
    assert (run.model, run.corpus, run.max_length) == ("demo", "demo", 128)
    assert run.out.resolve() == ROOT / "data" / "demo"


def test_extraction_has_the_same_options_and_defaults() -> None:
    from attlas.extract.options import RunOptions

    extraction = {f.name: f.default for f in fields(RunOptions)}
    flows = {name: MISSING if f.is_required() else f.default for name, f in Run.model_fields.items()}
    assert flows == extraction


def test_options_reach_extraction_unchanged() -> None:
    options = read_run(None, {**REQUIRED, "limit": 3, "tokens": "ids", "strict": True}).options()
    assert (options.out, options.limit, options.tokens, options.strict) == (Path("out"), 3, "ids", True)


def test_a_tab_may_be_typed_as_two_characters() -> None:
    assert read_run(None, {**REQUIRED, "delimiter": r"\t"}) == read_run(None, {**REQUIRED, "delimiter": "\t"})


def test_a_corpus_with_an_invalid_name_is_stored_escaped_and_opened_by_its_name(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    run = read_run(None, {**REQUIRED, "corpus": name})
    assert run.corpus == r"caf\xe9.txt"
    assert Run.model_validate_json(run.model_dump_json()).options().corpus == name
    (tmp_path / r"a\xe9.txt").touch()
    assert read_run(None, {**REQUIRED, "corpus": str(tmp_path / r"a\xe9.txt")}).options().corpus.endswith(r"/a\xe9.txt")


def test_files_of_statistics_in_a_run_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "needle"\nout = "data"\nstatistics = "all,code/mine.py"\n')
    run = read_run(file, {})
    assert run.statistics == f"all,{tmp_path}/code/mine.py"
    assert run.corpus == "needle", "a built-in corpus is no path"
    assert read_run(file, {"statistics": "mine.py"}).statistics == "mine.py"


def test_what_is_ablated_reaches_extraction_from_the_run_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "data"\nablate = "heads,mean"\n')
    assert read_run(file, {}).options().ablation.text == "heads,mean"
    overridden = read_run(file, {"ablate": "mlp"}).options()
    assert overridden.ablation.text == "mlp" and "ablations" in overridden.columns
    assert read_run(None, REQUIRED).options().ablate is None


def test_options_of_a_generated_corpus_reach_extraction() -> None:
    options = read_run(None, {**REQUIRED, "corpus": "needle", "seed": 3, "depths": "0,100"}).options()
    assert options.generation is not None
    assert (options.generation.seed, options.generation.depths, options.generation.documents) == (3, (0, 100), 16)


def test_paths_in_a_run_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    file = tmp_path / "run.toml"
    file.write_text('model = "encoder"\ncorpus = "texts/*.txt"\nout = "data"\ndigest_key = "secret"\n')
    run = read_run(file, {})
    assert (run.model, run.corpus) == (str(tmp_path / "encoder"), str(tmp_path / "texts/*.txt"))
    assert (run.out, run.digest_key) == (tmp_path / "data", tmp_path / "secret")


@pytest.mark.parametrize("corpus", ["demo", "hub:stanfordnlp/imdb"])
def test_names_in_a_run_file_are_not_paths(tmp_path: Path, corpus: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'model = "google-bert/bert-base-uncased"\ncorpus = "{corpus}"\nout = "data"\n')
    run = read_run(file, {})
    assert (run.model, run.corpus) == ("google-bert/bert-base-uncased", corpus)


def test_the_command_line_takes_precedence_with_paths_relative_to_the_current_folder(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "data"\nlimit = 5\nstrict = true\n')
    run = read_run(file, {"out": Path("here"), "limit": 2, "strict": False, "stride": None})
    assert (run.out, run.limit, run.strict, run.stride) == (Path("here"), 2, False, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_lenght = 128", "has no option 'max_lenght'; did you mean 'max_length'?"),
        ("max-length = 128", "has no option 'max-length'; did you mean 'max_length'?"),
        ("zzz = 1", "has no option 'zzz'; the options are model, corpus, out"),
        ("limit = -3", "limit must be at least 1; got -3; use a larger number"),
        ("limit = 0", "limit must be at least 1; got 0"),
        ("stride = -1", "stride must be at least 0; got -1"),
        ("max_length = -128", "max_length must be at least 1; got -128"),
        ("batch_tokens = 0", "batch_tokens must be at least 1; got 0"),
        ("shard_sequences = 0", "shard_sequences must be at least 1; got 0"),
        ('limit = "3"', "limit must be a whole number; got '3'"),
        ("limit = true", "limit must be a whole number; got True"),
        ("limit = 2.5", "limit must be a whole number; got 2.5"),
        ('strict = "yes"', "strict must be true or false; got 'yes'"),
        ('tokens = "all"', "tokens must be one of none, classes, ids, text; got 'all'"),
        ('dtype = "float64"', "dtype must be one of auto, float32, float16, bfloat16; got 'float64'"),
    ],
)
def test_an_invalid_line_is_refused_in_plain_words(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'model = "demo"\ncorpus = "demo"\nout = "data"\n{line}\n')
    with pytest.raises(Refusal, match=re.escape(message)) as refused:
        read_run(file, {})
    assert "pydantic" not in str(refused.value)


def test_all_invalid_lines_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "data"\nlimit = -1\nmodle = "x"\n')
    with pytest.raises(Refusal, match=r"limit must be .*; .*did you mean 'model'"):
        read_run(file, {})


def test_paths_are_normalized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("flows") / "runs"
    runs.mkdir(parents=True)
    (runs / "run.toml").write_text('model = "demo"\ncorpus = "demo"\nout = "../../data/demo"\ndigest_key = "../key"\n')
    run = read_run(runs / "run.toml", {})
    assert (str(run.out), str(run.digest_key)) == ("data/demo", "flows/key")
    assert str(read_run(None, {**REQUIRED, "out": "./a/../b"}).out) == "b"


def test_a_path_through_a_link_is_not_normalized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    out = read_run(None, {**REQUIRED, "out": "link/../out"}).out
    assert out.resolve() == tmp_path / "elsewhere" / "out"


def test_a_missing_option_is_refused_with_its_description() -> None:
    with pytest.raises(Refusal, match="a run needs --corpus: a text, JSONL"):
        read_run(None, {"model": "demo", "out": "x"})


@pytest.mark.parametrize(
    ("content", "message"), [(b"model = ", "valid TOML"), (b"\xff\xfe", "valid TOML"), (None, "there is none at")]
)
def test_an_invalid_run_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refusal, match=message):
        read_run(file, {})


def test_a_folder_instead_of_a_run_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="Is a directory"):
        read_run(tmp_path, {})


def with_card(tmp_path: Path, card: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(f'model = "demo"\ncorpus = "demo"\nout = "data"\n{card}\n')
    return file


def test_the_card_of_a_run_file_reaches_extraction(tmp_path: Path) -> None:
    from attlas.extract.card import Card

    file = with_card(tmp_path, '[card]\nlicense = "cc-by-4.0"\nlanguage = ["en", "no"]\nsource = "a manual"')
    run = read_run(file, {"limit": 2})
    assert run.options().card == Card(license="cc-by-4.0", language=("en", "no"), source="a manual")
    assert Run.model_validate_json(run.model_dump_json()) == run and hash(run)
    assert read_run(with_card(tmp_path, '[card]\nlanguage = "en, de"'), {}).options().card == Card(
        language=("en", "de")
    )
    assert read_run(with_card(tmp_path, ""), {}).options().card is None


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ('[card]\nlicence = "mit"', "[card] has license, language and source, each a text (language also a list); "),
        ("[card]\nlicense = 3", "has license = 3; correct it"),
        ('card = "mit"', "run.toml has 'mit'; correct it"),
        ('[card]\nlicense = "MIT License"', "a card's license is an identifier of the hub such as mit"),
        ('[card]\nlanguage = "English"', "a card's language is a code such as en, or a list of them; got 'English'"),
        ('[card]\nlanguage = ["en", 1]', "each a text (language also a list)"),
        ('[card]\nsource = "a\\nb"', "a card's source is one line of at most 500 characters"),
    ],
)
def test_an_invalid_card_is_refused_in_plain_words(tmp_path: Path, card: str, message: str) -> None:
    with pytest.raises(Refusal, match=re.escape(message)):
        read_run(with_card(tmp_path, card), {})
