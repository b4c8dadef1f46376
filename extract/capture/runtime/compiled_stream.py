"""The residual stream on the CPU, each state read once by compiled code.

Where torch's own norm reads a state, that one pass computes the norm's output as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.layout import HookPoint, Site
from attlas.extract.capture.runtime.stream import Stream, assert_identity, stack_columns, to_float
from attlas.extract.engines import buffers
from attlas.extract.engines.observations import NormObservation
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.visibility import Axis

if TYPE_CHECKING:
    from attlas.extract.engines.residual_cpu import StatePass


class CompiledStream(Stream):
    """The residual sites of one forward pass on the CPU."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from attlas.extract.engines import residual_cpu

        self._cpu = residual_cpu
        self._compares_heads = any(name in residual_cpu.OF_HEADS for name in self.columns)
        # columns that compiled code does not compute, with their functions in plain torch
        self._torch_columns = {
            name: compute for name, compute in self.columns.items() if name not in residual_cpu.MAKES
        }
        self._reads_states = bool(self._torch_columns) or self._observer.needs.states
        self._site_after = {site.after: site for site in self.sites if site.after is not None}
        self._site_of_norm_input = {site.norm.input: site for site in self.sites if site.norm is not None}
        # passes over states that a norm read: by the norm's input, and by the site whose x' it is
        self._norm_passes: dict[HookPoint, StatePass] = {}
        self._site_passes: dict[Site, StatePass] = {}

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        modules = dict(model.named_modules())
        norms = {site.norm.module for site in self.sites if site.norm is not None}
        with super().hooks(model), ExitStack() as stack:
            for name in norms:
                module = modules[name]
                if _is_replaceable_norm(module):
                    module.forward = self._norm_forward(name, module)
                    stack.callback(delattr, module, "forward")
            yield

    def _prepare_contexts(self, site: Site, contexts: Tensor) -> Any:
        if contexts.dtype == torch.float64:
            return super()._prepare_contexts(site, contexts)
        axis = self._axes.axis(site.stack, contexts.shape[0] * contexts.shape[2], contexts.device)
        head_columns = self._cpu.compare_heads(axis, contexts.float()) if self._compares_heads else {}
        return head_columns, to_float(contexts) if self._reads_states else None

    def _norm_forward(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        """A forward function of a norm that also measures its input."""
        original_forward = module.forward

        def forward(state: Tensor) -> Tensor:
            point = HookPoint(name, self._call_counts[name], "input")
            norm_site = self._site_of_norm_input.get(point)
            if norm_site is None or not self._is_readable(norm_site, state):
                return original_forward(state)
            return self._norm_output(module, state, point, norm_site)

        return forward

    def _norm_output(self, module: Any, state: Tensor, point: HookPoint, norm_site: Site) -> Tensor:
        """Compute a norm's output and measure its input in one pass, with the update that made it if x and F are there."""
        axis = self._axes.axis(norm_site.stack, state.numel() // state.shape[-1], state.device)
        site = self._site_after.get(point)
        if site is not None and any(p not in self._tensors for p in site.sum_points if p != site.after):
            site = None
        before, update = self._before_and_update(site) if site is not None else (None, None)
        output = torch.from_numpy(buffers.empty(tuple(state.shape), np.float32))
        kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        epsilon = torch.finfo(state.dtype).eps if module.eps is None else module.eps
        state_pass = self._cpu.read_state(
            axis,
            state,
            before,
            update,
            norm=NormObservation(state, output, kind, epsilon),
            output=output,
            weight=module.weight,
            bias=getattr(module, "bias", None),
        )
        self._norm_passes[point] = state_pass
        if site is not None:
            self._site_passes[site] = state_pass
        return output

    def _is_readable(self, site: Site, state: Tensor) -> bool:
        """Whether a state has the type and memory layout of the compiled code, and its axis is known."""
        return (
            state.dtype == torch.float32
            and state.is_contiguous()
            and not site.token_first
            and self._axes.is_known(site.stack, state.numel() // state.shape[-1])
        )

    def _sums(self, site: Site) -> SiteSums:
        state_pass = self._site_passes.pop(site, None)
        axis = self._axis(site)
        if state_pass is None:
            before, update = self._before_and_update(site)
            after = self._after(site, before, update)
            if after.dtype == torch.float64:
                return super()._sums(site)
            state_pass = self._cpu.read_state(axis, after, before, update)
        if site.before is not None:
            assert_identity(site, state_pass.off, state_pass.size, self._roundoff(site))
        head_columns, contexts = self._pop_contexts(site, axis) or ({}, None)
        columns = {**state_pass.stream, **self._norm_columns(site, axis), **head_columns}
        columns |= self._columns_in_torch(site, axis, contexts)
        counts = torch.from_numpy(state_pass.norm_counts)[None] if self._observer.needs.stream_profiles else None
        return SiteSums(stack_columns(columns, tuple(self.columns), axis.start), counts)

    def _layer_values(self, site: Site) -> Float[Tensor, "column batch"]:
        names = self._observer.needs.layer_names
        before, after = self._ends(site)
        if after.dtype == torch.float64 or not self._cpu.MAKES_OF_LAYERS.issuperset(names):
            return super()._layer_values(site)
        return stack_columns(self._cpu.compare_states(self._axis(site), before, after), names, after)

    def _columns_in_torch(self, site: Site, axis: Axis, contexts: Tensor | None) -> dict[str, Tensor | None]:
        """The columns that compiled code does not compute."""
        if not self._reads_states:
            return {}
        return self._observe_states(site, self._observation(site, axis, contexts), self._torch_columns)

    def _norm_columns(self, site: Site, axis: Axis) -> Mapping[str, Any]:
        if site.norm is None:
            return {}
        state_pass = self._norm_passes.pop(site.norm.input, None)
        if state_pass is None:
            norm = self._norm(site)
            assert norm is not None, "the site has a norm"
            state_pass = self._cpu.read_state(axis, norm.read, norm=norm)
        return state_pass.norm


def _is_replaceable_norm(module: nn.Module) -> bool:
    """Whether a module is torch's own norm over the last dimension, unmodified and in float32."""
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or "forward" in vars(module):
        return False
    parameters = list(module.parameters())
    return len(module.normalized_shape) == 1 and all(p.dtype == torch.float32 for p in parameters)  # pyright: ignore
