"""A synthetic dataset shared by all tests that only read it."""

from pathlib import Path

import pytest

from tests.analysis.synthetic import write_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "known [1]", lengths=(16, 34))
