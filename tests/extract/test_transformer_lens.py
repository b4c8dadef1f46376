"""`mass_previous`, `mass_same_token` and `mass_induction` of causal models are the scores of TransformerLens' head detector."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attlas.extract import measure
from tests.extract.models import eager_patterns, tiny

pytestmark = pytest.mark.slow

SCORES = {
    "mass_previous": "get_previous_token_head_detection_pattern",
    "mass_same_token": "get_duplicate_token_head_detection_pattern",
    "mass_induction": "get_induction_head_detection_pattern",
}


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its module of functions over patterns, without the rest of the package, whose dependencies are not installed."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(tmp_path), "transformer-lens==4.3.0"], check=True)
    package = ModuleType("transformer_lens")
    package.__path__ = [str(tmp_path / "transformer_lens")]
    stand_ins = {
        "ActivationCache": {"ActivationCache": object},
        "model_protocol": {"TransformerLensModel": object},
        "utilities": {"is_lower_triangular": None, "is_square": lambda x: x.shape[0] == x.shape[1]},
    }
    monkeypatch.setitem(sys.modules, "transformer_lens", package)
    for name, contents in stand_ins.items():
        module = ModuleType(f"transformer_lens.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    detector = importlib.import_module("transformer_lens.head_detector")
    monkeypatch.delitem(sys.modules, "transformer_lens.head_detector")
    return detector


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_masses_are_the_scores_of_the_head_detector(detector: Any, family: str):
    model = tiny(family)
    ids = torch.randint(2, 12, (1, 24), generator=torch.Generator().manual_seed(0))
    rows = {(r["layer"], r["head"]): r for r in measure(model, input_ids=ids)["heads"].to_pylist()}
    compared = 0
    for layer, pattern in enumerate(eager_patterns(model, input_ids=ids)):
        for head in range(pattern.shape[1]):
            for column, name in SCORES.items():
                score = detector.compute_head_attention_similarity_score(
                    pattern[0, head],
                    getattr(detector, name)(ids),
                    exclude_bos=False,
                    exclude_current_token=False,
                    error_measure="mul",
                )
                assert score > 0
                assert rows[layer, head][column] == pytest.approx(score, rel=1e-4, abs=1e-5), (layer, head, column)
                compared += 1
    assert compared == len(rows) * 3
