"""Find what a model is made of by watching it run once on a few tokens.

Nothing is guessed from names: the output projection of an attention call is the module that reads its contexts, a norm
is a module that does what a norm does, and a sublayer's update is the tensor F for which x' = x + F(x) holds.

A miss of a layer is the worst that can happen here, so the calls are counted again in ways that know nothing of the first:
by the model's own eager patterns where it gives them, by its configuration where it does not, and by the modules that ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.discovery.projection import NoProjection, Projection, find_projection
from attlas.extract.capture.discovery.sites import find_sites, one_refusal
from attlas.extract.capture.discovery.stacks import stacks_of
from attlas.extract.capture.discovery.trace import LARGEST_PATTERN, PROBE_TOKENS, Call, Trace, fixed_rng, same, trace_of
from attlas.extract.capture.intercept.interface import attending_by, configurations
from attlas.extract.capture.intercept.replay import find as find_by_replay
from attlas.extract.capture.intercept.sdpa import first_tensor, is_stream, read_tensor
from attlas.extract.capture.layout import Attention, Layout
from attlas.extract.capture.precision import types_to_examine, widened, widened_inputs
from attlas.extract.errors import CaptureError

# kinds of `layer_types` in configurations that make no pattern
_WITHOUT_PATTERN = ("linear", "recurrent", "mamba", "conv", "ssm", "gated_delta", "rwkv")

# the table of exceptions: modules whose contexts are more than the product of one softmax with values
_OF_SEVERAL_PARTS = ("InformerProbSparseAttention", "LEDEncoderSelfAttention", "LongformerSelfAttention")


def find_layout(model: nn.Module, inputs: Mapping[str, Any], *, batch: int) -> Layout:
    """Run the model on small inputs and find its attention calls, projections, norms and residual sites.

    Beside the largest entries of a stream a model's own type may round all of an update away. So one of half precision is
    examined with its weights in float32, and any whose stream was not found whole once more in float64. Where it does not
    run so, or shows no more, it is examined as it is.

    `batch` is the number of sequences in the inputs. Raises CaptureError where fewer patterns arrive than the model has
    attention layers.
    """
    _refuse_known(model)
    found: list[Layout] = []
    for dtype in types_to_examine(model):
        try:
            with widened(model, dtype):
                layout = _layout_of(model, widened_inputs(inputs, dtype), batch=batch)
        except Exception:  # kernels that take no other type, or no memory for the weights twice
            if dtype is None and not found:
                raise
            continue
        if layout.residual_refusal is None and not layout.residual_refusals:
            return layout
        found.append(layout)
    return max(found, key=lambda layout: len(layout.sites))


def _layout_of(model: nn.Module, inputs: Mapping[str, Any], *, batch: int) -> Layout:
    trace = trace_of(model, inputs, batch=batch)
    if any(call.way == "softmax" for call in trace.calls) or not trace.calls:
        trace = _through_interface(model, inputs, trace) or trace
    trace, others = _without_others(trace, inputs)
    trace, parts = _without_parts(model, _joined(model, trace))
    trace, without_pattern = _whole(model, inputs, trace, parts)
    batch_last = _batch_last(model, inputs, trace)
    modules = dict(model.named_modules())
    found = [_projection(trace, call, modules) for call in trace.calls]
    attentions = tuple(
        Attention(
            stack=place.stack,
            layer=place.layer,
            heads=call.heads,
            projection=p.module if p else None,
            way=call.way,
            module=owner_of(model, call),
            queries=place.queries,
            keys=place.keys,
            is_cross_attention=call.is_cross_attention,
            batch_last=number in batch_last,
            order=call.order,
            replayed=call.replayed,
            in_pieces=place.queries is None and _may_be_in_pieces(model, trace, call),
            shape=p.shape if p else None,
            no_projection=none,
        )
        for number, (call, place, (p, none)) in enumerate(
            zip(trace.calls, stacks_of(model, trace, inputs), found, strict=True)
        )
    )
    sites, refusals = find_sites(trace, attentions, modules)
    width = next((p.shape[1] for p, _ in found if p is not None), None)
    refusal = one_refusal(sites, refusals)
    return Layout(
        attentions,
        sites,
        refusal,
        width,
        others=others,
        without_pattern=without_pattern,
        mixed=any(call.batch % batch for call in trace.calls),
        residual_refusals=refusals,
    )


def _refuse_known(model: nn.Module) -> None:
    """The table of exceptions: models whose patterns are not what they seem."""
    config = getattr(model, "config", None)
    if getattr(config, "attention_type", None) == "block_sparse":
        raise CaptureError(
            f"what a model computes must not depend on what came before; {type(model).__name__} in blocks changes for good "
            'to full attention at its first short sequence; load it with attention_type="original_full"'
        )


def _through_interface(model: nn.Module, inputs: Mapping[str, Any], own: Trace) -> Trace | None:
    """The same pass through the attention interface; None where the model then computes anything else."""
    if not configurations(model):
        return None
    try:
        through = trace_of(model, inputs, batch=own.batch, interface=True, events=False)
        if not any(call.way == "interface" for call in through.calls) or not _gives_alike(own, through, None):
            return None
        padded = _padded(inputs)
        if padded is not None:
            a, b = (trace_of(model, padded, batch=own.batch, interface=way, events=False) for way in (False, True))
            if not _gives_alike(a, b, padded["attention_mask"]):
                return None
        return trace_of(model, inputs, batch=own.batch, interface=True)
    except Exception:
        # the model's own code, called as its authors may not have meant it: then it is watched as it is
        return None


def _padded(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with padding at the end of the last sequence, so that masks are seen at work."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 4:
        return None
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {**inputs, "attention_mask": mask}


def _gives_alike(a: Trace, b: Trace, mask: torch.Tensor | None) -> bool:
    """What the model gives at last, wherever tokens are real: anything done otherwise on the way would show there."""
    if len(a.calls) > len(b.calls):
        return False
    given, other = first_tensor(a.returned), first_tensor(b.returned)
    if given is None or other is None or given.shape != other.shape:
        return False
    if mask is not None and given.shape[:2] == mask.shape:
        given, other = given[mask.bool()], other[mask.bool()]
    return same(given.float(), other.float())


def _without_others(trace: Trace, inputs: Mapping[str, Any]) -> tuple[Trace, frozenset[int]]:
    """Leave out calls whose heads are as many as the probe's tokens: they look over layers or the like, at one position."""
    ids = inputs.get("input_ids")
    tokens = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None
    probed = tokens == PROBE_TOKENS  # a number that no model's heads have
    others = frozenset(
        n for n, call in enumerate(trace.calls) if call.heads == tokens != call.keys and (probed or call.queries == 1)
    )
    calls = [call for n, call in enumerate(trace.calls) if n not in others]
    return replace(trace, calls=calls), others


def _batch_last(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> set[int]:
    """Calls on windows of sequences that have the first window of every sequence before the second of any.

    Seen by changing the order of the sequences. Raises CaptureError where the windows follow neither order.
    """
    numbers = [n for n, call in enumerate(trace.calls) if call.batch != trace.batch and call.batch % trace.batch == 0]
    if trace.batch == 1 or not numbers:
        return set()
    turned = {
        name: x.roll(1, 0) if isinstance(x, torch.Tensor) and x.dim() and len(x) == trace.batch else x
        for name, x in inputs.items()
    }
    through = any(call.way == "interface" for call in trace.calls)
    again = trace_of(model, turned, batch=trace.batch, interface=through, events=False)
    again = _joined(model, _without_others(again, inputs)[0])
    of_modules = _by_module(model, trace.calls), _by_module(model, again.calls)
    last = set()
    for number in numbers:
        owner = owner_of(model, trace.calls[number])
        before, after = (calls.get(owner, []) for calls in of_modules)
        if len(before) != len(after):
            raise CaptureError(
                f"a model does the same every time; {owner} of {type(model).__name__} attended {len(before)} times, then "
                f"{len(after)}"
            )
        a, b = next((x.contexts, y.contexts) for x, y in zip(before, after, strict=True) if x is trace.calls[number])
        if same(a.unflatten(0, (trace.batch, -1)).roll(1, 0), b):
            continue
        if not same(a.unflatten(0, (-1, trace.batch)).roll(1, 1), b):
            raise CaptureError(
                f"windows of a sequence stand together in a batch, or the first of each first; those of "
                f"{owner_of(model, trace.calls[number])} of {type(model).__name__} do neither"
            )
        last.add(number)
    return last


def _by_module(model: nn.Module, calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(owner_of(model, call), []).append(call)
    return found


def _whole(
    model: nn.Module, inputs: Mapping[str, Any], trace: Trace, parts: list[Call]
) -> tuple[Trace, tuple[str, ...]]:
    """The trace with every attention layer of the model, and the layers that have no pattern to show.

    What has shown less than it has, or a part of what it does, is run again, module by module.
    """
    said = ""
    if not parts:
        try:
            return trace, _assert_whole(model, inputs, trace)
        except CaptureError as less:
            said = f"{less}; "
    found, refused = find_by_replay(model, inputs, trace)
    if refused is not None:
        raise CaptureError(f"{said}{refused}") from refused
    modules = {owner_of(model, call) for call in found}
    whole = [
        call
        for call in parts
        if not modules & {*call.inside}
        and type(model.get_submodule(owner_of(model, call))).__name__ not in _OF_SEVERAL_PARTS
    ]
    trace = replace(trace, calls=sorted((*trace.calls, *found, *whole), key=lambda call: call.time))
    return trace, _assert_whole(model, inputs, trace)


def _assert_whole(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> tuple[str, ...]:
    """Refuse a model that has shown less than it has; gives the layers that have no pattern to show."""
    name = type(model).__name__
    if not trace.calls:
        raise CaptureError(
            f"a model is measured by its attention; {name} showed none on a few tokens: seen are "
            "torch's scaled_dot_product_attention, transformers' attention interface, and a softmax over keys times values; "
            "attention by blocks, by hashing or without a softmax is not measured"
        )
    _assert_every_kind_showed(model, trace)
    confirmed = _assert_own_patterns(model, inputs, trace)
    expected = expected_layers(model)
    shown = len(trace.calls)
    if not confirmed and expected is not None and shown < expected:
        raise CaptureError(
            f"every attention layer must show its pattern; {name} has {expected} and showed {shown}; load it with "
            'attn_implementation="sdpa" or "eager"'
        )
    silent = _layers_without_pattern(model, trace)
    _refuse_hidden_attention(model, inputs, silent)
    return silent


def _joined(model: nn.Module, trace: Trace) -> Trace:
    """Calls that a module makes one after the other for windows or images of what it has read, as one call."""
    calls: list[Call] = []
    for _, group in groupby(trace.calls, key=lambda call: _invocation(model, call)):
        pieces = list(group)
        first, total = pieces[0], sum(call.queries for call in pieces)
        alike = {(call.way, call.batch, call.heads, call.keys - call.queries) for call in pieces}
        if len(pieces) == 1 or alike != {(first.way, 1, first.heads, 0)} or total != _rows_read(model, first):
            calls += pieces
            continue
        contexts = torch.cat([call.contexts for call in pieces], 1)
        calls.append(replace(first, queries=total, keys=total, contexts=contexts, pattern=_block_diagonal(pieces)))
    return replace(trace, calls=calls)


def _block_diagonal(pieces: Sequence[Call]) -> torch.Tensor | None:
    patterns = [call.pattern for call in pieces if call.pattern is not None]
    if len(patterns) < len(pieces) or sum(p.shape[-1] for p in patterns) ** 2 * len(patterns[0][0]) > LARGEST_PATTERN:
        return None
    by_head = zip(*(pattern[0] for pattern in patterns), strict=True)
    return torch.stack([torch.block_diag(*of_head) for of_head in by_head])[None]


def _invocation(model: nn.Module, call: Call) -> tuple[str, int]:
    """The module that makes a call, and when it began to run; each call that no module makes is by itself."""
    owner = owner_of(model, call)
    return (owner, call.began[call.inside.index(owner)]) if owner and call.began else ("", call.time)


def _rows_read(model: nn.Module, call: Call) -> int:
    owner = owner_of(model, call)
    return call.read[call.inside.index(owner)] if owner and call.read else 0


def _may_be_in_pieces(model: nn.Module, trace: Trace, call: Call) -> bool:
    """Whether other inputs may make several calls of it: it is its module's only one, over all that the module read."""
    whole = call.batch == 1 and call.queries == call.keys == _rows_read(model, call) and not call.is_cross_attention
    ran = _invocation(model, call)
    return whole and sum(_invocation(model, other) == ran for other in trace.calls) == 1


def _without_parts(model: nn.Module, trace: Trace) -> tuple[Trace, list[Call]]:
    """Leave out the calls that may be a part of what their module does: of some queries, or over blocks of keys."""
    parts = [call for call in trace.calls if _is_part(model, trace, call)]
    return replace(trace, calls=[call for call in trace.calls if call not in parts]), parts


def _is_part(model: nn.Module, trace: Trace, call: Call) -> bool:
    owner = owner_of(model, call)
    if type(model.get_submodule(owner)).__name__ in _OF_SEVERAL_PARTS:
        return True
    end = next((e for e in trace.events if e.module == owner and e.time > call.time), None)
    if end is None or not is_stream(end.wrote) or len(end.wrote) != trace.batch:
        return False
    began = max((e.time for e in trace.events if e.module == owner and e.time < call.time), default=0)
    rows = sum(
        other.batch * other.queries for other in trace.calls if began < other.time < end.time and owner in other.inside
    )
    in_blocks = call.queries != call.keys and call.batch > trace.batch
    return rows < end.wrote.shape[:2].numel() or (in_blocks and rows == end.wrote.shape[:2].numel())


# what mixes tokens without attention
_MIXERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def _refuse_hidden_attention(model: nn.Module, inputs: Mapping[str, Any], silent: tuple[str, ...]) -> None:
    """A layer of the user's own that showed no pattern among others that did has none: one token tells another nothing."""
    if configurations(model):
        return  # transformers' models are counted by their own patterns and their configuration
    mixing: list[str] = []

    def hook(name: str) -> Any:
        def mixes(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read, wrote = read_tensor(args, kwargs), first_tensor(output)
            if name in mixing or not (is_stream(read) and is_stream(wrote)) or read.shape[:2] != wrote.shape[:2]:
                return
            other = read.clone()
            other[0, 0] = other[0, 0].flip(-1) + 1
            given = (other, *args[1:]) if args else args
            named = kwargs if args else {n: other if v is read else v for n, v in kwargs.items()}
            changed = (first_tensor(module.forward(*given, **named)) - wrote).abs().sum(-1) > 0  # pyright: ignore
            changed[0, 0] = False
            if bool(changed.any()):
                mixing.append(name)

        return mixes

    with ExitStack() as stack, torch.inference_mode(), fixed_rng():
        for name in silent:
            module = model.get_submodule(name)
            if not any(isinstance(m, _MIXERS) for m in module.modules()):
                stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        if silent:
            model(**inputs)
    if mixing:
        raise CaptureError(
            f"every attention layer must show its pattern; {mixing[0]} of {type(model).__name__} showed none, though what "
            "it does with one token depends on the others; let it call torch's scaled_dot_product_attention, or softmax "
            "and a matrix product with the values"
        )


def _assert_every_kind_showed(model: nn.Module, trace: Trace) -> None:
    """Of modules of one class, either all that ran attend or none does; a wrapper of a product is no kind of its own."""
    attending = {owner_of(model, call) for call in trace.calls} - {""}
    kinds = {type(model.get_submodule(name)) for name in attending}
    silent = [n for n in dict.fromkeys(trace.ran) if type(model.get_submodule(n)) in kinds and n not in attending]
    if silent:
        raise CaptureError(
            f"every attention layer must show its pattern; {silent[0]} of {type(model).__name__} ran without showing one, "
            f"though others of its class ({type(model.get_submodule(silent[0])).__name__}) did"
        )


def owner_of(model: nn.Module, call: Call) -> str:
    """The innermost module with weights around a call."""
    with_weights = (n for n in reversed(call.inside) if next(model.get_submodule(n).parameters(), None) is not None)
    return next(with_weights, "")


def _assert_own_patterns(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> bool:
    """Find each of the model's own eager patterns among those that were seen; False where it gives none."""
    if not configurations(model) or any(call.pattern is None for call in trace.calls):
        return False
    try:
        with attending_by(model, "eager"):
            eager = trace_of(model, {**inputs, "output_attentions": True}, batch=trace.batch, events=False)
    except Exception:  # not every model takes the argument, or has an eager form
        return False
    eager, _ = _without_parts(model, _joined(model, _without_others(eager, inputs)[0]))
    heads = {call.heads for call in trace.calls}
    own = [p for p in patterns_in(eager.returned) if is_distribution(p) and is_over_keys(p, heads)]
    missed = [p for p in own if not any(_is_pattern(p, call, trace.rounding) for call in trace.calls)]
    replayed = sum(call.way == "replay" for call in trace.calls)
    if replayed:
        # a model that attends over blocks or for a sample gives such patterns in a layout of its own; that what was seen
        # makes its contexts is known from running it again
        usual = {(call.queries, call.keys) for call in trace.calls if call.way != "replay"}
        missed = [p for p in missed if tuple(p.shape[-2:]) in usual][replayed:]
    if missed or len(eager.calls) > len(trace.calls):
        raise CaptureError(
            f"every attention layer must show its pattern; {type(model).__name__} gives {len(own)} patterns of its own "
            f"and makes {len(eager.calls)} attention calls when it attends by eager code; {len(trace.calls)} were seen, and "
            f"{len(missed)} of its patterns were not among them"
        )
    return bool(own) and not replayed


def patterns_in(returned: Any) -> list[torch.Tensor]:
    """Every tensor that a model of transformers returned as attention."""
    items = returned.items() if isinstance(returned, Mapping) else []
    return [
        pattern
        for name, value in items
        for pattern in (_tensors(value) if "attentions" in name else patterns_in(value))
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for one in values for tensor in _tensors(one)]


def is_distribution(pattern: torch.Tensor) -> bool:
    """Whether it is what a softmax gives, a sink's share taken or not: some models return scores or states instead."""
    return bool((pattern >= 0).all() and (pattern.sum(-1) <= 1 + 1e-2).all())


def is_over_keys(pattern: torch.Tensor, heads: set[int]) -> bool:
    """Whether its rows are a head's: deformable attention gives [batch, query, head, point], or levels before points."""
    if pattern.dim() > 4 and torch.allclose(pattern.sum((-1, -2)), pattern.new_ones(()), atol=1e-4):
        return False
    if pattern.dim() == 3:  # batch and heads in one
        return any(len(pattern) % count == 0 for count in heads)
    return bool(heads & {*pattern.shape[1:-2]})


def _is_pattern(own: torch.Tensor, call: Call, rounding: float) -> bool:
    """Rows in proportion: whether the share of a learned sink is left out of them differs."""
    assert call.pattern is not None, "small enough to be kept"
    shape, seen = own.shape[-2:], call.pattern
    if own.numel() != seen.numel() and own.shape[:2] == seen.shape[:2] and shape <= seen.shape[-2:]:
        seen = seen[..., -shape[0] :, -shape[1] :]  # without the tokens that the model puts before the user's
    near = max(1e-4, 8 * rounding)  # half precision rounds; another pattern is far off
    for heads_first in (own, *(own.movedim(n, -3) for n in range(1, own.dim() - 3))):
        candidate = heads_first.flatten(0, -4) if heads_first.dim() > 4 else heads_first
        if candidate.numel() == seen.numel() and candidate.shape[-2:] == seen.shape[-2:]:
            rows = [
                p / p.sum(-1, keepdim=True).clamp_min(1e-30) for p in (candidate.reshape(seen.shape).to(seen), seen)
            ]
            averaged = rows[1].mean(1, keepdim=True).expand_as(rows[1])  # as torch's multi-head attention may give it
            sees = rows[1].isfinite().all(-1)  # a row that sees no key is whatever the model's code makes of it
            if bool(sees.any()) and any(
                torch.allclose(rows[0][sees], rows_seen[sees], atol=near, rtol=near)
                for rows_seen in (rows[1], averaged)
            ):
                return True
    return False


def expected_layers(model: nn.Module) -> int | None:
    """How many attention layers the model's configuration says it has; None where it does not say."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum(not any(other in kind for other in _WITHOUT_PATTERN) for kind in kinds)
    return getattr(config, "num_hidden_layers", None)


def _layers_without_pattern(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Members of a list of layers that showed no pattern while others of the list did; lists inside layers are parts."""
    attending = {name for call in trace.calls for name in call.inside}
    silent, lists = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{other}.") for other in lists):
            continue
        lists.append(name)
        layers = [f"{name}.{n}" if name else n for n, _ in module.named_children()]
        if any(layer in attending for layer in layers):
            silent += [layer for layer in layers if layer not in attending and layer in trace.ran]
    return tuple(silent)


def _projection(trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> tuple[Projection | None, str | None]:
    """The output projection of a call, or why it has none."""
    try:
        return find_projection(trace, call, modules), None
    except NoProjection as none:
        return None, str(none)
