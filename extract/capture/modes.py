"""Training mode: refusing a model that computes something else in it, and running a model in eval mode.

A flag that has no effect is no reason to refuse: a module just added, a dropout of zero, a container whose parts are all
frozen. What torch's own modules do is known. The code of any other module either reads `training` or does not. If it does,
the model is run in both modes, and must return the same values and draw no random numbers.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.errors import Refusal


def refuse_training(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise Refusal if a module in training mode makes the model compute something else on these inputs."""
    training = {name: module for name, module in model.named_modules() if module.training}
    for name, module in training.items():
        effect = _training_effect(module)
        if effect is not None:
            raise _refusal(name, module, effect)
    reader = next((name for name, module in training.items() if _reads_training(module)), None)
    if reader is not None and not _is_same_in_eval(model, inputs):
        raise _refusal(
            reader, training[reader], "the model gives something else, or draws random numbers, than in eval"
        )


def _refusal(name: str, module: nn.Module, effect: str) -> Refusal:
    described = f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    return Refusal(
        f"a pattern is measured in eval mode; {described} is in training mode, where {effect}; call model.eval()"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode and back, without calling `train()`, which a class may override."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _training_effect(module: nn.Module) -> str | None:
    """What one of torch's own modules does in training mode only; None if there is no difference."""
    match module:
        case nn.modules.dropout._DropoutNd(p=float(p)) | nn.modules.dropout._DropoutNd(p=int(p)) if p > 0:
            return f"it drops entries (p={p:g})"
        case nn.MultiheadAttention(dropout=p) | nn.RNNBase(dropout=p) if p > 0:
            return f"it drops entries (dropout={p:g})"
        case nn.modules.batchnorm._NormBase(running_mean=mean) if mean is not None:
            return "it normalises by the batch"
        case nn.RReLU():
            return "its slope is random"
    return None


def _reads_training(module: nn.Module) -> bool:
    """Whether the code of a module's class, or code that it calls, mentions `training`. Torch's own code is left out."""
    functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    for kind in type(module).__mro__:
        if not kind.__module__.startswith("torch.nn."):
            functions += [f for f in map(_function, vars(kind).values()) if f is not None]
    return any(_mentions_training(function, set()) for function in functions)


def _function(value: Any) -> FunctionType | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, FunctionType) else None


def _mentions_training(function: FunctionType, visited: set[Any]) -> bool:
    if function in visited or function.__module__.partition(".")[0] in ("torch", "typing", "collections"):
        return False
    visited.add(function)
    for code in _nested_code(function.__code__):
        if "training" in code.co_names or "training" in code.co_consts:
            return True
        called = (_function(function.__globals__.get(name)) for name in code.co_names)
        if any(_mentions_training(other, visited) for other in called if other is not None):
            return True
    return False


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested_code(constant)


def _is_same_in_eval(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model returns the same and draws as many random numbers in both modes, and changes no buffer."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        outputs, rng = _outputs_and_rng(model, inputs)
        unchanged = all(_is_equal(buffers[name], buffer) for name, buffer in model.named_buffers() if name in buffers)
        with eval_mode(model):
            eval_outputs, eval_rng = _outputs_and_rng(model, inputs)
    except Exception:  # the model's own code, in a mode that it was not written for
        return False
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, buffer in model.named_buffers():
            if name in buffers and not _is_equal(buffers[name], buffer):
                buffer.data.copy_(buffers[name])
    same = len(outputs) == len(eval_outputs) and all(map(_is_equal, outputs, eval_outputs))
    return unchanged and same and rng == eval_rng


def _outputs_and_rng(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """Run a model with fixed seeds: all tensors in its output, and the final state of every random number generator.

    The caller's generators are restored.
    """
    before = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        with torch.random.fork_rng(), torch.inference_mode(), compilation_disabled():
            torch.manual_seed(0)
            outputs = list(_tensors(model(**inputs)))
            cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
            rng = torch.get_rng_state().tolist(), cuda, random.getstate(), pickle.dumps(np.random.get_state())
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    return outputs, rng


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, except that NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
