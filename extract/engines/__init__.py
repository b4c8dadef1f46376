"""Engines: the same primitives in several ways. An engine makes one attention call: its output and its `Rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from extract.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from extract.engines.rows import AttentionCall, Rows, ScoredCall
    from extract.statistics.sums import HeadObservation, HeadSums


@dataclass(frozen=True)
class Engine:
    """How attention calls are made and summed up.

    `attend` is given a call and the way to make it as the model would, for what an engine leaves to it.
    """

    name: str
    attend: Callable[[AttentionCall, Callable[[], Tensor]], tuple[Tensor, Rows]]
    rows_of_scores: Callable[[ScoredCall, Tensor], Rows]  # of a call that the model has made itself
    summed: Callable[[HeadObservation], HeadSums]
    compiled: bool = False  # the residual stream is read by compiled code as well
    is_ready: Callable[[], bool] = lambda: True
    make_ready: Callable[[], None] = lambda: None  # what would otherwise be done in the first batch


def _reference() -> Engine:
    from extract.engines.reference import attend, rows_of_scores
    from extract.statistics.sums import summed

    return Engine("reference", attend, rows_of_scores, summed)


def _cpu() -> Engine:
    from extract.engines import compiled
    from extract.engines.cpu import attend, rows_of_scores
    from extract.statistics import residual_cpu  # noqa: F401 - its kernels are made ready with the others
    from extract.statistics.sums_cpu import summed

    return Engine(
        "cpu",
        attend,
        rows_of_scores,
        summed,
        compiled=True,
        is_ready=compiled.is_prepared,
        make_ready=compiled.prepare,
    )


def _triton() -> Engine:
    from extract.engines.reference import rows_of_scores
    from extract.engines.triton import attend
    from extract.statistics.sums import summed

    return Engine("triton", attend, rows_of_scores, summed)


_ENGINES: Mapping[str, Callable[[], Engine]] = {"reference": _reference, "cpu": _cpu, "triton": _triton}
# the device that an engine is for; the others run on any
_DEVICES = {"cpu": "cpu", "triton": "cuda"}


def choose(name: str, *, device: str = "cpu") -> Engine:
    """The engine of that name; `auto` takes the fastest that runs there."""
    chosen = _fastest(device) if name == "auto" else name
    if chosen not in _ENGINES:
        raise Refusal(f"an engine is one of auto, {', '.join(_ENGINES)}; got {name!r}; choose one of them")
    wanted = _DEVICES.get(chosen, device)
    if wanted != device:
        raise Refusal(
            f"the {chosen} engine measures on {wanted}; the device is {device}; use --engine auto or --device {wanted}"
        )
    if chosen == "triton" and not _has_triton():
        raise Refusal("the triton engine needs the package triton, which is not installed; use --engine auto")
    return _ENGINES[chosen]()


def _fastest(device: str) -> str:
    if device == "cuda" and _has_triton():
        return "triton"
    return "cpu" if device == "cpu" else "reference"


def _has_triton() -> bool:
    return find_spec("triton") is not None
