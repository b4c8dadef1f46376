"""What a column is: a function together with everything a reader of its numbers needs to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np

# what a column is computed from, and what of it: an array or tensor whose shape the table's module states
Observation = TypeVar("Observation")
Values = TypeVar("Values")

BOUND_TOLERANCE = 1e-4  # of float32 means; relative to bounds beyond ±1

DType = Literal["float32", "float64", "int16", "int32", "int64", "string", "stack", "bool", "list<int32>"]


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Observation, Values]):
    """One column of a table.

    `compute` takes the table's observation and gives the column's values, NaN where undefined (written as null), or
    None where the whole column is undefined; a key or a fact of the plan has no function.
    """

    name: str
    dtype: DType = "float32"
    unit: str = ""
    formula: str
    meaning: str = ""
    bounds: tuple[float | str | None, float | str | None] = (None, None)
    reference: str = ""
    nullable: bool = False
    signed: bool = False  # a key that may be negative
    core: bool = True  # measured by every run; others only if asked for
    corpus: str = ""  # the corpus on which alone it can be measured
    sample: bool = False  # measured for the sequences of the sample only
    averaged: bool = False  # an integer whose mean over sequences says something; that of a float always does
    by_name: bool = False  # measured only if it is named itself, because it costs many times a pass
    group: str = ""  # under which heading of its table readers find it
    known: Mapping[str, str] = field(
        default_factory=dict
    )  # values where they are known, as formulas, by the pattern or state
    elsewhere: str = ""  # other software that computes it, and under which name
    example: str = ""  # a query, if the table's own does not serve
    origin: str = ""  # of a user's column: the name of its file and its SHA-256
    compute: Callable[[Observation], Values] | None = None

    @property
    def is_averaged(self) -> bool:
        """Whether it has a mean over sequences."""
        return self.averaged or self.dtype == "float32"

    @property
    def bounds_text(self) -> str:
        low, high = self.bounds
        if low is None and high is None:
            return ""
        return f"[{'−∞' if low is None else low}, {'∞' if high is None else high}]"

    @property
    def origin_file(self) -> str:
        return self.origin.partition(" sha256:")[0]

    def first_out_of_bounds(self, values: np.ndarray) -> int | None:
        """The place of the first value that is infinite or beyond a bound that is a number; None if there is none."""
        low, high = (bound if isinstance(bound, int | float) else None for bound in self.bounds)
        wrong = np.isinf(values)
        if low is not None:
            wrong |= values < low - BOUND_TOLERANCE * max(1, abs(low))
        if high is not None:
            wrong |= values > high + BOUND_TOLERANCE * max(1, abs(high))
        return int(wrong.argmax()) if wrong.any() else None

    @property
    def metadata(self) -> dict[str, str]:
        """The facts that travel with the column inside every Parquet file."""
        facts = {
            "formula": self.formula,
            "unit": self.unit,
            "bounds": self.bounds_text,
            "meaning": self.meaning,
            "reference": self.reference,
            "origin": self.origin,
        }
        return {name: text for name, text in facts.items() if text}


def column(
    *,
    formula: str,
    unit: str = "",
    bounds: tuple[float | str | None, float | str | None] = (None, None),
    meaning: str = "",
    reference: str = "",
    nullable: bool = False,
    dtype: DType = "float32",
    core: bool = True,
    corpus: str = "",
    sample: bool = False,
    averaged: bool = False,
    by_name: bool = False,
    group: str = "",
    known: Mapping[str, str] | None = None,
    elsewhere: str = "",
    example: str = "",
) -> Callable[[Callable[[Observation], Values]], Column[Observation, Values]]:
    """Make the decorated function a `Column` of the same name."""

    def record(compute: Callable[[Observation], Values]) -> Column[Observation, Values]:
        return Column(
            name=getattr(compute, "__name__", ""),
            dtype=dtype,
            unit=unit,
            formula=formula,
            meaning=meaning or " ".join((compute.__doc__ or "").split()),
            bounds=bounds,
            reference=reference,
            nullable=nullable,
            core=core,
            corpus=corpus,
            sample=sample,
            averaged=averaged,
            by_name=by_name,
            group=group,
            known=known or {},
            elsewhere=elsewhere,
            example=example,
            compute=compute,
        )

    return record


def columns_of(names: Mapping[str, Any]) -> tuple[Column[Any, Any], ...]:
    """The computed columns among a module's names, in the order in which it defines them."""
    return tuple(value for value in names.values() if isinstance(value, Column) and value.compute is not None)
