"""Compiled and wrapped models: compiled code can't be observed, so the module that it was made from is run instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attlas.extract.errors import Refusal


@contextmanager
def compilation_disabled() -> Iterator[None]:
    """Run models, layers and functions compiled by torch.compile as the Python that they were made from."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def unwrap_model(model: Any) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and DistributedDataParallel.

    Raises Refusal for anything but a module, and for models that hold no Python code to run: TorchScript, exported
    programs, shards of a model.
    """
    if not isinstance(model, nn.Module):
        raise Refusal(f"a model is a torch.nn.Module; got {type(model).__name__}; {_advice(model)}")
    while (inner := _wrapped_module(model)) is not None:
        model = inner
    for name, module in model.named_modules():
        kind = _kind_without_python(module)
        if kind is not None:
            raise Refusal(
                f"a model is measured as its Python code runs; {name or 'this one'} is {kind}, which shows nothing of its "
                "attention; give the nn.Module that it was made of"
            )
    return model


def _wrapped_module(model: nn.Module) -> nn.Module | None:
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    if isinstance(model, compiled):
        return model._orig_mod  # pyright: ignore
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return None


def _kind_without_python(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        return f"a {type(module).__name__}, which holds a part of the weights"
    graph = getattr(sys.modules.get("torch.fx"), "GraphModule", ())
    if isinstance(module, graph):
        nodes: Any = module.graph.nodes  # pyright: ignore
        if any(isinstance(node.target, torch._ops.OpOverload) for node in nodes):
            return "an exported program"
    return None


def _advice(model: Any) -> str:
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return f"give the module inside it, {type(inner).__name__}, as .model"
    return "give the nn.Module that it was made of"
