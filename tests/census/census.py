"""The census: every architecture of transformers as a tiny random model, measured and compared with its own eager patterns.

`python -m tests.census.census [model_type … | text | vision | audio | multimodal]` prints a line per architecture;
`make census` measures all of them and writes data/COVERAGE.md.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from attlas.extract.engines import choose
from attlas.extract.errors import CaptureError, Refusal
from attlas.extract.measurement import layout_of, measure
from tests.census.judge import Verdict, verdict_on
from tests.census.model_patterns import ModelPatterns, attends, eager_readings
from tests.census.pool import map_in_processes, run_in_process
from tests.census.through_run import NO_IDS, YES, through_run
from tests.census.tiny import GAIN, NotBuilt, TinyModel, architectures, build, forward, forward_parameters, reason_of

if TYPE_CHECKING:
    from attlas.extract.capture.layout import Layout

EXACT, FALLBACK, UNCOMPARED = "exact", "exact by eager fallback", "measured, gives no patterns to compare with"
REFUSED, WITHOUT, NOT_BUILT, WRONG = "refused", "no attention", "not built", "WRONG"
OUTCOMES = (EXACT, FALLBACK, UNCOMPARED, REFUSED, WITHOUT, NOT_BUILT, WRONG)
ATTENDING = (EXACT, FALLBACK, UNCOMPARED, REFUSED, WRONG)
FALLBACKS = {"softmax", "replay"}
SMALL_GAIN = 0.2
# their attention is not a softmax over keys, so there is no pattern
WITHOUT_PATTERN = {
    "autoformer": "weighs delays of the whole series by autocorrelation",
    "mobilevitv2": "one vector of weights for all queries",
    "mra": "approximates by blocks of several resolutions, without a softmax",
    "patchtsmixer": "a gate of softmax over features",
    "rwkv": "a recurrence",
    "swiftformer": "one vector of weights for all queries",
    "yoso": "estimates by hashing, without a softmax",
}


@dataclass(frozen=True)
class Entry:
    """The result for one architecture."""

    model_type: str
    modality: str
    outcome: str
    reason: str = ""
    stacks: str = ""
    ways: tuple[str, ...] = ()
    compared: int = 0  # number of patterns returned by the model
    residual: str = ""
    through_run: str = NO_IDS  # YES, or the reason why `attlas run` does not measure it

    @property
    def fast(self) -> bool:
        return bool(self.ways) and not {*self.ways} & FALLBACKS


def entry(model_type: str) -> Entry:
    """Build, measure and compare one architecture."""
    warnings.simplefilter("ignore")
    result = entry_with_retries(model_type)
    return replace(result, through_run=through_run(model_type)) if result.outcome in ATTENDING else result


def entry_with_retries(model_type: str) -> Entry:
    """Compare an architecture; if that fails, again with other variants of its tiny model.

    With large weights, some tiny models amplify rounding so much that their SDPA and eager forms differ, or weights
    underflow to zero. These are compared with smaller weights or in float64.
    """
    result = compare(Variant(model_type))
    if result.outcome in (WRONG, REFUSED):
        for difference, variant in (
            ("with smaller weights", Variant(model_type, gain=SMALL_GAIN)),
            ("in float64", Variant(model_type, double=True)),
            ("as it attends by eager code", Variant(model_type, attention="eager")),
        ):
            again = compare(variant)
            if again.outcome in (EXACT, FALLBACK):
                return replace(again, reason=f"compared {difference}")
    return result


@dataclass(frozen=True)
class Variant:
    """A variant of a tiny model."""

    model_type: str
    gain: float = GAIN
    double: bool = False
    attention: str | None = None  # implementation with which it is measured

    def build(self, attention: str | None = None) -> TinyModel | NotBuilt:
        built = build(self.model_type, attention=attention or self.attention, gain=self.gain)
        if isinstance(built, NotBuilt):
            return built
        if not self.double:
            return built
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in built.inputs.items()}
        return replace(built, model=built.model.double(), inputs=inputs)


def compare(variant: Variant) -> Entry:
    model_type, built = variant.model_type, variant.build()
    kind = built.modality
    if isinstance(built, NotBuilt):
        return Entry(model_type, kind, NOT_BUILT, built.reason)
    try:
        forward(built)
    except Exception as error:
        return Entry(model_type, kind, NOT_BUILT, f"its forward pass fails: {reason_of(error)}")
    eager = variant.build("eager")
    readings = iter(()) if isinstance(eager, NotBuilt) else eager_readings(eager)
    try:
        tables = measure_batch(built)
    except (CaptureError, Refusal) as error:
        if model_type in WITHOUT_PATTERN:
            return Entry(model_type, kind, WITHOUT, WITHOUT_PATTERN[model_type])
        has_patterns = any(part.returned or part.softmaxes for part in next(readings, []))
        outcome = REFUSED if has_patterns or attends(built) else WITHOUT
        return Entry(model_type, kind, outcome, "" if outcome == WITHOUT else str(error))
    except Exception as error:
        return Entry(model_type, kind, WRONG, reason_of(error))
    return _judge(built, tables, readings)


def _judge(built: TinyModel, tables: Mapping[str, pa.Table], readings: Iterator[list[ModelPatterns]]) -> Entry:
    """Compare the measured rows with the reading of the batch that agrees best."""
    rows = tables["heads"].to_pylist()
    best, layout = Verdict((), -1), None
    for reading in readings:
        claim = layout_for(built, reading[0].inputs)
        verdict = None if claim is None else verdict_on(reading, claim.attentions, rows)
        if verdict is not None and (layout is None or verdict.rank > best.rank):
            best, layout = verdict, claim
        if layout is not None and best.rank == (True, len(layout.attentions)):
            break
    layout = layout or layout_for(built, built.inputs)
    if layout is None:
        return Entry(built.model_type, built.modality, WRONG, "measured, but examined again it is refused")
    outcome = FALLBACK if layout.methods & FALLBACKS else EXACT
    return Entry(
        built.model_type,
        built.modality,
        WRONG if best.missed else outcome if best.compared > 0 else UNCOMPARED,
        reason="; ".join(best.missed[:2]),
        stacks=", ".join(f"{s} {len(layout.of(s))}" for s in layout.stacks),
        ways=tuple(sorted(layout.methods)),
        compared=0 if best.missed else max(0, best.compared),
        residual="measured" if "residual" in tables else layout.residual_refusal or "not measured",
    )


def measure_batch(built: TinyModel) -> dict[str, pa.Table]:
    """All statistics of a batch, for all stacks that run."""
    torch.manual_seed(2)
    return measure(built.model, statistics="all", **_measure_arguments(built, built.inputs))


def layout_for(built: TinyModel, inputs: Mapping[str, Tensor]) -> Layout | None:
    """The layout that attlas found for such inputs; None if it refuses them."""
    try:
        return layout_of(built.model, _measure_arguments(built, inputs))
    except Exception:
        return None


def _measure_arguments(built: TinyModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**inputs, "use_cache": False} if "use_cache" in forward_parameters(type(built.model)) else dict(inputs)


def main(wanted: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    run_in_process(choose("auto", device="cpu").make_ready)  # compile once, instead of in each process
    modalities = architectures()
    chosen = [t for t in modalities if not wanted or t in wanted or modalities[t] in wanted]
    began, entries = time.monotonic(), []
    for model_type, found in map_in_processes(entry, chosen):
        result = found or Entry(model_type, modalities[model_type], WRONG, "died, or took too long")
        entries.append(result)
        fields = (
            result.model_type,
            result.modality,
            result.outcome,
            result.stacks,
            ",".join(result.ways),
            str(result.compared),
            str(result.residual),
            result.reason,
            result.through_run,
        )
        print("\t".join(fields), flush=True)
    runs = [e.through_run.startswith(YES) for e in entries if e.through_run != NO_IDS]
    print(f"{sum(runs)} of {len(runs)} that read ids go through attlas run")
    print(Counter(e.outcome for e in entries), f"{time.monotonic() - began:.0f} s")
    if not wanted:
        from tests.census.coverage import coverage

        Path("data/COVERAGE.md").write_text(coverage(entries), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
