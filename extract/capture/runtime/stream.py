"""Watch the residual stream of a forward pass: its states as the norms read them, and what is added between.

A state is handed on as soon as it is complete and dropped at once; no more than two states are held, three where
sublayers are parallel. On the CPU a state is read once, and where torch's own norm reads it, that reading makes the
norm's output as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.intercept.sdpa import first_tensor, read_tensor
from attlas.extract.capture.layout import Attention, Layout, Site, Tap, Update
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.stream_axes import Axes, Rows
from attlas.extract.engines import buffers
from attlas.extract.engines.observations import NormObservation, ResidualObservation
from attlas.extract.engines.visibility import Axis
from attlas.extract.errors import CaptureError

if TYPE_CHECKING:
    from attlas.extract.engines.needs import ResidualColumn
    from attlas.extract.engines.residual_cpu import StatePass

Observe = Callable[[Site, Float[Tensor, "column batch"]], None]


class Stream:
    """The residual sites of one watched forward pass, in plain torch on any device.

    `columns` are those that are asked for; they are observed in the order of their names.
    """

    def __init__(self, layout: Layout, batch: Batch, columns: Mapping[str, ResidualColumn], observe: Observe) -> None:
        self.sites = layout.sites
        self.columns = {name: columns[name] for name in sorted(columns)}
        self.done = 0
        self._axes = Axes(layout, batch)
        self._observe = observe
        self._counts: Counter[str] = Counter()
        self._held: dict[Tap, Tensor] = {}
        self._overwritten = {tap for site in self.sites for tap in site.overwritten}
        self._gains: dict[str, Tensor] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        self._hosts = {site.heads: site for site in self.sites if site.heads is not None}
        self._complete: dict[str, list[int]] = {}  # sites of a stack whose tokens are not known yet
        self._waiting = [set(site.taps) for site in self.sites]
        self._readers: dict[Tap, set[int]] = {}
        for index, taps in enumerate(self._waiting):
            for tap in taps:
                self._readers.setdefault(tap, set()).add(index)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Hook every module that a site reads from."""
        modules = dict(model.named_modules())
        gains = {u.gain for site in self.sites for u in site.updates if u.gain is not None}
        self._gains = {name: model.get_parameter(name).detach().flatten() for name in gains}
        with ExitStack() as stack:
            for name in {tap.module for tap in self._readers}:
                handle = modules[name].register_forward_hook(self._hook_of(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def contexts(
        self, attention: Attention, axis: Axis, contexts: Float[Tensor, "batch head token head_width"]
    ) -> None:
        """The output of an attention call, before its projection, and where its queries' tokens are real."""
        key = (attention.stack, attention.layer)
        site = self._hosts.get(key)
        if site is None:
            return
        batch, _, tokens, _ = contexts.shape
        if not self._axes.knows(site.stack, batch * tokens):
            self._axes.learn(site.stack, axis)
            for index in self._complete.pop(site.stack, ()):
                self._take(index)
        if batch == self._axes.sequences:  # windows of sequences have no row of their own
            self._contexts[key] = (tokens, self._of_heads(site, contexts))

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
        self._held[tap] = tensor.clone() if tap in self._overwritten else tensor
        for index in sorted(self._readers[tap]):
            self._waiting[index].discard(tap)
            if self._waiting[index]:
                continue
            self._take(index)

    def _take(self, index: int) -> None:
        """Finish a site that is complete, as soon as its tokens are known."""
        site = self.sites[index]
        if self._axes.knows(site.stack, self._count(site)):
            self._finish(index)
        else:
            self._complete.setdefault(site.stack, []).append(index)

    def _finish(self, index: int) -> None:
        """Observe a site and drop what nothing else waits for."""
        site = self.sites[index]
        self._observe(site, self._values(site))
        self.done += 1
        for used in set(site.taps):
            self._readers[used].discard(index)
            if not self._readers[used]:
                self._held.pop(used, None)

    def _of_heads(self, site: Site, contexts: Tensor) -> Any:  # noqa: ARG002 - a subclass uses it
        return _exact(contexts)

    def _taken(self, site: Site, rows: Rows) -> Any:
        """What is kept of the contexts of a site's attention call; None where they are not those of the stream's tokens."""
        tokens, kept = self._contexts.pop(site.heads, (0, None)) if site.heads is not None else (0, None)
        return kept if tokens == rows.axis.tokens else None

    def _count(self, site: Site) -> int:
        """How many states a site has."""
        held = self._held[site.sum[0]]
        return held.numel() // held.shape[-1]

    def _rows(self, site: Site) -> Rows:
        return self._axes.rows(site.stack, self._count(site), self._held[site.sum[0]].device)

    def _tensor(self, site: Site, tap: Tap) -> Float[Tensor, "batch token width"]:
        """What a tap holds, with the batch's own shape, in float32 or better."""
        held = self._held[tap]
        batch, tokens = self._axes.rows(site.stack, held.numel() // held.shape[-1], held.device).shape
        if site.token_first:
            return _exact(held.reshape(tokens, batch, held.shape[-1]).transpose(0, 1))
        return _exact(held.reshape(batch, tokens, held.shape[-1]))

    def _added(self, site: Site, update: Update) -> Float[Tensor, "batch token width"]:
        added = self._tensor(site, update.tap)
        if update.factor != 1:
            added = added * update.factor
        return added if update.gain is None else added * self._gains[update.gain].to(added)

    def _step(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """x and F of a site; at some nothing is added."""
        if site.stream is None or site.update is None:
            return None, None
        stream = self._tensor(site, site.stream)
        for update in site.beside:
            stream = stream + self._added(site, update)
        return stream, self._added(site, site.update)

    def _after(self, site: Site, stream: Tensor | None, update: Tensor | None) -> Float[Tensor, "batch token width"]:
        if site.after is not None:
            return self._tensor(site, site.after)
        assert stream is not None and update is not None, "a state that the model does not make is a sum"
        return stream + update

    def _norm(self, site: Site) -> NormObservation | None:
        if site.norm is None:
            return None
        read, wrote = self._tensor(site, site.norm.read), self._tensor(site, site.norm.wrote)
        return NormObservation(read, wrote, site.norm.kind, site.norm.epsilon)

    def _values(self, site: Site) -> Float[Tensor, "column batch"]:
        stream, update = self._step(site)
        after = self._after(site, stream, update)
        rows = self._rows(site)
        if stream is not None and update is not None:
            # token by token first: one small mask instead of copies of the whole stream
            parts = (after - stream - update, after, stream)
            off, total, x = (t.norm(dim=-1).where(rows.real, 0).norm() for t in parts)
            self._assert_identity(site, float(off), float(total + x))
        observation = ResidualObservation(rows.real, after, stream, update, self._norm(site), self._taken(site, rows))
        return self._stack({name: compute(observation) for name, compute in self.columns.items()}, after)

    def _stack(self, values: Mapping[str, Any], like: Tensor) -> Float[Tensor, "column batch"]:
        """The columns in their order, in float64; NaN where undefined."""
        stacked = like.new_full((len(self.columns), like.shape[0]), torch.nan, dtype=torch.float64)
        for place, name in enumerate(self.columns):
            if values.get(name) is not None:
                stacked[place] = torch.as_tensor(values[name])
        return stacked

    def _assert_identity(self, site: Site, off: float, size: float) -> None:
        """x' = x + F(x), on every batch, to a few roundings of the model's own type."""
        rounding = max(torch.finfo(self._held[tap].dtype).eps for tap in site.sum)
        if size < float("inf") and not off <= 4 * rounding * size:
            raise CaptureError(
                f"x' = x + F(x) must hold at every residual site; at {site.name} of layer {site.layer} of the "
                f"{site.stack} it is off by {off / size:.2e} of ‖x‖ + ‖x'‖; the model changed its way since it was examined"
            )


class CompiledStream(Stream):
    """The same on the CPU, each state read once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from attlas.extract.engines import residual_cpu

        self._cpu = residual_cpu
        self._compares_heads = any(name in residual_cpu.OF_HEADS for name in self.columns)
        # columns that the compiled pass does not make, by their functions in plain torch
        self._others = {name: compute for name, compute in self.columns.items() if name not in residual_cpu.MAKES}
        self._sites_after = {site.after: site for site in self.sites if site.after is not None}
        self._sites_of_norms = {site.norm.read: site for site in self.sites if site.norm is not None}
        # what a norm's reading gave: of the norm, by its tap; of the state, by its site
        self._of_norms: dict[Tap, StatePass] = {}
        self._of_sites: dict[Site, StatePass] = {}

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

    def _of_heads(self, site: Site, contexts: Tensor) -> Any:
        if contexts.dtype == torch.float64:
            return super()._of_heads(site, contexts)
        rows = self._axes.rows(site.stack, contexts.shape[0] * contexts.shape[2], contexts.device)
        compared = self._cpu.compare_heads(rows.axis, contexts.float()) if self._compares_heads else {}
        return compared, _exact(contexts) if self._others else None

    def _normalizing(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        """A norm's forward that measures what it reads."""
        plain = module.forward

        def forward(state: Tensor) -> Tensor:
            tap = Tap(name, self._counts[name], "input")
            measured = self._sites_of_norms.get(tap)
            if measured is None or not self._is_readable(measured, state):
                return plain(state)
            rows = self._axes.rows(measured.stack, state.numel() // state.shape[-1], state.device)
            site = self._sites_after.get(tap)
            known = site is not None and all(t in self._held for t in site.sum if t != site.after)
            stream, update = self._step(site) if site is not None and known else (None, None)
            output = torch.from_numpy(buffers.empty(tuple(state.shape), np.float32))
            kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
            epsilon = torch.finfo(state.dtype).eps if module.eps is None else module.eps
            passed = self._cpu.read_state(
                rows.axis,
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

    def _is_readable(self, site: Site, state: Tensor) -> bool:
        """Whether a state lies in memory as the compiled pass reads it, and its tokens are known."""
        return (
            state.dtype == torch.float32
            and state.is_contiguous()
            and not site.token_first
            and self._axes.knows(site.stack, state.numel() // state.shape[-1])
        )

    def _values(self, site: Site) -> Float[Tensor, "column batch"]:
        state = self._of_sites.pop(site, None)
        rows = self._rows(site)
        if state is None:
            stream, update = self._step(site)
            after = self._after(site, stream, update)
            if after.dtype == torch.float64:
                return super()._values(site)
            state = self._cpu.read_state(rows.axis, after, stream, update)
        if site.stream is not None:
            self._assert_identity(site, state.off, state.size)
        compared, contexts = self._taken(site, rows) or ({}, None)
        values = {**state.stream, **self._norm_columns(site, rows), **compared}
        return self._stack(values | self._in_plain_torch(site, rows, contexts), rows.axis.start)

    def _in_plain_torch(self, site: Site, rows: Rows, contexts: Tensor | None) -> dict[str, Tensor | None]:
        """The columns that the compiled pass does not make."""
        if not self._others:
            return {}
        stream, update = self._step(site)
        after = self._after(site, stream, update)
        observation = ResidualObservation(rows.real, after, stream, update, self._norm(site), contexts)
        return {name: compute(observation) for name, compute in self._others.items()}

    def _norm_columns(self, site: Site, rows: Rows) -> Mapping[str, Any]:
        if site.norm is None:
            return {}
        passed = self._of_norms.pop(site.norm.read, None)
        if passed is None:
            norm = self._norm(site)
            assert norm is not None, "the site has a norm"
            passed = self._cpu.read_state(rows.axis, norm.read, norm=norm)
        return passed.norm


def _is_plain_norm(module: nn.Module) -> bool:
    """Torch's own norm over the last dimension, unchanged, in float32: nothing else is computed in a norm's stead."""
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or "forward" in vars(module):
        return False
    parameters = list(module.parameters())
    return len(module.normalized_shape) == 1 and all(p.dtype == torch.float32 for p in parameters)  # pyright: ignore


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
