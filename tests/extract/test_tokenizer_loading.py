"""Refusals of tokenizers that can't be loaded, limits of positions, and token types."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import XLNetConfig, XLNetModel, XLNetTokenizer

from attlas.extract.errors import Refusal
from attlas.extract.model.encoder import load_encoder
from attlas.extract.model.measured_model import examine_text_model
from attlas.extract.model.positions import max_positions
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.options import RunOptions
from tests.extract.checkpoints import model_of, save, tokenizer_of
from tests.extract.runs import complete_run
from tests.oracles import head_columns

# a SentencePiece model of <unk> and ▁
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03\xe2\x96\x81\x15\x00\x00\x80\xbf"
MERGES = b"#version: 0.2\na b 1\n"
WORDS = {"the": 9, "cat": 10, "sat": 11, "on": 12, "mat": 13}


def missing(*modules: str) -> bool:
    return not any(importlib.util.find_spec(name) for name in modules)


def folder_with(folder: Path, family: str, files: dict[str, bytes], **stated: object) -> Path:
    """A model whose tokenizer is these files."""
    model_of(family).save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def refusal_of(folder: Path) -> str:
    with pytest.raises(Refusal) as refused:
        load_encoder(str(folder), device="cpu")
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.skipif(not missing("sentencepiece"), reason="sentencepiece is installed")
@pytest.mark.parametrize(
    ("family", "files", "kind"),
    [
        ("t5", {"spiece.model": SENTENCEPIECE}, None),
        ("llama", {"tokenizer.model": SENTENCEPIECE}, None),
        ("deberta-v2", {"spm.model": SENTENCEPIECE}, None),
        ("bart", {"sentencepiece.bpe.model": SENTENCEPIECE, "vocab.json": b"{}"}, "M2M100Tokenizer"),
        ("bart", {"source.spm": SENTENCEPIECE, "target.spm": SENTENCEPIECE, "vocab.json": b"{}"}, "MarianTokenizer"),
        ("gpt2", {"spiece.model": SENTENCEPIECE}, "GPTSw3Tokenizer"),
    ],
)
def test_a_sentencepiece_model_needs_the_packages_that_read_it(tmp_path, capfd, family, files, kind):
    stated = {} if kind is None else {"tokenizer_class": kind}
    message = refusal_of(folder_with(tmp_path / "m", family, files, **stated))
    assert "pip install sentencepiece" in message and "tiktoken" not in message
    assert "tiktoken" not in capfd.readouterr().err.lower()  # transformers' log of its attempts is misleading


@pytest.mark.parametrize(
    ("package", "module", "family", "files", "kind"),
    [
        ("sacremoses", "sacremoses", "bert", {"vocab.json": b'{"a":0}', "merges.txt": MERGES}, "XLMTokenizer"),
        ("sacremoses", "sacremoses", "gpt2", {"vocab.json": b'{"a":0}', "merges.txt": MERGES}, "BioGptTokenizer"),
        ("fugashi", "fugashi", "bert", {"vocab.txt": "[UNK]\n[CLS]\n日".encode()}, "BertJapaneseTokenizer"),
        ("rjieba", "rjieba", "bert", {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na"}, "RoFormerTokenizer"),
        ("tiktoken", "tiktoken", "llama", {"tokenizer.model": b"IQ== 0\nIg== 1\n"}, None),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, package, module, family, files, kind):
    if not missing(module):
        pytest.skip(f"{module} is installed")
    stated = {} if kind is None else {"tokenizer_class": kind, "word_tokenizer_type": "mecab"}
    message = refusal_of(folder_with(tmp_path / "m", family, files, **stated))
    assert message.endswith(f"not installed; pip install {package}")


@pytest.mark.parametrize(
    ("files", "stated", "words"),
    [
        ({}, {}, "save it to the same folder"),
        ({"tokenizer.json": b"{"}, {}, "tokenizer.json must be JSON"),
        ({"tokenizer.json": b"{}"}, {}, "can't be loaded"),
        ({"tokenizer.json": b'{"model": {"type": "Nothing"}}'}, {}, "copy or save it again"),
        ({"vocab.txt": b"a\nb\n"}, {"tokenizer_class": "NoSuchTokenizer"}, "names NoSuchTokenizer, which transformers"),
        (
            {"vocab.txt": b"a\nb\n"},
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
            "runs only with --trust-remote-code",
        ),
    ],
)
def test_invalid_tokenizer_files_are_refused_with_the_reason(tmp_path, files, stated, words):
    message = refusal_of(folder_with(tmp_path / "m", "bert", files, **stated))
    assert words in message and "sentencepiece" not in message


def test_a_missing_package_for_quantized_weights_is_named(tmp_path):
    if not missing("gptqmodel"):
        pytest.skip("gptqmodel is installed")
    folder = save(model_of("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | quantized))
    message = refusal_of(folder)
    assert "gptqmodel" in message and message.endswith("install it, or save the model again without quantization")


# positions


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {}, 129),  # one row is for padding
        ("gpt2", {"n_positions": 96}, 96),
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("t5", {"n_positions": 512}, None),
        ("deberta-v2", {"position_biased_input": False}, None),
        ("deberta-v2", {"position_biased_input": True, "max_position_embeddings": 48}, 48),
        ("mpnet", {"max_position_embeddings": 50}, 48),  # whose first position is 2
    ],
)
def test_the_limit_is_the_number_of_absolute_positions(family, changes, limit):
    assert max_positions(model_of(family, **changes)) == limit


@pytest.mark.parametrize("stated", [-1, 0, None, 10**30, 1e30])
def test_placeholder_lengths_mean_no_limit(stated):
    model = model_of("llama")
    object.__setattr__(model.config, "max_position_embeddings", stated)
    assert max_positions(model) is None


@pytest.mark.parametrize(("kind", "limit"), [("bloom", None), ("mpt", None), ("xlnet", None), ("falcon", None)])
def test_families_without_absolute_positions_have_no_limit(kind, limit):
    import transformers

    sizes = {
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4},
        "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True},
    }
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, **sizes[kind])
    assert max_positions(transformers.AutoModel.from_config(config)) == limit


def test_a_limit_in_a_sub_configuration_applies():
    import transformers

    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.CLIPConfig(text_config={**tiny, "max_position_embeddings": 20}, vision_config=tiny)
    assert max_positions(transformers.CLIPModel(config)) == 20


# token types


def xlnet(folder: Path, *, types: bool = True) -> Path:
    special = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eop>", "<eod>")
    vocabulary = [(t, 0.0) for t in special] + [(f"▁{w}", -2.0) for w in WORDS]
    names: dict[str, Any] = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if types else {}
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=len(vocabulary), d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.5)
    XLNetModel(config).eval().save_pretrained(folder)
    XLNetTokenizer(vocab=vocabulary, **names).save_pretrained(folder)
    return folder


def typed_bert(folder: Path, **changes: Any) -> Path:
    """A BERT whose tokenizer gives text and special tokens different types."""
    from tokenizers import processors

    tokenizer = tokenizer_of()
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")]
    post = processors.TemplateProcessing(single="[CLS]:0 $A:1 [SEP]:0", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = post
    save(model_of("bert", **changes), folder, tokenizer)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def heads_of(folder: Path, tmp_path: Path, texts: list[str], **options) -> dict[tuple[int, int, int], dict]:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(texts))
    run = RunOptions(model=str(folder), corpus=str(corpus), out=tmp_path / "out", unit="line", device="cpu", **options)
    complete_run(run)
    rows = pq.read_table(run.out / "heads" / "shard-00000.parquet").to_pylist()
    return {(row["sequence_id"], row["layer"], row["head"]): row for row in rows}


def entropy_of(pattern: torch.Tensor) -> float:
    entropy = head_columns(pattern.numpy())["entropy_nats"]
    assert entropy is not None
    return entropy


@pytest.mark.parametrize(
    ("build", "texts"),
    [
        (xlnet, ["the cat sat on the mat", "the mat", "cat sat on the cat"]),
        (typed_bert, ["The cat sat on the mat, and the cat", "every token", "what was skipped is counted"]),
    ],
)
def test_a_run_passes_the_tokenizers_token_types_to_the_model(tmp_path, build, texts):
    folder = build(tmp_path / "model")
    rows = heads_of(folder, tmp_path, texts, max_length=32)
    encoder = load_encoder(str(folder), device="cpu")
    eager: Any = encoder.model.double()
    eager.set_attn_implementation("eager")
    largest_difference = 0.0
    for number, text in enumerate(texts):
        given = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            patterns = eager(**given, output_attentions=True).attentions
            given.pop("token_type_ids")
            without = eager(**given, output_attentions=True).attentions
        for layer, pattern in enumerate(patterns):
            for head in range(pattern.shape[1]):
                wanted, other = (entropy_of(p[0, head]) for p in (pattern, without[layer]))
                assert rows[number, layer, head]["entropy_nats"] == pytest.approx(wanted, abs=1e-5)
                largest_difference = max(largest_difference, abs(other - wanted))
    assert largest_difference > 1e-2  # without the types the pattern differs


def test_every_window_has_the_types_of_a_complete_text(tmp_path):
    tokenizer = load_encoder(str(typed_bert(tmp_path / "model")), device="cpu").tokenizer
    special = special_tokens(tokenizer)
    assert special.types_of(5).tolist() == [0, 1, 1, 1, 0]
    assert special.types_of(3).tolist() == tokenizer("cat")["token_type_ids"]


def test_a_model_gets_no_types_from_a_tokenizer_without_them(tmp_path):
    encoder = load_encoder(str(xlnet(tmp_path / "model", types=False)), device="cpu")
    measured = examine_text_model(encoder.model, encoder.tokenizer, stacks="encoder", device=encoder.device)
    assert measured.input_names == ["input_ids", "attention_mask"]


def test_types_beyond_the_models_table_are_refused(tmp_path):
    encoder = load_encoder(str(typed_bert(tmp_path / "model", type_vocab_size=1)), device="cpu")
    with pytest.raises(Refusal, match="BertModel has 1, and its tokenizer gives type 1"):
        examine_text_model(encoder.model, encoder.tokenizer, stacks="encoder", device=encoder.device)


def test_a_model_without_a_limit_runs_at_any_length(tmp_path):
    rows = heads_of(xlnet(tmp_path / "model"), tmp_path, ["the cat sat on " * 200], max_length=600)
    assert {row["query_rows"] for row in rows.values()} == {600, 204}
