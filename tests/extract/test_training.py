"""Measuring a model while `transformers.Trainer` trains it."""

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerControl, TrainerState

import attlas
from attlas.analysis.trend import Trend, trend
from attlas.analysis.verify import verify
from attlas.callbacks import MeasureAttention, MeasurementWarning
from attlas.extract import training
from attlas.extract.capture.undisturbed import undisturbed
from attlas.extract.errors import Refusal
from attlas.extract.live import live_encoder
from attlas.extract.store import Store
from tests.extract.checkpoints import TEXT, VOCABULARY, model_of, tokenizer_of
from tests.extract.runs import contents
from tests.threads import one_thread

# transformers pins memory for a GPU that is not there
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
DOCUMENTS = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 24 words, long enough for an entropy."""
    file = tmp_path_factory.mktemp("probe") / "probe.txt"
    words, choice = TEXT.split(), random.Random(0)
    file.write_text("\n".join(" ".join(choice.choices(words, k=24)) for _ in range(DOCUMENTS)))
    return file


def small_model() -> Any:
    """A language model with dropout, with random weights that are the same each time."""
    config = transformers.AutoConfig.for_model(
        "gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3, pad_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def repeated_ids() -> list[dict[str, torch.Tensor]]:
    """Sequences whose second half repeats the first: something to learn."""
    ids = torch.randint(4, VOCABULARY, (64, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 12:] = ids[:, :12]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def train(
    folder: Path, *callbacks: Any, steps: int = 6, rate: float = 1e-3, resume: bool = False, **arguments: Any
) -> Any:
    """Train for a few steps; returns the Trainer."""
    defaults: dict[str, Any] = {"save_strategy": "no", "per_device_train_batch_size": 16}
    settings = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, learning_rate=rate, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1, logging_strategy="no", **(defaults | arguments),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=small_model(), args=settings, train_dataset=repeated_ids(), processing_class=tokenizer_of(), callbacks=list(callbacks)
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def measuring(probe: Path, out: Path, every: int = 3, **options: Any) -> MeasureAttention:
    return MeasureAttention(probe, every=every, out=out, unit="line", **({"strict": True} | options))


def state_of(trainer: Any) -> dict[str, Any]:
    """Everything that a training goes on from."""
    model = trainer.model
    optimizer = trainer.optimizer.optimizer.state_dict()["state"]
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "moments": {(n, name): tensor for n, of in optimizer.items() for name, tensor in of.items()},
        "random": (torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.from_numpy(np.random.get_state()[1].astype(np.int64))),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "config": model.config.to_dict() | {"attention": model.config._attn_implementation},
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }  # fmt: skip


def are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return a == b


# --- training as without


TRAININGS: tuple[dict[str, Any], ...] = (
    {},
    {"bf16": True},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    {"activation_checkpointing": True},
)


def differences(probe: Path, folder: Path, arguments: dict[str, Any]) -> list[str]:
    """What a training leaves differently if it is measured on its way."""
    without = state_of(train(folder / "a", **arguments))
    measured = state_of(train(folder / "b", measuring(probe, folder / "out"), **arguments))
    assert len(list((folder / "out").iterdir())) == 3
    return [name for name in without if not are_equal(without[name], measured[name])]


def test_training_is_bit_for_bit_as_without(probe: Path, tmp_path: Path) -> None:
    """In a process of its own: threads that other tests have left behind draw from Python's generator too."""
    code = "import sys; from pathlib import Path; from tests.extract.test_training import print_differences as p; p(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(probe), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [[]] * len(TRAININGS)


def print_differences(probe: Path, folder: Path) -> None:
    print(json.dumps([differences(probe, folder / str(n), arguments) for n, arguments in enumerate(TRAININGS)]))


def test_the_model_is_measured_in_eval_mode_and_left_training(probe: Path, tmp_path: Path) -> None:
    """The dataset of a step is that of a run of the saved model."""
    trainer = train(tmp_path, measuring(probe, tmp_path / "out"), steps=3)
    assert trainer.model.training
    trainer.model.save_pretrained(tmp_path / "model")
    tokenizer_of().save_pretrained(tmp_path / "model")
    attlas.run(model=str(tmp_path / "model"), corpus=str(probe), out=tmp_path / "run", unit="line")
    live, loaded = (
        pl.read_parquet(folder / "heads" / "*.parquet")
        for folder in (tmp_path / "out" / "step-0000003", tmp_path / "run")
    )
    for name in ("entropy_nats", "score_max", "output_norm"):
        assert live[name].to_numpy() == pytest.approx(loaded[name].to_numpy(), rel=1e-5), name


def test_what_a_model_keeps_of_a_pass_is_restored() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("table", torch.ones(1))
            self.length, self.cache = 0, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.table = torch.full((1,), float(len(x)))
            self.length, self.cache, self.made = len(x), self.linear(x), True
            return self.cache * torch.rand(1) * random.random() * np.random.rand()

    model = Caching()
    before = copy.deepcopy(vars(model)), torch.get_rng_state(), random.getstate(), np.random.get_state()
    with undisturbed(model, CPU), torch.inference_mode():
        assert not model.training
        model(torch.ones(3, 2))
    assert model.training
    assert (model.length, model.cache, hasattr(model, "made")) == (0, None, False)
    assert (model.count.item(), model.table.item()) == (0, 1)
    assert not model.table.is_inference()
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (random.getstate(), str(np.random.get_state())) == (before[2], str(before[3]))


def test_the_tokenizer_of_the_trainer_stays_as_it_is(probe: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    tokenizer("a cat", padding="max_length", max_length=7, truncation=True)
    before = tokenizer.backend_tokenizer.to_str()
    step(measuring(probe, tmp_path / "out"), 0, tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


# --- the series


def step(
    callback: MeasureAttention, number: int, *, model: Any = None, tokenizer: Any = None, main: bool = True
) -> None:
    """A step of a training, as the Trainer tells of it."""
    state = TrainerState(global_step=number, max_steps=100, is_world_process_zero=main)
    model = small_model() if model is None else model
    given = {"model": model, "processing_class": tokenizer_of() if tokenizer is None else tokenizer}
    event = callback.on_step_end if number else callback.on_train_begin
    event(SimpleNamespace(load_best_model_at_end=False), state, TrainerControl(), **given)  # pyright: ignore[reportArgumentType]


def test_every_measured_step_is_a_finished_dataset_of_the_same_documents(probe: Path, tmp_path: Path) -> None:
    train(tmp_path, measuring(probe, tmp_path / "out", name="tiny"), steps=7)
    folders = sorted((tmp_path / "out").iterdir())
    assert [folder.name for folder in folders] == ["step-0000000", "step-0000003", "step-0000006", "step-0000007"]
    assert [verify(folder) for folder in folders] == [[]] * 4
    found = trend(folders)
    assert (found.steps, found.series.has_steps) == ([0, 3, 6, 7], True)
    assert found.changes["is_paired"].all()
    assert set(found.changes["documents"]) == {DOCUMENTS}
    manifests = [Store.at(folder).manifest or {} for folder in folders]
    assert [(m["model"]["name"], m["model"]["revision"]) for m in manifests] == [
        ("tiny", f"step-{n}") for n in (0, 3, 6, 7)
    ]
    assert len({m["model"]["weights_digest"] for m in manifests}) == 4


def test_options_are_those_of_a_run(probe: Path, tmp_path: Path) -> None:
    step(measuring(probe, tmp_path / "out", limit=3, max_length=8, statistics="gini"), 0)
    heads = pl.read_parquet(tmp_path / "out" / "step-0000000" / "heads" / "*.parquet")
    assert heads["document_id"].n_unique() == 3
    assert heads["query_rows"].max() <= 8
    assert "gini" in heads.columns


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_other_models_are_measured_as_they_are(probe: Path, tmp_path: Path, family: str) -> None:
    step(measuring(probe, tmp_path / "out"), 0, model=model_of(family).train())
    assert verify(tmp_path / "out" / "step-0000000") == []


def test_only_the_main_process_measures(probe: Path, tmp_path: Path) -> None:
    step(measuring(probe, tmp_path / "out"), 3, main=False)
    assert not (tmp_path / "out").exists()


def test_a_training_that_is_resumed_keeps_finished_steps_and_makes_unfinished_ones_again(
    probe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, measuring(probe, out), steps=3, **saving)
    kept = contents(out / "step-0000003")
    begun = out / "step-0000006"  # of the process that was killed
    planned = training.run_live
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attlas.extract.live.finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            step(measuring(probe, out), 6)
    assert training.run_live is planned
    assert (begun / "_work").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        train(tmp_path, measuring(probe, out), steps=6, resume=True, **saving)
    assert contents(out / "step-0000003") == kept
    assert verify(begun) == []
    assert trend(f"{out}/*").steps == [0, 3, 6]


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_step_that_was_measured_with_other_weights_is_kept_with_a_warning(probe: Path, tmp_path: Path) -> None:
    step(measuring(probe, tmp_path / "out"), 3)
    before = contents(tmp_path / "out")
    other = small_model()
    with torch.no_grad():
        other.transformer.wte.weight.mul_(2)
    with pytest.warns(MeasurementWarning, match="step-0000003 is kept, and has been measured with other weights"):
        step(measuring(probe, tmp_path / "out"), 3, model=other)
    assert contents(tmp_path / "out") == before


def test_the_model_that_is_loaded_at_the_end_is_not_taken_for_the_last_step(probe: Path, tmp_path: Path) -> None:
    callback = measuring(probe, tmp_path / "out")
    state = TrainerState(global_step=5, max_steps=100)
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=True), state, TrainerControl(), model=small_model())  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


# --- failures


class Failing(nn.Module):
    """A model that can't be measured: it has no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.embedding(input_ids)


def test_training_goes_on_if_measuring_fails_with_one_warning(probe: Path, tmp_path: Path) -> None:
    callback = measuring(probe, tmp_path / "out", strict=False)
    with pytest.warns(
        MeasurementWarning, match=r"step 3 was not measured \(\w+: .*\); training goes on; strict=True"
    ) as caught:
        step(callback, 3, model=Failing())
        step(callback, 6, model=Failing())
    assert len(caught) == 1
    step(callback, 9)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["step-0000009"]


def test_a_failure_is_raised_if_that_is_asked(probe: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="attention"):
        step(measuring(probe, tmp_path / "out"), 3, model=Failing())


def test_weights_in_parts_are_refused(probe: Path, tmp_path: Path) -> None:
    model = small_model()
    model.transformer.wte.weight.ds_id = 0
    with pytest.raises(
        Refusal,
        match=r"wte.weight is a parameter of DeepSpeed's stage 3, of which this process holds a part; measure the checkpoints",
    ):
        step(measuring(probe, tmp_path / "out"), 3, model=model)
    with pytest.raises(Refusal, match="on the meta device"):
        live_encoder(nn.Linear(2, 2, device="meta"), tokenizer_of(), name="x")


def test_a_trainer_without_a_tokenizer_is_refused(probe: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="needs a tokenizer of transformers; got object; give it as tokenizer=…"):
        step(measuring(probe, tmp_path / "out"), 3, tokenizer=object())
    step(measuring(probe, tmp_path / "out", tokenizer=tokenizer_of()), 3, tokenizer=object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is a number of training steps, at least 1; got 0"),
        ({"model": "demo"}, "the options of a measurement are max_length, .*; got model; leave it out"),
        ({"probe": "nowhere.txt"}, "nowhere.txt"),
        ({"statistics": "entropi"}, "entropi"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_training(probe: Path, tmp_path: Path, options: dict, message: str) -> None:
    given = {"probe": probe, "every": 3, "out": tmp_path / "out"} | options
    with pytest.raises(Refusal, match=message):
        MeasureAttention(given.pop("probe"), **given)
    assert not (tmp_path / "out").exists()


# --- what a trend tells of a training


@pytest.fixture(scope="module")
def trends(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trend]:
    """Two trainings of the same model on the same data: one with a sound learning rate, one with a hundred times that.

    On one thread: what becomes of the second depends on the last digits.
    """
    found = {}
    for name, rate in (("sound", 1e-3), ("collapsing", 1e-1)):
        folder = tmp_path_factory.mktemp(name)
        with one_thread():
            train(folder, measuring(probe, folder / "out", every=20), steps=60, rate=rate)
        found[name] = trend(f"{folder}/out/*")
    return found


def test_a_sound_training_is_marked_as_no_collapse(trends: dict[str, Trend]) -> None:
    found = trends["sound"]
    assert found.steps == [0, 20, 40, 60]
    assert found.alerts.height == 0
    last = found.rows.filter(step=60)
    assert last.filter(column="entropy_normalized")["estimate"].min() > 0.95
    assert last.filter(column="score_max")["estimate"].max() < 2
    entropy = found.changes_to(-1, from_first=True).filter(column="entropy_nats")
    assert set(entropy["verdict"]) == {"unchanged"}
    assert found.has_drift  # it learns: logits and updates grow


def test_a_collapse_is_marked_with_the_step_and_the_heads(trends: dict[str, Trend]) -> None:
    found = trends["collapsing"]
    alerts = found.alerts.group_by("alert").len().sort("alert").rows()
    assert [name for name, _ in alerts] == ["entropy collapse", "large logits"]
    last, first = (found.rows.filter(step=step) for step in (60, 0))
    assert first.filter(column="entropy_normalized")["estimate"].min() > 0.99
    collapsed = found.alerts.filter(alert="entropy collapse")
    assert collapsed.height >= 2
    assert collapsed["lasts"].all()
    assert collapsed["first"].min() > 0.99
    assert collapsed["high"].max() < 0.05
    assert last.filter(column="score_max")["estimate"].max() > 300
    changes = found.changes_to(-1, from_first=True)
    for name, direction in (("entropy_nats", -1), ("score_max", 1)):
        rows = changes.filter(column=name)
        assert set(rows["verdict"]) == {"changed"}, name
        assert (rows["difference"].sign() == direction).all(), name


# --- distributed


SCRIPT = """
import sys
from pathlib import Path
from tests.extract.test_training import measuring, train
folder, probe = map(Path, sys.argv[1:3])
callbacks = [measuring(probe, folder / "out", every=2)] if sys.argv[3] == "measured" else []
trainer = train(folder, *callbacks, steps=4, ddp_backend="gloo", per_device_train_batch_size=8)
if trainer.is_world_process_zero():
    import hashlib
    print("weights", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_train_as_without_and_one_of_them_measures(probe: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    weights = []
    for mode in ("plain", "measured"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "script.py"), str(tmp_path), str(probe), mode]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=root, env=environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        weights += [line for line in ended.stdout.splitlines() if line.startswith("weights")]
    assert len(weights) == 2
    assert weights[0] == weights[1]
    assert [verify(folder) for folder in sorted((tmp_path / "out").iterdir())] == [[]] * 3
