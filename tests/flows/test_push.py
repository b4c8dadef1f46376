"""Uploads to a hub: real requests of huggingface_hub to a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.extract.options import RunOptions
from tests.extract.runs import complete_run
from tests.files import read_json
from tests.flows.conftest import ROOT
from tests.flows.fake_hub import TOKEN, Hub, fake_hub

NAME = "me/study"
Pushed = tuple[int, str, str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a report beside its tables."""
    from tests.analysis.synthetic import write_dataset

    root = write_dataset(tmp_path_factory.mktemp("push") / "known [1]")
    (root / "report.html").write_text("<html>")
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Callable[..., Pushed]:
    """Run `attlas push` in a new process, because huggingface_hub reads its settings when it is imported."""

    def run(*arguments: object, **environment: str) -> Pushed:
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        ended = subprocess.run(
            [sys.executable, "-m", "attlas.flows.cli", "push", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **settings, **quiet, **environment},
        )
        return ended.returncode, ended.stdout, ended.stderr

    return run


def files_of(dataset: Path) -> dict[str, bytes]:
    """What a push uploads: the parts that the manifest names, card and manifest."""
    manifest = read_json(dataset / "manifest.json") or {}
    parts = [part["path"] for table in manifest["tables"].values() for part in table["parts"]]
    return {name: (dataset / name).read_bytes() for name in (*parts, "README.md", "manifest.json")}


def test_a_push_uploads_what_the_manifest_names_and_the_manifest_last(
    push: Callable[..., Pushed], hub: Hub, dataset: Path
) -> None:
    code, out, err = push(dataset, NAME)
    assert code == 0, err
    assert out == f"pushed   {hub.address}/datasets/{NAME}\n"
    assert hub.branches[NAME]["main"] == {".gitattributes": b"", **files_of(dataset)}
    assert not hub.private[NAME]
    assert sorted(hub.commits[-1]) == ["README.md", "manifest.json"]
    assert all("manifest.json" not in commit for commit in hub.commits[:-1])
    assert sorted(path.name for path in dataset.iterdir()) == sorted(
        {"report.html", *(name.split("/")[0] for name in files_of(dataset))}
    ), "the dataset itself stays as it is"


def test_a_push_again_replaces_the_dataset(push: Callable[..., Pushed], hub: Hub, dataset: Path) -> None:
    hub.create(NAME, private=False)
    hub.branches[NAME]["main"] |= {
        "manifest.json": b"{}",
        "heads/shard-00009.parquet": b"earlier",
        "LICENSE": b"of its owner",
    }
    code, _, err = push(dataset, NAME)
    assert code == 0, err
    assert hub.branches[NAME]["main"] == {".gitattributes": b"", "LICENSE": b"of its owner", **files_of(dataset)}


def test_an_upload_that_stops_leaves_no_manifest(push: Callable[..., Pushed], hub: Hub, dataset: Path) -> None:
    hub.create(NAME, private=False)
    hub.branches[NAME]["main"]["manifest.json"] = b"{}"
    hub.fail_at_commit = 1
    code, out, err = push(dataset, NAME)
    assert (code, out) == (1, ""), err
    assert "manifest.json" not in hub.branches[NAME]["main"]
    hub.fail_at_commit = None
    assert push(dataset, NAME)[0] == 0
    assert hub.branches[NAME]["main"]["manifest.json"] == (dataset / "manifest.json").read_bytes()


def test_a_private_dataset_and_a_branch(push: Callable[..., Pushed], hub: Hub, dataset: Path) -> None:
    code, out, err = push(dataset, NAME, "--private", "--revision", "second")
    assert code == 0, err
    assert out.endswith(f"/datasets/{NAME}/tree/second\n")
    assert hub.private[NAME]
    assert hub.branches[NAME]["second"] == {".gitattributes": b"", **files_of(dataset)}
    assert hub.branches[NAME]["main"] == {".gitattributes": b""}


def test_a_repository_with_something_else_is_refused(push: Callable[..., Pushed], hub: Hub, dataset: Path) -> None:
    hub.create(NAME, private=False)
    hub.branches[NAME]["main"]["data/train.csv"] = b"years of work"
    code, _, err = push(dataset, NAME)
    assert code == 2
    assert "holds something else (data/train.csv); push to another name" in err
    assert hub.commits == []


def test_a_damaged_dataset_is_refused_before_a_repository_is_created(
    push: Callable[..., Pushed], hub: Hub, dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    part = copy / "heads" / "shard-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    code, _, err = push(copy, NAME)
    assert code == 2 and "heads/shard-00000.parquet: size" in err
    assert hub.branches == {}


@pytest.mark.parametrize("tokens", ["ids", "text"])
def test_text_is_refused_unless_it_is_asked_for(
    push: Callable[..., Pushed], hub: Hub, tmp_path: Path, tokens: str
) -> None:
    (tmp_path / "corpus.txt").write_text("One fox jumps over one dog. " * 3)
    out = tmp_path / "out"
    complete_run(RunOptions(model="demo", corpus=str(tmp_path / "corpus.txt"), out=out, tokens=tokens))  # pyright: ignore
    code, _, err = push(out, NAME)
    column = "sequences.token_ids" if tokens == "ids" else "sequences.token_ids and sequences.text"
    assert code == 2 and f"a push reveals no text; this dataset has {column}; " in err
    assert hub.branches == {}
    assert push(out, NAME, "--with-text")[0] == 0
    assert hub.branches[NAME]["main"].keys() >= files_of(out).keys()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps attlas from it; unset it"),
        ({"HF_TOKEN": ""}, "a push needs a token of the hub that may write; there is none; set HF_TOKEN"),
        ({"HF_TOKEN": "hf_another"}, "it answers with status 401; give a token that it knows"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "it can't be reached"),
    ],
)
def test_without_a_hub_a_push_is_refused_before_any_work(
    push: Callable[..., Pushed], hub: Hub, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    code, out, err = push(tmp_path / "nowhere", NAME, **environment)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert hub.branches == {}


@pytest.mark.parametrize("name", ["study", "me/my/study", "me/my study", "me/..", "-/-"])
def test_a_name_that_the_hub_does_not_take_is_refused(push: Callable[..., Pushed], dataset: Path, name: str) -> None:
    code, _, err = push(dataset, "--", name, HF_HUB_OFFLINE="1")
    assert code == 2 and "a dataset on the hub is OWNER/NAME; " in err


# the card


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    folder = tmp_path_factory.mktemp("card")
    (folder / "corpus.txt").write_text("One fox jumps over one dog. " * 3)
    return RunOptions(model="demo", corpus=str(folder / "corpus.txt"), out=folder / "plain")


def front_matter(card: str) -> dict:
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_changes_nothing_but_the_card(options: RunOptions, tmp_path: Path) -> None:
    from attlas.extract.card import Card
    from tests.extract.runs import contents

    complete_run(options)
    card = Card(license="cc-by-4.0", language=("en", "no"), source="PleIAs/common_corpus")
    other = replace(options, out=tmp_path / "card", card=card)
    planned = complete_run(other)
    plain, with_card = contents(Path(str(options.out))), contents(tmp_path / "card")
    assert plain.keys() == with_card.keys()
    assert {name for name in plain if plain[name] != with_card[name]} == {"README.md"}
    facts = front_matter(with_card["README.md"].decode())
    assert facts["license"] == "cc-by-4.0" and facts["language"] == ["en", "no"]
    assert facts["size_categories"] == ["n<1K"] and facts["source_datasets"] == ["PleIAs/common_corpus"]
    assert {config["config_name"] for config in facts["configs"]} == {n.split("/")[0] for n in plain if "/" in n}
    assert "| source | PleIAs/common_corpus |" in with_card["README.md"].decode()
    assert "card" not in planned.identity.recipe
    assert "license" not in front_matter(plain["README.md"].decode())


def test_another_card_is_written_when_the_same_run_is_started_again(options: RunOptions) -> None:
    from attlas.extract.card import Card
    from attlas.extract.run import finish, plan_run

    complete_run(options)
    assert plan_run(replace(options, card=Card(license="mit"))).is_complete, "it is the same run"
    finish(options.out, card=Card(license="mit"))
    readme = Path(str(options.out), "README.md")
    assert front_matter(readme.read_text())["license"] == "mit"
    finish(options.out)
    assert front_matter(readme.read_text())["license"] == "mit", "a finished dataset stays as it is"


@pytest.mark.parametrize("source", ["<img src=x> | *bold* [link](http://x) `code`", "a: b # c", "---"])
def test_a_source_is_text_on_the_card_whatever_it_holds(options: RunOptions, tmp_path: Path, source: str) -> None:
    from attlas.extract.card import Card
    from attlas.extract.dictionary import dataset_card

    complete_run(options)
    manifest = json.loads(Path(str(options.out), "manifest.json").read_text())
    card = dataset_card(manifest, Card(source=source))
    assert front_matter(card).keys() == front_matter(dataset_card(manifest)).keys()
    row = next(line for line in card.splitlines() if line.startswith("| source |"))
    assert not any(character in row.removeprefix("| source |").removesuffix("|") for character in "<>|*[]`")


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (39_024, "10K<n<100K"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_sizes_have_the_categories_of_the_hub(rows: int, category: str) -> None:
    from attlas.extract.card import size_category

    assert size_category(rows) == category


def test_a_finished_run_whose_file_has_another_card_gets_it(options: RunOptions) -> None:
    from attlas.flows.config import CardSettings, Run
    from attlas.flows.measure import write_card

    complete_run(options)
    run = Run(model=options.model, corpus=options.corpus, out=Path(str(options.out)))
    readme = Path(str(options.out), "README.md")
    before = readme.read_text()
    write_card(run)
    assert readme.read_text() == before
    write_card(run.model_copy(update={"card": CardSettings(license="apache-2.0", language="en, de")}))
    facts = front_matter(readme.read_text())
    assert (facts["license"], facts["language"]) == ("apache-2.0", ["en", "de"])
