"""The wheel: what it contains, and that it works beside folders that have the names of its packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("analysis", "extract", "flows")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "attlas", *PACKAGES)
NOTEBOOK = """
from importlib import import_module

import torch
import attlas
import attlas.statistics
from transformers import BertConfig, BertModel

assert {import_module(name).WHOSE for name in ("analysis", "extract", "flows")} == {"the notebook's"}
assert "site-packages" in attlas.__file__, attlas.__file__

model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)).eval()
tables = attlas.measure(model, input_ids=torch.arange(5, 21).reshape(2, 8))
assert tables["heads"].num_rows == 2 * 2 * 4
assert b"<html" in attlas.view(model, input_ids=torch.arange(5, 13)[None]).page

dataset = attlas.open_dataset("data")
assert dataset.scan("documents").collect().height == 2
assert attlas.query("data", "SELECT count(*) AS n FROM documents").to_pylist() == [{"n": 2}]
assert attlas.verify("data") == []
assert "<html" in attlas.report("data").save("page.html").read_text()
"""


def copied(folder: Path) -> Path:
    """What the wheel is built from, without what an earlier build left in `build/`, which would get into it."""
    folder.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip(*arguments: str | Path) -> None:
    """Run pip with the setuptools of this environment, which torch requires in a version that will do: no downloads."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def environment_with(*what: str | Path, folder: Path) -> Path:
    """The `bin` of an environment that has attlas as it is told here, and everything else from this one."""
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages, programs = (Path(sysconfig.get_path(kind, "venv", paths)) for kind in ("purelib", "scripts"))
    ours = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "ours.pth").write_text("".join(f"{entry}\n" for entry in ours))
    # the attlas that is seen through that path is none of this environment's
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    pip("--python", programs / "python", "install", *options, *what)
    return programs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    sources, out = copied(tmp_path_factory.mktemp("sources") / "attlas"), tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sources)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def research(tmp_path: Path) -> Path:
    """A folder of somebody's research, with packages of the names that ours have."""
    folder = tmp_path / "research"
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text('WHOSE = "the notebook\'s"\n')
    (folder / "notebook.py").write_text(NOTEBOOK)
    return folder


def test_the_wheel_holds_every_module_and_page_exactly_once(wheel: Path) -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()]
    ours = [
        *(f"attlas/{f.name}" for f in (ROOT / "attlas").glob("*.py")),
        *(f"attlas/{f.relative_to(ROOT)}" for f in files if f.parent.name != "__pycache__"),
    ]
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(ours)
    assert {Path(name).suffix for name in ours} == {".py", ".html", ".css", ".js", ".toml"}


@pytest.mark.slow
def test_the_wheel_works_beside_folders_of_the_same_names(wheel: Path, research: Path, tmp_path: Path) -> None:
    programs = environment_with(wheel, folder=tmp_path / "environment")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # the compiled engine is of this path, which is no one's after the test
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run(program: str, *arguments: str) -> str:
        command = [programs / program, *arguments]
        ended = subprocess.run(command, cwd=research, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    # `-m` and a script put a folder of the user's before everything that is installed: where they start, or lie
    options = ["--model", "demo", "--corpus", "demo", "--out", "data", "--limit", "2", "--max-length", "32"]
    run("python", "-m", "attlas.flows.cli", "run", *options)
    run("python", "notebook.py")
    assert "is valid" in run("attlas", "verify", "data")
    assert run("attlas", "--version") == f"attlas {run('python', '-c', 'import attlas; print(attlas.__version__)')}"


@pytest.mark.slow
def test_an_editable_installation_puts_nothing_but_attlas_within_reach(tmp_path: Path) -> None:
    # a folder without `__init__.py`, as those of research are, gives way to a package of its name anywhere on the path
    sources = copied(tmp_path / "attlas")
    programs = environment_with("--editable", sources, folder=tmp_path / "environment")
    for package in PACKAGES:
        (tmp_path / "research" / package).mkdir(parents=True)
        (tmp_path / "research" / package / "mine.py").touch()
    code = "import analysis.mine, extract.mine, flows.mine, attlas.flows.cli; print(attlas.flows.cli.__file__)"
    ended = subprocess.run([programs / "python", "-c", code], cwd=tmp_path / "research", capture_output=True, text=True)
    assert ended.stdout.strip() == str(sources / "attlas" / "flows" / "cli.py"), ended.stderr
