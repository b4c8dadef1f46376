"""Watch the residual stream of a forward pass: its states as the norms read them, and what is added between.

A state is handed on as soon as it is complete and dropped at once; no more than two states are held. On the CPU a state
is read once, and where torch's own norm reads it, that reading makes the norm's output as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from extract.capture.layout import Layout, Site, Tap
from extract.capture.seam import first_tensor, read_tensor
from extract.engines import buffers
from extract.engines.visibility import positions_of
from extract.errors import CaptureError
from extract.statistics.residual import NormObservation, ResidualObservation, column_values

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from extract.statistics.residual_cpu import Passed

    Observe = Callable[[Site, Float[Tensor, "column batch"]], None]


class Stream:
    """The residual sites of one watched forward pass, in plain torch on any device."""

    def __init__(
        self,
        layout: Layout,
        start: Int[Tensor, " batch"],
        length: Int[Tensor, " batch"],
        tokens: int,
        observe: Observe,
    ) -> None:
        self.sites = layout.sites
        self.done = 0
        self.start, self.length, self.tokens = start, length, tokens
        self._observe = observe
        self._counts: Counter[str] = Counter()
        self._held: dict[Tap, Tensor] = {}
        self._contexts: dict[int, Any] = {}
        self._waiting = [_taps_of(site) for site in self.sites]
        self._readers: dict[Tap, set[int]] = {}
        for index, taps in enumerate(self._waiting):
            for tap in taps:
                self._readers.setdefault(tap, set()).add(index)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Hook every module that a site reads from."""
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for name in {tap.module for tap in self._readers}:
                handle = modules[name].register_forward_hook(self._hook_of(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def contexts(self, layer: int, contexts: Float[Tensor, "batch head token head_width"]) -> None:
        """The output of an attention call, before its projection."""
        self._contexts[layer] = _exact(contexts)

    def _hook_of(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._counts[name]
            self._counts[name] += 1
            self._arrive(Tap(name, call, "input"), read_tensor(args, kwargs))
            self._arrive(Tap(name, call, "output"), first_tensor(output))

        return hook

    def _arrive(self, tap: Tap, tensor: Tensor | None) -> None:
        """A site is complete when its last tap has come."""
        if tap not in self._readers or tensor is None:
            return
        self._held[tap] = tensor
        for index in sorted(self._readers[tap]):
            self._waiting[index].discard(tap)
            if self._waiting[index]:
                continue
            site = self.sites[index]
            self._observe(site, self._values(site))
            self.done += 1
            for used in _taps_of(site):
                self._readers[used].discard(index)
                if not self._readers[used]:
                    self._held.pop(used, None)

    def _tensor(self, tap: Tap) -> Float[Tensor, "batch token width"]:
        """What a tap holds, with the batch's own shape, in float32 or better."""
        held = self._held[tap]
        return _exact(held.reshape(len(self.start), self.tokens, held.shape[-1]))

    def _step(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """x and F of a site; at some nothing is added."""
        if site.stream is None or site.update is None:
            return None, None
        return self._tensor(site.stream), self._tensor(site.update)

    def _norm(self, site: Site) -> NormObservation | None:
        if site.norm is None:
            return None
        read, wrote = self._tensor(site.norm.read), self._tensor(site.norm.wrote)
        return NormObservation(read, wrote, site.norm.kind, site.norm.epsilon)

    def _values(self, site: Site) -> Float[Tensor, "column batch"]:
        after = self._tensor(site.after)
        stream, update = self._step(site)
        real = positions_of(self.start, self.length, self.tokens) >= 0
        if stream is not None and update is not None:
            # token by token first: one small mask instead of copies of the whole stream
            off, total, x = (t.norm(dim=-1).where(real, 0).norm() for t in (after - stream - update, after, stream))
            self._assert_identity(site, float(off), float(total + x))
        contexts = self._contexts.pop(site.layer, None) if site.name == "attention" else None
        return column_values(ResidualObservation(real, after, stream, update, self._norm(site), contexts))

    def _assert_identity(self, site: Site, off: float, size: float) -> None:
        """x' = x + F(x), on every batch, to a few roundings of the model's own type."""
        taps = (site.after, site.stream, site.update)
        rounding = max(torch.finfo(self._held[tap].dtype).eps for tap in taps if tap is not None)
        if size < float("inf") and not off <= 4 * rounding * size:
            raise CaptureError(
                f"x' = x + F(x) must hold at every residual site; at {site.name} of layer {site.layer} it is off by "
                f"{off / size:.2e} of ‖x‖ + ‖x'‖; the model changed its way since it was examined"
            )


class CompiledStream(Stream):
    """The same on the CPU, each state read once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from extract.statistics import residual_cpu

        self._cpu = residual_cpu
        self._segments = residual_cpu.Segments(self.start, self.length, self.tokens)
        self._after = {site.after: site for site in self.sites}
        # what a norm's reading gave: of the norm, by its tap; of the state, by its site
        self._of_norms: dict[Tap, Passed] = {}
        self._of_sites: dict[Site, Passed] = {}

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        modules = dict(model.named_modules())
        norms = {site.norm.module for site in self.sites if site.norm is not None}
        with super().watched(model), ExitStack() as stack:
            for name in norms:
                module = modules[name]
                if _is_plain_norm(module):
                    module.forward = self._normalizing(name, module)
                    stack.callback(delattr, module, "forward")
            yield

    def contexts(self, layer: int, contexts: Tensor) -> None:
        if contexts.dtype == torch.float64:
            super().contexts(layer, contexts)
        else:
            self._contexts[layer] = self._cpu.of_heads(self._segments, contexts.float())

    def _normalizing(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        """A norm's forward that measures what it reads."""
        plain = module.forward

        def forward(state: Tensor) -> Tensor:
            rows = len(self.start) * self.tokens
            if state.dtype != torch.float32 or state.numel() != rows * state.shape[-1] or not state.is_contiguous():
                return plain(state)
            tap = Tap(name, self._counts[name], "input")
            site = self._after.get(tap)
            known = site is not None and all(t is None or t in self._held for t in (site.stream, site.update))
            stream, update = self._step(site) if site is not None and known else (None, None)
            output = torch.from_numpy(buffers.empty(tuple(state.shape), np.float32))
            kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
            epsilon = torch.finfo(state.dtype).eps if module.eps is None else module.eps
            passed = self._cpu.passed(
                self._segments,
                state,
                stream,
                update,
                norm=NormObservation(state, output, kind, epsilon),
                output=output,
                weight=module.weight,
                bias=getattr(module, "bias", None),
            )
            self._of_norms[tap] = passed
            if site is not None and known:
                self._of_sites[site] = passed
            return output

        return forward

    def _values(self, site: Site) -> Float[Tensor, "column batch"]:
        state = self._of_sites.pop(site, None)
        if state is None:
            after = self._tensor(site.after)
            if after.dtype == torch.float64:
                return super()._values(site)
            state = self._cpu.passed(self._segments, after, *self._step(site))
        if site.stream is not None:
            self._assert_identity(site, state.off, state.size)
        heads = self._contexts.pop(site.layer, None) if site.name == "attention" else None
        return self._cpu.assembled(state.stream, self._norm_values(site), heads)

    def _norm_values(self, site: Site) -> Any:
        if site.norm is None:
            return None
        known = self._of_norms.pop(site.norm.read, None)
        if known is None:
            norm = self._norm(site)
            assert norm is not None, "the site has a norm"
            known = self._cpu.passed(self._segments, norm.read, norm=norm)
        return known.norm


def _is_plain_norm(module: nn.Module) -> bool:
    """Torch's own norm over the last dimension, unchanged, in float32: nothing else is computed in a norm's stead."""
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or "forward" in vars(module):
        return False
    parameters = list(module.parameters())
    return len(module.normalized_shape) == 1 and all(p.dtype == torch.float32 for p in parameters)  # pyright: ignore


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _taps_of(site: Site) -> set[Tap]:
    norm = () if site.norm is None else (site.norm.read, site.norm.wrote)
    return {tap for tap in (site.after, site.stream, site.update, *norm) if tap is not None}
