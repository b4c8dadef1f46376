"""Model folders made to do harm: nothing of theirs runs, nothing outside them is read, and sizes beyond reason are refused at once."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from attlas.extract.errors import Refusal
from attlas.extract.model.encoder import load_encoder
from attlas.extract.model.folder import check_model_name
from attlas.extract.run import run
from tests.extract.checkpoints import model_of, save

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(model_of("bert"), tmp_path / "model")


def configure(folder: Path, **entries: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def refusal_of(folder: Path, check: Callable[[str], object] = check_model_name) -> str:
    with pytest.raises(Refusal) as refused:
        check(str(folder))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def load(name: str) -> object:
    return load_encoder(name, device="cpu")


@pytest.mark.parametrize("named", ["../outside.safetensors", "{absolute}", "a/../../outside.safetensors"])
def test_weights_outside_the_folder_are_not_read(folder: Path, named: str) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    name = named.format(absolute=outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(outside), name)}))
    assert f"{INDEX} names {name!r}" in refusal_of(folder)
    (folder / INDEX).unlink()
    configure(folder, transformers_weights=name)
    assert f"config.json names {name!r}" in refusal_of(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"_attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:forward"},
        {"_attn_implementation": {"": "someone/kernel"}},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
        {"parts": [{"_attn_implementation_internal": "someone/kernel"}]},
        {"_experts_implementation": "someone/kernel"},
    ],
)
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(folder: Path, entries: dict[str, Any]) -> None:
    message = refusal_of(configure(folder, **entries))
    assert "own code runs only with your consent" in message
    check_model_name(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("option", ["use_kernels", "allow_all_kernels", "_attn_implementation", "offload_folder"])
def test_settings_of_sentence_transformers_reach_no_kernels_and_no_other_folders(folder: Path, option: str) -> None:
    (folder / "sentence_bert_config.json").write_text(json.dumps({"config_args": {option: "someone/kernel"}}))
    assert f"config_kwargs.{option}" in refusal_of(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": -(10**6)},
        {"text_config": {"n_layer": 10**6}},
        {"depths": [2, 10**6]},
    ],
)
def test_more_layers_than_any_model_has_are_refused_before_they_are_built(
    folder: Path, entries: dict[str, Any]
) -> None:
    assert "a model has at most 2,000 layers" in refusal_of(configure(folder, **entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"vocab_size": 10**9},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**9},
        {"max_position_embeddings": 10**9},
    ],
)
def test_a_model_much_larger_than_its_weights_is_refused_before_memory_is_taken(
    folder: Path, entries: dict[str, Any]
) -> None:
    assert "GB of them, and the safetensors have 0.000 GB" in refusal_of(configure(folder, **entries), load)


def write_weights(file: Path, header: dict[str, Any], *, size: int | None = None) -> None:
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    if size is not None:
        os.truncate(file, 8 + len(content) + size)


def test_a_declared_tensor_of_100_gb_is_refused_whether_its_bytes_are_there_or_not(folder: Path) -> None:
    size = 100 * 10**9
    header = {"encoder.layer": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    write_weights(folder / WEIGHTS, header)
    assert "is cut off" in refusal_of(folder)
    write_weights(folder / WEIGHTS, header, size=size)  # sparse; whether it can be mapped depends on the machine
    message = refusal_of(folder, load)
    assert "are missing" in message or "Cannot allocate memory" in message


def test_a_million_tensors_are_refused(folder: Path) -> None:
    write_weights(
        folder / WEIGHTS, {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    )
    assert "holds at most 100,000 tensors" in refusal_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", WEIGHTS])
def test_pipes_and_devices_in_a_model_folder_are_refused_and_never_read(folder: Path, name: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        assert str(folder) in refusal_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json"])
def test_json_larger_than_any_vocabulary_is_refused_before_it_is_read(folder: Path, name: str) -> None:
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)
    assert "more than 268,435,456" in refusal_of(folder)


def test_a_reference_in_the_hub_s_cache_leads_to_its_snapshots_only(folder: Path) -> None:
    cache = folder.parent / "models--a--b"
    (cache / "snapshots" / "other").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("../../model")
    assert "has 0 with a config.json" in refusal_of(cache)


def test_loading_a_folder_opens_no_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its files name other repositories."""

    def connect(_: socket.socket, address: object) -> None:
        pytest.fail(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    configure(folder, auto_map={"AutoModel": "someone/model--code.Model"}, _name_or_path="someone/model")
    file = folder / "tokenizer_config.json"
    entries = {"auto_map": {"AutoTokenizer": ["someone/model--code.Tokenizer", None]}, "name_or_path": "someone/model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    load(str(folder))


# --- tokenizers


def with_tokenizer(folder: Path, **parts: Any) -> Path:
    """The folder with a tokenizer of words whose tokenizer.json has these parts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "a": 1, "b": 2, "[PAD]": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def split_by(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def run_refused(folder: Path, *texts: str) -> str:
    corpus = folder.parent / "corpus"
    corpus.mkdir()
    for number, text in enumerate(texts):
        (corpus / f"{number}.txt").write_text(text)
    out = folder.parent / "out"
    message = refusal_of(folder, lambda name: run(model=name, corpus=str(corpus), out=out, device="cpu"))
    assert not (out / "manifest.json").exists()
    return message


@pytest.mark.parametrize("step", [{"String": "a"}, {"Regex": "a"}])
def test_replacements_that_make_a_text_grow_without_end_are_refused_before_it_is_read(
    folder: Path, step: dict[str, str]
) -> None:
    doubling = {"type": "Replace", "pattern": step, "content": "aa"}
    with_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [doubling] * 60})
    message = refusal_of(folder, load)
    assert message.startswith("a tokenizer makes a text at most 64 times as long before it splits it; ")
    assert "make it 1.15e+18 times as long" in message


def test_ordinary_replacements_are_no_growth(folder: Path) -> None:
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    quote = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    with_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [space, quote] * 20})
    load(str(folder))


def test_a_document_at_which_a_tokenizer_fails_is_named(folder: Path) -> None:
    with_tokenizer(folder, pre_tokenizer=split_by("(a+)+$"))
    message = run_refused(folder, "a b a", "a" * 60 + "!", "b")
    assert message.startswith(
        "a tokenizer reads any text; this one fails at 1.txt (PanicException: Onig: Regex search "
    )


def test_a_tokenizer_that_takes_hours_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attlas.extract.plan.encoding._SECONDS", 0)
    monkeypatch.setattr("attlas.extract.plan.encoding._CHARACTERS_PER_SECOND", 100_000)
    with_tokenizer(folder, pre_tokenizer=split_by("(?=.*b)a"))  # its time grows with the square of the length
    message = run_refused(folder, "a" * 100_000)
    assert message.startswith(
        "a tokenizer reads 100,000 characters a second at least; this one has been reading 0.txt for 1 s; "
    )
