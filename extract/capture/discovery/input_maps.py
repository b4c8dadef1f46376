"""The linear maps by which an attention call's queries, keys and values are made, found by their values.

A module makes the values of a call if every coordinate of every head equals one of its outputs on all tokens, and if the
module is linear in the states that it reads. Wherever one of this can't be shown, there is no map, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.columns import (
    Match,
    block_layouts,
    in_order,
    is_same_product,
    match_columns,
    match_in_order,
    match_rotated,
    product_scale,
    take,
)
from attlas.extract.capture.discovery.module_tree import owner_of
from attlas.extract.capture.discovery.norms import is_leaf
from attlas.extract.capture.discovery.trace import Call, CallInputs, Trace, approx_equal
from attlas.extract.capture.layout import InputMap, InputMaps, ReplaySpec
from attlas.extract.capture.linear_map import linear_map
from attlas.extract.capture.tensors import has_matrix, same_values

T = TypeVar("T")

_OWN_SCORES = "the model computes scores itself, so that its queries and keys are not seen"
_NOT_SEEN = "the module is run again: its queries, keys and values are not seen in a call"


class _NoMap(Exception):
    """Why no matrix stands for what makes queries, keys or values."""


@dataclass(frozen=True)
class _Source:
    """A module that may have made queries, keys or values: the states that it read, and what it wrote, as rows."""

    module: str
    input: Tensor
    output: Float[Tensor, "row output"]
    time: int = 0
    weight: str | None = None


class _Found(NamedTuple):
    map: InputMap
    match: Match
    source: _Source
    is_rotated: bool


def find_input_maps(model: nn.Module, trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> InputMaps:
    """Return the maps of a call's queries, keys and values, with the reason for those that it has not."""
    if call.replay is not None:
        value, no_value = _or_reason(lambda: _value_of_replayed(trace, call, call.replay, modules))
        return InputMaps(value=value, no_query_key=_NOT_SEEN, no_value=no_value)
    if call.inputs is None:
        return InputMaps(no_query_key=_NOT_SEEN, no_value=_NOT_SEEN)
    search = _Search(model, trace, call, call.inputs, modules)
    value, no_value = _or_reason(search.value)
    pair, no_query_key = _or_reason(search.query_and_key)
    query, key = pair or (None, None)
    return InputMaps(
        query=query.map if query else None,
        key=key.map if key else None,
        value=value.map if value else None,
        scale=search.scale,
        is_self=not call.is_cross_attention,
        no_query_key=no_query_key,
        no_value=no_value,
    )


def _or_reason(find: Callable[[], T]) -> tuple[T | None, str | None]:
    """What a search finds, or why it finds nothing."""
    try:
        return find(), None
    except _NoMap as reason:
        return None, str(reason)


def _value_of_replayed(trace: Trace, call: Call, spec: ReplaySpec | None, modules: Mapping[str, nn.Module]) -> InputMap:
    """The map of the one submodule that computes the values of a replayed module, heads side by side. Raises _NoMap."""
    assert spec is not None, "it was replayed"
    if len(spec.values) != 1:
        raise _NoMap(f"{' and '.join(spec.values)} compute its values, for different keys")
    name = f"{call.modules[-1]}.{spec.values[0]}"
    event = next(e for e in trace.events if e.module == name)
    if event.input is None or event.output is None:
        raise _NoMap(f"{name} reads no states")
    shape = (event.input.shape[-1], event.output.shape[-1])
    if shape[1] % call.heads or linear_map(modules[name], shape, within=modules[""]) is None:
        raise _NoMap(f"{name} is not linear in what it reads")
    return InputMap(name, shape, in_order(call.heads, shape[1] // call.heads))


class _Search:
    """Looks for the modules that made what one call was given."""

    def __init__(
        self, model: nn.Module, trace: Trace, call: Call, inputs: CallInputs, modules: Mapping[str, nn.Module]
    ) -> None:
        self._trace, self._call, self._inputs, self._modules = trace, call, inputs, modules
        self._began = _times_of_modules_around(model, call)
        self.scale = inputs.scale

    def value(self) -> _Found:
        return self._find(self._inputs.value, "values", 2, may_be_rotated=False)

    def query_and_key(self) -> tuple[_Found, _Found]:
        queries, keys = self._inputs.query, self._inputs.key
        if queries is None or keys is None:
            return self._of_own_scores()
        query = self._find(queries, "queries", 0, may_be_rotated=True)
        key = self._find(keys, "keys", 1, may_be_rotated=True)
        if (query.is_rotated or key.is_rotated) and not self._keeps_products(query, key, queries, keys):
            raise _NoMap("queries and keys have other products at one position than what their modules write")
        return query, key

    def _of_own_scores(self) -> tuple[_Found, _Found]:
        """The two modules whose outputs have the model's own scores as products, apart from what depends on positions."""
        scores = self._inputs.scores
        if scores is None or self._inputs.value.shape[1] != self._call.heads:
            raise _NoMap(_OWN_SCORES)
        batch, tokens = self._call.batch, (self._call.queries, self._call.keys)
        for began in self._began:
            of_queries, of_keys = (list(self._candidates(n, began)) for n in tokens)
            for (source, match, queries), (other, of_other, keys) in product(of_queries, of_keys):
                q, k = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (queries, keys))
                scale = product_scale(scores, q, k) if q.shape[3] == k.shape[3] else None
                if scale is not None:
                    self.scale = scale
                    return self._found(source, match, False, began), self._found(other, of_other, False, began)
        raise _NoMap(f"{_OWN_SCORES}, and they are not products of what two linear modules write")

    def _candidates(self, tokens: int, began: int) -> Iterator[tuple[_Source, Match, Float[Tensor, "row head width"]]]:
        """What may be queries or keys of so many tokens: outputs of modules with a matrix, head by head."""
        heads, batch = self._call.heads, self._call.batch
        rows = self._inputs.value.new_zeros(batch * tokens, heads, 1)
        for source in self._sources(rows, 0, began):
            if has_matrix(self._modules[source.module]):
                for match in block_layouts(source.output.shape[1], heads):
                    yield source, match, take(source.output, match)

    def _find(self, target: Tensor, name: str, number: int, *, may_be_rotated: bool) -> _Found:
        """The outermost linear module whose outputs are the target. Raises _NoMap."""
        rows, reason = _rows_of(target), None
        # the quickest first
        ways = (match_in_order, *((match_rotated,) if may_be_rotated else ()), match_columns)
        for began in self._began:
            sources = list(self._sources(rows, number, began))
            for way in ways:
                for source in sources:
                    match = way(rows, source.output)
                    if match is None:
                        continue
                    try:
                        return self._found(source, match, way is match_rotated, began)
                    except _NoMap as refusal:
                        reason = reason or str(refusal)
            if reason is not None:
                raise _NoMap(reason)
        raise _NoMap(f"{name} are not outputs of one linear module{' or their rotations' if may_be_rotated else ''}")

    def _sources(self, rows: Float[Tensor, "row head width"], number: int, began: int) -> Iterator[_Source]:
        """What may have made a target since a time: the weight that torch's function was given, or modules, the last first."""
        batch = self._call.batch
        if self._inputs.in_projections:
            x, weight = self._inputs.in_projections[number]
            yield from _sources_with_weight(x, weight, self._modules, len(rows), batch)
            return
        for event in reversed(self._trace.events):
            if not began < event.time < self._call.time or event.input is None or event.output is None:
                continue
            if not _passes_on(event.input, event.output):
                for output in _as_rows(event.output, len(rows), batch):
                    yield _Source(event.module, event.input, output, event.time)

    def _found(self, source: _Source, match: Match, is_rotated: bool, began: int) -> _Found:
        """The map of a module that made the target. Raises _NoMap if it is no linear map of the stream."""
        module, x = self._modules[source.module], source.input
        shape = (x.shape[-1], source.output.shape[-1])
        if source.weight is None and linear_map(module, shape, within=self._modules[""]) is None:
            raise _NoMap(f"{source.module} is not linear in what it reads")
        before = self._matrix_before(x, began, source)
        if before is not None:
            raise _NoMap(f"{source.module} reads what {before} writes: two matrices in a row")
        columns = _of_every_head(match.columns, self._call.heads)
        found = InputMap(source.module, shape, columns, match.factor, source.weight)
        return _Found(found, match._replace(columns=columns), source, is_rotated)

    def _matrix_before(self, x: Tensor, began: int, source: _Source) -> str | None:
        """A module with a matrix that has written states, or what a norm made them of, since the attention module began."""
        if source.weight is not None:
            return None
        events = [e for e in self._trace.events if began < e.time < source.time and e.input is not None]
        origins = [x, *(e.input for e in events if is_leaf(self._modules[e.module]) and approx_equal(e.output, x))]
        for event in events:
            if event.output is None or not has_matrix(self._modules[event.module]):
                continue
            if any(origin is not None and _holds(event.output, origin) for origin in origins):
                return event.module
        return None

    def _keeps_products(self, query: _Found, key: _Found, queries: Tensor, keys: Tensor) -> bool:
        """Whether queries and keys at the same position have the products that their maps give."""
        batch = len(queries)
        tokens = min(queries.shape[2], keys.shape[2])

        def at_positions(found: _Found, target: Tensor) -> tuple[Tensor, Tensor]:
            before = take(found.source.output, found.match).unflatten(0, (batch, -1))[:, :tokens].flatten(0, 1)
            copies = self._call.heads // target.shape[1]
            after = _rows_of(target).repeat_interleave(copies, 1).unflatten(0, (batch, -1))[:, :tokens].flatten(0, 1)
            return before, after

        return is_same_product(at_positions(query, queries), at_positions(key, keys))


def _times_of_modules_around(model: nn.Module, call: Call) -> list[int]:
    """When the attention module began, and the one around it: what it was given is made there."""
    owner = owner_of(model, call)
    if not owner:
        return [0]
    place = call.modules.index(owner)
    return [call.started[n] for n in range(place, max(-1, place - 2), -1) if call.modules[n]]


def _rows_of(target: Float[Tensor, "batch head token width"]) -> Float[Tensor, "row head width"]:
    return target.transpose(1, 2).flatten(0, 1)


def _as_rows(output: Tensor, rows: int, batch: int) -> Iterator[Float[Tensor, "row output"]]:
    """What a module wrote as rows in the order of the call's, if it may be that: batch first, tokens first, or heads first."""
    if output.dim() == 4 and output.shape[0] == batch and batch * output.shape[2] == rows:
        yield output.transpose(1, 2).flatten(0, 1).flatten(1)
    leading, count = 0, 1
    while count != rows or leading == 0:
        if leading == output.dim() - 1:
            return
        count *= output.shape[leading]
        leading += 1
    by_row = output.flatten(0, leading - 1) if leading > 1 else output
    yield by_row.flatten(1)
    if leading == 2 and output.shape[1] == batch > 1:
        yield output.transpose(0, 1).flatten(0, 1).flatten(1)


def _sources_with_weight(
    x: Tensor, weight: Tensor, modules: Mapping[str, nn.Module], rows: int, batch: int
) -> Iterator[_Source]:
    """The module whose parameter torch's multi-head attention multiplied states by, or has equal values if it was computed."""
    named = [(name, p, own) for name, m in modules.items() for p, own in m._parameters.items() if own is not None]
    owners = [(name, parameter) for name, parameter, own in named if own is weight]
    owners += [
        (name, attribute)
        for name, module in modules.items()
        for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        if isinstance(own := getattr(module, attribute, None), Tensor) and same_values(own, weight)
    ]
    for name, attribute in owners[:1]:
        for output in _as_rows(x @ weight.detach().to(x).T, rows, batch):
            yield _Source(name, x, output, weight=attribute)


def _passes_on(read: Tensor, written: Tensor) -> bool:
    """Whether a module returns what it reads, as a dropout does."""
    return read.numel() == written.numel() and torch.equal(read.reshape(-1), written.reshape(-1))


def _holds(output: Tensor, origin: Tensor) -> bool:
    """Whether states are among the outputs of a module: their first and their last column."""
    rows = origin.numel() // origin.shape[-1]
    if output.numel() // output.shape[-1] != rows:
        return False
    columns, of_output = origin.reshape(rows, -1), output.reshape(rows, -1)
    return all(bool((of_output == columns[:, n, None]).all(0).any()) for n in (0, -1))


def _of_every_head(columns: tuple[range | tuple[int, ...], ...], heads: int) -> tuple[range | tuple[int, ...], ...]:
    """The columns of each query head, where heads share keys and values."""
    copies = heads // len(columns)
    return tuple(of_head for of_head in columns for _ in range(copies))
