"""Runs over saved models that compute attention with SDPA, the attention interface or by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.extract.checkpoints import TEXT, model_of, save
from tests.flows.conftest import Ended

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("test_server")]

# family: (the saved class, the measured stack)
FAMILIES = {
    "bert": ("BertForMaskedLM", "encoder"),
    "roberta": ("RobertaForSequenceClassification", "encoder"),
    "albert": ("AlbertForMaskedLM", "encoder"),
    "modernbert": ("ModernBertForMaskedLM", "encoder"),
    "mpnet": ("MPNetModel", "encoder"),
    "deberta-v2": ("DebertaV2Model", "encoder"),
    "gpt2": ("GPT2LMHeadModel", "decoder"),
    "llama": ("LlamaForCausalLM", "decoder"),
    "gemma2": ("Gemma2ForCausalLM", "decoder"),
    "mixtral": ("MixtralForCausalLM", "decoder"),
    "t5": ("T5EncoderModel", "encoder"),
    "longformer": ("LongformerForMaskedLM", "encoder"),
    "bart": ("BartForConditionalGeneration", "encoder"),
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One document longer than a sequence and one shorter, for padding."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXT, "The cat sat.")))
    return file


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_over_a_saved_model_gives_a_valid_dataset(
    attlas: Callable[..., Ended], tmp_path: Path, texts: Path, family: str
) -> None:
    kind, stack = FAMILIES[family]
    model, out = save(model_of(family, kind), tmp_path / family, max_shard_size="20KB"), tmp_path / "out"
    code, _, err = attlas("run", "--model", model, "--corpus", texts, "--out", out, "--max-length", 24)
    assert code == 0, err
    code, output, err = attlas("verify", out)
    assert code == 0, output + err
    heads = pq.read_table(out / "heads")
    assert set(heads["stack"].to_pylist()) == {stack}
    sequences = pq.read_table(out / "sequences").num_rows
    assert heads.num_rows == 2 * 4 * sequences
    assert sequences > 2
    assert heads["entropy_nats"].null_count == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["name"] == family
    assert manifest["model"]["residual"] == "measured"


USER_FILE = """
from torch import nn

from tests.extract.checkpoints import VOCABULARY, tokenizer_of


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)

    def forward(self, input_ids, attention_mask):
        return self.body(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)


def build():
    return Own(), tokenizer_of()
"""


def test_a_user_model_is_measured_by_its_file_and_function(
    attlas: Callable[..., Ended], tmp_path: Path, texts: Path
) -> None:
    (tmp_path / "own.py").write_text(USER_FILE)
    name, out = f"{tmp_path / 'own.py'}:build", tmp_path / "out"
    code, _, err = attlas("run", "--model", name, "--corpus", texts, "--out", out, "--max-length", 24)
    assert code == 0, err
    code, output, err = attlas("verify", out)
    assert code == 0, output + err
    heads = pq.read_table(out / "heads")
    assert set(heads["stack"].to_pylist()) == {"encoder"}
    assert set(heads["layer"].to_pylist()) == {0, 1}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["name"] == "own.py:build"
    assert manifest["model"]["residual"] == "measured"
    assert {a["way"] for a in manifest["model"]["layout"]["attention"]} == {"sdpa"}
