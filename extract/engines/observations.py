"""Observations of one attention call or one residual site in a forward pass, from which tables record what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # commands that only read the catalogue do not load torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from attlas.extract.engines.block import Block
    from attlas.extract.engines.rows import AttentionCall, ChosenRows, Rows, ScoredCall
    from attlas.extract.engines.visibility import Visibility


# what makes an activation massive: its size, and its size against the median of all (Sun 2024)
_MASSIVE, _MASSIVE_RATIO = 100, 1000
# an update that differs by more than this share from a linear map of its contexts is not one, even in half precision
_NOT_LINEAR = 0.02
# blocks of a pattern are kept for all tables that read them if it has no more weights than this
_KEPT_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class HeadObservation:
    """One attention call: its row quantities, its visibility, and the token classes of the keys.

    `call` are its arguments, from which its pattern is computed; None unless patterns are needed. `places` are those of the
    sample's sequences in the batch, if they are known: to find them, a GPU is waited for.
    """

    rows: Rows
    visibility: Visibility
    classes: Int[Tensor, "batch key"] | None = None  # index into TOKEN_CLASSES; arbitrary at padding
    call: AttentionCall | ScoredCall | None = None
    places: Int[Tensor, " sequence"] | None = None

    @cached_property
    def sampled(self) -> tuple[Int[Tensor, " sequence"], HeadObservation]:
        """The places in the batch of the sample's sequences, and the observation of these alone."""
        import torch

        chosen = self._sampled_places
        if chosen is None:
            return torch.arange(len(self.rows.measured), device=self.rows.measured.device), self
        assert self.call is not None, "patterns are needed"
        call = self.call.of_sequences(chosen)
        classes = None if self.classes is None else self.classes[chosen]
        return chosen, HeadObservation(self.rows.of_sequences(chosen), call.visibility, classes, call)

    def chosen_rows(self, most: int) -> ChosenRows | None:
        """At most so many rows of the pattern in each sequence of the sample, evenly spaced; None if the batch has none of it."""
        assert self.call is not None, "patterns are needed"
        chosen = self._sampled_places
        if chosen is not None and not len(chosen):
            return None
        made = self.rows.chosen_rows(self.call, chosen, most)
        if made is not None:
            return made
        from attlas.extract.engines.chosen_rows import chosen_rows

        if chosen is None:
            return chosen_rows(self.call, self.rows.measured, most)
        return chosen_rows(self.call.of_sequences(chosen), self.rows.measured[chosen], most)

    @cached_property
    def _sampled_places(self) -> Int[Tensor, " sequence"] | None:
        """The places of the sample's sequences in the batch; None if all of its sequences are in the sample."""
        assert self.call is not None, "patterns are needed"
        if self.call.sample is None:
            return None
        chosen = self.call.sample.nonzero().flatten() if self.places is None else self.places
        return None if len(chosen) == len(self.call.sample) else chosen

    def blocks(self) -> Iterator[Block]:
        """The pattern, a block of rows at a time. What several tables read is computed once, if it is not too large."""
        weights = self.rows.measured.numel() * self.visibility.keys.tokens
        if not weights:  # no sequence of the batch is in the sample
            return iter(())
        return iter(self._kept_blocks) if weights <= _KEPT_WEIGHTS else self._make_blocks()

    @cached_property
    def _kept_blocks(self) -> tuple[Block, ...]:
        return tuple(self._make_blocks())

    def _make_blocks(self) -> Iterator[Block]:
        from attlas.extract.engines import reference

        assert self.call is not None, "patterns are needed"
        return reference.blocks_of(self.call, self.rows.measured.shape[1], self.rows.measured)

    @cached_property
    def count(self) -> Float[Tensor, "batch head"]:
        """Number of measured rows."""
        return self.rows.measured.sum(-1).double()

    @cached_property
    def visible_keys(self) -> Float[Tensor, "batch head query"]:
        """m_i of measured rows, 0 for others."""
        return (self.visibility.visible * self.rows.measured).double()

    @cached_property
    def entropy(self) -> Float[Tensor, "batch head query"]:
        return self.rows["entropy"].double()

    @cached_property
    def entropy_share(self) -> Float[Tensor, "batch head query"]:
        """H_i / ln m_i of rows that see two keys or more, 0 for others; a learned sink is one more outcome."""
        outcomes = self.visible_keys + ("sink" in self.rows)
        return (self.entropy * (self.visible_keys >= 2) / outcomes.clamp_min(2).log()).clamp_max(1)

    @cached_property
    def log_self_weights(self) -> Float[Tensor, "batch head query"]:
        """ln p[i,i], from the row's largest score and weight; arbitrary where a row is not measured."""
        log_largest = self.rows["max_weight"].double().log()
        return self.rows["self_score"].double() - self.rows["score_max"].double() + log_largest

    @cached_property
    def self_weights(self) -> Float[Tensor, "batch head query"]:
        """p[i,i]; 0 of rows that are not measured."""
        return self.log_self_weights.exp().where(self.rows.measured, 0)

    @cached_property
    def received(self) -> Float[Tensor, "batch head key"]:
        return self.rows["received"].double()

    @cached_property
    def mean_row(self) -> Float[Tensor, "batch head key"]:
        """p̄_j = mean_i p[i,j]; NaN if no row is measured."""
        return self.received / self.count[..., None]


@dataclass(frozen=True)
class NormObservation:
    """Input and output of a normalisation layer; and γ, if it reads x' and that is asked for."""

    read: Float[Tensor, "*batch token width"]
    wrote: Float[Tensor, "*batch token width"]
    kind: Literal["layer", "rms"]
    epsilon: float
    gain: Float[Tensor, " width"] | None = None


@dataclass(frozen=True)
class ResidualObservation:
    """The stream around one sublayer, in float32 or better.

    `sample` marks the sequences of the sample; None: all of them. Of an attention sublayer, `heads` is its call, where patterns
    are needed and its rows are the sequences, and `write` gives what contexts [batch, head, token, head_width] add to the stream
    [batch, token, width], without a bias; None if that is not linear.
    """

    real: Bool[Tensor, "batch token"]
    after: Float[Tensor, "batch token width"]
    stream: Float[Tensor, "batch token width"] | None = None
    update: Float[Tensor, "batch token width"] | None = None
    norm: NormObservation | None = None
    contexts: Float[Tensor, "batch head token head_width"] | None = None
    sample: Bool[Tensor, " batch"] | None = None
    heads: HeadObservation | None = None
    write: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def written(self) -> tuple[Float[Tensor, "batch token width"], Float[Tensor, "batch token width"]] | None:
        """What attention adds to each token's state of the token's own value, and of the others'; NaN where a row is not measured.

        None where the parts are not known, or where they and a bias are not the update: it was normalised, for instance.
        """
        heads, contexts = self.heads, self.contexts
        if heads is None or heads.call is None or self.write is None or contexts is None or self.update is None:
            return None
        value = heads.call.value
        if value is None or heads.visibility.is_cross_attention or heads.rows.get("self_score") is None:
            return None
        values = value.to(contexts.dtype).repeat_interleave(contexts.shape[1] // value.shape[1], dim=1)
        of_own = heads.self_weights[..., None].to(contexts.dtype) * values
        own, others = self.write(of_own), self.write(contexts - of_own)
        bias = (self.update - own - others).where(self.real[..., None], 0)
        spread = bias - (bias.sum((0, 1)) / self.real.sum())
        if not bool(self._size(spread) <= _NOT_LINEAR * self._size(self.update)):
            return None
        measured = heads.rows.measured.all(1)[..., None]
        return own.where(measured, float("nan")), others.where(measured, float("nan"))

    @cached_property
    def massive_mass(self) -> Float[Tensor, "batch head"] | None:
        """Σ p of an attention call on the keys whose state in the stream that it reads is massive; None if that is not known."""
        heads, x = self.heads, self.stream
        if heads is None or x is None or heads.visibility.is_cross_attention or heads.received.shape[-1] != x.shape[1]:
            return None
        sizes = x.abs().where(self.real[..., None], float("nan"))
        largest = sizes.amax(-1)
        massive = largest >= _MASSIVE
        if x.device.type != "cpu" or bool(massive.any()):  # a median of all states is costly
            massive &= largest >= _MASSIVE_RATIO * sizes.flatten(1).nanmedian(-1, keepdim=True).values
        return (heads.received * massive[:, None]).sum(-1)

    def _size(self, states: Float[Tensor, "batch token width"]) -> Float[Tensor, ""]:
        return states.norm(dim=-1).where(self.real, 0).norm()

    def mean(self, values: Float[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
        """Mean over the real tokens where the value is defined; NaN if there are none."""
        defined = self.real & values.isfinite()
        return values.where(defined, 0).sum(-1) / defined.sum(-1)

    def median(self, values: Float[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
        """Median over the real tokens where the value is defined, between two middle ones their mean; NaN if there are none."""
        defined = self.real & values.isfinite()
        return values.double().where(defined, float("nan")).nanquantile(0.5, dim=-1)

    def of_sample(
        self, compute: Callable[[Float[Tensor, "token width"]], Float[Tensor, ""]]
    ) -> Float[Tensor, " batch"]:
        """A number of x' over the real tokens of each sequence of the sample; NaN for the others."""
        values = self.after_norms.double().new_full((len(self.after),), float("nan"))
        for sequence in self.sampled.tolist():
            if bool(self.real[sequence].any()):
                values[sequence] = compute(self.after[sequence, self.real[sequence]])
        return values

    @cached_property
    def sampled(self) -> Int[Tensor, " place"]:
        """The places of the sample's sequences."""
        import torch

        if self.sample is None:
            return torch.arange(len(self.real), device=self.real.device)
        return self.sample.nonzero().flatten()

    @cached_property
    def stream_norms(self) -> Float[Tensor, "batch token"] | None:
        return None if self.stream is None else self.stream.norm(dim=-1)

    @cached_property
    def update_norms(self) -> Float[Tensor, "batch token"] | None:
        return None if self.update is None else self.update.norm(dim=-1)

    @cached_property
    def after_norms(self) -> Float[Tensor, "batch token"]:
        return self.after.norm(dim=-1)

    @cached_property
    def chords(self) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]] | None:
        """‖u − v‖ and ‖u + v‖ of the directions of x and x', which keep their digits where a cosine near 1 loses them."""
        if self.stream is None or self.stream_norms is None:
            return None
        u, v = self.stream / self.stream_norms[..., None], self.after / self.after_norms[..., None]
        return (u - v).norm(dim=-1), (u + v).norm(dim=-1)

    @cached_property
    def start(self) -> Int[Tensor, " batch"]:
        """The place of each sequence's first token; real tokens stand together."""
        return self.real.int().argmax(-1)

    @cached_property
    def largest(self) -> Float[Tensor, "batch width"]:
        """Largest |x'| of each dimension over the real tokens."""
        return (self.after.abs() * self.real[..., None]).amax(1)
