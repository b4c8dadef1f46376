"""The names that inputs may have: a model that takes any keyword swallows what was meant otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import CodeType
from typing import Any

from torch import nn

from extract.errors import Refusal

# what tokenizers give beside ids, which a model that has one type of token does without; and what decorators of
# transformers take before forward does
_OF_ANY = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    *("return_dict", "use_cache", "output_attentions", "output_hidden_states"),
)


def refuse_unknown_names(model: nn.Module, inputs: Mapping[str, Any], options: Sequence[str]) -> None:
    """Raise Refusal for a keyword that neither the model reads nor `measure` takes as an option.

    A module that is not of transformers may do anything with its **kwargs: there, a name is refused only where it is
    nearly that of an option.
    """
    explicit, takes_any = _parameters(model)
    others = [name for name in inputs if name not in explicit]
    if not others or not takes_any:
        return  # the signature itself refuses the others
    known = {*explicit, *_known_inside(model), *_OF_ANY}
    of_transformers = any(hasattr(module, "config") for module in model.modules())
    for name in others:
        near = get_close_matches(name, [*options, *sorted(known)], 1, 0.6)
        if name in known or not (of_transformers or (near and near[0] in options and _is_misspelt(name, near[0]))):
            continue
        hint = f"did you mean {near[0]}?" if near else f"leave it out; options are {', '.join(options)}"
        raise Refusal(
            f"a keyword is an option of measure or an input of the model; {type(model).__name__} reads no {name}; {hint}"
        )


def _is_misspelt(name: str, option: str) -> bool:
    return bool(get_close_matches(name, [option], 1, 0.8))


def _parameters(module: nn.Module) -> tuple[set[str], bool]:
    """The names that a module's forward takes, and whether it takes any."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.kind not in kinds}, any(p.kind is kinds[0] for p in parameters)


def _known_inside(model: nn.Module) -> Iterator[str]:
    """What modules within a model read by name, since keywords are handed on, and what transformers documents."""
    seen = set()
    for module in model.modules():
        if type(module) in seen:
            continue
        seen.add(type(module))
        yield from _parameters(module)[0]
        yield from _strings(getattr(type(module).forward, "__code__", None))
    try:
        from transformers.utils.generic import TransformersKwargs
    except ImportError:
        return
    yield from TransformersKwargs.__annotations__


def _strings(code: CodeType | None) -> Iterator[str]:
    """What a forward takes out of its keywords by a name of its own."""
    for constant in () if code is None else code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
