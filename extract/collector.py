"""Between a forward pass and the tables: every recorder is asked what it keeps, and gets it once the pass went through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from attlas.extract.capture.layout import Attention, Layout, Site
from attlas.extract.capture.runtime.ablation import Ablating, SequenceAblations
from attlas.extract.engines import Engine
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import HeadObservation, ResidualObservation
from attlas.extract.engines.quantities import ROW_QUANTITIES, Fact
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.sums import HeadSums
from attlas.extract.tables import TABLES, Columns, Recorder, Scope, Table, needs_of, with_own_columns

_Kept = tuple[Recorder, Any, dict[str, Tensor]]


class Collector:
    """Hands what a pass shows to the recorders of tables.

    A batch counts when it is settled, and as a whole: one that failed half-way leaves nothing behind.
    """

    def __init__(
        self, recorders: Sequence[Recorder], needs: Needs, *, sequences: int, ablating: Ablating | None = None
    ) -> None:
        self.needs, self.ablating = needs, ablating
        self._recorders = recorders
        self.begin(range(sequences))

    def begin(self, sequences: Sequence[int] | np.ndarray) -> None:
        """The next batch has these sequences of the shard; what is left of one that failed is dropped."""
        self._sequences = np.asarray(sequences)
        self.drop()

    def drop(self) -> None:
        """Drop what a pass over the batch has shown so far."""
        self._kept: list[_Kept] = []
        for recorder in self._recorders:
            recorder.begin_batch()

    def heads(self, attention: Attention, sums: HeadSums, calls: Sequence[HeadObservation]) -> None:
        for recorder in self._recorders:
            self._take(recorder, attention, recorder.keep_heads(attention, sums, calls))

    def residual(self, site: Site, sums: SiteSums) -> None:
        for recorder in self._recorders:
            self._take(recorder, site, recorder.keep_site(site, sums))

    def layer(self, site: Site, sums: SiteSums) -> None:
        for recorder in self._recorders:
            self._take(recorder, site, recorder.keep_layer(site, sums))

    def state(self, site: Site, o: ResidualObservation) -> None:
        for recorder in self._recorders:
            self._take(recorder, site, recorder.keep_state(site, o))

    def ablations(self, place: int, sequence: SequenceAblations) -> None:
        for recorder in self._recorders:
            self._take(recorder, None, recorder.keep_ablations(place, sequence))

    def settle(self) -> None:
        """Count the batch: its forward pass went through."""
        for recorder in self._recorders:
            for place, tensors in recorder.end_batch():
                self._take(recorder, place, tensors)
        kept = _on_the_host([(tensor, of.in_parts) for of, _, kept in self._kept for tensor in kept.values()])
        for recorder, place, tensors in self._kept:
            recorder.add(place, self._sequences, {name: next(kept).numpy() for name in tensors})
        self.begin(self._sequences)

    def tables(self) -> dict[str, pa.Table]:
        """The rows of every table."""
        return self.tables_of_passes() | self.tables_of_parameters()

    def tables_of_passes(self) -> dict[str, pa.Table]:
        """The rows of the tables that are recorded while the model runs."""
        return self._tables_of(lambda table: table.kind != "static")

    def tables_of_parameters(self) -> dict[str, pa.Table]:
        """The rows of the static tables. To make them the model's modules are called, so no pass may be under way."""
        return self._tables_of(lambda table: table.kind == "static")

    def _tables_of(self, is_wanted: Callable[[Table], bool]) -> dict[str, pa.Table]:
        return {r.table.name: r.to_arrow() for r in self._recorders if is_wanted(r.table)}

    def _take(self, recorder: Recorder, place: Any, kept: Mapping[str, Tensor] | None) -> None:
        if kept is not None:
            self._kept.append((recorder, place, dict(kept)))


def _on_the_host(tensors: Sequence[tuple[Tensor, bool]]) -> Iterator[Tensor]:
    """The tensors in host memory, those in parts added up.

    Tensors of one shape on a device come in one transfer, and a device is waited for once.
    """
    groups: dict[Any, list[int]] = {}
    for number, (tensor, in_parts) in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype, tensor.shape, in_parts), []).append(number)
    places: dict[int, Tensor] = {}
    for (device, _, _, in_parts), numbers in groups.items():
        of_group = [tensors[number][0] for number in numbers]
        if device.type == "cpu":
            copies = [tensor.sum(0, dtype=torch.float64) for tensor in of_group] if in_parts else of_group
        else:
            stacked = torch.stack(of_group)
            stacked = stacked.sum(1, dtype=torch.float64) if in_parts else stacked
            copies = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=device.type == "cuda")
            copies.copy_(stacked, non_blocking=True)
        places |= zip(numbers, copies, strict=True)
    for device in {device for device, *_ in groups if device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    return (places[number] for number in range(len(tensors)))


def open_collector(
    columns: Columns,
    model: nn.Module,
    layout: Layout,
    *,
    sequence_ids: np.ndarray,
    document_ids: np.ndarray,
    shard: int = 0,
    edges: int = 8,
    ablating: Ablating | None = None,
    without: frozenset[str] = frozenset(),
) -> Collector:
    """A collector for these columns of tables, as far as the model and the shard have the tables; `without` names others."""
    chosen = {
        name: tuple(c for c in chosen if c.name not in without)
        for name, chosen in columns.items()
        if is_recorded(TABLES[name], layout, shard=shard)
    }
    needs = needs_of(chosen)
    recorders = []
    for name, of_table in chosen.items():
        scope = Scope(sequence_ids, document_ids, of_table, needs, model, layout, shard, edges)
        table = with_own_columns(TABLES[name], of_table)
        assert table.recorder is not None, f"{name} is recorded"
        recorders.append(table.recorder(table, scope))
    return Collector(recorders, needs, sequences=len(sequence_ids), ablating=ablating)


def is_recorded(table: Table, layout: Layout, *, shard: int) -> bool:
    """Whether the table has rows of a shard: one of the residual stream needs a model whose stream can be read."""
    if table.kind == "static" and shard > 0:
        return False
    return layout.residual_refusal is None or not table.of_stream


def left_to_reference(
    columns: Columns, layout: Layout, engine: Engine, *, absent: Collection[Fact]
) -> dict[str, list[str]]:
    """Row quantities and residual columns that the engine leaves to the reference engine; empty if it makes all.

    `absent` are facts that no attention call of the model has: what needs them is never made.
    """
    chosen = {name: c for name, c in columns.items() if is_recorded(TABLES[name], layout, shard=0)}
    needs = needs_of(chosen)
    rows = [name for name in needs.row_quantities if not set(ROW_QUANTITIES[name].needs) & set(absent)]
    left = {
        "rows": engine.left_to_reference(rows),
        "residual": engine.residual_left_to_reference(needs.residual),
    }
    return {what: names for what, names in left.items() if names}
