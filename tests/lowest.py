"""Print the lowest versions that pyproject.toml allows, as pip constraints: `python tests/lowest.py`."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# no other CPU build installs on every machine that runs the tests
INSTALLED_SEPARATELY = {"torch"}


def lowest_versions(requirements: Iterable[str]) -> Iterator[str]:
    """`name==version` for every requirement except those that are installed separately.

    Raises ValueError for a requirement without a lower bound, which cannot be tested at its lowest version.
    """
    for requirement in requirements:
        match = re.match(r"([\w.-]+)\s*(?:>=|==)\s*([\w.]+)", requirement)
        if match is None:
            raise ValueError(
                f"a dependency must have a lower bound; got {requirement!r}; add the lowest version that works"
            )
        name, version = match.groups()
        if name not in INSTALLED_SEPARATELY:
            yield f"{name}=={version}"


if __name__ == "__main__":
    print("\n".join(lowest_versions(tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["dependencies"])))
