"""Check that a trace shows every attention layer of the model, and replay modules that show less than they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.configurations import configurations
from attlas.extract.capture.discovery.call_filters import OF_SEVERAL_SOFTMAXES
from attlas.extract.capture.discovery.module_tree import owner_of
from attlas.extract.capture.discovery.own_patterns import matches_own_patterns
from attlas.extract.capture.discovery.replay_search import find_replayed_calls
from attlas.extract.capture.discovery.trace import Call, Trace
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.tensors import first_tensor, input_tensor, is_stream
from attlas.extract.errors import CaptureError

# kinds of `layer_types` in configurations that have no pattern
_WITHOUT_PATTERN = ("linear", "recurrent", "mamba", "conv", "ssm", "gated_delta", "rwkv")
# modules that mix tokens without attention
_MIXERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def complete_trace(
    model: nn.Module, inputs: Mapping[str, Any], trace: Trace, partial: list[Call]
) -> tuple[Trace, tuple[str, ...]]:
    """Return the trace with every attention layer of the model, and the layers that have no pattern.

    `partial` are calls that may be a part of their module's attention. If there are any, or if a layer is missing, modules
    are replayed. Raises CaptureError if a layer is still missing.
    """
    missing = ""
    if not partial:
        try:
            return trace, _assert_complete(model, inputs, trace)
        except CaptureError as error:
            missing = f"{error}; "
    replayed, refusal = find_replayed_calls(model, inputs, trace)
    if refusal is not None:
        raise CaptureError(f"{missing}{refusal}") from refusal
    modules = {owner_of(model, call) for call in replayed}
    complete = [
        call
        for call in partial
        if not modules & {*call.modules}
        and type(model.get_submodule(owner_of(model, call))).__name__ not in OF_SEVERAL_SOFTMAXES
    ]
    calls = sorted((*trace.calls, *replayed, *complete), key=lambda call: call.time)
    trace = replace(trace, calls=calls)
    return trace, _assert_complete(model, inputs, trace)


def _assert_complete(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> tuple[str, ...]:
    """Raise CaptureError if an attention layer is missing. Returns the layers that have no pattern."""
    name = type(model).__name__
    if not trace.calls:
        raise CaptureError(
            f"a model is measured by its attention; {name} showed none on a few tokens: seen are "
            "torch's scaled_dot_product_attention, transformers' attention interface, and a softmax over keys times values; "
            "attention by blocks, by hashing or without a softmax is not measured"
        )
    _assert_all_of_a_class_attend(model, trace)
    is_confirmed = matches_own_patterns(model, inputs, trace)
    expected = _configured_layers(model)
    calls = len(trace.calls)
    if not is_confirmed and expected is not None and calls < expected:
        raise CaptureError(
            f"every attention layer must show its pattern; {name} has {expected} and showed {calls}; load it with "
            'attn_implementation="sdpa" or "eager"'
        )
    without_pattern = _layers_without_pattern(model, trace)
    _refuse_hidden_attention(model, inputs, without_pattern)
    return without_pattern


def _assert_all_of_a_class_attend(model: nn.Module, trace: Trace) -> None:
    """Of the modules of one class that ran, either all attend or none does. Modules without weights do not count."""
    attending = {owner_of(model, call) for call in trace.calls} - {""}
    classes = {type(model.get_submodule(name)) for name in attending}
    silent = [
        name
        for name in dict.fromkeys(trace.started)
        if type(model.get_submodule(name)) in classes and name not in attending
    ]
    if silent:
        raise CaptureError(
            f"every attention layer must show its pattern; {silent[0]} of {type(model).__name__} ran without showing one, "
            f"though others of its class ({type(model.get_submodule(silent[0])).__name__}) did"
        )


def _configured_layers(model: nn.Module) -> int | None:
    """The number of attention layers in the model's configuration, None if it does not say."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum(not any(other in kind for other in _WITHOUT_PATTERN) for kind in kinds)
    return getattr(config, "num_hidden_layers", None)


def _layers_without_pattern(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Layers that ran without a pattern while others of their list have one. Lists inside layers are left out."""
    attending = {name for call in trace.calls for name in call.modules}
    silent, lists = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        lists.append(name)
        layers = [f"{name}.{n}" if name else n for n, _ in module.named_children()]
        if any(layer in attending for layer in layers):
            silent += [layer for layer in layers if layer not in attending and layer in trace.started]
    return tuple(silent)


def _refuse_hidden_attention(model: nn.Module, inputs: Mapping[str, Any], silent: tuple[str, ...]) -> None:
    """In a layer of the user's own without a pattern, no token may depend on another, unless a known module mixes them.

    Transformers' models are left out: they are checked by their own patterns and their configuration.
    """
    if configurations(model):
        return
    mixing: list[str] = []
    with ExitStack() as stack, torch.inference_mode(), fixed_rng():
        for name in silent:
            module = model.get_submodule(name)
            if not any(isinstance(m, _MIXERS) for m in module.modules()):
                stack.callback(module.register_forward_hook(_mixing_hook(name, mixing), with_kwargs=True).remove)
        if silent:
            model(**inputs)
    if mixing:
        raise CaptureError(
            f"every attention layer must show its pattern; {mixing[0]} of {type(model).__name__} showed none, though what "
            "it does with one token depends on the others; let it call torch's scaled_dot_product_attention, or softmax "
            "and a matrix product with the values"
        )


def _mixing_hook(name: str, mixing: list[str]) -> Callable[..., None]:
    """A forward hook that adds a module's name to `mixing` if changing its first token changes another one's output."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = input_tensor(args, kwargs), first_tensor(output)
        if name in mixing or not (is_stream(x) and is_stream(y)) or x.shape[:2] != y.shape[:2]:
            return
        changed = x.clone()
        changed[0, 0] = changed[0, 0].flip(-1) + 1
        changed_args = (changed, *args[1:]) if args else args
        changed_kwargs = kwargs if args else {n: changed if v is x else v for n, v in kwargs.items()}
        changed_output = first_tensor(module.forward(*changed_args, **changed_kwargs))
        differs = (changed_output - y).abs().sum(-1) > 0  # pyright: ignore
        differs[0, 0] = False
        if bool(differs.any()):
            mixing.append(name)

    return hook
