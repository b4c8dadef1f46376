"""Watch a forward pass: attention calls as they happen, and the residual stream beside them.

What a call shows is summed up at once: nothing of the size of a pattern is held.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import uncompiled
from attlas.extract.capture.intercept.interface import replaced_interface
from attlas.extract.capture.intercept.replay import Run, replay_attention
from attlas.extract.capture.intercept.sdpa import Request, interception_disabled, read_tensor, replaced_sdpa
from attlas.extract.capture.intercept.softmax import ManualAttention, Product, SoftmaxTracker, manual_attention_of
from attlas.extract.capture.layout import Attention, CaptureMethod, Layout, Site
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.capture.runtime.stream import CompiledStream, Stream
from attlas.extract.capture.runtime.write_factors import write_factors
from attlas.extract.engines import Engine
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.patches import Grid
from attlas.extract.engines.quantities import needs_of
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.sums import HeadSums, head_quantity
from attlas.extract.engines.visibility import Axis, Visibility, axis_of, keys_seen, visibility_from_mask, whole_axis
from attlas.extract.errors import CaptureError

# one name is replaced for the whole process, so one forward pass is watched at a time
_WATCHING = threading.Lock()
# a score so far below its row's largest is a mask's doing: some models hide by adding −10,000
_HIDDEN = 5000


@runtime_checkable
class Observer(Protocol):
    """Takes what a pass shows as it comes: what the observer `needs`, and nothing else."""

    needs: Needs

    def heads(self, attention: Attention, sums: HeadSums, calls: Sequence[HeadObservation]) -> None: ...

    def residual(self, site: Site, columns: Float[Tensor, "column batch"]) -> None: ...


@contextmanager
def watching(
    model: nn.Module,
    layout: Layout,
    *,
    batch: Batch,
    engine: Engine,
    observer: Observer,
) -> Iterator[None]:
    """Watch one forward pass made inside this context.

    Raises CaptureError when the pass shows other attention calls or residual sites than the layout has.
    """
    needs = observer.needs
    factors = {}
    if "projection" in needs_of(needs.row_quantities):
        with uncompiled():
            factors = write_factors(model, layout)
    stream = None
    if needs.residual and layout.residual_refusal is None:
        kind = CompiledStream if engine.compiled else Stream
        stream = kind(layout, batch, needs.residual, observer.residual)
    watch = _Watch(layout, batch, engine, observer, factors, stream)
    with _WATCHING, ExitStack() as stack, uncompiled():
        if stream is not None:
            stack.enter_context(stream.watched(model))
        stack.enter_context(replaced_sdpa(watch.attend))
        if "interface" in layout.ways:
            stack.enter_context(replaced_interface(model, watch.attend))
        if "softmax" in layout.ways:
            stack.enter_context(SoftmaxTracker(watch.finished))
        stack.enter_context(watch.replays(model))
        stack.enter_context(watch.pieces_of(model))
        yield
        if watch.calls != len(layout.attentions):
            raise CaptureError(
                f"every forward pass must show each attention layer once; expected {len(layout.attentions)} patterns, "
                f"got {watch.calls}; the model changed its way since it was examined"
            )
        if stream is not None and stream.done != len(layout.sites):
            raise CaptureError(
                f"every forward pass must show each residual site once; expected {len(layout.sites)}, got {stream.done}"
            )


class _OriginalOutput:
    """What the model itself gives of an attention call.

    An engine makes an output where tokens are real. What the model has at padding may be read all the same, by what looks
    at a whole tensor: a quantiser by its largest entry, cross-attention over what no mask tells of, or a user's hook.
    """

    def __init__(self, request: Request, query: Float[Tensor, "batch head query width"]) -> None:
        self.made = False
        self._request = request
        self._query = query

    def whole(self) -> Float[Tensor, "batch head query value_width"]:
        self.made = True
        return self._request.call_original().reshape(*self._query.shape[:-1], -1)

    def at_padding(
        self, output: Float[Tensor, "batch head query value_width"], queries: Axis
    ) -> Float[Tensor, "batch head query value_width"]:
        """The output with the model's own where queries are padding."""
        rows = queries.padding
        if rows is None:
            return output
        request = self._request
        if request.call is None or request.query.shape != self._query.shape:
            own = self.whole()[:, :, rows]
        else:
            mask = request.mask
            mask = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
            own = request.call(request.query[:, :, rows], mask)
        real = queries.real[:, None, rows, None]
        output[:, :, rows] = output[:, :, rows].where(real, own.to(output.dtype))
        return output


class _Piece(NamedTuple):
    """A call for a window or an image of a sequence."""

    attention: Attention
    sums: HeadSums
    call: HeadObservation
    contexts: Float[Tensor, "batch head token head_width"]


@dataclass
class _Watch:
    """The state of one watched forward pass."""

    layout: Layout
    batch: Batch
    engine: Engine
    observer: Observer
    factors: Mapping[int, Tensor]
    stream: Stream | None
    calls: int = 0  # of attention layers
    made: int = 0  # of all kinds
    running: Run | None = None  # a module that is run again when it ends
    pieces: list[_Piece] | None = None  # of a module that runs and may call several times
    own_axes: dict[tuple[int, int], Axis] = field(default_factory=dict)  # of self-attention, by batch and tokens
    seen_masks: dict[tuple[Any, ...], tuple[Any, Visibility]] = field(default_factory=dict)

    def attend(self, request: Request) -> Tensor:
        """Make an attention call that comes through torch or the interface, and observe it."""
        if self.running is not None:  # a part of what is run again
            return request.call_original()
        with interception_disabled():
            self.made += 1
            return request.call_original() if self.made - 1 in self.layout.others else self._attend(request)

    def _attend(self, request: Request) -> Tensor:
        attention = self._next(request.way)
        number = self.calls - 1
        packed = request.query.shape
        query = _unpacked(request.query, attention)
        self._assert_as_examined(attention, query.shape[1], query.shape[-2], request.key.shape[-2])
        call = AttentionCall(
            query=query,
            key=request.key,
            value=request.value,
            visibility=self._visibility(attention, request, query),
            scale=request.scale,
            softcap=request.softcap,
            sinks=request.sinks,
            write=self.factors.get(number),
            token_ids=self._tokens(attention.queries).ids,
            grid=self._grid(attention, *query.shape[::2]),
        )
        original = _OriginalOutput(request, query)
        output, rows = self.engine.attend(call, original.whole, self.observer.needs.row_quantities)
        self._observe(attention, call.visibility, rows, output)
        if not original.made:
            output = original.at_padding(output, call.visibility.queries)
        return output.reshape(*packed[:-1], output.shape[-1])

    def finished(self, product: Product) -> None:
        """Observe an attention call that the model has made itself."""
        if self.running is not None:
            return
        expected = self.layout.attentions[self.calls] if self.calls < len(self.layout.attentions) else None
        heads, order = (None, "") if expected is None else (expected.heads, expected.order)
        made = manual_attention_of(product, batch=self.batch.sequences, heads=heads, order=order)
        if made is None:
            return  # no attention, and counted as none when the model was examined
        self.made += 1
        if self.made - 1 in self.layout.others:
            return
        self._observe_manual(made)

    def _observe_manual(self, made: ManualAttention) -> None:
        attention = self._next("softmax")
        number = self.calls - 1
        self._assert_as_examined(attention, *made.scores.shape[1:])
        visibility = self._visibility_of_pairs(attention, _visible(made.scores))
        call = ScoredCall(
            scores=made.scores,
            value=made.value,
            visibility=visibility,
            sinks=made.sinks,
            write=self.factors.get(number),
            token_ids=self._tokens(attention.queries).ids,
            grid=self._grid(attention, *made.scores.shape[::2]),
        )
        rows = self.engine.rows_of_scores(call, made.contexts, self.observer.needs.row_quantities)
        self._observe(attention, visibility, rows, made.contexts)

    @contextmanager
    def replays(self, model: nn.Module) -> Iterator[None]:
        """Run those modules again that show their attention in no other way, each as it ends."""
        with ExitStack() as stack:
            for name in dict.fromkeys(a.module for a in self.layout.attentions if a.replayed is not None):
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._ends).remove)
            yield

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running = Run(module, args, kwargs)

    def _ends(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        assert self.running is not None, "it began"
        with interception_disabled():
            self._observe_replayed(self.running)
        self.running = None

    def _observe_replayed(self, run: Run) -> None:
        attention = self._next("replay")
        number = self.calls - 1
        assert attention.replayed is not None
        axis = self._tokens(attention.queries).axis
        pattern, contexts, value = replay_attention(
            run, attention.replayed, heads=attention.heads, axis=axis, name=attention.module
        )
        self._assert_as_examined(attention, *pattern.shape[1:])
        visibility = self._visibility_of_pairs(attention, pattern > 0)
        of_tokens = contexts[:, :, : pattern.shape[-2]]
        call = ScoredCall(
            scores=pattern,
            value=value,
            visibility=visibility,
            write=self.factors.get(number),
            token_ids=self._tokens(attention.queries).ids,
            grid=self._grid(attention, *pattern.shape[::2]),
            weights_only=True,
        )
        rows = self.engine.rows_of_scores(call, of_tokens, self.observer.needs.row_quantities)
        self._observe(attention, visibility, rows, contexts)

    @contextmanager
    def pieces_of(self, model: nn.Module) -> Iterator[None]:
        """Put together what a module shows in several calls, one for each window or image of a sequence."""
        with ExitStack() as stack:
            for name in dict.fromkeys(a.module for a in self.layout.attentions if a.in_pieces):
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._begins_pieces).remove)
                stack.callback(module.register_forward_hook(self._ends_pieces, with_kwargs=True).remove)
            yield

    def _begins_pieces(self, _module: nn.Module, _args: Any) -> None:
        self.pieces = []

    def _ends_pieces(self, _module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        pieces, self.pieces = self.pieces or [], None
        if not pieces:
            return
        attention, read = pieces[0].attention, read_tensor(args, kwargs)
        contexts = torch.cat([piece.contexts for piece in pieces], 2)
        if read is None or contexts.shape[-2] * len(contexts) != read.numel() // read.shape[-1]:
            raise CaptureError(
                f"the calls of a module are over all that it reads; those of {attention.module} are over "
                f"{contexts.shape[-2]} tokens; the model changed its way since it was examined"
            )
        profiles = [piece.sums.profiles for piece in pieces if piece.sums.profiles is not None]
        sums = HeadSums(
            torch.cat([piece.sums.values for piece in pieces], 1), torch.stack(profiles).sum(0) if profiles else None
        )
        self._hand_over(attention, sums, [piece.call for piece in pieces])
        if self.stream is not None:
            axis = pieces[0].call.visibility.queries
            if len(pieces) > 1:
                axis = whole_axis(len(contexts), contexts.shape[-2], contexts.device)
            self.stream.contexts(attention, axis, contexts)

    def _next(self, way: CaptureMethod) -> Attention:
        """The attention call that comes now."""
        if self.pieces:  # one more of what has begun
            return self.pieces[0].attention
        attentions = self.layout.attentions
        if self.calls >= len(attentions):
            raise CaptureError(f"expected {len(attentions)} attention calls, the model makes more")
        attention = attentions[self.calls]
        if attention.way != way:
            raise CaptureError(
                f"layer {attention.layer} of the {attention.stack} was examined as it attends by {attention.way}; now it "
                f"does so by {way}"
            )
        self.calls += 1
        return attention

    def _assert_as_examined(self, attention: Attention, heads: int, queries: int, keys: int) -> None:
        expected = [self._tokens(name).axis for name in (attention.queries, attention.keys)]
        wanted = [given if axis is None else axis.tokens for axis, given in zip(expected, (queries, keys), strict=True)]
        if heads != attention.heads or [queries, keys] != wanted:
            raise CaptureError(
                f"layer {attention.layer} of the {attention.stack} was examined with {attention.heads} heads over the "
                f"batch's own tokens; this call has {heads} heads, {queries} queries and {keys} keys for {wanted[0]} and "
                f"{wanted[1]} tokens"
            )

    def _tokens(self, name: str | None) -> Tokens:
        return self.batch.texts.get(name or "", _UNKNOWN)

    def _grid(self, attention: Attention, batch: int, queries: int) -> Grid | None:
        """Where patches stand in this call; None where it is over windows, or fewer tokens than the image began with."""
        grid = self.batch.grids.get(attention.stack)
        whole = grid is not None and batch == self.batch.sequences and queries == grid.tokens
        return grid if whole and not attention.is_cross_attention else None

    def _visibility(self, attention: Attention, request: Request, query: Tensor) -> Visibility:
        """The visibility of a call's mask; layers share masks, so it is read once."""
        batch, _, queries, _ = query.shape
        keys = request.key.shape[-2]
        known_by = (id(request.mask), request.causal, attention.queries, attention.keys, batch, queries, keys)
        known = self.seen_masks.get(known_by)
        if known is None:
            of_keys = self._keys(attention, request.mask, batch, keys, query.device)
            of_queries = self._queries(attention, of_keys, batch, queries)
            read = visibility_from_mask(request.mask, causal=request.causal, queries=of_queries, keys=of_keys)
            # the mask is kept with it, so that no other object takes its id
            known = self.seen_masks[known_by] = (request.mask, read)
        return known[1]

    def _visibility_of_pairs(self, attention: Attention, visible: Bool[Tensor, "batch head query key"]) -> Visibility:
        batch, _, queries, keys = visible.shape
        # heads most often share what they see, and it is read once then
        visible = visible[:, :1] if bool((visible == visible[:, :1]).all()) else visible
        of_keys = self._keys(attention, visible, batch, keys, visible.device)
        return visibility_from_mask(
            visible, causal=False, queries=self._queries(attention, of_keys, batch, queries), keys=of_keys
        )

    def _keys(self, attention: Attention, mask: Tensor | None, batch: int, keys: int, device: torch.device) -> Axis:
        """Where the keys' tokens are real: as the inputs say, or where any query sees them."""
        known = self._tokens(attention.keys).axis
        if known is not None:
            return known
        axis = axis_of(keys_seen(mask, batch=batch, keys=keys, device=device))
        if axis is None and attention.is_cross_attention:  # places among such keys mean nothing
            return whole_axis(batch, keys, device)
        if axis is None:
            raise CaptureError(
                f"the real tokens of a sequence must stand together; in layer {attention.layer} of the {attention.stack} "
                "there are keys between them that no query sees"
            )
        return axis

    def _queries(self, attention: Attention, keys: Axis, batch: int, queries: int) -> Axis:
        """The keys' own places; for cross-attention as the inputs say, or as the queries' own attention showed last."""
        if not attention.is_cross_attention:
            self.own_axes[batch, queries] = keys
            return keys
        known = self._tokens(attention.queries).axis or self.own_axes.get((batch, queries))
        return known or whole_axis(batch, queries, keys.start.device)

    def _observe(self, attention: Attention, visibility: Visibility, rows: Rows, output: Tensor) -> None:
        needs = self.observer.needs
        call = HeadObservation(rows, visibility, self._tokens(attention.keys).classes)
        sums = self.engine.head_sums(call, needs.head_names, profiles=needs.profiles)
        if self.pieces is not None:
            self.pieces.append(_Piece(attention, sums, call, output))
            return
        self._hand_over(attention, sums, [call])
        if self.stream is not None:
            axis = visibility.queries
            axis = axis if output.shape[-2] == axis.tokens else replace(axis, tokens=output.shape[-2])
            self.stream.contexts(attention, axis, output)

    def _hand_over(self, attention: Attention, sums: HeadSums, calls: Sequence[HeadObservation]) -> None:
        names = self.observer.needs.head_names
        self.observer.heads(attention, _by_sequence(sums, names, self.batch.sequences, attention), calls)


_UNKNOWN = Tokens(None)


def _unpacked(query: Tensor, attention: Attention) -> Tensor:
    """Queries as [batch, head, query, width]: a single token's heads may come side by side as queries of the key heads."""
    batch, key_heads, rows, width = query.shape
    packed = key_heads != attention.heads and key_heads * rows == attention.heads
    return query.reshape(batch, attention.heads, 1, width) if packed else query


def _visible(scores: Tensor) -> Bool[Tensor, "batch head query key"]:
    least = (
        (scores.amax(-1, keepdim=True) - _HIDDEN).nan_to_num(-torch.inf).clamp_min(torch.finfo(scores.dtype).min / 2)
    )
    return ~(scores < least)  # what is not a number hides nothing


def _by_sequence(sums: HeadSums, names: Sequence[str], sequences: int, attention: Attention) -> HeadSums:
    """Sums of sequences that the model has cut into windows, put together; what does not merge is not known then."""
    windows, rest = divmod(sums.values.shape[1], sequences)
    if rest:
        raise CaptureError(
            f"a stack attends over as many rows as the batch has sequences, or over windows of them; layer "
            f"{attention.layer} of the {attention.stack} has {sums.values.shape[1]} rows for {sequences} sequences; give "
            "the inputs of one sequence at a time"
        )
    if windows == 1:
        return sums
    values = sums.values.unflatten(1, (windows, sequences) if attention.batch_last else (sequences, windows))
    if attention.batch_last:
        values = values.transpose(1, 2)
    total = values.sum(2)
    for place, name in enumerate(names):
        merge = head_quantity(name).merge
        if merge != "sum":
            total[place] = values[place].amax(1) if merge == "max" else torch.nan
    return HeadSums(total, sums.profiles)
