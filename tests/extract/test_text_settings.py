"""The settings of sentence-transformers folders, compared with what the library itself does."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from attlas.extract.errors import Refusal
from attlas.extract.model.encoder import load_encoder
from attlas.extract.model.folder import check_model_name
from attlas.extract.model.text_settings import SETTINGS, folder_lookup, read_text_settings
from attlas.extract.options import RunOptions
from attlas.extract.plan import read_shard
from attlas.extract.run import plan_run
from tests.extract.checkpoints import model_of, save, tokenizer_of
from tests.extract.runs import complete_run

TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"
SHOUTED = "The CAT sat on THE mat, and a Transformer reads every TOKEN at once; nothing is lost " * 3


def words():
    """A tokenizer with lower-case words only, which does not lower-case its input."""
    return tokenizer_of(SHOUTED.lower())


def folder_of(
    folder: Path, settings: dict[str, Any] | None, *, name: str = SETTINGS[0], place: str = "", tokenizer: Any = None
) -> Path:
    save(model_of("bert", max_position_embeddings=64), folder / place, tokenizer or words())
    modules = [{"idx": 0, "name": "0", "path": place, "type": TRANSFORMER}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": POOLING}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(parents=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if settings is not None:
        (folder / place / name).write_text(json.dumps(settings))
    return folder


def planned_ids(folder: Path, tmp_path: Path, text: str = SHOUTED, **options: Any) -> list[list[int]]:
    corpus = tmp_path / "text.txt"
    corpus.write_text(text)
    run = RunOptions(model=str(folder), corpus=str(corpus), out=tmp_path / "out", device="cpu", **options)
    return read_shard(plan_run(run).store.storage, 0)[0]["token_ids"].to_pylist()


def library_ids(folder: Path, text: str = SHOUTED) -> list[int]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.preprocess([text])["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("settings", "name", "place"),
    [
        ({"max_seq_length": 16, "do_lower_case": True}, SETTINGS[0], ""),
        ({"max_seq_length": 9, "do_lower_case": False}, SETTINGS[0], "0_Transformer"),
        ({"max_seq_length": 12, "do_lower_case": True}, "sentence_roberta_config.json", "0_Transformer"),
        ({"max_seq_length": None, "do_lower_case": True, "tokenizer_args": {"model_max_length": 11}}, SETTINGS[0], ""),
        ({"processor_kwargs": {"model_max_length": 13}, "max_seq_length": 20}, SETTINGS[0], ""),
        ({"processing_kwargs": {"text": {"max_length": 10}}, "do_lower_case": True}, SETTINGS[0], ""),
        ({"config_args": {"num_hidden_layers": 2}, "model_args": {"attn_implementation": "eager"}}, SETTINGS[0], ""),
        (None, SETTINGS[0], "0_Transformer"),
    ],
)
def test_the_first_window_equals_the_ids_of_the_library(tmp_path, settings, name, place):
    folder = folder_of(tmp_path / "model", settings, name=name, place=place)
    assert planned_ids(folder, tmp_path)[0] == library_ids(folder)


@pytest.mark.parametrize(
    "normalizer", [None, normalizers.NFC(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])]
)
def test_texts_are_lower_cased_before_the_tokenizers_own_steps(tmp_path, normalizer):
    tokenizer = words()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    folder = folder_of(tmp_path / "model", {"do_lower_case": True, "max_seq_length": 60}, tokenizer=tokenizer)
    text = "ThÉ CAT [SEP] Sat\u0301"
    assert planned_ids(folder, tmp_path, text)[0] == library_ids(folder, text)


def test_a_tokenizer_written_in_python_lower_cases(tmp_path):
    model = model_of("bert", max_position_embeddings=64)
    config = model.config
    config.vocab_size = 384
    folder = folder_of(tmp_path / "model", {"do_lower_case": True})
    save(type(model)(config), folder, ByT5Tokenizer())
    (folder / "tokenizer.json").unlink()
    assert load_encoder(str(folder), device="cpu").tokenizer.do_lower_case is True


def test_the_default_length_is_the_folders(tmp_path):
    folder = folder_of(tmp_path / "model", {"max_seq_length": 16})
    assert load_encoder(str(folder), device="cpu").default_length == 16
    assert max(map(len, planned_ids(folder, tmp_path, max_length=40))) == 40


def test_the_default_length_is_limited_by_the_models_positions(tmp_path):
    folder = folder_of(tmp_path / "model", {"max_seq_length": 4096})
    assert load_encoder(str(folder), device="cpu").default_length == 64
    with pytest.raises(Refusal, match="max_length 65 is beyond this model's 64 positions"):
        planned_ids(folder, tmp_path, max_length=65)


def test_the_demo_is_a_sentence_transformers_folder(demo):
    assert (demo.default_length, demo.max_positions, demo.settings.from_sentence_transformers) == (256, 512, True)


def test_lower_casing_changes_the_digest_of_the_tokenizer(tmp_path):
    plain = load_encoder(str(folder_of(tmp_path / "a", {"do_lower_case": False})), device="cpu")
    lower = load_encoder(str(folder_of(tmp_path / "b", {"do_lower_case": True})), device="cpu")
    assert plain.tokenizer_digest() != lower.tokenizer_digest()


def test_the_digest_of_a_tokenizer_does_not_depend_on_earlier_calls(demo):
    before = demo.tokenizer_digest()
    demo.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=7)
    assert demo.tokenizer_digest() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_seq_length": "16"}, "max_seq_length in sentence_bert_config.json must be a whole number"),
        ({"max_seq_length": -1}, "max_seq_length in sentence_bert_config.json must be a whole number"),
        ({"do_lower_case": "yes"}, "do_lower_case in sentence_bert_config.json must be true or false"),
        ({"tokenizer_args": [1]}, "processor_kwargs in sentence_bert_config.json must be a JSON object"),
        ({"tokenizer_args": {"vocab_file": "/etc/passwd"}}, "processor_kwargs.vocab_file"),
        ({"model_args": {"quantization_config": {}}}, "model_kwargs.quantization_config"),
        ({"model_kwargs": {"gguf_file": "x.gguf"}}, "model_kwargs.gguf_file"),
        ({"config_args": {"auto_map": {}}}, "config_kwargs.auto_map"),
        ({"config_kwargs": {"transformers_weights": "x"}}, "config_kwargs.transformers_weights"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs.text.add_special_tokens"),
        ({"tokenizer_name_or_path": "another/model"}, "tokenizer_name_or_path"),
    ],
)
def test_unsupported_settings_are_refused_by_name_before_loading(tmp_path, settings, words):
    folder = folder_of(tmp_path / "model", settings)
    with pytest.raises(Refusal) as refused:
        check_model_name(str(folder))
    assert words in str(refused.value)


def test_configuration_options_reach_the_model(tmp_path):
    folder = folder_of(tmp_path / "model", {"config_args": {"layer_norm_eps": 0.25}})
    model: Any = load_encoder(str(folder), device="cpu").model
    assert model.config.layer_norm_eps == 0.25


def test_a_folder_can_not_make_its_code_trusted(tmp_path):
    section = {"trust_remote_code": True, "revision": "other", "cache_dir": "/nowhere"}
    names = ("model_args", "tokenizer_args", "config_args")
    folder = folder_of(tmp_path / "model", dict.fromkeys(names, section))
    settings = read_text_settings(folder_lookup(folder), folder_lookup(folder))
    assert (dict(settings.tokenizer_options), dict(settings.config_options)) == ({}, {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            "puts the prompt 'query', \"query: \", before every text",
        ),
        (
            SETTINGS[0],
            {"query_expansion": {"length": 32}, "document_length": 100},
            "sets document_length, query_expansion",
        ),
        (SETTINGS[0], {"modality_config": {"message": {}}}, "chat template"),
        (SETTINGS[0], {"colour": "blue"}, "sets colour, which attlas does not know"),
    ],
)
def test_ignored_settings_are_noted_and_recorded_in_the_manifest(tmp_path, name, content, words):
    folder = folder_of(tmp_path / "model", None)
    (folder / name).write_text(json.dumps(content))
    corpus = tmp_path / "text.txt"
    corpus.write_text("the cat sat on the mat")
    run = complete_run(RunOptions(model=str(folder), corpus=str(corpus), out=tmp_path / "out", device="cpu"))
    (note,) = run.instrument.encoder.settings.notes
    assert words in note
    manifest = run.store.manifest or {}
    assert manifest["tokenizer"]["notes"] == [note]
    assert manifest["tokenizer"]["classes"]["word_start"] > 5


@pytest.mark.parametrize(
    "prompts", [{"prompts": {"query": ""}, "default_prompt_name": "query"}, {"prompts": {"q": "x"}}]
)
def test_prompts_that_are_not_the_default_are_not_noted(tmp_path, prompts):
    folder = folder_of(tmp_path / "model", None)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert load_encoder(str(folder), device="cpu").settings.notes == ()


@pytest.mark.parametrize("place", ["..", "../other", "/etc"])
def test_a_transformer_outside_its_folder_is_refused(tmp_path, place):
    folder = folder_of(tmp_path / "model", None)
    (folder / "modules.json").write_text(json.dumps([{"type": TRANSFORMER, "path": place}]))
    with pytest.raises(Refusal, match="a module must be inside its folder"):
        check_model_name(str(folder))


def test_an_adapter_in_place_of_a_transformer_is_refused_with_advice(tmp_path):
    folder = folder_of(tmp_path / "model", None, place="0_Transformer")
    inside = folder / "0_Transformer"
    (inside / "config.json").unlink()
    (inside / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"an adapter .*merge_and_unload"):
        check_model_name(str(folder))


def test_settings_are_read_without_modules_json(tmp_path):
    folder = folder_of(tmp_path / "model", {"max_seq_length": 16}, place="0_Transformer")
    assert load_encoder(str(folder / "0_Transformer"), device="cpu").default_length == 16


def test_the_default_length_of_any_other_folder_is_the_smallest_limit(tmp_path):
    tokenizer = words()
    tokenizer.model_max_length = 24
    save(model_of("bert", max_position_embeddings=64), tmp_path / "a", tokenizer)
    assert load_encoder(str(tmp_path / "a"), device="cpu").default_length == 24
    tokenizer.model_max_length = 10**30
    save(model_of("bert", max_position_embeddings=64), tmp_path / "b", tokenizer)
    assert load_encoder(str(tmp_path / "b"), device="cpu").default_length == 64
    tokenizer.model_max_length = 4096
    save(model_of("t5"), tmp_path / "c", tokenizer)
    assert load_encoder(str(tmp_path / "c"), device="cpu").default_length == 512
