"""The lowest versions that pyproject.toml admits, as pip constraints: `python tests/lowest.py` prints them."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# its CPU build of this version is the only one that installs everywhere the tests run
INSTALLED_APART = {"torch"}


def lowest(requirements: Iterable[str]) -> Iterator[str]:
    """`name==floor` of every requirement with a lower bound, but for what is installed in a step of its own.

    Raises ValueError for a requirement without one: a range that begins nowhere cannot be tested where it begins.
    """
    for requirement in requirements:
        match = re.match(r"([\w.-]+)\s*(?:>=|==)\s*([\w.]+)", requirement)
        if match is None:
            raise ValueError(
                f"a dependency has a lower bound; {requirement!r} has none; add the lowest version that works"
            )
        name, floor = match.groups()
        if name not in INSTALLED_APART:
            yield f"{name}=={floor}"


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["dependencies"])))
