"""Training mode: what of a model would do something else in it, and running a model without it.

A flag that changes nothing is no reason to refuse: a module that was just added, a dropout of zero, a container whose
parts were all frozen. A module of torch's own says what it does. Of any other it is known by its code, which reads
`training` or does not; where it does, the model is run both ways, and must give the same and draw no random number.
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

from attlas.extract.capture.compiled import uncompiled
from attlas.extract.errors import Refusal


def refuse_training(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise Refusal where a module in training mode makes the model compute something else on these inputs."""
    training = {name: module for name, module in model.named_modules() if module.training}
    for name, module in training.items():
        why = _otherwise(module)
        if why is not None:
            raise _refusal(name, module, why)
    reading = next((name for name, module in training.items() if _reads_training(module)), None)
    if reading is not None and not _does_alike(model, inputs):
        raise _refusal(
            reading, training[reading], "the model gives something else, or draws random numbers, than in eval"
        )


def _refusal(name: str, module: nn.Module, why: str) -> Refusal:
    what = f"{name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    return Refusal(f"a pattern is measured in eval mode; {what} is in training mode, where {why}; call model.eval()")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Take every module out of training mode, and put it back. Methods that a class runs at a change are not called."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _otherwise(module: nn.Module) -> str | None:
    """What a module of torch's own does in training mode and not in eval; None where there is no difference."""
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
    """Whether the code of a module's class, torch's own apart, or of what it calls has the name `training`."""
    functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    for kind in type(module).__mro__:
        if not kind.__module__.startswith("torch.nn."):
            functions += [f for f in map(_function, vars(kind).values()) if f is not None]
    return any(_names_training(function, set()) for function in functions)


def _function(value: Any) -> FunctionType | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, FunctionType) else None


def _names_training(function: FunctionType, seen: set[Any]) -> bool:
    if function in seen or function.__module__.partition(".")[0] in ("torch", "typing", "collections"):
        return False
    seen.add(function)
    for code in _codes(function.__code__):
        if "training" in code.co_names or "training" in code.co_consts:
            return True
        called = (_function(function.__globals__.get(name)) for name in code.co_names)
        if any(_names_training(other, seen) for other in called if other is not None):
            return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _does_alike(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model gives the same in both modes, draws as much at random, and changes none of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        given, drawn = _run(model, inputs)
        kept = all(_equal(buffers[name], buffer) for name, buffer in model.named_buffers() if name in buffers)
        with eval_mode(model):
            in_eval, drawn_in_eval = _run(model, inputs)
    except Exception:  # the model's own code, in the mode for which it was not meant
        return False
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, buffer in model.named_buffers():
            if name in buffers and not _equal(buffers[name], buffer):
                buffer.data.copy_(buffers[name])
    same = len(given) == len(in_eval) and all(map(_equal, given, in_eval))
    return kept and same and drawn == drawn_in_eval


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """All tensors that a model gives, and where the random numbers then stand: they begin alike, and are put back."""
    held = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        with torch.random.fork_rng(), torch.inference_mode(), uncompiled():
            torch.manual_seed(0)
            given = list(_tensors(model(**inputs)))
            on_gpu = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
            drawn = torch.get_rng_state().tolist(), on_gpu, random.getstate(), pickle.dumps(np.random.get_state())
    finally:
        random.setstate(held[0])
        np.random.set_state(held[1])
    return given, drawn


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit; what is not a number in both is equal."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
