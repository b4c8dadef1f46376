"""Find the residual sites of every stack in a trace.

A stack's stream is the path of states, each derived from the one before as x' = x + F(x) or by a norm, on which most of its
attention calls lie. QK-norms and sums inside a sublayer lie on no such path. An update with an attention call inside is that
layer's `attention` or `cross_attention`, an update without one its `mlp`.

The norm of a site is the one that reads x (pre-norm, sandwich), or that turns x' into the next x (post-norm). In a sandwich,
F is the output of the second norm, since that is what is added. Parallel sublayers, x' = x + F + G, are measured as if they
ran one after the other: `attention` from x to x + F, a state that the model never computes, and `mlp` from there to x'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from torch import nn

from attlas.extract.capture.discovery.state_graph import StateGraph
from attlas.extract.capture.discovery.stream_sites import NoStream, StreamSites, name_some
from attlas.extract.capture.discovery.sublayers import Sublayer, stream_width, sublayers_by_stack
from attlas.extract.capture.discovery.trace import Trace
from attlas.extract.capture.layer_lists import LayerLists
from attlas.extract.capture.layout import Attention, Site

# a site and the moment at which its last point has been read
_TimedSite = tuple[int, Site]


def find_sites(
    trace: Trace, attentions: Sequence[Attention], modules: Mapping[str, nn.Module]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Return the sites of all stacks in the order in which they are complete, and why a stack is left out, or part of one."""
    lists = LayerLists((name for call in trace.calls for name in call.modules), modules)
    graphs: dict[int, StateGraph] = {}
    sites: list[_TimedSite] = []
    refusals: dict[str, str] = {}
    for stack, sublayers in sublayers_by_stack(trace, attentions).items():
        try:
            of_stack, left_out = _sites_of_stack(trace, stack, sublayers, modules, lists, graphs)
            sites += of_stack
            if left_out is not None:
                refusals[stack] = left_out
        except NoStream as reason:
            refusals[stack] = str(reason)
    return tuple(site for _, site in sorted(sites, key=lambda timed: timed[0])), refusals


def joint_refusal(sites: Sequence[Site], refusals: Mapping[str, str]) -> str | None:
    """Return why no stack is measured; None if any is."""
    if sites:
        return None
    reasons = dict.fromkeys(refusals.values())
    return next(iter(reasons)) if len(reasons) == 1 else "; ".join(f"{k}: {v}" for k, v in refusals.items())


def _sites_of_stack(
    trace: Trace,
    stack: str,
    sublayers: list[Sublayer],
    modules: Mapping[str, nn.Module],
    lists: LayerLists,
    graphs: dict[int, StateGraph],
) -> tuple[list[_TimedSite], str | None]:
    """A stack whose width changes, as between stages of a vision model, has one stream for each width in turn."""
    widths = [stream_width(trace, sublayer) for sublayer in sublayers]
    sites: list[_TimedSite] = []
    for width, group in groupby(zip(widths, sublayers, strict=True), key=lambda pair: pair[0]):
        if width is None:
            raise NoStream("no output projection was found, so the stream's width is not known")
        if width not in graphs:
            graphs[width] = StateGraph(trace, modules, width)
        stream = StreamSites(trace, stack, [sublayer for _, sublayer in group], graphs[width], lists)
        sites = [timed for timed in sites if timed[1].name != "final_norm"]  # that of a stage, not of the stack
        sites += stream.sites(with_embedding=not sites)
    return _without_repeated(sites)


def _without_repeated(sites: list[_TimedSite]) -> tuple[list[_TimedSite], str | None]:
    """Leave out the `mlp` sites of layers with several such updates, which have no names of their own, and say so."""
    counts = Counter((site.name, site.layer) for _, site in sites)
    repeated = {key for key, count in counts.items() if count > 1}
    refused = [f"{name} of layer {layer}" for name, layer in sorted(repeated, key=lambda key: key[1]) if name != "mlp"]
    if refused:
        raise NoStream(f"more than one update was found for {name_some(refused)}")
    if not repeated:
        return sites, None
    layers = sorted(layer for _, layer in repeated)
    note = f"what layers {layers} add besides attention is left out: it is more than one update"
    return [(when, site) for when, site in sites if (site.name, site.layer) not in repeated], note
