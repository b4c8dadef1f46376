"""Loading a model: every folder layout, every weight present, and refusals that name what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from attlas.extract import measure
from attlas.extract.errors import Refusal
from attlas.extract.model.encoder import load_encoder
from attlas.extract.model.folder import check_model_name
from tests.extract.checkpoints import SPECIAL, VOCABULARY, model_of, save, tokenizer_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NO_SPECIAL: dict[str, Any] = dict.fromkeys(SPECIAL)
IDS = torch.tensor([[2, 9, 8, 7, 3]])


def load(folder: Path | str, **options: Any):
    return load_encoder(str(folder), device="cpu", **options)


def refusal_of(folder: Path | str, **options: Any) -> str:
    with pytest.raises(Refusal) as refused:
        load(folder, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in several shards, to be copied by tests that change it."""
    folder = save(model_of("bert"), tmp_path_factory.mktemp("models") / "bert", max_shard_size="30KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "sharded"))


@pytest.fixture
def unsharded(tmp_path: Path) -> Path:
    return save(model_of("bert"), tmp_path / "unsharded")


def assert_same(loaded: torch.nn.Module, saved_model: torch.nn.Module) -> None:
    """Assert that every weight equals the saved one of the same name, up to a prefix; a missing pooler must be zero."""
    expected = saved_model.state_dict()
    for name, weight in loaded.state_dict().items():
        match = next((expected[k] for k in expected if k == name or k.endswith(f".{name}")), None)
        if match is None:
            assert name.startswith("pooler."), name
            assert not weight.any()
        else:
            assert torch.equal(weight, match), name


# layouts


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("albert", "AlbertModel"),
        ("albert", "AlbertForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("mixtral", "MixtralForCausalLM"),
        ("t5", "T5Model"),
        ("t5", "T5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("bart", "BartForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_saved_weights_are_loaded_without_the_head(tmp_path: Path, family: str, kind: str, shards: str) -> None:
    model = model_of(family, kind)
    folder = save(model, tmp_path / family, max_shard_size=shards)
    assert (folder / INDEX).exists() == (shards != "5GB")
    encoder = load(folder)
    assert type(encoder.model) is type(model_of(family))
    assert_same(encoder.model, model)
    assert not encoder.model.training
    assert encoder.name == family


@pytest.mark.parametrize(("family", "kind"), [("t5", "T5EncoderModel"), ("bart", "BartForCausalLM")])
def test_one_half_of_an_encoder_decoder_model_is_loaded_as_its_own_class(
    tmp_path: Path, family: str, kind: str
) -> None:
    model = model_of(family, kind)
    encoder = load(save(model, tmp_path / family))
    assert type(encoder.model).__name__ == kind
    assert_same(encoder.model, model)


def test_a_missing_pooler_is_the_same_each_time(tmp_path: Path) -> None:
    folder = save(model_of("bert", "BertForMaskedLM"), tmp_path / "bert")
    assert load(folder).weights_digest() == load(folder).weights_digest()


def test_the_only_subfolder_with_a_model_is_used_and_named(saved: Path, tmp_path: Path) -> None:
    model = tmp_path / "sentences"
    shutil.copytree(saved, model / "0_Transformer")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    assert load(model).name == "sentences/0_Transformer"
    assert load(model / "0_Transformer").name == "0_Transformer"
    assert load(model).weights_digest() == load(saved).weights_digest()


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_modules_json_locates_the_transformer(saved: Path, tmp_path: Path, place: str) -> None:
    model = tmp_path / "sentences"
    shutil.copytree(saved, model / place)
    (model / "old").mkdir()
    shutil.copy(saved / "config.json", model / "old" / "config.json")
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    modules = [{"idx": 0, "name": "0", "path": place, "type": kind}, {"path": "1_Pooling", "type": "models.Pooling"}]
    (model / "modules.json").write_text(json.dumps(modules))
    assert load(model).weights_digest() == load(saved).weights_digest()


def test_a_text_encoder_uses_the_tokenizer_beside_it(tmp_path: Path) -> None:
    model_of("bert").save_pretrained(tmp_path / "pipeline" / "text_encoder")
    tokenizer_of().save_pretrained(tmp_path / "pipeline" / "tokenizer")
    assert load(tmp_path / "pipeline").name == "pipeline/text_encoder"
    assert load(tmp_path / "pipeline" / "text_encoder").tokenizer("The cat")["input_ids"][0] == 2


def test_a_folder_in_the_hub_cache_is_its_main_snapshot(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--bert"
    for revision in ("aaa", "bbb"):
        shutil.copytree(saved, cache / "snapshots" / revision)
    assert "give one of its snapshots' folders" in refusal_of(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    assert load(cache).name == "models--someone--bert/snapshots/bbb"


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
def test_a_single_variant_is_loaded(tmp_path: Path, shards: str) -> None:
    model = model_of("bert").half()
    folder = save(model, tmp_path / "bert", variant="fp16", max_shard_size=shards)
    encoder = load(folder)
    assert encoder.dtype == torch.float32
    assert_same(encoder.model, model.float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_runs_in_the_requested_precision(saved: Path, dtype: str) -> None:
    encoder = load(saved, dtype=dtype)
    assert encoder.dtype == getattr(torch, dtype)
    assert encoder.weights_digest() != load(saved).weights_digest()
    with torch.inference_mode():
        assert encoder.model(IDS).last_hidden_state.isfinite().all()


# refusals


def cut(folder: Path, keep: float, file: str = "") -> Path:
    path = folder / file if file else sorted(folder.glob("model*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def test_a_truncated_shard_is_refused_with_both_lengths(sharded: Path) -> None:
    path = sorted(sharded.glob("model*.safetensors"))[1]
    size = path.stat().st_size
    cut(sharded, 0.7, path.name)
    message = refusal_of(sharded)
    assert f"{path} is cut off" in message
    assert f"{int(size * 0.7):,} bytes" in message
    assert f"its header says {size:,}" in message
    assert message.endswith("copy or download it again")


def test_a_file_that_ends_within_its_header_is_refused(unsharded: Path) -> None:
    path = unsharded / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} is cut off: it has 100 bytes, its header alone takes" in refusal_of(unsharded)


def test_missing_shards_are_counted_and_listed(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    for gone in shards[1:3]:
        gone.unlink()
    message = refusal_of(sharded)
    assert f"lacks 2 of {len(shards)}: {shards[1].name}, {shards[2].name}; copy or download them into it" in message


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has a config.json; "),
    "config cut off": (lambda f: cut(f, 0.5, "config.json"), "config.json must be JSON; "),
    "config of another kind": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    "tokenizer cut off": (lambda f: cut(f, 0.5, "tokenizer.json"), "tokenizer.json must be JSON; "),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
    "nothing in the file": (lambda f: (f / WEIGHTS).write_bytes(b""), "(0 bytes) is not"),
    "other content": (lambda f: (f / WEIGHTS).write_bytes(b"PK\3\4" * 90), "(360 bytes) is not"),
    "no header": (lambda f: (f / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"no json {"), "a header in JSON"),
    "odd header": (lambda f: (f / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b'{"a": {}}'), "a header in JSON"),
    "bytes too many": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + bytes(8)), "is damaged"),
    "a pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a broken link": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(f / "gone")),
        "is a broken link",
    ),
    "an index that is cut off": (
        lambda f: ((f / WEIGHTS).unlink(), (f / INDEX).write_text('{"weight_')),
        f"{INDEX} must be JSON",
    ),
    "an empty index": (lambda f: ((f / WEIGHTS).unlink(), (f / INDEX).write_text("{}")), "must have a weight_map"),
    "pickles behind an index": (
        lambda f: (
            (f / WEIGHTS).rename(f / "pytorch_model.bin"),
            (f / INDEX).write_text('{"weight_map": {"pooler.dense.bias": "pytorch_model.bin"}}'),
        ),
        "names pytorch_model.bin",
    ),
    "a weight in no shard": (
        lambda f: (
            (f / WEIGHTS).rename(f / "model-1.safetensors"),
            (f / INDEX).write_text('{"weight_map": {"a.b": "model-1.safetensors"}}'),
        ),
        "lacks a.b",
    ),
    "shards without an index": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00001.safetensors"),
        f"holds shards (model-00001-of-00001.safetensors) and no {INDEX}",
    ),
    "pickles": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "only pickled weights (pytorch_model.bin)",
    ),
    "another name": (lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"), "others (consolidated.safe"),
    "two variants": (
        lambda f: (
            shutil.copy(f / WEIGHTS, f / "model.fp16.safetensors"),
            (f / WEIGHTS).rename(f / "model.bf16.safetensors"),
        ),
        "the variants bf16, fp16",
    ),
    "a pickle named by the config": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(transformers_weights="adapter_model.bin")),
        "has 'adapter_model.bin'",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it into the model"),
    "an unknown model_type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="bertt")),
        "has 'bertt'; correct it (similar: bert, ",
    ),
    "no model_type": (lambda f: edit_json(f / "config.json", lambda c: c.pop("model_type")), "has none"),
    "a model_type of another kind": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type=["bert"])),
        "has ['bert']",
    ),
    "an unknown architecture": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(architectures=["BertForMaskedML"])),
        "has 'BertForMaskedML'; correct it (similar: BertForMaskedLM, ",
    ),
    "code": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(auto_map={"AutoModel": "m.M"}, model_type="mine")),
        "add --trust-remote-code if you trust it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_before_loading(unsharded: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    change(unsharded)
    with pytest.raises(Refusal) as refused:
        check_model_name(str(unsharded))
    assert words in str(refused.value)
    assert str(unsharded) in str(refused.value)
    assert refusal_of(unsharded) == str(refused.value)


def test_missing_weights_are_refused_and_counted(unsharded: Path) -> None:
    edit_weights(
        unsharded / WEIGHTS,
        lambda w: [w.pop(k) for k in list(w) if k.startswith("encoder.layer.1.attention.output")],
    )
    message = refusal_of(unsharded)
    assert "the safetensors must hold every weight of BertModel; 4 are missing" in message
    assert "encoder.layer.1.attention.output.LayerNorm.bias" in message
    assert "and 1 more" in message


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("experts.1.w1", "its weights layers.1.mlp.experts.gate_up_proj can't be converted"),
        (
            "experts.2.",
            "layers.1.mlp.experts.down_proj of MixtralModel should be [3, 32, 48] and is saved as [2, 32, 48]",
        ),
        ("gate.weight", "1 are missing: layers.1.mlp.gate.weight"),
    ],
)
def test_missing_experts_are_refused(tmp_path: Path, removed: str, words: str) -> None:
    folder = save(model_of("mixtral", "MixtralForCausalLM"), tmp_path / "mixtral")
    edit_weights(folder / WEIGHTS, lambda w: [w.pop(k) for k in list(w) if f"layers.1.block_sparse_moe.{removed}" in k])
    assert words in refusal_of(folder)


def test_a_weight_of_another_shape_is_refused_with_both_shapes(unsharded: Path) -> None:
    edit_json(unsharded / "config.json", lambda c: c.update(intermediate_size=64))
    message = refusal_of(unsharded)
    assert (
        "encoder.layer.0.intermediate.dense.bias of BertModel should be [64] and is saved as [48] and 5 more" in message
    )


def test_a_layer_beyond_the_configured_number_is_refused(tmp_path: Path) -> None:
    folder = save(model_of("bert", "BertForMaskedLM"), tmp_path / "bert")
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=1))
    assert "16 weights belong to none: bert.encoder.layer.1.attention" in refusal_of(folder)


def test_weights_of_another_architecture_are_refused(unsharded: Path) -> None:
    edit_json(unsharded / "config.json", lambda c: c.update(model_type="electra", architectures=["ElectraModel"]))
    shutil.copy(save(model_of("gpt2"), unsharded.parent / "gpt2") / WEIGHTS, unsharded / WEIGHTS)
    assert "the safetensors must hold every weight of ElectraModel" in refusal_of(unsharded)


def test_the_error_of_transformers_is_passed_on_for_an_invalid_config(unsharded: Path) -> None:
    edit_json(unsharded / "config.json", lambda c: c.update(hidden_size="many"))
    message = refusal_of(unsharded)
    assert "hidden_size" in message
    assert "HF_HUB_OFFLINE" not in message


def test_several_models_in_a_folder_are_listed(saved: Path, tmp_path: Path) -> None:
    for name in ("question", "answer"):
        shutil.copytree(saved, tmp_path / "two" / name)
    message = refusal_of(tmp_path / "two")
    assert f"give one of them: {tmp_path / 'two' / 'answer'}, {tmp_path / 'two' / 'question'}" in message


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ("{", "must be a JSON list of modules"),
        ('[{"path": "", "type": "models.StaticEmbedding"}]', "has 0 among StaticEmbedding"),
        ('[{"path": "0_Transformer", "type": "models.Transformer"}]', "there is no config.json"),
    ],
)
def test_a_modules_json_without_a_transformer_is_refused(unsharded: Path, modules: str, words: str) -> None:
    (unsharded / "modules.json").write_text(modules)
    assert words in refusal_of(unsharded)


def test_a_file_instead_of_a_folder_is_refused(unsharded: Path) -> None:
    assert f"{unsharded / WEIGHTS} is a file; give its folder" in refusal_of(unsharded / WEIGHTS)


def test_a_hub_name_is_refused_if_the_hub_is_disabled() -> None:
    assert "HF_HUB_OFFLINE keeps it from reaching the hub" in refusal_of("no-one/no-such-model")


def test_an_unknown_device_is_refused(saved: Path) -> None:
    with pytest.raises(Refusal, match="device must be auto, cpu, cuda or cuda:N; got 'gpu'"):
        load_encoder(str(saved), device="gpu")


# tokenizers


def test_ids_beyond_the_embedding_table_are_refused_with_both_numbers(unsharded: Path) -> None:
    tokenizer = tokenizer_of()
    tokenizer.add_tokens([f"new{n}" for n in range(VOCABULARY)])
    tokenizer.save_pretrained(unsharded)
    last = len(tokenizer) - 1
    message = refusal_of(unsharded)
    assert f"that of {unsharded} has {VOCABULARY} rows, and the ids go up to {last}" in message
    assert f"resize_token_embeddings({last + 1})" in message


def test_spare_rows_in_the_embedding_table_are_allowed(saved: Path) -> None:
    encoder = load(saved)
    assert len(encoder.tokenizer) < VOCABULARY


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_a_model_without_tokenizer_files_is_refused(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path / family)
    assert "a model comes with its tokenizer; none could be loaded" in refusal_of(tmp_path / family)


# code


def leave_trap(folder: Path) -> Path:
    """Add Python files that create the returned file when they run."""
    mark = folder.parent / "it-ran"
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "__init__.py", "build.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    return mark


def test_python_in_a_model_folder_never_runs(unsharded: Path) -> None:
    mark = leave_trap(unsharded)
    load(unsharded)
    edit_json(unsharded / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_mine.M"}))
    edit_json(
        unsharded / "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": ["tokenization_mine.T", None]}),
    )
    load(unsharded)
    edit_json(unsharded / "config.json", lambda c: c.update(model_type="mine"))
    refusal_of(unsharded)
    assert not mark.exists()


USER_FILE = """
import torch
from beside import words


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding({rows}, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, {takes}):
        if {fails}:
            raise RuntimeError("not today")
        return self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)


def build():
    model = Own()
    {extra}
    return {returned}
"""


def user_model(folder: Path, **changes: Any) -> str:
    """Write a user's own model; returns the name to load it by."""
    default = {"rows": VOCABULARY, "takes": "input_ids, attention_mask", "fails": False, "extra": ""}
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(USER_FILE.format(**default | {"returned": "model, words()"} | changes))
    (folder / "beside.py").write_text("from tests.extract.checkpoints import tokenizer_of as words\n")
    return f"{folder / 'mine.py'}:build"


@pytest.mark.parametrize(
    "changes",
    [{}, {"returned": "model", "extra": "model.tokenizer = words()"}, {"returned": "model, words()._tokenizer"}],
)
def test_a_user_model_is_built_in_eval_mode_and_the_same_each_time(tmp_path: Path, changes: dict[str, str]) -> None:
    name = user_model(tmp_path, **changes)
    check_model_name(name)
    encoder = load(name)
    assert encoder.name == "mine.py:build"
    assert encoder.revision is not None
    assert encoder.revision.startswith("sha256:")
    assert not encoder.model.training
    assert encoder.tokenizer("The cat")["input_ids"] == [2, 10, 15, 3]
    assert encoder.weights_digest() == load(name).weights_digest()


def test_a_user_model_has_the_maximum_length_of_its_tokenizer(tmp_path: Path) -> None:
    assert load(user_model(tmp_path)).max_positions is None
    stated = user_model(tmp_path, extra="w = words(); w.model_max_length = 48", returned="model, w")
    assert load(stated).max_positions == 48


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"returned": "model"}, "needs a tokenizer"),
        ({"returned": "model, 3"}, "returned an object of type int"),
        ({"returned": "words()"}, "returned an object of type TokenizersBackend"),
        ({"returned": "None"}, "returned None"),
        ({"takes": "input_ids"}, "has forward(input_ids)"),
        ({"fails": True}, "mine.py, line 14: RuntimeError: not today"),
        ({"extra": "1 / 0"}, "mine.py, line 20: ZeroDivisionError: division by zero"),
        ({"extra": "raise SystemExit(3)"}, "mine.py, line 20: SystemExit: 3"),
        ({"rows": 10}, "has no row for 41, the largest id"),
    ],
)
def test_a_user_model_that_cannot_be_measured_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal_of(user_model(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.py:build", "there is no file"),
        ("mine.py", "add the function's name, such as :build"),
        ("mine.py:", "add the function's name, such as :build"),
        ("mine.py:biuld", "defines no 'biuld'; did you mean build?"),
        ("bad.py:build", "bad.py, line 2: "),
    ],
)
def test_a_missing_file_or_function_is_refused_without_running_the_code(tmp_path: Path, name: str, words: str) -> None:
    user_model(tmp_path, extra="raise SystemExit")
    (tmp_path / "bad.py").write_text("def build():\n  return (\n")
    with pytest.raises(Refusal) as refused:
        check_model_name(str(tmp_path / name))
    assert words in str(refused.value)


# batches


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pads", [True, False])
def test_padding_changes_nothing_with_or_without_a_padding_token(tmp_path: Path, family: str, pads: bool) -> None:
    tokenizer = tokenizer_of(special=(), **{} if pads else NO_SPECIAL)
    assert (tokenizer.pad_token_id is not None) == pads
    folder = save(model_of(family), tmp_path / family, tokenizer)
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("The cat sat", "the mat, and the cat " * 3, "at"))
    )
    alone, together = (heads_of(folder, corpus, tmp_path / f"out{n}", batch_tokens=n) for n in (1, 1000))
    assert alone.num_rows == 2 * 4 * 3
    for column in ("entropy_nats", "distance_tokens"):
        a, b = (torch.tensor(t[column].fill_null(-1).to_pylist()) for t in (alone, together))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def heads_of(model: Path, corpus: Path, out: Path, **options: Any):
    import pyarrow.parquet as pq

    from attlas.extract.options import RunOptions
    from tests.extract.runs import complete_run

    complete_run(RunOptions(model=str(model), corpus=str(corpus), out=out, max_length=64, device="cpu", **options))
    return pq.read_table(out / "heads")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_completes_in_half_precision(saved: Path, tmp_path: Path, dtype: str) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("The cat sat on the mat")
    assert heads_of(saved, corpus, tmp_path / "out", dtype=dtype).num_rows == 2 * 4


def test_transformers_still_has_no_sdpa_for_these_models() -> None:
    """If that changes, the fallback to eager attention needs another model for its test."""
    for kind in (transformers.DebertaV2Model, transformers.MPNetModel):
        assert not kind._supports_sdpa


@pytest.mark.parametrize(
    "options",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}, {"use_cache": False}],
)
def test_output_options_in_config_json_change_nothing(unsharded, options):
    config = json.loads((unsharded / "config.json").read_text())
    (unsharded / "config.json").write_text(json.dumps(config | options))
    loaded = load(unsharded)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert_same(loaded.model, model_of("bert"))
    assert measure(loaded.model, input_ids=IDS)["heads"].num_rows


def test_a_tower_configured_to_output_attentions_is_loaded(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = transformers.CLIPTextConfig(**sizes, vocab_size=40, max_position_embeddings=16, output_attentions=True)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    folder = save(model, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["output_attentions"]
    assert load(folder).model.config.text_config._attn_implementation == "sdpa"
