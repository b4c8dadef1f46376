"""Engines: different implementations of the same row quantities. An engine computes the output and the `Rows` of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from attlas.extract.engines.quantities import ROW_QUANTITIES, Fact, known_quantities, needs_of
from attlas.extract.errors import Refusal

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.observations import HeadObservation
    from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
    from attlas.extract.engines.sums import HeadSums

    Call = TypeVar("Call", AttentionCall, ScoredCall)


# what reads the residual stream: plain torch, compiled code on the CPU, or Triton's kernels on a GPU
StreamReader = Literal["torch", "cpu", "triton"]


@dataclass(frozen=True)
class FusedPass:
    """Output and row quantities of an attention call in one pass.

    `makes` are the row quantities that it computes, if the call has what they need, and `takes` tests whether it supports
    a call.
    """

    makes: frozenset[str]
    takes: Callable[[AttentionCall | ScoredCall], bool]
    attend: Callable[[AttentionCall, Callable[[], Tensor]], tuple[Tensor, Rows]]
    rows_of_scores: Callable[[ScoredCall, Tensor], Rows] | None = (
        None  # None if it does not support calls that the model computes
    )


@dataclass(frozen=True)
class Engine:
    """Computes attention calls and sums up their rows.

    The reference engine, which supports everything, does what the fused pass does not take or make.
    """

    name: str
    fused: FusedPass | None
    sum_rows: Callable[..., HeadSums]
    stream: StreamReader = "torch"
    is_ready: Callable[[], bool] = lambda: True
    make_ready: Callable[[], None] = lambda: None  # work that would otherwise delay the first batch

    def attend(
        self, call: AttentionCall, call_original: Callable[[], Tensor], wanted: Collection[str]
    ) -> tuple[Float[Tensor, "batch head query value_width"], Rows]:
        """Output of an attention call, and the wanted row quantities for which the call has what they need.

        `call_original` makes the call as the model would.
        """
        from attlas.extract.engines import reference

        known, sampled, unneeded = _asked(frozenset(wanted), call.facts)
        needed = _without(call, unneeded)
        if self.fused is None or not self.fused.takes(needed):
            output, rows = reference.attend(needed, call_original, known)
        else:
            output, rows = self.fused.attend(needed, call_original)
            rows = _complement(rows, needed, output, known)
        return output, _add_sampled(rows, needed, output, sampled)

    def rows_of_scores(self, call: ScoredCall, output: Tensor, wanted: Collection[str]) -> Rows:
        """The wanted row quantities of a call that the model computed, if the call has what they need."""
        from attlas.extract.engines import reference

        known, sampled, unneeded = _asked(frozenset(wanted), call.facts)
        needed = _without(call, unneeded)
        if self.fused is None or self.fused.rows_of_scores is None or not self.fused.takes(needed):
            rows = reference.rows_of(needed, output, known)
        else:
            rows = _complement(self.fused.rows_of_scores(needed, output), needed, output, known)
        return _add_sampled(rows, needed, output, sampled)

    def head_sums(self, observation: HeadObservation, names: Sequence[str], *, profiles: bool = False) -> HeadSums:
        """The named head quantities of an observation, and its profiles if asked for."""
        return self.sum_rows(observation, names, profiles=profiles)

    def left_to_reference(self, wanted: Collection[str]) -> list[str]:
        """The wanted row quantities that this engine leaves to the reference engine."""
        others = {name for name in wanted if not ROW_QUANTITIES[name].sampled}
        return [] if self.fused is None else sorted(others - self.fused.makes)

    def residual_left_to_reference(self, columns: Collection[str]) -> list[str]:
        """The residual columns that are computed in torch, not by the engine's own code."""
        if self.stream == "torch":
            return []
        return sorted(set(columns) - _residual_columns(self.stream))


def _residual_columns(stream: StreamReader) -> frozenset[str]:
    """The residual columns that an engine's own code makes."""
    if stream == "triton":
        from attlas.extract.engines.triton.residual import MAKES
    else:
        from attlas.extract.engines.residual_cpu import MAKES
    return MAKES


class _Asked(NamedTuple):
    """Row quantities of all sequences, those of the sample, and the fields of the call that none of them needs."""

    known: frozenset[str]
    sampled: frozenset[str]
    unneeded: tuple[str, ...]


@lru_cache(maxsize=256)
def _asked(wanted: frozenset[str], facts: frozenset[Fact]) -> _Asked:
    """What is wanted of a call with these facts, as far as it has what that needs."""
    names = known_quantities(wanted, facts)
    sampled = frozenset(name for name in names if ROW_QUANTITIES[name].sampled)
    fields: Mapping[Fact, str] = {
        "projection": "write",
        "token_ids": "token_ids",
        "classes": "classes",
        "grid": "grid",
        "reading": "reading",
    }
    needs = needs_of(names)
    return _Asked(names - sampled, sampled, tuple(field for fact, field in fields.items() if fact not in needs))


def _add_sampled(rows: Rows, call: AttentionCall | ScoredCall, output: Tensor, names: frozenset[str]) -> Rows:
    """Add quantities of the sample's sequences, computed by the reference engine; NaN for the others."""
    from attlas.extract.engines import reference

    if not names:
        return rows
    if call.sample is None:
        made = reference.rows_of(call, output, names, measured=rows.measured).quantities
        return rows.with_quantities(made)
    chosen = call.sample.nonzero().flatten()
    if not len(chosen):
        return rows.with_quantities({name: _unknown(name, rows) for name in names})
    made = reference.rows_of(call.of_sequences(chosen), output[chosen], names, measured=rows.measured[chosen])
    return rows.with_quantities({name: _spread(values, chosen, rows) for name, values in made.quantities.items()})


def _unknown(name: str, rows: Rows) -> Tensor:
    """A quantity of the sample where nothing is in the sample."""
    import torch

    shape = rows.measured.shape[:2] if ROW_QUANTITIES[name].axis == "head" else rows.measured.shape
    return torch.tensor(math.nan, device=rows.measured.device).expand(shape)


def _spread(values: Tensor, chosen: Tensor, rows: Rows) -> Tensor:
    """Values of some sequences as those of all, NaN for the others."""
    spread = values.new_full((len(rows.measured), *values.shape[1:]), math.nan)
    spread[chosen] = values
    return spread


def _without(call: Call, fields: Sequence[str]) -> Call:
    """The call without these fields."""
    there = [field for field in fields if getattr(call, field) is not None]
    return replace(call, **dict.fromkeys(there)) if there else call


def _complement(rows: Rows, call: AttentionCall | ScoredCall, output: Tensor, known: frozenset[str]) -> Rows:
    """Add the quantities that the engine did not make, computed by the reference engine."""
    from attlas.extract.engines import reference

    rows = rows.only(known)
    others = rows.lacks(known)
    if not others:
        return rows
    return rows.with_quantities(reference.rows_of(call, output, others, measured=rows.measured).quantities)


def _reference() -> Engine:
    from attlas.extract.engines import sums

    return Engine("reference", None, sums.head_sums)


def _cpu() -> Engine:
    from attlas.extract.engines import (
        compiled,
        cpu,
        residual_cpu,  # noqa: F401 - registers its kernels
        sums_cpu,
    )

    return Engine(
        "cpu",
        FusedPass(cpu.MAKES, cpu.takes, cpu.attend, cpu.rows_of_scores),
        sums_cpu.head_sums,
        stream="cpu",
        is_ready=compiled.is_prepared,
        make_ready=compiled.prepare,
    )


def _triton() -> Engine:
    from attlas.extract.engines import triton

    return Engine("triton", FusedPass(triton.MAKES, triton.takes, triton.attend), triton.head_sums, stream="triton")


_ENGINES: Mapping[str, Callable[[], Engine]] = {"reference": _reference, "cpu": _cpu, "triton": _triton}
# engines for one type of device; the others run on any
_DEVICES = {"cpu": "cpu", "triton": "cuda"}


def choose(name: str, *, device: str = "cpu") -> Engine:
    """The engine of this name; `auto` is the fastest one for the device."""
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
