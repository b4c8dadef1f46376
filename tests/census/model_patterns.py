"""The patterns that a model itself returns, and the softmaxes that it computes.

What counts as a pattern is decided here independently: this module shares no code with `extract`, which it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.census.blocks import dense_pattern
from tests.census.text import BATCH
from tests.census.tiny import TinyModel, forward

# they return the pattern without the sink's share, and scale the output by the rest
RETURNED_BEFORE_SINK = ("granite_swa", "granitemoe_swa")
# inputs with one value per text token
_PER_TOKEN_INPUTS = {
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "bbox"),
    *("image_attention_mask", "image_embeds_position_mask"),
}
_NOT_COUNTS = (
    "dim",
    "size",
    "scal",
    "bias",
    "type",
    "norm",
    "mask",
    "layer",
    "width",
)  # fields named "head" with these words are not numbers of heads


@dataclass(frozen=True)
class ModelPatterns:
    """The patterns that a model returns for inputs, and every softmax that it computes."""

    inputs: Mapping[str, Tensor]
    returned: list[Tensor]
    softmaxes: list[Tensor]


def eager_readings(built: TinyModel) -> Iterator[list[ModelPatterns]]:
    """The patterns of an eager model for the batch as a whole, then for each sequence alone.

    Towers that pack images, and text among images, are measured one sequence at a time. Either reading may be the right
    one, but it must agree in every pattern.
    """
    for inputs in ([dict(built.inputs)], split_sequences(built.inputs)):
        torch.manual_seed(2)  # as when it is measured; random numbers continue from part to part
        yield [_run_eager(replace(built, inputs=part)) for part in inputs]


def split_sequences(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs of each sequence alone, with its own images and without padding."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(BATCH)]
    for name, value in inputs.items():
        first = _first_rows(name, value, inputs)
        cut = [value, value] if first is None else [value[:first], value[first:]]
        for part, of_part in zip(parts, cut, strict=True):
            part[name] = of_part
    return [_without_padding(part) for part in parts]


def _first_rows(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> int | None:
    """The number of a tensor's rows that belong to the first sequence; None if both share all rows."""
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
    return {name: value[:, real] if name in _PER_TOKEN_INPUTS else value for name, value in part.items()}


def _run_eager(built: TinyModel) -> ModelPatterns:
    returned: list[Tensor] = []
    recorder, drawn = _SoftmaxRecorder(), torch.get_rng_state()
    for options in ({"output_attentions": True}, {}):  # the option fails for some models
        recorder = _SoftmaxRecorder()
        torch.set_rng_state(drawn)
        try:
            with recorder:
                returned = returned_patterns(forward(built, **options))
            break
        except Exception:
            continue
    own = [p.double() for p in returned if is_pattern(p) and not _is_average(p)]
    own = [p for n, p in enumerate(own) if not any(p is q or torch.equal(p, q) for q in own[:n])]
    if built.model_type in RETURNED_BEFORE_SINK:
        own = [p * share[..., None] for p, share in zip(own, recorder.shares, strict=True)]
    config, tokens = built.model.config, max((x.shape[1] for x in built.inputs.values() if x.dim() > 1), default=0)
    own, made = ([dense_pattern(p, config, tokens, recorder.sampled) for p in of] for of in (own, recorder.made))
    heads = head_counts(built.model)
    return ModelPatterns(built.inputs, [_uncut_pattern(p, made) for p in own if is_of_heads(p, heads)], made)


def returned_patterns(output: Any) -> list[Tensor]:
    """Every tensor in fields that transformers uses for attention weights, in an output and the outputs of its towers."""
    if not isinstance(output, Mapping):
        return []
    tensors: list[Tensor] = []
    for name, value in output.items():
        tensors += _tensors_in(value) if name.endswith("attentions") else returned_patterns(value)
    return tensors


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and outputs, in which layers without a pattern have None."""
    if isinstance(value, Tensor):
        return [value]
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else []
    return [tensor for one in inner for tensor in _tensors_in(one)]


def is_pattern(weights: Tensor) -> bool:
    """Whether the rows of [batch, …, query, key] are non-negative and sum to at most one.

    Some models return scores or states under the same name. With a learned sink, a row sums to less than one.
    """
    if weights.dim() < 3 or not weights.is_floating_point():
        return False
    total = weights.double().sum(-1)
    return bool(weights.isfinite().all() and weights.min() >= 0 and total.max() <= 1 + 1e-3)


def is_of_heads(weights: Tensor, heads: set[int]) -> bool:
    """Whether one dimension has as many entries as the model has heads.

    Deformable attention returns weights of a few sampled points: [batch, query, head, point], or [batch, query, head,
    level, point], whose sum over levels and points is one. Those weights are not over keys.
    """
    if weights.dim() == 3:  # batch and heads in one dimension
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
    return "head" in name and not any(other in name for other in _NOT_COUNTS)


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
    """Whether all heads are equal: torch's multi-head attention returns their average by default."""
    return pattern.dim() == 4 and pattern.shape[1] > 1 and bool((pattern == pattern[:, :1]).all())


def _uncut_pattern(pattern: Tensor, softmaxes: list[Tensor]) -> Tensor:
    """The softmax of which the pattern is a part, if any: some models omit the tokens that they prepend."""
    rows, keys = pattern.shape[-2:]
    for softmax in softmaxes:
        larger = softmax.dim() == pattern.dim() == 4 and softmax.shape[:2] == pattern.shape[:2]
        larger = larger and softmax.shape[-1] > keys + 1 and softmax.shape[-2] > rows
        if larger and torch.allclose(softmax[..., -rows:, -keys:], pattern, atol=1e-7):
            return softmax
    return pattern


class _SoftmaxRecorder(TorchFunctionMode):
    """Records every softmax of a tensor with three or more dimensions, independently of `extract`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.shares: list[Tensor] = []  # sigmoids
        self.sampled: list[tuple[Tensor, Tensor]] = []  # softmaxes after a selection of rows, with the selection
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


def attends(built: TinyModel) -> bool:
    """Whether a module with attention in its name ran; only used for models without patterns."""
    ran = []
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda module, _args: ran.append(type(module).__name__))
    forward(built)
    return any("attention" in name.lower() or "attn" in name.lower() for name in ran)
