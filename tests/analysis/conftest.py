"""Datasets shared by all tests that only read them: a synthetic one, and small ones that runs left."""

import json
from pathlib import Path

import pytest

from tests.analysis.synthetic import write_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "known [1]", lengths=(16, 34))


@pytest.fixture(scope="session")
def encoder_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a small encoder left: three documents, one of them dropped, one in two shards."""
    return _run(tmp_path_factory.mktemp("encoder"), "bert", "AutoModel")


@pytest.fixture(scope="session")
def causal_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a small causal language model."""
    return _run(tmp_path_factory.mktemp("causal"), "gpt2", "GPT2LMHeadModel")


def _run(place: Path, family: str, kind: str) -> Path:
    from attlas.extract.options import RunOptions
    from tests.extract.checkpoints import TEXT, model_of, save
    from tests.extract.runs import complete_run

    corpus = place / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT * 3, "", "The cat sat on the mat.")))
    model = save(model_of(family, kind), place / family)
    out = place / "run's [1]"
    complete_run(RunOptions(model=str(model), corpus=str(corpus), out=out, max_length=16, shard_sequences=4))
    return out
