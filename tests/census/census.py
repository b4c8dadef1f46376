"""The census: every architecture of transformers as a tiny random model, measured, against its own eager patterns.

`python -m tests.census.census [model_type … | text | vision | audio | multimodal]` prints a line of each; `make census`
measures all of them and writes data/COVERAGE.md.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from extract.capture.examine import is_distribution, is_over_keys, patterns_in
from extract.errors import CaptureError, Refusal
from extract.measurement import layout_of, measure, parts_of
from tests import oracles
from tests.census.blocks import in_places
from tests.census.pool import each
from tests.census.tiny import GAIN, Built, NotBuilt, architectures, build, forward, reason_of, takes

EXACT, FALLBACK, UNCOMPARED = "exact", "exact by eager fallback", "measured, gives no patterns to compare with"
REFUSED, WITHOUT, NOT_BUILT, WRONG = "refused", "no attention", "not built", "WRONG"
OUTCOMES = (EXACT, FALLBACK, UNCOMPARED, REFUSED, WITHOUT, NOT_BUILT, WRONG)
FALLBACKS = {"softmax", "replay"}
ABSOLUTE, RELATIVE = 1e-5, 1e-4
SMALL_GAIN = 0.2
# they return the pattern before its sink takes a share, and multiply what comes of it by the rest
BEFORE_SINKS = ("granite_swa", "granitemoe_swa")
# what is called attention there is no softmax over keys, so there is no pattern
WITHOUT_PATTERN = {
    "autoformer": "weighs delays of the whole series by autocorrelation",
    "mobilevitv2": "one vector of weights for all queries",
    "mra": "approximates by blocks of several resolutions, without a softmax",
    "patchtsmixer": "a gate of softmax over features",
    "rwkv": "a recurrence",
    "swiftformer": "one vector of weights for all queries",
    "yoso": "estimates by hashing, without a softmax",
}


@dataclass(frozen=True)
class Entry:
    """An architecture's line in the census."""

    model_type: str
    modality: str
    outcome: str
    reason: str = ""
    stacks: str = ""
    ways: tuple[str, ...] = ()
    compared: int = 0  # patterns of the model's own
    residual: str = ""

    @property
    def fast(self) -> bool:
        return bool(self.ways) and not {*self.ways} & FALLBACKS


def entry(model_type: str) -> Entry:
    """Build, measure and compare one architecture.

    With large weights some tiny models amplify rounding so much that their own two forms differ, or let weights of keys
    underflow to zero; these are compared with smaller ones, or in float64.
    """
    warnings.simplefilter("ignore")
    found = _compared(Making(model_type))
    if found.outcome in (WRONG, REFUSED):
        for said, making in (
            ("with smaller weights", Making(model_type, gain=SMALL_GAIN)),
            ("in float64", Making(model_type, double=True)),
            ("as it attends by eager code", Making(model_type, attention="eager")),
        ):
            again = _compared(making)
            if again.outcome in (EXACT, FALLBACK):
                return replace(again, reason=f"compared {said}")
    return found


@dataclass(frozen=True)
class Making:
    """How a tiny model is made."""

    model_type: str
    gain: float = GAIN
    double: bool = False
    attention: str | None = None  # as it is measured

    def built(self, attention: str | None = None) -> Built | NotBuilt:
        built = build(self.model_type, attention=attention or self.attention, gain=self.gain)
        if isinstance(built, NotBuilt):
            return built
        if not self.double:
            return built
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in built.inputs.items()}
        return replace(built, model=built.model.double(), inputs=inputs)


def _compared(making: Making) -> Entry:
    model_type, built = making.model_type, making.built()
    kind = built.modality
    if isinstance(built, NotBuilt):
        return Entry(model_type, kind, NOT_BUILT, built.reason)
    try:
        forward(built)
    except Exception as error:
        return Entry(model_type, kind, NOT_BUILT, f"its forward pass fails: {reason_of(error)}")
    own = own_patterns(making)
    try:
        tables, layout = measured(built)
    except (CaptureError, Refusal) as error:
        if model_type in WITHOUT_PATTERN:
            return Entry(model_type, kind, WITHOUT, WITHOUT_PATTERN[model_type])
        outcome = REFUSED if any(p.returned or p.softmaxes for p in own) or attends(built) else WITHOUT
        return Entry(model_type, kind, outcome, "" if outcome == WITHOUT else str(error))
    except Exception as error:
        return Entry(model_type, kind, WRONG, reason_of(error))
    stacks = ", ".join(f"{s} {len(layout.of(s))}" for s in layout.stacks)
    facts = {"stacks": stacks, "ways": tuple(sorted(layout.ways)), "residual": layout.residual_refusal or "measured"}
    missed, compared = checked(own, layout.attentions, tables["heads"].to_pylist())
    if missed:
        return Entry(model_type, kind, WRONG, "; ".join(missed[:2]), **facts)
    if not compared:
        return Entry(model_type, kind, UNCOMPARED, **facts)
    return Entry(model_type, kind, FALLBACK if layout.ways & FALLBACKS else EXACT, compared=compared, **facts)


def checked(own: list[Own], attentions: Sequence[Any], rows: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Own patterns that were not measured, and how many layers were found among them in every part of the inputs."""
    heads, missed, compared = {a.heads for a in attentions}, [], []
    for number, part in enumerate(own):
        of_part = [r | {"sequence_id": 0} for r in rows if r["sequence_id"] == number] if len(own) > 1 else rows
        returned = [p for p in part.returned if is_over_keys(p, heads)]
        not_measured, left = unmatched(returned, attentions, of_part, part.inputs)
        # what the model computed by softmax and did not return answers for the rest
        _, left = unmatched(part.softmaxes, left, of_part, part.inputs)
        left = [a for a in left if not (a.in_pieces and is_in_pieces(part.softmaxes, a, of_part))]
        missed += not_measured
        compared.append(len(attentions) - len(left))
    return missed, min(compared, default=0)


def measured(built: Built) -> tuple[dict[str, Any], Any]:
    """The tables of a batch, all stacks that it reaches, and the layout they were measured by."""
    inputs: dict[str, Any] = dict(built.inputs)
    if "use_cache" in takes(type(built.model)):
        inputs["use_cache"] = False
    torch.manual_seed(2)
    tables = measure(built.model, **cast(Any, inputs))
    return tables, layout_of(built.model, parts_of(built.model, inputs)[0].inputs)


@dataclass(frozen=True)
class Own:
    """What the model gives by itself for inputs: the patterns that it returns, and every softmax that it computes."""

    inputs: Mapping[str, Tensor]
    returned: list[Tensor]
    softmaxes: list[Tensor]


def own_patterns(making: Making) -> list[Own]:
    """By eager attention; one where a batch is a batch, else one of each image."""
    built = making.built("eager")
    if isinstance(built, NotBuilt):
        return []
    parts = _parts(making)
    torch.manual_seed(2)  # as when it is measured: what is drawn for one part follows on what was for the one before
    return [_own(making, replace(built, inputs=part)) for part in parts]


def _parts(making: Making) -> list[dict[str, Tensor]]:
    """The inputs as they are measured: all at once, or one sequence or image at a time."""
    built = making.built()
    assert not isinstance(built, NotBuilt), "it was built before"
    try:
        return [part.inputs for part in parts_of(built.model, built.inputs)]
    except (CaptureError, Refusal):
        return [dict(built.inputs)]


def _own(making: Making, built: Built) -> Own:
    returned: list[Tensor] = []
    recorder, drawn = _Softmaxes(), torch.get_rng_state()
    for options in ({"output_attentions": True}, {}):  # the option fails in some models
        recorder = _Softmaxes()
        torch.set_rng_state(drawn)
        try:
            with recorder:
                returned = patterns_in(forward(built, **options))
            break
        except Exception:
            continue
    own = [p.double() for p in returned if is_distribution(p) and not _is_average(p)]
    own = [p for n, p in enumerate(own) if not any(p is q or torch.equal(p, q) for q in own[:n])]
    if making.model_type in BEFORE_SINKS:
        own = [p * share[..., None] for p, share in zip(own, recorder.shares, strict=True)]
    config, tokens = built.model.config, max((x.shape[1] for x in built.inputs.values() if x.dim() > 1), default=0)
    own, made = ([in_places(p, config, tokens, recorder.sampled) for p in of] for of in (own, recorder.made))
    return Own(built.inputs, [_whole(p, made) for p in own], made)


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
    """Every softmax over the last of three dimensions or more, by a way that shares nothing with the seam's."""

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


def unmatched(
    own: list[Tensor], attentions: Sequence[Any], rows: list[dict[str, Any]], inputs: Mapping[str, Tensor]
) -> tuple[list[str], list[Any]]:
    """Own patterns that no measured layer equals in every column, and layers that no own pattern equals."""
    of_layers: dict[tuple[str, int], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        of_layers.setdefault((row["stack"], row["layer"]), {})[row["sequence_id"], row["head"]] = row
    left, missed = list(attentions), []
    for number, pattern in enumerate(own):
        failures = []
        for attention in left:
            failure = difference(pattern, attention, of_layers[attention.stack, attention.layer], inputs)
            if failure is None:
                left.remove(attention)
                break
            failures.append(f"{attention.stack} {attention.layer}: {failure}")
        else:
            nearest = next((f for f in failures if "heads" not in f), failures[0] if failures else "no layer is left")
            missed.append(f"own pattern {number} of shape {tuple(pattern.shape)} was not measured ({nearest})")
    return missed, left


def difference(
    pattern: Tensor, attention: Any, rows: Mapping[tuple[int, int], Mapping[str, Any]], inputs: Mapping[str, Tensor]
) -> str | None:
    """Where a layer's rows are not those of the pattern; None if they are."""
    sequences = 1 + max(sequence for sequence, _ in rows)
    pattern = heads_second(pattern, attention.heads, sequences)
    if pattern.dim() != 4 or pattern.shape[1] != attention.heads or pattern.shape[0] % sequences:
        return f"has {attention.heads} heads"
    for name, side in ((attention.queries, 2), (attention.keys, 3)):
        if name is not None and inputs[name].shape[1] != pattern.shape[side]:
            return "heads are of other tokens"
    if not attention.crosses and pattern.shape[2] != pattern.shape[3]:
        return "heads look at something else"
    windows = len(pattern) // sequences
    # of each sequence in turn, or the first of each first: as the seam found it by changing the order of sequences
    of_sequences = pattern.unflatten(0, (windows, sequences)).transpose(0, 1) if attention.batch_last else None
    pieces = pattern.unflatten(0, (sequences, windows)) if of_sequences is None else of_sequences
    for (sequence, head), row in rows.items():
        queries, keys = (
            real_of(pieces[sequence], sequence, name, side, inputs)
            for name, side in ((attention.queries, -2), (attention.keys, -1))
        )
        parts = [p[queries][:, keys].numpy() for p in pieces[sequence, :, head]]
        # heads share a mask, and a weight that underflows in one need not in another
        if any(0 in part.shape for part in parts):
            return "has no real tokens there"
        visible = [(p.amax(0) > 0)[queries][:, keys].numpy() for p in pieces[sequence]]
        for name, value in expected_columns(parts, visible, crosses=attention.crosses).items():
            if not agree(row[name], value):
                return f"{name} of head {head} in sequence {sequence} is {row[name]}, not {value}"
    return None


def is_in_pieces(softmaxes: list[Tensor], attention: Any, rows: list[dict[str, Any]]) -> bool:
    """Whether a layer is what some softmaxes in a row, each of a window or an image of the sequence, come to together."""
    of_heads = {r["head"]: r for r in rows if (r["stack"], r["layer"]) == (attention.stack, attention.layer)}
    tokens = of_heads[0]["query_rows"]
    for first in range(len(softmaxes)):
        pieces: list[Tensor] = []
        for softmax in softmaxes[first:]:
            one = heads_second(softmax, attention.heads, 1)
            if one.dim() != 4 or one.shape[:2] != (1, attention.heads) or one.shape[2] != one.shape[3]:
                break
            pieces.append(one[0])
            if sum(piece.shape[-1] for piece in pieces) >= tokens:
                break
        if len(pieces) < 2 or sum(piece.shape[-1] for piece in pieces) != tokens:
            continue
        visible = [(piece.amax(0) > 0).numpy() for piece in pieces]
        expected = [
            expected_columns([piece[head].numpy() for piece in pieces], visible, crosses=False) for head in of_heads
        ]
        if all(
            agree(row[name], value)
            for row, columns in zip(of_heads.values(), expected, strict=True)
            for name, value in columns.items()
        ):
            return True
    return False


def heads_second(pattern: Tensor, heads: int, sequences: int) -> Tensor:
    """A pattern as [batch and windows, head, query, key], from the several ways in which models give theirs."""
    if pattern.dim() == 3 and len(pattern) % (sequences * heads) == 0:
        return pattern.unflatten(0, (-1, heads))
    if pattern.dim() > 4 and heads in pattern.shape[1:-2]:
        return pattern.movedim(1 + pattern.shape[1:-2].index(heads), -3).flatten(0, -4)
    return pattern


def real_of(pieces: Tensor, sequence: int, name: str | None, side: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which queries (side −2) or keys (−1) are real: as the inputs' mask says; elsewhere, the keys that anyone sees."""
    count = pieces.shape[side]
    mask = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.get(name or "")
    given = inputs.get(mask) if mask else None
    if name is not None:
        return torch.ones(count, dtype=torch.bool) if given is None else given[sequence].bool()
    seen = (pieces > 0).flatten(0, -3).any(0).any(-2)
    return seen if side == -1 or len(seen) == count else torch.ones(count, dtype=torch.bool)


def expected_columns(parts: list[np.ndarray], visibles: list[np.ndarray], *, crosses: bool) -> dict[str, float | None]:
    """What follows from a head's pattern in a sequence, or from its patterns in the windows of one."""
    of_parts = []
    for part, visible in zip(parts, visibles, strict=True):
        p = _normalized(part)
        rows = [i for i in range(len(p)) if (p[i] > 0).any()]
        sink = _sink(p)
        columns = oracles.entropy_columns(p, visible, rows, sink) | oracles.concentration_columns(p, rows)
        if sink is not None:  # one more outcome
            shares = [
                oracles.entropy([*p[i], sink[i]]) / np.log(visible[i].sum() + 1) for i in rows if visible[i].sum() > 1
            ]
            columns["entropy_normalized"] = float(np.mean(shares)) if shares else None
        if not crosses:
            columns |= oracles.distance_columns(p, visible, rows) | oracles.mass_columns(p, rows, None)
        if len(parts) == 1:
            columns |= oracles.received_columns(p, rows, _sink(p))
            of_parts.append({n: v for n, v in columns.items() if n not in ("mass_sink", "received_max_key")})
        else:
            apart = ("entropy_std_nats", "entropy_normalized", "distance_vs_uniform", "mass_sink", "mass_first")
            of_parts.append({n: v for n, v in columns.items() if n not in apart})
    if len(of_parts) == 1:
        return of_parts[0]
    sizes = [len(part) for part in parts]
    return {name: float(np.average([of[name] for of in of_parts], weights=sizes)) for name in of_parts[0]}


def _normalized(p: np.ndarray) -> np.ndarray:
    """Rows that a float32 softmax has rounded sum to one again; those of a learned sink are left as they are."""
    total = p.sum(-1, keepdims=True)
    return np.where(np.abs(total - 1) < 1e-5, p / np.maximum(total, 1e-30), p)


def _sink(p: np.ndarray) -> np.ndarray | None:
    """What is missing of a row: the mass of a learned sink."""
    missing = 1 - p.sum(-1)
    return missing if missing.max() > 1e-5 else None


def agree(got: Any, expected: float | None) -> bool:
    if got is None or expected is None:
        return got is None and expected is None
    return abs(got - expected) <= max(ABSOLUTE, RELATIVE * abs(expected))


def main(wanted: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = architectures()
    chosen = [t for t in known if not wanted or t in wanted or known[t] in wanted]
    began, entries = time.monotonic(), []
    for model_type, found in each(entry, chosen):
        result = found or Entry(model_type, known[model_type], WRONG, "died, or took too long")
        entries.append(result)
        said = (
            result.model_type,
            result.modality,
            result.outcome,
            result.stacks,
            ",".join(result.ways),
            str(result.compared),
            str(result.residual),
            result.reason,
        )
        print("\t".join(said), flush=True)
    print(Counter(e.outcome for e in entries), f"{time.monotonic() - began:.0f} s")
    if not wanted:
        from tests.census.coverage import coverage

        Path("data/COVERAGE.md").write_text(coverage(entries), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
