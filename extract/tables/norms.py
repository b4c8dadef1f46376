"""`norms`: gain and bias of the norm at each site of the residual stream, from the parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from attlas.extract.tables.column import column, columns_of
from attlas.extract.tables.recording import Arrays, StaticRecorder
from attlas.extract.tables.residual import SITE
from attlas.extract.tables.table import LAYER, STACK, Rule, Table

if TYPE_CHECKING:  # the catalogue is read by commands that need no torch
    from attlas.extract.capture.layout import Norm
    from attlas.extract.capture.norm_gain import NormGain


@column(formula="mean of γ", nullable=True)
def gain_mean(found: NormGain) -> float:
    """What the norm multiplies a normalised dimension by, on average; 1 for a norm without parameters."""
    return float(found.gain.mean())


@column(formula="deviation of γ over dimensions", bounds=(0, None), nullable=True)
def gain_std(found: NormGain) -> float:
    """How differently the norm treats dimensions."""
    return float(found.gain.std(correction=0))


@column(formula="largest |γ|", bounds=(0, None), nullable=True)
def gain_max_abs(found: NormGain) -> float:
    """The dimension that the norm amplifies most: outlier dimensions show here, too."""
    return float(found.gain.abs().max())


@column(formula="‖β‖; null for a norm without β", bounds=(0, None), nullable=True)
def bias_norm(found: NormGain) -> float | None:
    """Size of what the norm adds to every token."""
    return None if found.bias is None else float(found.bias.norm())


class NormRecorder(StaticRecorder):
    """A row for every site with a norm."""

    def rows(self) -> Arrays:
        sites = sorted(self.scope.layout.sites, key=lambda site: (site.stack, site.layer, site.name))
        sites = [site for site in sites if site.norm is not None]
        gains = [self._gain(site.norm) for site in sites]
        columns = {c.name: [_value(c.compute, found) for found in gains] for c in self.scope.columns}
        return {
            "stack": np.array([site.stack for site in sites]),
            "layer": np.array([site.layer for site in sites], dtype=np.int64),
            "site": np.array([site.name for site in sites]),
            **{name: np.array(values, dtype=np.float64) for name, values in columns.items()},
        }

    def _gain(self, norm: Norm) -> NormGain | None:
        from attlas.extract.capture.norm_gain import norm_gain

        return norm_gain(self.scope.model, norm)


def _value(compute: Callable[[NormGain], float | None] | None, found: NormGain | None) -> float:
    value = None if found is None or compute is None else compute(found)
    return np.nan if value is None else value


TABLE = Table(
    name="norms",
    row="stack × layer × site",
    kind="static",
    is_newer=True,
    keys=(STACK, LAYER, SITE),
    facts=columns_of(dict(globals())),
    order=("stack", "layer", "site"),
    recorder=NormRecorder,
    rules=(Rule("gains", "abs(gain_mean) > gain_max_abs * 1.00001", "the mean of γ is above the largest |γ|"),),
    notes="""\
From the parameters alone, in the first shard's part. The norm of a site is the one that `residual` describes: pre-norm, that
which reads x; post-norm, that which reads x'. γ is what the normalised states are multiplied by, whatever the module stores
(Gemma stores γ − 1), found by calling the module by itself. A site without a norm, or of a stream that `residual` leaves out,
has no row; where a norm does not run by itself, or does something else, all columns are null.""",
)
