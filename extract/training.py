"""Measure a model while it trains: a series of datasets of the same probe corpus, one for each measured step."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attlas.extract.errors import Refusal, first_line
from attlas.extract.live import live_encoder, run_live
from attlas.extract.options import RunOptions, check_options
from attlas.extract.store import Location, Store

# of a live model, or of the series
_GIVEN = {"model", "corpus", "out", "device", "dtype", "revision", "trust_remote_code"}
_OPTIONS = tuple(field.name for field in fields(RunOptions) if field.name not in _GIVEN)


class MeasurementWarning(UserWarning):
    """A step of a training that could not be measured, or that was measured before with other weights."""


class MeasureAttention(TrainerCallback):
    """Measure a probe corpus with the model that a `transformers.Trainer` trains, every `every` steps and at the end.

    Each measured step becomes a finished dataset, `out`/step-0000100, of the same documents, so `attlas trend` compares them in
    pairs. The first is of the model before training (step 0). Training goes on as without: weights, gradients, random numbers,
    modes and hooks stay as they are. The model runs in eval mode, in the type of its weights (without mixed precision), as the
    checkpoint saved at that step would.

    Only the main process measures; the others wait at their next collective operation. A step that has its finished dataset is not
    measured again, an unfinished dataset is made again. If a measurement fails, training goes on with a warning; with `strict` the
    error is raised. Weights in parts (FSDP, DeepSpeed's stage 3) can't be measured live.
    """

    def __init__(
        self,
        probe: str | os.PathLike[str],
        *,
        every: int,
        out: str | os.PathLike[str],
        tokenizer: Any = None,
        name: str | None = None,
        strict: bool = False,
        **options: Any,
    ) -> None:
        """Check the options. Raises Refusal.

        probe: a corpus of texts, as `--corpus` of a run. out: the folder, or URL, of the series. tokenizer: the Trainer's
        `processing_class` by default. name: the model's name in the datasets, that of its class by default. options: those of a
        run, such as `max_length`, `limit` and `statistics`.
        """
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise Refusal(
                f"the options of a measurement are {', '.join(_OPTIONS)}; got {', '.join(unknown)}; leave it out"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise Refusal(f"every is a number of training steps, at least 1; got {every!r}; use 100, for example")
        self.every, self.strict = every, strict
        self._probe, self._out, self._name, self._tokenizer = os.fspath(probe), os.fspath(out), name, tokenizer
        self._options = options
        self._has_warned = False
        corpus = check_options(self._options_at(0, "model"), is_loaded=True)
        if corpus.has_images:
            raise Refusal(
                f"a probe corpus is one of texts; {probe} holds images; measure the checkpoints with attlas run"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the model before training, or where it goes on."""
        if state.global_step % self.every == 0:
            self._measure(state, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time, or the last step."""
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % self.every == 0 or is_last:
            self._measure(state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step of a training that was stopped between steps."""
        if not args.load_best_model_at_end:  # else the model is that of another step by now
            self._measure(state, kwargs)

    def location(self, step: int) -> str:
        """Where the dataset of a step is."""
        return (
            f"{self._out.rstrip('/')}/step-{step:07d}"
            if "://" in self._out
            else str(Path(self._out, f"step-{step:07d}"))
        )

    def _measure(self, state: TrainerState, arguments: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._measure_step(state.global_step, arguments)
        except Exception as error:  # of any kind: a training is worth more than a measurement
            if self.strict:
                raise
            self._warn(
                f"step {state.global_step} was not measured ({type(error).__name__}: {first_line(error)}); training goes on; "
                "strict=True raises the error; further warnings are left out"
            )

    def _measure_step(self, step: int, arguments: dict[str, Any]) -> None:
        model, tokenizer = arguments["model"], self._tokenizer_of(arguments.get("processing_class"))
        name = self._name or type(model).__name__
        options = self._options_at(step, name)
        store = Store.at(options.out)
        if store.manifest is None:
            store.discard_unfinished()
            run_live(model, tokenizer, options)
        else:
            self._warn_of_other_weights(store, model, tokenizer, options)

    def _options_at(self, step: int, name: str) -> RunOptions:
        out: Location = self.location(step)
        return RunOptions(model=name, corpus=self._probe, out=out, revision=f"step-{step}", **self._options)

    def _tokenizer_of(self, processing_class: Any) -> Any:
        """A copy of the tokenizer, so that padding and truncation of the Trainer's stay as they are. Raises Refusal."""
        from copy import deepcopy

        from transformers import PreTrainedTokenizerBase

        given = processing_class if self._tokenizer is None else self._tokenizer
        tokenizer = getattr(given, "tokenizer", given)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise Refusal(
                f"a probe corpus of texts needs a tokenizer of transformers; got {type(tokenizer).__name__}; give it as tokenizer=…, "
                "or as processing_class of the Trainer"
            )
        return deepcopy(tokenizer)

    def _warn_of_other_weights(self, store: Store, model: nn.Module, tokenizer: Any, options: RunOptions) -> None:
        """Warn if a kept dataset is not of this model."""
        identity = store.held_identity()
        encoder = live_encoder(model, tokenizer, name=options.model)
        if identity is not None and identity.recipe.get("weights_digest") != encoder.weights_digest():
            self._warn(
                f"{store.storage.place()} is kept, and has been measured with other weights than those of this training at {options.revision}; "
                "give another training another out"
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, MeasurementWarning, stacklevel=4)
