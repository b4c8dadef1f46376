"""Inputs and results of an engine: attention calls and their row quantities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.extract.engines.patches import Grid
from attlas.extract.engines.quantities import ROW_QUANTITIES, TOKEN_CLASSES, Fact
from attlas.extract.engines.visibility import Visibility


class Classes(NamedTuple):
    """Token classes of queries and keys, as indices into TOKEN_CLASSES; arbitrary at padding."""

    queries: Int[Tensor, "batch query"]
    keys: Int[Tensor, "batch key"]

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> Classes:
        return Classes(self.queries[chosen], self.keys[chosen])

    def rows(self, measured: Bool[Tensor, "batch head query"]) -> Float[Tensor, "batch head class"]:
        """The number of measured rows of each class."""
        return measured.double() @ self.of_each(self.queries).double()

    @staticmethod
    def of_each(numbers: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token class"]:
        """Whether each token is of each class."""
        return numbers[..., None] == torch.arange(len(TOKEN_CLASSES), device=numbers.device)


@dataclass(frozen=True)
class Reading:
    """The rows that read an answer, and the keys of the needle in which it is. All of these rows lie in `span`.

    A row reads the token `ahead` of it: 1 where the next token is predicted, 0 where the token's own row reads it.
    """

    rows: Bool[Tensor, "batch query"]
    keys: Bool[Tensor, "batch key"]
    span: slice
    ahead: int

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> Reading:
        return replace(self, rows=self.rows[chosen], keys=self.keys[chosen])


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call, and what row quantities may need in addition.

    With grouped heads, `key` has fewer heads than `query`, each for consecutive query heads. `sinks` are logits of a
    learned sink. Scores are (query · key)·scale, soft-capped, plus the visibility's bias. `write` is R of each head,
    lower triangular, with ‖c R‖ = ‖c W_O^h‖. `sample` marks the sequences of the sample; None: all of them.

    The output is the model's own where a row is not measured. An engine that would have to wait for a device to know may
    instead set `unmeasured` to 1 and return its own output: the caller then looks later, and makes the call again.
    """

    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch key_head key width"]
    value: Float[Tensor, "batch key_head key value_width"]
    visibility: Visibility
    scale: float
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    write: Float[Tensor, "head value_width value_width"] | None = None
    token_ids: Int[Tensor, "batch token"] | None = None
    classes: Classes | None = None
    grid: Grid | None = None
    sample: Bool[Tensor, " batch"] | None = None
    reading: Reading | None = None
    unmeasured: Int[Tensor, " 1"] | None = None

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> AttentionCall:
        """The call of some sequences."""
        return replace(
            self,
            query=self.query[chosen],
            key=self.key[chosen],
            value=self.value[chosen],
            visibility=self.visibility.of_sequences(chosen),
            token_ids=None if self.token_ids is None else self.token_ids[chosen],
            classes=None if self.classes is None else self.classes.of_sequences(chosen),
            reading=None if self.reading is None else self.reading.of_sequences(chosen),
            sample=None,
        )

    def of_rows(self, places: Int[Tensor, "batch row"]) -> AttentionCall:
        """The call of some queries of each sequence, for their pattern alone."""
        index = places[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[-1])
        return AttentionCall(
            self.query.gather(2, index),
            self.key,
            self.value,
            self.visibility.of_rows(places),
            self.scale,
            self.softcap,
            self.sinks,
        )

    @cached_property
    def facts(self) -> frozenset[Fact]:
        """What the call offers to row quantities."""
        return _facts(self, queries=True, scores=True, values=True)


@dataclass(frozen=True)
class ScoredCall:
    """An attention call in which the model itself computed scores (masked, biased and scaled) and softmax.

    With `weights_only` only the pattern is known, and `scores` contains it.
    """

    scores: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch key_head key value_width"] | None  # None if the value of a key depends on the query
    visibility: Visibility
    sinks: Float[Tensor, "batch head query"] | None = None
    write: Float[Tensor, "head value_width value_width"] | None = None
    token_ids: Int[Tensor, "batch token"] | None = None
    classes: Classes | None = None
    grid: Grid | None = None
    weights_only: bool = False
    sample: Bool[Tensor, " batch"] | None = None
    reading: Reading | None = None

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> ScoredCall:
        """The call of some sequences."""
        return replace(
            self,
            scores=self.scores[chosen],
            value=None if self.value is None else self.value[chosen],
            visibility=self.visibility.of_sequences(chosen),
            sinks=None if self.sinks is None else self.sinks[chosen],
            token_ids=None if self.token_ids is None else self.token_ids[chosen],
            classes=None if self.classes is None else self.classes.of_sequences(chosen),
            reading=None if self.reading is None else self.reading.of_sequences(chosen),
            sample=None,
        )

    def of_rows(self, places: Int[Tensor, "batch row"]) -> ScoredCall:
        """The call of some queries of each sequence, for their pattern alone."""
        index = places[:, None].expand(-1, self.scores.shape[1], -1)
        scores = self.scores.gather(2, index[..., None].expand(-1, -1, -1, self.scores.shape[-1]))
        sinks = None if self.sinks is None else self.sinks.gather(2, index)
        visibility = self.visibility.of_rows(places)
        return ScoredCall(scores, self.value, visibility, sinks=sinks, weights_only=self.weights_only)

    @cached_property
    def facts(self) -> frozenset[Fact]:
        """What the call offers to row quantities."""
        return _facts(self, queries=False, scores=not self.weights_only, values=self.value is not None)


def _facts(call: AttentionCall | ScoredCall, *, queries: bool, scores: bool, values: bool) -> frozenset[Fact]:
    has: dict[Fact, bool] = {
        "queries": queries,
        "scores": scores,
        "values": values,
        "positions": not call.visibility.is_cross_attention,
        "token_ids": call.token_ids is not None,
        "classes": call.classes is not None,
        "projection": call.write is not None,
        "sink": call.sinks is not None,
        "grid": call.grid is not None,
        "reading": call.reading is not None,
    }
    return frozenset(fact for fact, is_there in has.items() if is_there)


class ChosenRows(NamedTuple):
    """Some rows of each sequence's pattern, zeros where a row is not measured or there are fewer rows.

    A learned sink is one more key, the last. `mixed` has H((p + q) / 2) in nats of heads p and q, p not after q, 0 for the others:
    on its diagonal H(p).
    """

    patterns: Float[Tensor, "sequence head row key"]
    measured: Bool[Tensor, "sequence head row"]
    mixed: Float[Tensor, "sequence row head head"]


@dataclass(frozen=True)
class Rows:
    """Row quantities of one attention call by name, in float32 or better; unknown ones are absent.

    A row that is not measured (padding, fully masked, non-finite scores) has zeros and adds to no sum.
    """

    measured: Bool[Tensor, "batch head query"]
    quantities: Mapping[str, Float[Tensor, "batch head *place"]]

    def __post_init__(self) -> None:
        for name, values in self.quantities.items():
            axis = ROW_QUANTITIES[name].axis
            expected = (*self.measured.shape[:2], *((self.measured.shape[-1],) if axis == "query" else ()))
            assert values.shape[: len(expected)] == expected, f"{name} is {[*values.shape]}, not {[*expected]}"

    def lacks(self, names: frozenset[str]) -> frozenset[str]:
        """The names of quantities that are not known."""
        return names - self.quantities.keys()

    def only(self, names: frozenset[str]) -> Rows:
        """These rows with no other quantities than those named."""
        return replace(self, quantities={name: self.quantities[name] for name in self.quantities if name in names})

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> Rows:
        """The rows of some sequences."""
        return Rows(self.measured[chosen], {name: values[chosen] for name, values in self.quantities.items()})

    def with_quantities(self, others: Mapping[str, Tensor]) -> Rows:
        """These rows with other quantities beside, or instead of, their own."""
        return replace(self, quantities={**self.quantities, **others})

    def chosen_rows(
        self,
        call: AttentionCall | ScoredCall,  # noqa: ARG002 - a subclass uses them
        sequences: Int[Tensor, " sequence"] | None,  # noqa: ARG002
        most: int,  # noqa: ARG002
    ) -> ChosenRows | None:
        """At most so many rows of the call's pattern in each of these sequences (None: in all), if they are known already."""
        return None

    def __getitem__(self, name: str) -> Tensor:
        return self.quantities[name]

    def __contains__(self, name: str) -> bool:
        return name in self.quantities

    def get(self, name: str) -> Tensor | None:
        """The quantity, or None if it is not known."""
        return self.quantities.get(name)
