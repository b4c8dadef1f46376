"""The import rules of the house: packages meet in files, and are known by one name."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "extract", "analysis")
# where else a package may be named: what runs, what configures, what people copy
DOCUMENTS = ("Makefile", ".ci/run", "pyproject.toml", "README.md", "CONTRIBUTING.md")
OLD_NAME = re.compile(
    rf"(?<![\w./\\-])({'|'.join(PACKAGES)})\\?\.([a-zA-Z_]\w*)"
    rf"|\bfrom ({'|'.join(PACKAGES)})(?:\.\w+)* import\b"
    rf"|^\s*import ({'|'.join(PACKAGES)})\b"
)


def imports_of(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, relative imports made absolute."""
    package = ("attlas", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top_of(module: str) -> str:
    """The package of ours, without the name that all of them are under, or the library."""
    return module.removeprefix("attlas.").partition(".")[0]


def imports_within(package: str) -> list[tuple[str, str]]:
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        found += [(str(file.relative_to(ROOT)), module) for module in imports_of(file)]
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("extract", {"attlas", "flows", "analysis", "prefect", "polars", "typer", "tests"}),
        ("analysis", {"attlas", "flows", "torch", "transformers", "prefect", "tests"}),
        ("flows", {"attlas", "torch", "transformers", "polars", "tests"}),
    ],
)
def test_a_package_imports_only_what_it_may(package: str, forbidden: set[str]) -> None:
    found = imports_within(package)
    assert found, f"no imports found in {package}: the rule would hold of nothing"
    assert [(file, module) for file, module in found if top_of(module) in forbidden] == []


def test_analysis_knows_only_the_store_the_tables_and_how_names_are_shown_of_extract() -> None:
    allowed = ("attlas.extract.store", "attlas.extract.tables", "attlas.extract.printable")
    wrong = [
        (file, module)
        for file, module in imports_within("analysis")
        if top_of(module) == "extract"
        and not any(module == a or module.startswith(f"{a}.") for a in allowed)
        # the package part of `from attlas.extract import store`, judged by what it names
        and module != "attlas.extract"
    ]
    assert wrong == []


CAPTURE = "attlas.extract.capture"
ROOMS = ("intercept", "discovery", "runtime")


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("intercept", ("discovery", "runtime")), ("discovery", ("runtime",)), ("runtime", ("discovery",)), (".", ROOMS)],
)
def test_discovery_and_runtime_share_only_interception_and_what_stands_beside_them(
    room: str, forbidden: tuple[str, ...]
) -> None:
    files = sorted((ROOT / "extract" / "capture" / room).glob("*.py"))
    found = [(file.name, module) for file in files for module in imports_of(file)]
    assert any(module.startswith(CAPTURE) for _, module in found), f"{room} imports nothing of ours"
    names = [f"{CAPTURE}.{other}" for other in forbidden]
    assert [pair for pair in found if any(pair[1] == name or pair[1].startswith(f"{name}.") for name in names)] == []


STORED = (
    *(f"extract/{n}.py" for n in ("identity", "manifest", "run", "shard")),
    *(f"extract/plan/{n}.py" for n in ("images", "means", "spool", "stored", "texts")),
    *(
        f"analysis/{n}.py"
        for n in (
            "damage",
            "dataset",
            "info",
            "integrity",
            "parts",
            "query",
            "row_checks",
            "scanning",
            "table_checks",
            "verify",
        )
    ),
)


@pytest.mark.parametrize("file", STORED)
def test_what_a_dataset_holds_is_reached_through_its_storage(file: str) -> None:
    paths = {"pathlib", "shutil", "glob", "tempfile", "attlas.extract.files"}
    assert paths & set(imports_of(ROOT / file)) == set()


def test_the_rules_see_relative_and_inner_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    inner = tmp_path / "analysis" / "report"
    inner.mkdir(parents=True)
    (inner / "page.py").write_text(
        "def f():\n    import torch.nn\n    from ..dataset import Dataset\n    from . import svg\n"
    )
    found = {module for _, module in imports_within("analysis")}
    assert {"torch.nn", "attlas.analysis.dataset.Dataset", "attlas.analysis.report.svg"} <= found


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, attlas.flows.cli; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    heavy = {"torch", "transformers", "datasets", "prefect", "polars", "duckdb", "pyarrow", "numpy", "scipy", "pandas"}
    assert "typer" in loaded
    assert heavy & set(loaded) == set()


@pytest.mark.parametrize(
    "module",
    ["attlas.extract.tables", "attlas.extract.store", "attlas.flows.checks", "attlas.analysis.query", "attlas"],
)
def test_what_reads_datasets_or_checks_a_run_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "False\n"


def modules() -> dict[str, Path]:
    """Every module of the packages, by its name."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    paths = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    names = [f"attlas.{path.removesuffix('.__init__')}" for path in paths]
    return dict(zip(names, files, strict=True))


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others, wherever in the file: at its top, in a function, or for type checkers alone."""
    graph = {}
    for name, file in files.items():
        imported = {next((m for m in _prefixes(each) if m in files), name) for each in _named_in(file)}
        graph[name] = imported - {name}
    return graph


def _named_in(file: Path) -> Iterator[str]:
    """Modules that a file imports, and what it imports from them by its full name."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _prefixes(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def circles_in(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or through others."""
    reached = {name: set(imported) for name, imported in graph.items()}
    for through in graph:
        for name in graph:
            if through in reached[name]:
                reached[name] |= reached[through]
    together = {
        frozenset(other for other in graph if other in reached[name] and name in reached[other]) for name in graph
    }
    return [set(circle) for circle in together if circle]


def test_no_module_imports_itself_through_others() -> None:
    assert circles_in(import_graph(modules())) == []


def test_circles_are_seen_wherever_the_import_stands(tmp_path: Path) -> None:
    sources = {
        "a": "from b import x\n",
        "b": "def f():\n    import c\n",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import y\n",
        "d": "import a\n",
    }
    files = {name: tmp_path / f"{name}.py" for name in sources}
    for name, source in sources.items():
        files[name].write_text(source)
    assert circles_in(import_graph(files)) == [{"a", "b", "c"}]


def old_names(text: str) -> Iterator[tuple[int, str]]:
    """The number and text of each line that names a package of ours as if it were at the top."""
    for number, line in enumerate(text.splitlines(), 1):
        if any(match[2] is None or is_module(match[1], match[2]) for match in OLD_NAME.finditer(line)):
            yield number, line.strip()


def is_module(package: str, name: str) -> bool:
    """Whether a package has it: `attlas.extract.engines`; a variable `extract` may have anything else."""
    return (ROOT / package / f"{name}.py").exists() or (ROOT / package / name).is_dir() or name == "measure"


def test_packages_are_named_only_under_attlas() -> None:
    # under two names a module would be there twice, with classes that are not equal
    code = [file for folder in ("attlas", *PACKAGES, "tests") for file in sorted((ROOT / folder).rglob("*.py"))]
    files = [*code, *(ROOT / name for name in DOCUMENTS)]
    assert [(str(file.relative_to(ROOT)), *line) for file in files for line in old_names(file.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("line", "is_old"),
    [
        ("from {}.errors import Refusal", True),
        ("    import {}.pipeline", True),
        ("from {} import measure", True),
        ("python -m {}.dictionary", True),
        ('"ignore::{}.errors.ResidualWarning"', True),
        ("from attlas.{} import measure", False),
        ("from tests.{}.models import encoder", False),
        ("{}/engines/cpu.py", False),
        ("sorted({}.glob('engines/*.py'))", False),
        ("made from {} and imported", False),
    ],
)
def test_the_rule_of_names_sees_code_and_no_prose(line: str, is_old: bool) -> None:
    assert bool(list(old_names(line.format("extract")))) == is_old
