"""What a model gives by itself for inputs: the patterns that it returns and the softmaxes that it computes.

This is the census' own judgement of what a pattern is. It shares no code with `extract`, which it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.census.blocks import in_places
from tests.census.text import BATCH
from tests.census.tiny import Built, forward

# they return the pattern before its sink takes a share, and multiply what comes of it by the rest
BEFORE_SINKS = ("granite_swa", "granitemoe_swa")
# inputs of which each token of the text has one
_OF_TOKENS = {
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "bbox"),
    *("image_attention_mask", "image_embeds_position_mask"),
}
_NO_COUNT = (
    "dim",
    "size",
    "scal",
    "bias",
    "type",
    "norm",
    "mask",
    "layer",
    "width",
)  # names beside "head" that count none


@dataclass(frozen=True)
class Own:
    """What a model gives for inputs: the patterns that it returns, and every softmax that it computes."""

    inputs: Mapping[str, Tensor]
    returned: list[Tensor]
    softmaxes: list[Tensor]


def readings(built: Built) -> Iterator[list[Own]]:
    """What an eager model gives for the batch as a whole, then for each of its sequences alone.

    Towers that pack images together, and text among images, are measured one sequence at a time; nothing here says which,
    since one reading or the other must agree in every pattern.
    """
    for inputs in ([dict(built.inputs)], each_alone(built.inputs)):
        torch.manual_seed(
            2
        )  # as when it is measured: what is drawn for one part follows on what was for the one before
        yield [_own(replace(built, inputs=part)) for part in inputs]


def each_alone(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs of each sequence by itself, with its own images and without the padding of its text."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(BATCH)]
    for name, value in inputs.items():
        first = _first_rows(name, value, inputs)
        cut = [value, value] if first is None else [value[:first], value[first:]]
        for part, of_part in zip(parts, cut, strict=True):
            part[name] = of_part
    return [_without_padding(part) for part in parts]


def _first_rows(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> int | None:
    """How many of a tensor's rows are the first sequence's; None where all are for both."""
    if not value.dim() or len(value) == 1:
        return None
    grid = next((inputs[n] for n in ("grid_thw", "image_grid_thw") if n in inputs), None)
    if grid is None or "grid" in name or len(value) == BATCH:
        return len(value) // BATCH
    patches = grid.prod(-1)
    return int(len(value) * patches[: len(grid) // BATCH].sum() / patches.sum())


def _without_padding(part: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = part.get("attention_mask") if "input_ids" in part else None
    if mask is None or mask.dim() != 2:
        return part
    real = mask[0].bool()
    return {name: value[:, real] if name in _OF_TOKENS else value for name, value in part.items()}


def _own(built: Built) -> Own:
    returned: list[Tensor] = []
    recorder, drawn = _Softmaxes(), torch.get_rng_state()
    for options in ({"output_attentions": True}, {}):  # the option fails in some models
        recorder = _Softmaxes()
        torch.set_rng_state(drawn)
        try:
            with recorder:
                returned = returned_patterns(forward(built, **options))
            break
        except Exception:
            continue
    own = [p.double() for p in returned if is_pattern(p) and not _is_average(p)]
    own = [p for n, p in enumerate(own) if not any(p is q or torch.equal(p, q) for q in own[:n])]
    if built.model_type in BEFORE_SINKS:
        own = [p * share[..., None] for p, share in zip(own, recorder.shares, strict=True)]
    config, tokens = built.model.config, max((x.shape[1] for x in built.inputs.values() if x.dim() > 1), default=0)
    own, made = ([in_places(p, config, tokens, recorder.sampled) for p in of] for of in (own, recorder.made))
    heads = head_counts(built.model)
    return Own(built.inputs, [_whole(p, made) for p in own if is_of_heads(p, heads)], made)


def returned_patterns(output: Any) -> list[Tensor]:
    """Every tensor under a name that transformers gives to attention weights, in an output and those of its towers."""
    if not isinstance(output, Mapping):
        return []
    found: list[Tensor] = []
    for name, value in output.items():
        found += _tensors_in(value) if name.endswith("attentions") else returned_patterns(value)
    return found


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and outputs; layers without a pattern have None there."""
    if isinstance(value, Tensor):
        return [value]
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else []
    return [tensor for one in inner for tensor in _tensors_in(one)]


def is_pattern(weights: Tensor) -> bool:
    """Whether every row holds shares of one whole: [batch, …, query, key], none below zero, at most one in sum.

    Some models return scores or states under the same name. A row may sum to less: a learned sink takes the rest.
    """
    if weights.dim() < 3 or not weights.is_floating_point():
        return False
    total = weights.double().sum(-1)
    return bool(weights.isfinite().all() and weights.min() >= 0 and total.max() <= 1 + 1e-3)


def is_of_heads(weights: Tensor, heads: set[int]) -> bool:
    """Whether one of its dimensions is the heads', as many as the model says it has.

    Deformable attention returns weights of a few sampled points: [batch, query, head, point], or [batch, query, head,
    level, point], whose sum over levels and points is one. Those are over no keys.
    """
    if weights.dim() == 3:  # batch and heads in one
        return any(len(weights) % count == 0 for count in heads)
    if weights.dim() > 4 and bool(((weights.double().sum((-2, -1)) - 1).abs() < 1e-4).all()):
        return False
    return any(size in heads for size in weights.shape[1:-2])


def head_counts(model: nn.Module) -> set[int]:
    """The numbers of heads that a model's configurations and modules state."""
    stated = [vars(module) for module in model.modules()]
    stated += [part.to_dict() for part in _configs(getattr(model, "config", None))]
    return {count for names in stated for name, value in names.items() if _counts_heads(name) for count in _ints(value)}


def _counts_heads(name: str) -> bool:
    return "head" in name and not any(other in name for other in _NO_COUNT)


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those of its towers."""
    if hasattr(config, "to_dict"):
        yield config
        for part in vars(config).values():
            yield from _configs(part)


def _ints(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if isinstance(one, int) and not isinstance(one, bool) and one > 0]


def _is_average(pattern: Tensor) -> bool:
    """Whether it is one pattern for all heads: torch's multi-head attention averages them unless told otherwise."""
    return pattern.dim() == 4 and pattern.shape[1] > 1 and bool((pattern == pattern[:, :1]).all())


def _whole(pattern: Tensor, softmaxes: list[Tensor]) -> Tensor:
    """The softmax that a pattern was cut from: some models leave out the tokens that they put before the user's."""
    rows, keys = pattern.shape[-2:]
    for softmax in softmaxes:
        larger = softmax.dim() == pattern.dim() == 4 and softmax.shape[:2] == pattern.shape[:2]
        larger = larger and softmax.shape[-1] > keys + 1 and softmax.shape[-2] > rows
        if larger and torch.allclose(softmax[..., -rows:, -keys:], pattern, atol=1e-7):
            return softmax
    return pattern


class _Softmaxes(TorchFunctionMode):
    """Every softmax over the last of three dimensions or more, by code that shares nothing with the package's."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.shares: list[Tensor] = []  # sigmoids
        self.sampled: list[tuple[Tensor, Tensor]] = []  # those made after some of the rows were chosen, and which
        self._chosen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "softmax" and result.dim() >= 3:
            self.made.append(result.detach().double().nan_to_num(0.0))
            if self._chosen is not None:
                self.sampled.append((self.made[-1], self._chosen))
            self._chosen = None
        if name == "topk":
            self._chosen = result[1]
        if name == "sigmoid" and result.dim() == 3:
            self.shares.append(result.detach().double())
        return result


def attends(built: Built) -> bool:
    """Whether a module that calls itself attention ran: asked only of models that showed none."""
    ran = []
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda module, _args: ran.append(type(module).__name__))
    forward(built)
    return any("attention" in name.lower() or "attn" in name.lower() for name in ran)
