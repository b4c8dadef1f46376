"""What is asked of a forward pass: quantities of heads and rows by name, and columns of the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.observations import ResidualObservation

    ResidualColumn = Callable[[ResidualObservation], Float[Tensor, " batch"] | None]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a table, or all tables together, need of a pass: nothing else is computed.

    `rows` are the row quantities that are needed for themselves, not as parts of head quantities; with `patterns`, the
    blocks of attention patterns are there too. `residual` are the columns of residual sites, each with the function that
    gives it, `layers` those of whole layers; with `states`, recorders are shown the states of the stream themselves. With
    `calls`, what is observed of an attention sublayer includes its attention call (which needs `patterns`), and with
    `outputs` what contexts write. With `ablations`, the sequences of the sample go through the model again without its parts.
    """

    head_quantities: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    patterns: bool = False
    profiles: bool = False
    residual: Mapping[str, ResidualColumn] = field(default_factory=dict)
    layers: Mapping[str, ResidualColumn] = field(default_factory=dict)
    stream_profiles: bool = False
    states: bool = False
    calls: bool = False
    outputs: bool = False
    ablations: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            head_quantities=self.head_quantities | other.head_quantities,
            rows=self.rows | other.rows,
            patterns=self.patterns or other.patterns,
            profiles=self.profiles or other.profiles,
            residual={**self.residual, **other.residual},
            layers={**self.layers, **other.layers},
            stream_profiles=self.stream_profiles or other.stream_profiles,
            states=self.states or other.states,
            calls=self.calls or other.calls,
            outputs=self.outputs or other.outputs,
            ablations=self.ablations or other.ablations,
        )

    @property
    def reads_stream(self) -> bool:
        """Whether the residual stream is needed."""
        return bool(self.residual or self.layers) or self.stream_profiles or self.states

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """The head quantities in the order in which a pass gives them."""
        return tuple(sorted(self.head_quantities))

    @cached_property
    def residual_names(self) -> tuple[str, ...]:
        """The columns of sites in the order in which a pass gives them."""
        return tuple(sorted(self.residual))

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """The columns of layers in the order in which a pass gives them."""
        return tuple(sorted(self.layers))

    @cached_property
    def row_quantities(self) -> frozenset[str]:
        """All row quantities that engines are asked for."""
        from attlas.extract.engines.sums import PROFILE_ROWS, row_quantities_for

        of_profiles = frozenset(PROFILE_ROWS) if self.profiles else frozenset()
        return self.rows | row_quantities_for(self.head_quantities) | of_profiles
