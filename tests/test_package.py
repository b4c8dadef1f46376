"""`import attlas`: the public names, each there when it is asked for and not before."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import attlas

ROOT = Path(__file__).parent.parent


def modules_after(code: str) -> set[str]:
    """The modules that a new interpreter has after it ran the code, beyond those it begins with."""
    counted = f"import sys; before = set(sys.modules); {code}; print(*sorted(set(sys.modules) - before))"
    ended = subprocess.run([sys.executable, "-c", counted], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(ended.stdout.split())


@pytest.mark.parametrize("code", ["import attlas", "import attlas; dir(attlas)", "import attlas; hasattr(attlas, 'x')"])
def test_importing_attlas_loads_the_standard_library_at_most(code: str) -> None:
    loaded = {module.partition(".")[0] for module in modules_after(code)}
    assert loaded - sys.stdlib_module_names == {"attlas"}


def test_importing_attlas_loads_none_of_its_packages() -> None:
    assert {module for module in modules_after("import attlas") if module.startswith("attlas.")} == set()


@pytest.mark.parametrize("name", ["export", "open_dataset", "query", "report", "verify"])
def test_what_reads_a_dataset_loads_neither_torch_nor_prefect(name: str) -> None:
    loaded = {module.partition(".")[0] for module in modules_after(f"import attlas; attlas.{name}")}
    assert loaded & {"torch", "transformers", "prefect"} == set()


@pytest.mark.parametrize("name", attlas.__all__)
def test_every_public_name_is_a_documented_function(name: str) -> None:
    function = getattr(attlas, name)
    assert callable(function) and function.__doc__
    assert getattr(attlas, name) is function


def test_the_public_names_are_those_of_the_modules_behind_them() -> None:
    from attlas.extract.measurement import measure

    assert attlas.measure is measure


def test_all_public_names_are_listed() -> None:
    assert {*attlas.__all__, "__version__"} <= set(dir(attlas))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "attlas" / "__init__.py").read_text("utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {ast.unparse(node) for node in ast.walk(checked) if isinstance(node, ast.Name | ast.alias)}
    assert {name.rpartition(" as ")[2] for name in seen} >= {*attlas.__all__, "__version__"}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert attlas.__version__ == version("attlas")


def test_a_name_that_is_not_there_is_refused_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'attlas' has no attribute 'extrac'"):
        _ = attlas.extrac


@pytest.mark.parametrize("package", ["extract", "analysis", "flows"])
def test_a_package_is_linked_relatively(package: str) -> None:
    assert (ROOT / "attlas" / package).readlink() == Path("..", package)


def test_a_run_from_a_source_tree_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from attlas.extract import software

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", absent)
    assert software.software_version("attlas") == attlas.__version__
    with pytest.raises(PackageNotFoundError):
        software.software_version("torch")
