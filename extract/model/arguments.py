"""Bind the arguments of `measure` to the inputs of a model's forward, and refuse arguments that were meant otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn

from attlas.extract.errors import Refusal

# accepted everywhere: inputs that tokenizers return and some models ignore, and options that transformers' decorators take
_COMMON_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    *("return_dict", "use_cache", "output_attentions", "output_hidden_states"),
)


def bind_inputs(
    model: nn.Module, arguments: tuple[Any, ...], inputs: Mapping[str, Any], *, options: Sequence[str] = ()
) -> dict[str, Any]:
    """All inputs by their names in the model's forward, without those that are None.

    `options` are the other keywords of `measure`. Raises Refusal for inputs that forward does not accept, and if none of
    them is a tensor.
    """
    _refuse_non_tensors(arguments, inputs)
    _refuse_unknown_keywords(model, inputs, options)
    try:
        signature = inspect.signature(model.forward)
        signature.bind_partial(*arguments, **inputs)
        bound = signature.bind_partial(*arguments).arguments
    except TypeError as error:
        raise Refusal(f"inputs must be those of {type(model).__name__}.forward; {error}; pass them by name") from error
    named = {name: value for name, value in {**bound, **inputs}.items() if value is not None}
    if not any(isinstance(value, torch.Tensor) for value in named.values()):
        raise Refusal(
            f"measure needs the tensors that the model reads, such as input_ids of shape [batch, token]; "
            f"got {', '.join(named) or 'nothing'}; pass them by name"
        )
    ids = named.get("input_ids")
    if "input_ids" in named and (not isinstance(ids, torch.Tensor) or ids.dim() < 2):
        raise Refusal(f"measure needs input_ids of shape [batch, token]; got {_description(ids)}; pass a 2-d tensor")
    return named


def _refuse_non_tensors(arguments: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
    """Refuse a batch passed without **, text that was not tokenized, and lists or arrays in place of tensors."""
    for value in arguments:
        if isinstance(value, Mapping):
            raise Refusal(
                f"inputs are passed by name; got a {type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}; "
                "write measure(model, **batch)"
            )
    for name, value in [*((None, value) for value in arguments), *inputs.items()]:
        label = f"{name} as " if name else ""
        if isinstance(value, str) or (_is_array(value) and _contains(value, str)):
            raise Refusal(
                f"a model reads tensors; got {label}text; write measure(model, **tokenizer(texts, padding=True, "
                'return_tensors="pt"))'
            )
        if _is_array(value) and _contains(value, bool | int | float):
            raise Refusal(
                f"a model reads tensors; got {label}a {type(value).__name__} of numbers; write torch.tensor(…), or call the "
                'tokenizer with return_tensors="pt"'
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _contains(value: Any, kind: Any) -> bool:
    """Whether the first element of nested lists or of an array is of this type."""
    if isinstance(value, np.ndarray):
        return value.size > 0 and isinstance(value.flat[0].item(), kind)
    return _contains(value[0], kind) if isinstance(value, list | tuple) and value else isinstance(value, kind)


def _description(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _refuse_unknown_keywords(model: nn.Module, inputs: Mapping[str, Any], options: Sequence[str]) -> None:
    """Refuse a keyword that is neither an input of the model nor an option of `measure`.

    A model whose forward has **kwargs would ignore a misspelled one. A module that is not from transformers may use any
    keyword, so only near misses of an option are refused there.
    """
    explicit, has_kwargs = _parameters(model)
    others = [name for name in inputs if name not in explicit]
    if not others or not has_kwargs:
        return  # binding the signature refuses the others
    accepted = {*explicit, *_keywords_inside(model), *_COMMON_INPUTS}
    from_transformers = any(hasattr(module, "config") for module in model.modules())
    for name in others:
        near = get_close_matches(name, [*options, *sorted(accepted)], 1, 0.6)
        misspells_option = bool(near) and near[0] in options and bool(get_close_matches(name, near, 1, 0.8))
        if name in accepted or not (from_transformers or misspells_option):
            continue
        hint = f"did you mean {near[0]}?" if near else f"remove it; the options are {', '.join(options)}"
        raise Refusal(
            f"a keyword must be an option of measure or an input of the model; {type(model).__name__} has no input {name}; "
            f"{hint}"
        )


def _parameters(module: nn.Module) -> tuple[set[str], bool]:
    """The names of the parameters of a module's forward, and whether it has **kwargs."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.kind not in kinds}, any(p.kind is kinds[0] for p in parameters)


def _keywords_inside(model: nn.Module) -> Iterator[str]:
    """Keywords that the modules inside a model may read from **kwargs, and those that transformers documents."""
    visited = set()
    for module in model.modules():
        if type(module) in visited:
            continue
        visited.add(type(module))
        yield from _parameters(module)[0]
        yield from _identifiers(getattr(type(module).forward, "__code__", None))
    try:
        from transformers.utils.generic import TransformersKwargs
    except ImportError:
        return
    yield from TransformersKwargs.__annotations__


def _identifiers(code: CodeType | None) -> Iterator[str]:
    """The string constants of a function that could be keys of its **kwargs."""
    for constant in () if code is None else code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
