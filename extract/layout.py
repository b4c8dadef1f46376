"""What a model is made of, found by watching it run once on a few tokens.

Nothing is guessed from names: the output projection of an attention call is the module that reads its contexts, a norm
is a module that does what a norm does, and a sublayer's update is the tensor F for which x' = x + F(x) holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from extract.errors import CaptureError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PROBE_TOKENS = 12
# relative to the larger tensor's norm; a wrong candidate differs by its whole size
_SAME = 1e-3


class Tap(NamedTuple):
    """A place in the forward pass: what a module read or wrote at its n-th call."""

    module: str
    call: int
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Norm:
    """A normalisation layer of the stream, at one call."""

    module: str
    call: int
    kind: Literal["layer", "rms"]
    epsilon: float

    @property
    def read(self) -> Tap:
        return Tap(self.module, self.call, "input")

    @property
    def wrote(self) -> Tap:
        return Tap(self.module, self.call, "output")


@dataclass(frozen=True)
class Site:
    """One place of the residual stream: x, F and x', and the norm that reads x (pre-norm) or x' (post-norm)."""

    name: str
    layer: int
    after: Tap
    stream: Tap | None = None
    update: Tap | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Attention:
    """One attention call: its layer, its heads and, where found, W_O by head: [head, head_width, model_width]."""

    stack: str
    layer: int
    heads: int
    projection: Float[Tensor, "head head_width model_width"] | None = field(default=None, repr=False, compare=False)
    projection_name: str | None = None


@dataclass(frozen=True)
class Layout:
    """What `capture` watches, and what it expects to see in every forward pass."""

    attentions: tuple[Attention, ...]
    sites: tuple[Site, ...]
    residual_refusal: str | None  # why `residual` is not measured, or None
    width: int | None
    sdpa: bool = True

    @property
    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "attention": [
                {"stack": a.stack, "layer": a.layer, "heads": a.heads, "projection": a.projection_name}
                for a in self.attentions
            ],
            "sites": [
                {
                    "site": s.name,
                    "layer": s.layer,
                    "after": _name(s.after),
                    "stream": _name(s.stream),
                    "update": _name(s.update),
                    "norm": None if s.norm is None else f"{s.norm.module}#{s.norm.call} ({s.norm.kind})",
                }
                for s in self.sites
            ],
        }


def _name(tap: Tap | None) -> str | None:
    return None if tap is None else f"{tap.module}#{tap.call} {tap.side}"


@dataclass(frozen=True)
class _Event:
    """A module's call in the probe."""

    time: int
    module: str
    call: int
    read: Tensor | None
    wrote: Tensor | None


@dataclass(frozen=True)
class _Call:
    """An attention call in the probe; contexts as [batch, token, head × head_width]."""

    time: int
    heads: int
    contexts: Tensor
    causal: bool
    self_attention: bool


@dataclass
class _Trace:
    events: list[_Event] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    rounding: float = torch.finfo(torch.float32).eps  # ε of the model's own type
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def find_layout(model: nn.Module, inputs: Mapping[str, Any]) -> Layout:
    """Run the model once on small inputs and find its attention calls, projections, norms and residual sites.

    Raises CaptureError where fewer patterns arrive than the model says it has attention layers.
    """
    trace = _trace(model, inputs)
    expected = expected_layers(model)
    calls = trace.calls
    if not calls or (expected is not None and len(calls) != expected):
        raise CaptureError(
            f"every attention layer must show its pattern; {type(model).__name__} has "
            f"{'at least one' if expected is None else expected} and showed {len(calls)}; load it with "
            'attn_implementation="sdpa", or it is a kind that is not measured yet'
        )
    if not all(c.self_attention for c in calls):
        raise CaptureError(
            f"only self-attention over the model's own tokens is measured; {type(model).__name__} has attention calls "
            "over something else"
        )
    modules = dict(model.named_modules())
    found = [_projection(trace, c, modules) for c in calls]
    attentions = tuple(
        Attention("decoder" if c.causal else "encoder", n, c.heads, p.weight if p else None, p.module if p else None)
        for n, (c, p) in enumerate(zip(calls, found, strict=True))
    )
    width = next((p.weight.shape[-1] for p in found if p is not None), None)
    sites, refusal = _sites(trace, modules, width)
    return Layout(attentions, sites, refusal, width)


def expected_layers(model: nn.Module) -> int | None:
    """How many attention calls the model says a forward pass makes, or None where it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return sum(isinstance(m, nn.MultiheadAttention) for m in model.modules()) or None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum("attention" in kind for kind in kinds)
    return getattr(config, "num_hidden_layers", None)


@contextmanager
def replaced_sdpa(replacement: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Replace torch's scaled_dot_product_attention by `replacement(original)`, and switch the fused paths around it off."""
    original = functional.scaled_dot_product_attention
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    functional.scaled_dot_product_attention = replacement(original)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's input or output is, or begins with."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple | list):
        return first_tensor(value[0]) if value else None
    return None


def read_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads: its first argument, however it was passed."""
    return first_tensor(args) if args else first_tensor(next(iter(kwargs.values()), None))


def _trace(model: nn.Module, inputs: Mapping[str, Any]) -> _Trace:
    trace = _Trace()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        trace.rounding = torch.finfo(parameter.dtype).eps
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            trace.events.append(
                _Event(trace.tick(), name, number, _kept(read_tensor(args, kwargs)), _kept(first_tensor(output)))
            )

        return hook

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = original(query, key, value, *args, **kwargs)
            contexts = output.transpose(1, 2).flatten(2).float()
            causal = bool(kwargs.get("is_causal")) or _hides_the_future(
                kwargs.get("attn_mask", args[0] if args else None)
            )
            same = query.shape[-2] == key.shape[-2]
            trace.calls.append(_Call(trace.tick(), query.shape[1], contexts, causal, same))
            return output

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(replaced_sdpa(watched))
        stack.enter_context(torch.inference_mode())
        model(**inputs)
    return trace


def _kept(tensor: Tensor | None) -> Tensor | None:
    """A copy, since later modules may write into it; in float32, for sums that half precision would round."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def _hides_the_future(mask: Any) -> bool:
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool(seen.triu(1).any())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    return bool((a - b).norm() <= _SAME * torch.maximum(a.norm(), b.norm()))


class _Projection(NamedTuple):
    module: str
    weight: Tensor


def _projection(trace: _Trace, call: _Call, modules: Mapping[str, nn.Module]) -> _Projection | None:
    """The linear module that reads exactly this call's contexts; None where something stands between."""
    for event in trace.events:
        if event.time < call.time or not _same(event.read, call.contexts):
            continue
        weight = getattr(modules[event.module], "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or event.wrote is None:
            continue
        by_input = weight.T if isinstance(modules[event.module], nn.Linear) else weight
        if by_input.shape != (call.contexts.shape[-1], event.wrote.shape[-1]):
            continue
        return _Projection(event.module, by_input.detach().unflatten(0, (call.heads, -1)))
    return None


def _norms(trace: _Trace, modules: Mapping[str, nn.Module], width: int) -> list[tuple[_Event, Norm]]:
    """Every call of a module without children that normalises vectors of the stream's width, checked by doing it."""
    found = []
    for event in trace.events:
        module = modules[event.module]
        if next(module.children(), None) is not None or event.read is None or event.wrote is None:
            continue
        if event.read.shape[-1] != width or event.read.shape != event.wrote.shape:
            continue
        kind = _norm_kind(module, event.read, event.wrote)
        if kind is not None:
            found.append((event, Norm(event.module, event.call, kind, norm_epsilon(module))))
    return found


def norm_epsilon(module: nn.Module) -> float:
    """ε of a norm: its attribute under either of the two names in use; torch's RMSNorm without one uses the type's own."""
    for name in ("eps", "variance_epsilon"):
        if getattr(module, name, None) is not None:
            return float(getattr(module, name))
    return torch.finfo(torch.float32).eps


def _norm_kind(module: nn.Module, read: Tensor, wrote: Tensor) -> Literal["layer", "rms"] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if any(p.dim() != 1 or p.shape[-1] != read.shape[-1] for p in parameters.values()):
        return None
    gain = parameters.get("weight", torch.ones(read.shape[-1])).to(read)
    bias = parameters.get("bias", torch.zeros(read.shape[-1])).to(read)
    epsilon = norm_epsilon(module)
    centred = read - read.mean(-1, keepdim=True)
    kinds: tuple[tuple[Literal["layer", "rms"], Tensor], ...] = (("layer", centred), ("rms", read))
    for kind, vector in kinds:
        unit = vector / (vector.square().mean(-1, keepdim=True) + epsilon).sqrt()
        # some families store γ − 1
        if _close(unit * gain + bias, wrote) or _close(unit * (1 + gain) + bias, wrote):
            return kind
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 2e-2 * b.norm())  # half precision rounds; another operation is far off


def _sites(trace: _Trace, modules: Mapping[str, nn.Module], width: int | None) -> tuple[tuple[Site, ...], str | None]:
    """Walk along the norms and name what is added between them."""
    if width is None:
        return (), "no output projection was found, so the stream's width is not known"
    norms = _norms(trace, modules, width)
    if not norms:
        return (), f"no normalisation layer of the stream's width {width} was found"
    updates = [u for k in range(len(norms)) if (u := _update(trace, norms, k, trace.rounding)) is not None]
    if not updates:
        return (), "no place was found where x' = x + F(x) holds between norms"
    sites = [_embedding(norms, updates[0]), *updates]
    last = norms[-1][1]
    if updates[-1].after == last.read and updates[-1].norm != last:
        sites.append(Site("final_norm", len(trace.calls) - 1, after=last.read, norm=last))
    return tuple(sites), _missing(trace, sites)


class _State(NamedTuple):
    """A state of the stream: where it stands, and the norm that reads it (pre-norm) if one does."""

    time: int
    tensor: Tensor
    tap: Tap
    reader: Norm | None


class _Sum(NamedTuple):
    """A state and an update that add up to what a norm reads, and by how much they miss it."""

    error: float
    state: _State
    update: _Event


def _embedding(norms: list[tuple[_Event, Norm]], first: Site) -> Site:
    """The stream as the first sublayer finds it; where a norm of the embeddings makes it, what that norm reads."""
    assert first.stream is not None, "an update is added to a state"
    maker = next((norm for _, norm in norms if norm.wrote == first.stream), None)
    return Site("embedding", 0, after=first.stream if maker is None else maker.read, norm=maker)


def _update(trace: _Trace, norms: list[tuple[_Event, Norm]], k: int, rounding: float) -> Site | None:
    """What was added to the stream just before norm k reads it: the x and F for which its input is x + F."""
    event, norm = norms[k]
    sums = [found for state in _states(trace, norms, k) if (found := _added(trace, state, event, rounding)) is not None]
    if not sums:
        return None
    best = min(sums, key=lambda found: found.error)
    finished = [c for c in trace.calls if c.time <= best.update.time]
    inside = [c for c in finished if c.time > best.state.time]
    if not finished:
        return None  # embeddings added to each other
    return Site(
        name="attention" if inside else "mlp",
        layer=len(finished) - 1,
        after=norm.read,
        stream=best.state.tap,
        update=Tap(best.update.module, best.update.call, "output"),
        norm=best.state.reader or norm,
    )


def _states(trace: _Trace, norms: list[tuple[_Event, Norm]], k: int) -> Iterator[_State]:
    """Candidates for x before norm k: what the norms before it read and wrote; before the first, what any module wrote."""
    event = norms[k][0]
    for earlier, norm in norms[max(0, k - 4) : k]:
        if earlier.read is not None and earlier.wrote is not None:
            yield _State(earlier.time, earlier.read, norm.read, norm)
            yield _State(earlier.time, earlier.wrote, norm.wrote, None)
    if k == 0:
        for other in trace.events:
            if other.time < event.time and other.wrote is not None:
                yield _State(other.time, other.wrote, Tap(other.module, other.call, "output"), None)


def _added(trace: _Trace, state: _State, event: _Event, rounding: float) -> _Sum | None:
    """The module output that, added to the state, comes nearest to what the norm reads; None if none is near."""
    if event.read is None or state.tensor.shape != event.read.shape:
        return None
    added = event.read - state.tensor
    size = event.read.norm() + state.tensor.norm()
    nearest = None
    for candidate in trace.events:
        if (
            not state.time < candidate.time < event.time
            or candidate.wrote is None
            or candidate.wrote.shape != added.shape
        ):
            continue
        error = float((added - candidate.wrote).norm())
        near = error <= 4 * rounding * float(size) and error < 0.1 * float(candidate.wrote.norm())
        if near and (nearest is None or error < nearest.error):
            nearest = _Sum(error, state, candidate)
    return nearest


def _missing(trace: _Trace, sites: list[Site]) -> str | None:
    have = [(s.layer, s.name) for s in sites]
    wanted = [(layer, name) for layer in range(len(trace.calls)) for name in ("attention", "mlp")]
    absent = [f"{name} of layer {layer}" for layer, name in wanted if (layer, name) not in have]
    repeated = sorted({f"{name} of layer {layer}" for layer, name in have if have.count((layer, name)) > 1})
    if absent:
        return f"x' = x + F(x) was not found for {', '.join(absent[:4])}{' …' if len(absent) > 4 else ''}"
    return f"more than one update was found for {', '.join(repeated[:4])}" if repeated else None
