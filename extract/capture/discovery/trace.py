"""One run of a model on a few tokens, with everything kept that its modules read and wrote and how it attended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from attlas.extract.capture.intercept.interface import configurations, replaced_interface
from attlas.extract.capture.intercept.sdpa import (
    Request,
    first_tensor,
    interception_disabled,
    read_tensor,
    replaced_sdpa,
)
from attlas.extract.capture.intercept.softmax import Product, SoftmaxTracker, manual_attention_of
from attlas.extract.capture.layout import CaptureMethod, Replayed
from attlas.extract.engines.visibility import allows

# what a probe has, where the choice is ours: no two numbers alike, so that dimensions tell themselves apart
PROBE_SEQUENCES, PROBE_TOKENS, PROBE_DECODER_TOKENS = 3, 13, 11
LARGEST_PATTERN = 1 << 20  # entries
# relative to the larger tensor's norm; a wrong candidate differs by its whole size
_SAME = 1e-3


@dataclass(frozen=True)
class Event:
    """A module's call in the probe: copies of what it read and wrote, and the tensors themselves, as they are later."""

    time: int
    module: str
    call: int
    read: Float[Tensor, "*rows width"] | None  # None where it is no float tensor of two dimensions or more
    wrote: Float[Tensor, "*written_rows written_width"] | None
    later_read: Shaped[Tensor, ...] | None = None
    later_wrote: Shaped[Tensor, ...] | None = None


@dataclass(frozen=True)
class Call:
    """An attention call in the probe. `inside` are the modules that were running, outermost first.

    `began` and `read` say of each when it began, and how many rows it read.
    """

    time: int
    way: CaptureMethod
    inside: tuple[str, ...]
    batch: int
    heads: int
    queries: int
    keys: int
    contexts: Float[Tensor, "batch query head_width"]  # heads side by side
    pattern: Float[Tensor, "batch head row key"] | None  # None where it is too large to be kept
    causal: bool
    is_cross_attention: bool
    projection: Tensor | None = None
    order: str = ""
    replayed: Replayed | None = None
    began: tuple[int, ...] = ()
    read: tuple[int, ...] = ()


@dataclass
class Trace:
    """What a probe has seen, in the order of time."""

    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)  # modules, as they began
    rounding: float = torch.finfo(torch.float32).eps  # ε of the model's own type
    batch: int = 1
    returned: Any = None
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def trace_of(
    model: nn.Module, inputs: Mapping[str, Any], *, batch: int, interface: bool = False, events: bool = True
) -> Trace:
    """Run the model on inputs of so many sequences, its calls through the attention interface answered by ours if asked.

    Without `events` what modules read and wrote is not kept.
    """
    trace = Trace(batch=batch)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        trace.rounding = torch.finfo(parameter.dtype).eps
    probe = _Probe(trace, _head_counts(model), keep=events)
    with ExitStack() as stack:
        stack.enter_context(probe.hooked(model))
        stack.enter_context(replaced_sdpa(probe.attend))
        if interface:
            stack.enter_context(replaced_interface(model, probe.attend))
        stack.enter_context(SoftmaxTracker(probe.finished))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(fixed_rng())
        trace.returned = model(**inputs)
    return trace


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Seed torch's random number generators with 0, and restore the caller's state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _head_counts(model: nn.Module) -> frozenset[int]:
    """The numbers of heads that the model's configurations know of."""
    found: set[int] = set()
    for config in configurations(model):
        for name, value in config.to_dict().items():
            if "head" in name:
                found |= {n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int)}
    return frozenset(found)


class _Running(NamedTuple):
    """A module that runs: whether it was given what others hold, when it began, and how many rows it read."""

    name: str
    elsewhere: bool
    began: int
    rows: int


class _Probe:
    def __init__(self, trace: Trace, head_counts: frozenset[int], *, keep: bool) -> None:
        self._trace = trace
        self._keep = keep
        self._head_counts = head_counts
        self._running: list[_Running] = []

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        counts: dict[str, int] = {}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                begins = module.register_forward_pre_hook(self._begins(name), with_kwargs=True)
                ends = module.register_forward_hook(self._ends(name, counts), with_kwargs=True)
                stack.callback(begins.remove)
                stack.callback(ends.remove)
            yield

    def _begins(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            elsewhere = any(kwargs.get(n) is not None for n in ("encoder_hidden_states", "key_value_states"))
            read = read_tensor(args, kwargs)
            rows = 0 if read is None or not read.dim() else read.numel() // max(1, read.shape[-1])
            self._running.append(_Running(name, elsewhere, self._trace.tick(), rows))
            self._trace.ran.append(name)

        return hook

    def _ends(self, name: str, counts: dict[str, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._running and self._running.pop().name != name:
                pass  # one that ended by an exception which the model caught
            number = counts[name] = counts.get(name, -1) + 1
            read, wrote = read_tensor(args, kwargs), first_tensor(output)
            time = self._trace.tick()
            if self._keep:
                self._trace.events.append(Event(time, name, number, _kept(read), _kept(wrote), read, wrote))

        return hook

    def attend(self, request: Request) -> Tensor:
        with interception_disabled():
            output = request.call_original()
            pattern = None
            if output.shape[:2].numel() * request.query.shape[-2] * request.key.shape[-2] <= LARGEST_PATTERN:
                pattern = _pattern(request)
        shape = (*output.shape[:3], request.key.shape[-2])
        causal = request.causal or hides_the_future(request.mask)
        self._add(request.way, shape, output, pattern, causal, request.is_cross_attention, request.projection)
        return output

    def finished(self, product: Product) -> None:
        made = manual_attention_of(product, batch=self._trace.batch, head_counts=self._head_counts)
        if made is None:
            return
        softmax = product.softmax.reshape(-1, product.softmax.shape[-1])[..., : product.pattern.shape[-1]]
        # what was changed between softmax and product is another pattern than the softmax's
        if not torch.equal(softmax.reshape(-1), product.pattern.reshape(-1)):
            return
        pattern = made.pattern.detach().double() if made.pattern.numel() <= LARGEST_PATTERN else None
        causal = hides_the_future(made.pattern > 0)
        self._add("softmax", made.pattern.shape, made.contexts, pattern, causal, None, None, made.order)

    def _add(
        self,
        way: CaptureMethod,
        shape: tuple[int, ...],
        contexts: Tensor,
        pattern: Tensor | None,
        causal: bool,
        is_cross_attention: bool | None,
        projection: Tensor | None,
        order: str = "",
    ) -> None:
        batch, heads, queries, keys = shape
        if is_cross_attention is None:
            is_cross_attention = queries != keys or (bool(self._running) and self._running[-1].elsewhere)
        inside, _, began, read = zip(*self._running, strict=True) if self._running else ((), (), (), ())
        contexts = contexts.transpose(1, 2).flatten(2).float()
        call = Call(
            self._trace.tick(),
            way,
            inside,
            batch,
            heads,
            queries,
            keys,
            contexts,
            pattern,
            causal,
            is_cross_attention,
            projection,
            order,
            began=began,
            read=read,
        )
        self._trace.calls.append(call)


def hides_the_future(mask: Tensor | None) -> bool:
    if mask is None or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    return not bool(allows(mask).triu(1).any())


def _pattern(request: Request) -> Float[Tensor, "batch head query key"]:
    """The pattern of a call that goes through torch or the interface, by its definition."""
    heads = request.query.shape[1]
    keys = request.key.double().repeat_interleave(heads // request.key.shape[1], dim=1)
    scores = request.query.double() @ keys.transpose(-1, -2) * request.scale
    if request.softcap is not None:
        scores = (scores / request.softcap).tanh() * request.softcap
    if request.mask is not None:
        hides = request.mask.dtype == torch.bool
        scores = scores.masked_fill(~request.mask, -torch.inf) if hides else scores + request.mask.double()
    if request.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if request.sinks is not None:
        sink = request.sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def _kept(tensor: Tensor | None) -> Float[Tensor, "*rows width"] | None:
    """A copy, since later modules may write into it; in float32, for sums that half precision would round."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    return bool((a - b).norm() <= _SAME * torch.maximum(a.norm(), b.norm()))
