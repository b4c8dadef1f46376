"""RXNMapper's published confidences come out of `edges`: they are computed from one attention head of its ALBERT."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from attlas.extract import measure

pytestmark = pytest.mark.slow

LAYER, HEAD = 10, 5
# reactions whose canonical form is as they are written, and the confidences in the tests of rxnmapper 0.4.3
GOLDEN = {
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F": 0.9565619900376546,
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12": 0.9704424331552834,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rxnmapper")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    packages = ("rxnmapper==0.4.3", "rdkit", "rxn-chem-utils", "rxn-utils", "attrs")
    subprocess.run([*install, "--target", str(folder), *packages], check=True)
    return folder


@pytest.fixture
def rxnmapper(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules for tokens and for mappings from attention, without the one that runs the model."""
    monkeypatch.syspath_prepend(str(installed))
    package = ModuleType("rxnmapper")
    package.__path__ = [str(installed / "rxnmapper")]
    monkeypatch.setitem(sys.modules, "rxnmapper", package)
    names = ("attention", "tokenization_smiles", "smiles_utils")
    modules = [importlib.import_module(f"rxnmapper.{name}") for name in names]
    for module in modules:
        monkeypatch.delitem(sys.modules, module.__name__)
    return modules


def albert(folder: Path) -> transformers.AlbertModel:
    facts = json.loads((folder / "config.json").read_text())
    facts.pop("output_past")
    model = transformers.AlbertModel(transformers.AlbertConfig(**facts), add_pooling_layer=False).eval()
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    found = {name.removeprefix("albert."): w for name, w in weights.items() if name.startswith("albert.")}
    assert model.load_state_dict(found, strict=False).missing_keys == []
    return model


def test_the_published_confidences_follow_from_the_edges_of_a_head(installed: Path, rxnmapper: Any):
    (folder,) = (installed / "rxnmapper" / "models" / "transformers").iterdir()
    model, vocabulary = albert(folder), (folder / "vocab.txt").read_text().split("\n")
    attention, tokenization, _ = rxnmapper
    for reaction, golden in GOLDEN.items():
        tokens = ["[CLS]", *tokenization.BasicSmilesTokenizer().tokenize(reaction), "[SEP]"]
        ids = torch.tensor([[vocabulary.index(token) for token in tokens]])
        edges = pl.DataFrame(measure(model, tables=("edges",), edges=len(tokens), input_ids=ids)["edges"])
        pattern = np.zeros((len(tokens), len(tokens)), np.float32)
        for query, key, weight in edges.filter(layer=LAYER, head=HEAD).select("query", "key", "weight").rows():
            pattern[query, key] = weight
        mapping = attention.AttentionScorer(reaction, tokens, pattern).generate_attention_guided_pxr_atom_mapping()
        assert float(np.prod(mapping["confidences"])) == pytest.approx(golden, abs=1e-6)
