"""Observe the residual stream during a forward pass: x, F, x' and the norm of every site.

A site is measured as soon as its last point has been read, and its tensors are released at once. At most two states are kept,
three where sublayers are parallel. That x' = x + F holds is checked when the pass is over, because a GPU must be waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.layout import WHOLE_LAYER, Attention, HookPoint, Layout, Norm, Site, Update
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.observer import Observer
from attlas.extract.capture.runtime.stream_axes import StreamAxes
from attlas.extract.capture.tensors import first_tensor, input_tensor
from attlas.extract.engines.observations import HeadObservation, NormObservation, ResidualObservation
from attlas.extract.engines.stream_profiles import SiteSums, count_norms
from attlas.extract.engines.visibility import Axis
from attlas.extract.errors import CaptureError

if TYPE_CHECKING:
    from attlas.extract.engines.needs import ResidualColumn


class Stream:
    """The residual sites of one forward pass, in plain torch on any device.

    The observer is given the columns that it needs in the order of their names. `outputs` are the matrices of output
    projections, by the number of the layer, and `gains` γ of norms that read x', if they are needed. `finish` ends a pass that succeeded.
    """

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        observer: Observer,
        outputs: Mapping[int, Tensor] | None = None,
        gains: Mapping[Norm, Tensor] | None = None,
    ) -> None:
        needs = observer.needs
        self.sites = layout.sites
        self.columns: dict[str, ResidualColumn] = {name: needs.residual[name] for name in needs.residual_names}
        self.observed = 0
        self._watched = layout.sites + (layout.layer_sites if needs.layers else ())
        self._points = layout.points_with_layers if needs.layers else layout.points
        self._axes = StreamAxes(layout, batch)
        self._observer = observer
        self._sample = batch.sample
        self._call_counts: Counter[str] = Counter()
        self._tensors: dict[HookPoint, Tensor] = {}
        self._gains: dict[str, Tensor] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        self._heads: dict[tuple[str, int], HeadObservation] = {}  # attention calls, where patterns are needed
        self._keeps_heads = needs.calls
        self._norm_gains = gains or {}
        self._outputs = {
            (layout.attentions[number].stack, layout.attentions[number].layer): matrix
            for number, matrix in (outputs or {}).items()
        }
        self._site_of_attention = {site.attention: site for site in self.sites if site.attention is not None}
        self._without_axis: dict[str, list[int]] = {}  # by stack: complete sites whose axis is not known yet
        # points that a site still waits for, and sites that still need a point
        self._missing = [len(points) for points in self._points.of_site]
        self._uses = {point: len(sites) for point, sites in self._points.sites_at.items()}
        # sites that are checked in the end: the roundoff of their type, and the pair ‖x' − x − F‖, ‖x'‖ + ‖x‖
        self._identities: list[tuple[Site, float, Tensor]] = []

    @property
    def missing(self) -> int:
        """How many sites and layers have not been observed."""
        return len(self._watched) - self.observed

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Hook every module that a site reads."""
        self._gains = {name: model.get_parameter(name).detach().flatten() for name in self._points.gains}
        handles = [
            _submodule(model, name).register_forward_hook(self._hook_of(name), with_kwargs=True)
            for name in self._points.calls
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_contexts(
        self,
        attention: Attention,
        axis: Axis,
        contexts: Float[Tensor, "batch head token head_width"],
        calls: Sequence[HeadObservation] = (),
    ) -> None:
        """Take the output of an attention layer, before its projection, the axis of its queries, and its calls."""
        key = (attention.stack, attention.layer)
        site = self._site_of_attention.get(key)
        if site is None:
            return
        batch, _, tokens, _ = contexts.shape
        if not self._axes.is_known(site.stack, batch * tokens):
            self._axes.add(site.stack, axis)
            for index in self._without_axis.pop(site.stack, ()):
                self._complete(index)
        if batch == self._axes.sequences:  # windows are not rows of the stream
            self._contexts[key] = (tokens, self._prepare_contexts(site, contexts))
            if self._keeps_heads and len(calls) == 1 and calls[0].call is not None:
                self._heads[key] = calls[0]

    def finish(self) -> None:
        """End a pass: check that x' = x + F(x) held at every site."""
        if not self._identities:
            return
        device = self._identities[0][2].device
        sums = torch.stack([pair.to(device) for _, _, pair in self._identities]).tolist()
        for (site, roundoff, _), (error, size) in zip(self._identities, sums, strict=True):
            assert_identity(site, error, size, roundoff)

    def _hook_of(self, name: str) -> Callable[..., None]:
        calls = self._points.calls[name]

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._call_counts[name]
            self._call_counts[name] = call + 1
            if call >= len(calls):
                return
            read, wrote = calls[call]
            if read is not None:
                self._add_tensor(read, input_tensor(args, kwargs))
            if wrote is not None:
                self._add_tensor(wrote, first_tensor(output))

        return hook

    def _add_tensor(self, point: HookPoint, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        self._tensors[point] = tensor.clone() if point in self._points.overwritten else tensor
        for index in self._points.sites_at[point]:
            self._missing[index] -= 1
            if not self._missing[index]:
                self._complete(index)

    def _complete(self, index: int) -> None:
        """Observe a site whose points have all been read, as soon as its axis is known."""
        site = self._watched[index]
        if self._axes.is_known(site.stack, self._state_count(site)):
            self._observe_and_release(index)
        else:
            self._without_axis.setdefault(site.stack, []).append(index)

    def _observe_and_release(self, index: int) -> None:
        """Observe a site and release the tensors that no other site needs."""
        site = self._watched[index]
        if site.name == WHOLE_LAYER:
            self._observe_layer(site)
        else:
            self._observe_site(site)
        self.observed += 1
        for point in self._points.of_site[index]:
            self._uses[point] -= 1
            if not self._uses[point]:
                del self._tensors[point]

    def _observe_site(self, site: Site) -> None:
        self._observer.residual(site, self._sums(site))

    def _observe_layer(self, layer: Site) -> None:
        self._observer.layer(layer, SiteSums(self._layer_values(layer)))

    def _prepare_contexts(self, site: Site, contexts: Tensor) -> Any:  # noqa: ARG002 - a subclass uses it
        """What to keep of the contexts of a site's attention call."""
        return contexts

    def _pop_contexts(self, site: Site, axis: Axis) -> Any:
        """What was kept of the contexts; None if they are not over the tokens of the stream."""
        if site.attention is None:
            return None
        tokens, contexts = self._contexts.pop(site.attention, (0, None))
        return contexts if tokens == axis.tokens else None

    def _first_state(self, site: Site) -> Tensor:
        """A state of the site, x' if the model computes it."""
        point = site.before if site.after is None else site.after
        assert point is not None, "a site has x' or x"
        return self._tensors[point]

    def _state_count(self, site: Site) -> int:
        tensor = self._first_state(site)
        return tensor.numel() // tensor.shape[-1]

    def _axis(self, site: Site) -> Axis:
        return self._axes.axis(site.stack, self._state_count(site), self._first_state(site).device)

    def _tensor(self, site: Site, point: HookPoint) -> Float[Tensor, "batch token width"]:
        """The tensor at a point in the batch's own shape, in float32 or better."""
        return to_float(self._in_batch_shape(site, self._tensors[point]))

    def _in_batch_shape(self, site: Site, tensor: Tensor) -> Float[Tensor, "batch token width"]:
        width = tensor.shape[-1]
        axis = self._axes.axis(site.stack, tensor.numel() // width, tensor.device)
        batch, tokens = len(axis.start), axis.tokens
        if site.token_first:
            return tensor.reshape(tokens, batch, width).transpose(0, 1)
        return tensor.reshape(batch, tokens, width)

    def _update_tensor(self, site: Site, update: Update) -> Float[Tensor, "batch token width"]:
        return self._scale(self._tensor(site, update.point), update)

    def _scale(self, tensor: Tensor, update: Update) -> Tensor:
        """A module's output by what the model multiplies it before it adds it to the stream."""
        if update.factor != 1:
            tensor = tensor * update.factor
        return tensor if update.gain is None else tensor * self._gains[update.gain].to(tensor)

    def _before_and_update(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """x and F of a site; None at a site that adds nothing."""
        if site.before is None or site.update is None:
            return None, None
        before = self._tensor(site, site.before)
        for update in site.parallel:
            before = before + self._update_tensor(site, update)
        return before, self._update_tensor(site, site.update)

    def _after(self, site: Site, before: Tensor | None, update: Tensor | None) -> Float[Tensor, "batch token width"]:
        if site.after is not None:
            return self._tensor(site, site.after)
        assert before is not None and update is not None, "a state that the model does not compute is a sum"
        return before + update

    def _norm(self, site: Site) -> NormObservation | None:
        if site.norm is None:
            return None
        norm_input, norm_output = self._tensor(site, site.norm.input), self._tensor(site, site.norm.output)
        gain = self._norm_gains.get(site.norm)
        return NormObservation(norm_input, norm_output, site.norm.kind, site.norm.epsilon, gain)

    def _observation(self, site: Site, axis: Axis, contexts: Tensor | None) -> ResidualObservation:
        before, update = self._before_and_update(site)
        after = self._after(site, before, update)
        contexts = None if contexts is None else to_float(contexts)
        heads = None if site.attention is None else self._heads.pop(site.attention, None)
        if contexts is None:  # not over the tokens of the stream
            heads = None
        return ResidualObservation(
            axis.real, after, before, update, self._norm(site), contexts, self._sample, heads, self._write(site)
        )

    def _write(self, site: Site) -> Callable[[Tensor], Tensor] | None:
        """A function that gives what contexts add to the stream, without a bias, if the projection's matrix is known."""
        matrix = None if site.attention is None else self._outputs.get(site.attention)
        update = site.update
        if matrix is None or update is None:
            return None

        def write(contexts: Float[Tensor, "batch head token head_width"]) -> Float[Tensor, "batch token width"]:
            written = contexts.transpose(1, 2).flatten(2)
            return self._scale(written @ matrix.to(written.dtype), update)

        return write

    def _layer_values(self, site: Site) -> Float[Tensor, "column batch"]:
        needs = self._observer.needs
        before, after = self._ends(site)
        o = ResidualObservation(self._axis(site).real, after, before)
        return stack_columns({name: needs.layers[name](o) for name in needs.layer_names}, needs.layer_names, after)

    def _ends(self, layer: Site) -> tuple[Tensor, Tensor]:
        """The stream before and after a whole layer."""
        assert layer.before is not None and layer.after is not None, "a layer has both"
        return self._tensor(layer, layer.before), self._tensor(layer, layer.after)

    def _sums(self, site: Site) -> SiteSums:
        axis = self._axis(site)
        o = self._observation(site, axis, self._pop_contexts(site, axis))
        if o.stream is not None and o.update is not None:
            # one norm per token first: then only a small tensor is masked, not copies of the whole stream
            parts = (o.after - o.stream - o.update, o.after, o.stream)
            error, x_after, x = (t.norm(dim=-1).where(axis.real, 0).norm() for t in parts)
            self._identities.append((site, self._roundoff(site), torch.stack([error, x_after + x])))
        counts = count_norms(o) if self._observer.needs.stream_profiles else None
        return SiteSums(
            stack_columns(self._observe_states(site, o, self.columns), tuple(self.columns), o.after), counts
        )

    def _observe_states(
        self, site: Site, o: ResidualObservation, columns: Mapping[str, ResidualColumn]
    ) -> dict[str, Tensor | None]:
        """Show the observer the states around a site, if it needs them, and compute columns from them."""
        if self._observer.needs.states:
            self._observer.state(site, o)
        return {name: compute(o) for name, compute in columns.items()}

    def _roundoff(self, site: Site) -> float:
        """The roundoff of the type in which the site's sum is made."""
        return roundoff_of({self._tensors[point].dtype for point in site.sum_points})


def stack_columns(values: Mapping[str, Any], names: Sequence[str], like: Tensor) -> Float[Tensor, "column batch"]:
    """The named columns in float64; NaN where undefined."""
    stacked = like.new_full((len(names), like.shape[0]), torch.nan, dtype=torch.float64)
    for row, name in enumerate(names):
        if values.get(name) is not None:
            stacked[row] = torch.as_tensor(values[name])
    return stacked


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """A submodule by its name, ten times faster than `get_submodule`: every pass asks for all that it hooks."""
    for part in name.split(".") if name else ():
        model = cast("nn.Module", model._modules[part])
    return model


def assert_identity(site: Site, error: float, size: float, roundoff: float) -> None:
    """Check x' = x + F(x) on every batch, to a few roundings of the model's own type."""
    if size < float("inf") and not error <= 4 * roundoff * size:
        raise CaptureError(
            f"x' = x + F(x) must hold at every residual site; at {site.name} of layer {site.layer} of the "
            f"{site.stack} it is off by {error / size:.2e} of ‖x‖ + ‖x'‖; the model changed its way since it was examined"
        )


def roundoff_of(dtypes: Collection[torch.dtype]) -> float:
    """The roundoff of the coarsest of these types."""
    return max(_epsilon(dtype) for dtype in dtypes)


@cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def to_float(x: Tensor) -> Tensor:
    """Convert to float32 unless the tensor is float64."""
    return x if x.dtype == torch.float64 else x.float()
