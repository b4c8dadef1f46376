"""A module's call, recorded so that it can be made again with other outputs of its submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from attlas.extract.capture.tensors import first_tensor, has_matrix, input_tensor

# maps a submodule's output to another
Change = Callable[[Tensor], Tensor]


class RecordedCall:
    """A module's inputs and the state of the random number generators, taken before the module runs.

    They are taken then because a module may modify its inputs in place.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        self._args = tuple(map(_copy, args))
        self._kwargs = {name: _copy(value) for name, value in kwargs.items()}
        self._devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self._rng_state = torch.get_rng_state()
        self._cuda_rng_states = [torch.cuda.get_rng_state(device) for device in self._devices]
        self.cache: dict[str, list[Tensor]] = {}

    def fill_cache(self, readers: Sequence[str]) -> list[Tensor | None]:
        """Replay once and keep the outputs of all linear submodules, so that later replays need not run them.

        This is valid because their inputs do not change up to the contexts. Returns what `replay` returns.
        """
        self.cache, result = self.linear_outputs(readers)
        return result

    def linear_outputs(self, readers: Sequence[str] = ()) -> tuple[dict[str, list[Tensor]], list[Tensor | None]]:
        """Replay once: the outputs of each linear submodule, in order of execution, and what `replay` returns."""
        outputs: dict[str, list[Tensor]] = {}

        def record(name: str) -> Change:
            def change(output: Tensor) -> Tensor:
                outputs.setdefault(name, []).append(output.clone())
                return output

            return change

        result = self.replay({name: record(name) for name in linear_submodules(self.module)}, readers)
        return outputs, result

    def replay(self, changes: Mapping[str, Change], readers: Sequence[str] = ()) -> list[Tensor | None]:
        """Make the call again with changed outputs of submodules.

        Returns the input of each reader (the largest of several), and last the module's output.
        """
        inputs: dict[nn.Module, Tensor] = {}

        def record_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = input_tensor(args, kwargs)
            if tensor is not None and (module not in inputs or tensor.numel() > inputs[module].numel()):
                inputs[module] = tensor.clone()

        modules = [self.module.get_submodule(name) for name in readers]
        with _hooks_disabled(self.module), ExitStack() as stack, torch.random.fork_rng(self._devices):
            for module in modules:
                stack.callback(module.register_forward_pre_hook(record_input, with_kwargs=True).remove)
            for name, outputs in self.cache.items():
                stack.enter_context(_forward_replaced(self.module.get_submodule(name), outputs))
            for name, change in changes.items():
                stack.callback(self.module.get_submodule(name).register_forward_hook(_hook_of(change)).remove)
            torch.set_rng_state(self._rng_state)
            for device, state in zip(self._devices, self._cuda_rng_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            output = self.module.forward(
                *map(_copy, self._args), **{name: _copy(value) for name, value in self._kwargs.items()}
            )
        return [*(inputs.get(module) for module in modules), first_tensor(output)]


def linear_submodules(module: nn.Module) -> list[str]:
    """The names of the submodules that have a matrix as their weight."""
    return [name for name, submodule in module.named_modules() if name and has_matrix(submodule)]


def _copy(value: Any) -> Any:
    """Copy what a module may modify: a tensor, or a cache of keys and values."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return deepcopy(value) if hasattr(value, "get_seq_length") else value


@contextmanager
def _forward_replaced(module: nn.Module, outputs: Sequence[Tensor]) -> Iterator[None]:
    """Make a module return copies of these outputs, in turn, without running it."""
    remaining, before = iter(outputs), module.__dict__.get("forward")
    module.forward = lambda *_, **__: next(remaining).clone()
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _hook_of(change: Change) -> Callable[..., Tensor]:
    return lambda _module, _args, output: change(output)


@contextmanager
def _hooks_disabled(module: nn.Module) -> Iterator[None]:
    """Disable all hooks of a module and its children."""
    before = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    try:
        for m, hooks, pre_hooks in before:
            m._forward_hooks, m._forward_pre_hooks = type(hooks)(), type(pre_hooks)()
        yield
    finally:
        for m, hooks, pre_hooks in before:
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks
