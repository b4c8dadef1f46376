"""Instrument a model for one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.intercept.assemble import intercept_attention
from attlas.extract.capture.layout import Layout, Norm
from attlas.extract.capture.norm_gain import norm_gain
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.compiled_stream import CompiledStream
from attlas.extract.capture.runtime.observer import Observer
from attlas.extract.capture.runtime.receiver import CallReceiver
from attlas.extract.capture.runtime.stream import Stream
from attlas.extract.capture.runtime.write_factors import output_matrices, write_factors
from attlas.extract.engines import Engine
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.quantities import needs_of
from attlas.extract.errors import CaptureError

# the functions that are replaced belong to the whole process, so one pass is instrumented at a time
_LOCK = threading.Lock()


@contextmanager
def instrumented_pass(
    model: nn.Module,
    layout: Layout,
    *,
    batch: Batch,
    engine: Engine,
    observer: Observer,
    factors: Mapping[int, Tensor] | None = None,
    waits: bool = True,
) -> Iterator[None]:
    """Measure one forward pass of the model, made inside this context, and hand the results to the observer.

    `factors` are the model's write factors; None: they are made, or looked up and checked, for this pass.

    Raises CaptureError if the pass shows other attention calls or residual sites than the layout has. Unless it `waits` for
    the device after each call, it raises UnmeasuredRows if some rows were not measured: then it has to be made again.
    """
    needs = observer.needs
    if factors is None:
        factors = factors_for(model, layout, needs)
    stream = None
    if needs.reads_stream and layout.residual_refusal is None:
        with compilation_disabled():
            outputs = output_matrices(model, layout) if needs.outputs else None
            gains = _gains_after_attention(model, layout) if needs.outputs else None
        stream = _stream_class(engine)(layout, batch, observer, outputs, gains)
    receiver = CallReceiver(layout, batch, engine, observer, factors, stream, waits=waits)
    replayed = dict.fromkeys(a.module for a in layout.attentions if a.replay is not None)
    in_pieces = dict.fromkeys(a.module for a in layout.attentions if a.in_pieces)
    with _LOCK, ExitStack() as stack, compilation_disabled():
        if stream is not None:
            stack.enter_context(stream.hooks(model))
        stack.enter_context(
            intercept_attention(
                model,
                receiver,
                layout.methods,
                replayed_modules=replayed,
                finds_imported=layout.imports_attention,
            )
        )
        stack.enter_context(receiver.pieces.hooks(model, in_pieces, receiver.deliver))
        yield
        receiver.finish()
        if stream is None:
            return
        stream.finish()
        if stream.missing:
            raise CaptureError(
                f"every forward pass must show each residual site once; {stream.missing} of {len(layout.sites)} are missing"
            )


def factors_for(model: nn.Module, layout: Layout, needs: Needs) -> Mapping[int, Tensor]:
    """The model's write factors, by the number of the layer; none if nothing that is asked for needs them."""
    if "projection" not in needs_of(needs.row_quantities):
        return {}
    with compilation_disabled():
        return write_factors(model, layout)


def _gains_after_attention(model: nn.Module, layout: Layout) -> dict[Norm, Tensor]:
    """γ of the norms that read what attention has added to the stream."""
    norms = {site.norm for site in layout.sites if site.attention is not None and site.is_post_norm and site.norm}
    found = ((norm, norm_gain(model, norm)) for norm in norms)
    return {norm: gain.gain for norm, gain in found if gain is not None}


def _stream_class(engine: Engine) -> type[Stream]:
    if engine.stream == "triton":
        # needs a package that is only there where a GPU may be
        from attlas.extract.capture.runtime.fused_stream import FusedStream

        return FusedStream
    return CompiledStream if engine.stream == "cpu" else Stream
