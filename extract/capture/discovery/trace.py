"""Record one forward pass on a few tokens: the input and output of every module, and every attention call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from attlas.extract.capture.configurations import configurations
from attlas.extract.capture.intercept.assemble import intercept_attention
from attlas.extract.capture.intercept.recorded_call import RecordedCall
from attlas.extract.capture.intercept.request import Request, interception_disabled
from attlas.extract.capture.intercept.softmax import Product, manual_attention_of
from attlas.extract.capture.layout import CaptureMethod, ReplaySpec
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.tensors import first_tensor, input_tensor
from attlas.extract.engines.visibility import allows

# sizes of the probe inputs, where we choose them: all different, so that dimensions can be told apart
PROBE_SEQUENCES, PROBE_TOKENS, PROBE_DECODER_TOKENS = 3, 13, 11
LARGEST_PATTERN = 1 << 20  # entries
# relative to the norm of the larger tensor; a wrong candidate is off by its whole size
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Event:
    """One forward call of a module: copies of its input and output, and the tensors themselves, modified since or not."""

    time: int
    module: str
    call: int
    input: Float[Tensor, "*rows width"] | None  # None unless it is a float tensor of two dimensions or more
    output: Float[Tensor, "*output_rows output_width"] | None
    input_tensor: Shaped[Tensor, ...] | None = None
    output_tensor: Shaped[Tensor, ...] | None = None


@dataclass(frozen=True)
class CallInputs:
    """Copies of what an attention call was given. Where a model makes its own scores they stand for queries, keys and scale.

    `in_projections` are as in a `Request`.
    """

    value: Float[Tensor, "batch key_head key value_width"]
    query: Float[Tensor, "batch head query width"] | None = None
    key: Float[Tensor, "batch key_head key width"] | None = None
    scale: float | None = None
    in_projections: tuple[tuple[Tensor, Tensor], ...] = ()
    scores: Float[Tensor, "batch head query key"] | None = None


@dataclass(frozen=True)
class Call:
    """One attention call. `modules` are those that were running, outermost first.

    `started` says when each of them started, and `rows_read` how many rows its input has.
    """

    time: int
    method: CaptureMethod
    modules: tuple[str, ...]
    batch: int
    heads: int
    queries: int
    keys: int
    contexts: Float[Tensor, "batch query head_width"]  # heads side by side
    pattern: Float[Tensor, "batch head row key"] | None  # None if it is larger than LARGEST_PATTERN
    causal: bool
    is_cross_attention: bool
    projection: Tensor | None = None
    dim_order: str = ""
    replay: ReplaySpec | None = None
    started: tuple[int, ...] = ()
    rows_read: tuple[int, ...] = ()
    inputs: CallInputs | None = None


@dataclass
class Trace:
    """Everything recorded of one forward pass, in order of time."""

    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    started: list[str] = field(default_factory=list)  # modules, in the order in which they started
    eps: float = torch.finfo(torch.float32).eps  # of the model's own type
    batch: int = 1
    output: Any = None
    imports_attention: bool = False  # a module called torch's attention function by a name of its own
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def trace_of(
    model: nn.Module, inputs: Mapping[str, Any], *, batch: int, interface: bool = False, events: bool = True
) -> Trace:
    """Run the model on inputs of so many sequences and return the trace.

    With `interface`, the model attends through transformers' attention interface. Without `events`, inputs and outputs of
    modules are not kept.
    """
    trace = Trace(batch=batch)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        trace.eps = torch.finfo(parameter.dtype).eps
    tracer = _Tracer(trace, _head_counts(model), keep_events=events)
    methods: set[CaptureMethod] = {"sdpa", "softmax", "interface"} if interface else {"sdpa", "softmax"}
    with (
        tracer.hooks(model),
        intercept_attention(model, tracer, methods),
        torch.inference_mode(),
        fixed_rng(),
    ):
        trace.output = model(**inputs)
    return trace


def _head_counts(model: nn.Module) -> frozenset[int]:
    """All numbers of heads in the model's configurations."""
    counts: set[int] = set()
    for config in configurations(model):
        for name, value in config.to_dict().items():
            if "head" in name:
                counts |= {n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int)}
    return frozenset(counts)


class _RunningModule(NamedTuple):
    name: str
    has_other_keys: bool  # it was given states for keys and values besides its input
    started: int
    rows_read: int


class _Tracer:
    """Writes events and attention calls into a trace."""

    def __init__(self, trace: Trace, head_counts: frozenset[int], *, keep_events: bool) -> None:
        self._trace = trace
        self._keep_events = keep_events
        self._head_counts = head_counts
        self._running: list[_RunningModule] = []

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        counts: dict[str, int] = {}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                start = module.register_forward_pre_hook(self._start_hook(name), with_kwargs=True)
                end = module.register_forward_hook(self._end_hook(name, counts), with_kwargs=True)
                stack.callback(start.remove)
                stack.callback(end.remove)
            yield

    def _start_hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            has_other_keys = any(kwargs.get(n) is not None for n in ("encoder_hidden_states", "key_value_states"))
            tensor = input_tensor(args, kwargs)
            rows = 0 if tensor is None or not tensor.dim() else tensor.numel() // max(1, tensor.shape[-1])
            self._running.append(_RunningModule(name, has_other_keys, self._trace.tick(), rows))
            self._trace.started.append(name)

        return hook

    def _end_hook(self, name: str, counts: dict[str, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._running and self._running.pop().name != name:
                pass  # a module that ended with an exception, which the model caught
            number = counts[name] = counts.get(name, -1) + 1
            read, written = input_tensor(args, kwargs), first_tensor(output)
            time = self._trace.tick()
            if self._keep_events:
                self._trace.events.append(Event(time, name, number, _copy(read), _copy(written), read, written))

        return hook

    def attend(self, request: Request) -> Tensor:
        self._trace.imports_attention |= request.is_imported
        with interception_disabled():
            output = request.call_original()
            pattern = None
            if output.shape[:2].numel() * request.query.shape[-2] * request.key.shape[-2] <= LARGEST_PATTERN:
                pattern = _pattern(request)
        shape = (*output.shape[:3], request.key.shape[-2])
        causal = request.causal or is_causal_mask(request.mask)
        inputs = _inputs_of(request) if self._keep_events else None
        self._add(
            request.method,
            shape,
            output,
            pattern,
            causal,
            request.is_cross_attention,
            request.projection,
            inputs=inputs,
        )
        return output

    def receive_product(self, product: Product) -> None:
        attention = manual_attention_of(product, batch=self._trace.batch, head_counts=self._head_counts)
        if attention is None:
            return
        softmax = product.softmax.reshape(-1, product.softmax.shape[-1])[..., : product.pattern.shape[-1]]
        # a result that was changed between softmax and product is not the softmax's pattern
        if not torch.equal(softmax.reshape(-1), product.pattern.reshape(-1)):
            return
        pattern = attention.pattern.detach().double() if attention.pattern.numel() <= LARGEST_PATTERN else None
        causal = is_causal_mask(attention.pattern > 0)
        shape = attention.pattern.shape
        inputs = None
        if self._keep_events:
            scores = _float_copy(attention.scores) if attention.scores.numel() <= LARGEST_PATTERN else None
            inputs = CallInputs(_float_copy(attention.value), scores=scores)
        self._add("softmax", shape, attention.contexts, pattern, causal, None, None, attention.dim_order, inputs)

    def receive_recorded_call(self, call: RecordedCall) -> None:
        raise AssertionError(f"a recorded pass replays no module; got {type(call.module).__name__}")

    def _add(
        self,
        method: CaptureMethod,
        shape: tuple[int, ...],
        contexts: Tensor,
        pattern: Tensor | None,
        causal: bool,
        is_cross_attention: bool | None,
        projection: Tensor | None,
        dim_order: str = "",
        inputs: CallInputs | None = None,
    ) -> None:
        batch, heads, queries, keys = shape
        if is_cross_attention is None:
            is_cross_attention = queries != keys or (bool(self._running) and self._running[-1].has_other_keys)
        modules, _, started, rows_read = zip(*self._running, strict=True) if self._running else ((), (), (), ())
        call = Call(
            time=self._trace.tick(),
            method=method,
            modules=modules,
            batch=batch,
            heads=heads,
            queries=queries,
            keys=keys,
            contexts=contexts.transpose(1, 2).flatten(2).float(),
            pattern=pattern,
            causal=causal,
            is_cross_attention=is_cross_attention,
            projection=projection,
            dim_order=dim_order,
            started=started,
            rows_read=rows_read,
            inputs=inputs,
        )
        self._trace.calls.append(call)


def is_causal_mask(mask: Tensor | None) -> bool:
    """Whether a square mask hides every later key from every query."""
    if mask is None or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    return not bool(allows(mask).triu(1).any())


def approx_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same values in the same order, up to rounding. Leading dimensions may differ."""
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    return bool((a - b).norm() <= _TOLERANCE * torch.maximum(a.norm(), b.norm()))


def _pattern(request: Request) -> Float[Tensor, "batch head query key"]:
    """The pattern of a request by its definition, in float64."""
    heads = request.query.shape[1]
    keys = request.key.double().repeat_interleave(heads // request.key.shape[1], dim=1)
    scores = request.query.double() @ keys.transpose(-1, -2) * request.scale
    if request.softcap is not None:
        scores = (scores / request.softcap).tanh() * request.softcap
    if request.mask is not None:
        is_boolean = request.mask.dtype == torch.bool
        scores = scores.masked_fill(~request.mask, -torch.inf) if is_boolean else scores + request.mask.double()
    if request.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if request.sinks is not None:
        sink = request.sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def _copy(tensor: Tensor | None) -> Float[Tensor, "*rows width"] | None:
    """A copy, since later modules may modify the tensor; in float32 or better, for sums that half precision would round."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return _float_copy(tensor)


def _float_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def _inputs_of(request: Request) -> CallInputs:
    return CallInputs(
        _float_copy(request.value),
        _float_copy(request.query),
        _float_copy(request.key),
        request.scale,
        tuple((_float_copy(x), weight) for x, weight in request.in_projections),
    )
