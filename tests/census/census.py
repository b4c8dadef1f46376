"""The census: every architecture of transformers as a tiny random model, measured, against its own eager patterns.

`python -m tests.census.census [model_type … | text | vision | audio | multimodal]` prints a line of each; `make census`
measures all of them and writes data/COVERAGE.md.
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
from tests.census.own import Own, attends, readings
from tests.census.pool import each, in_a_process
from tests.census.through_run import NO_IDS, YES, through_run
from tests.census.tiny import GAIN, Built, NotBuilt, architectures, build, forward, reason_of, takes

if TYPE_CHECKING:
    from attlas.extract.capture.layout import Layout

EXACT, FALLBACK, UNCOMPARED = "exact", "exact by eager fallback", "measured, gives no patterns to compare with"
REFUSED, WITHOUT, NOT_BUILT, WRONG = "refused", "no attention", "not built", "WRONG"
OUTCOMES = (EXACT, FALLBACK, UNCOMPARED, REFUSED, WITHOUT, NOT_BUILT, WRONG)
ATTENDING = (EXACT, FALLBACK, UNCOMPARED, REFUSED, WRONG)
FALLBACKS = {"softmax", "replay"}
SMALL_GAIN = 0.2
# what is called attention there is no softmax over keys, so there is no pattern
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
    """An architecture's line in the census."""

    model_type: str
    modality: str
    outcome: str
    reason: str = ""
    stacks: str = ""
    ways: tuple[str, ...] = ()
    compared: int = 0  # patterns of the model's own
    residual: str = ""
    through_run: str = NO_IDS  # YES, or in words why `attlas run` does not measure it

    @property
    def fast(self) -> bool:
        return bool(self.ways) and not {*self.ways} & FALLBACKS


def entry(model_type: str) -> Entry:
    """Build, measure and compare one architecture.

    With large weights some tiny models amplify rounding so much that their own two forms differ, or let weights of keys
    underflow to zero; these are compared with smaller ones, or in float64.
    """
    warnings.simplefilter("ignore")
    found = judged(model_type)
    return replace(found, through_run=through_run(model_type)) if found.outcome in ATTENDING else found


def judged(model_type: str) -> Entry:
    found = compared(Making(model_type))
    if found.outcome in (WRONG, REFUSED):
        for said, making in (
            ("with smaller weights", Making(model_type, gain=SMALL_GAIN)),
            ("in float64", Making(model_type, double=True)),
            ("as it attends by eager code", Making(model_type, attention="eager")),
        ):
            again = compared(making)
            if again.outcome in (EXACT, FALLBACK):
                return replace(again, reason=f"compared {said}")
    return found


@dataclass(frozen=True)
class Making:
    """How a tiny model is made."""

    model_type: str
    gain: float = GAIN
    double: bool = False
    attention: str | None = None  # as it is measured

    def built(self, attention: str | None = None) -> Built | NotBuilt:
        built = build(self.model_type, attention=attention or self.attention, gain=self.gain)
        if isinstance(built, NotBuilt):
            return built
        if not self.double:
            return built
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in built.inputs.items()}
        return replace(built, model=built.model.double(), inputs=inputs)


def compared(making: Making) -> Entry:
    model_type, built = making.model_type, making.built()
    kind = built.modality
    if isinstance(built, NotBuilt):
        return Entry(model_type, kind, NOT_BUILT, built.reason)
    try:
        forward(built)
    except Exception as error:
        return Entry(model_type, kind, NOT_BUILT, f"its forward pass fails: {reason_of(error)}")
    eager = making.built("eager")
    own = iter(()) if isinstance(eager, NotBuilt) else readings(eager)
    try:
        tables = measured(built)
    except (CaptureError, Refusal) as error:
        if model_type in WITHOUT_PATTERN:
            return Entry(model_type, kind, WITHOUT, WITHOUT_PATTERN[model_type])
        shown = any(part.returned or part.softmaxes for part in next(own, []))
        outcome = REFUSED if shown or attends(built) else WITHOUT
        return Entry(model_type, kind, outcome, "" if outcome == WITHOUT else str(error))
    except Exception as error:
        return Entry(model_type, kind, WRONG, reason_of(error))
    return _judged(built, tables, own)


def _judged(built: Built, tables: Mapping[str, pa.Table], own: Iterator[list[Own]]) -> Entry:
    """What the reading of the batch that agrees best says of the measured rows."""
    rows = tables["heads"].to_pylist()
    best, layout = Verdict((), -1), None
    for reading in own:
        claim = claimed(built, reading[0].inputs)
        verdict = None if claim is None else verdict_on(reading, claim.attentions, rows)
        if verdict is not None and (layout is None or verdict.rank > best.rank):
            best, layout = verdict, claim
        if layout is not None and best.rank == (True, len(layout.attentions)):
            break
    layout = layout or claimed(built, built.inputs)
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


def measured(built: Built) -> dict[str, pa.Table]:
    """The tables of a batch, of all stacks that it reaches."""
    torch.manual_seed(2)
    return measure(built.model, **_asked(built, built.inputs))


def claimed(built: Built, inputs: Mapping[str, Tensor]) -> Layout | None:
    """What was found of the model when it was examined on inputs like these; None where it was on none like them."""
    try:
        return layout_of(built.model, _asked(built, inputs))
    except Exception:
        return None


def _asked(built: Built, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**inputs, "use_cache": False} if "use_cache" in takes(type(built.model)) else dict(inputs)


def main(wanted: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    in_a_process(choose("auto", device="cpu").make_ready)  # compiled once, not by each process in its time
    known = architectures()
    chosen = [t for t in known if not wanted or t in wanted or known[t] in wanted]
    began, entries = time.monotonic(), []
    for model_type, found in each(entry, chosen):
        result = found or Entry(model_type, known[model_type], WRONG, "died, or took too long")
        entries.append(result)
        said = (
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
        print("\t".join(said), flush=True)
    asked = [e.through_run.startswith(YES) for e in entries if e.through_run != NO_IDS]
    print(f"{sum(asked)} of {len(asked)} that read ids go through attlas run")
    print(Counter(e.outcome for e in entries), f"{time.monotonic() - began:.0f} s")
    if not wanted:
        from tests.census.coverage import coverage

        Path("data/COVERAGE.md").write_text(coverage(entries), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
