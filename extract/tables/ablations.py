"""`ablations`, on request: what changes in a model's result when a head or a sublayer is left out, of the sequences of the sample.

A head is left out by setting its contexts to zero or to their mean, a sublayer by setting what it adds to the residual stream.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.errors import Refusal
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import OF_SAMPLE
from attlas.extract.tables.recording import Arrays, RaggedRecorder
from attlas.extract.tables.selection import statistics_named
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["head", "attention", "mlp"]
_PARTS: tuple[Part, ...] = ("head", "attention", "mlp")
# the words of the option --ablate: parts, and what their vectors are set to
_WORDS: Mapping[Part, str] = {"head": "heads", "attention": "attention", "mlp": "mlp"}
_VALUES = ("zero", "mean")


@dataclass(frozen=True)
class AblateOption:
    """Which parts are left out, and whether their vectors are set to their mean over the sample instead of zero."""

    parts: tuple[Part, ...] = _PARTS
    is_mean: bool = False

    @property
    def text(self) -> str:
        """The option as a run records it; empty for the default."""
        words = [_WORDS[part] for part in self.parts if self.parts != _PARTS]
        return ",".join([*words, *(("mean",) if self.is_mean else ())])


def ablate_option(ablate: str | Collection[str] | None) -> AblateOption:
    """The option --ablate, of words in a comma-separated text or in a collection; the default for None. Raises Refusal."""
    if ablate is None:
        return AblateOption()
    words = statistics_named(ablate)
    known = (*_WORDS.values(), *_VALUES)
    for word in words or ("",):
        if word not in known:
            nearest = difflib.get_close_matches(word, known, n=2)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else "use one or several of these"
            raise Refusal(f"ablate takes {', '.join(known)}, separated by commas; got {word!r}; {hint}")
    if set(_VALUES) <= set(words):
        raise Refusal("a part is set to zero or to its mean; ablate has both; leave one out, or make two runs")
    parts: tuple[Part, ...] = tuple(part for part in _PARTS if _WORDS[part] in words)
    return AblateOption(parts or _PARTS, "mean" in words)


class AblationRecorder(RaggedRecorder):
    """Keeps a row for each part that is left out."""

    def keep_ablations(self, place: int, sequence: Any) -> Mapping[str, Tensor]:
        import torch

        rows: list[Tensor] = []
        for parts, outcome in sequence.outcomes():
            changes = _changes(sequence.plain, outcome, sequence.repeated)
            for number, part in enumerate(parts):
                keys = (place, part.attention, _PARTS.index(part.part), part.head)
                rows.append(torch.cat((changes.new_tensor(keys), changes[number])))
        return {"rows": torch.stack(rows)} if rows else {"rows": sequence.plain.states.new_zeros(0, 8).double()}

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        number, attention, part, head, *changes = kept["rows"].T
        layers = [self.scope.layout.attentions[n] for n in attention.astype(int)]
        chosen = sequences[number.astype(int)]
        columns: Arrays = {
            "sequence_id": self.scope.sequence_ids[chosen],
            "document_id": self.scope.document_ids[chosen],
            "stack": np.array([layer.stack for layer in layers], dtype=object),
            "layer": np.array([layer.layer for layer in layers], dtype=np.int64),
            "part": np.array([_PARTS[n] for n in part.astype(int)], dtype=object),
            "head": head,
        }
        names = ("final_change", "final_norm_change", "loss_change_nats", "repeat_gain_change_nats")
        wanted = {c.name for c in self.scope.columns}
        columns |= {name: values for name, values in zip(names, changes, strict=True) if name in wanted}
        self._parts.append(columns)


def _changes(plain: Any, outcome: Any, repeated: Tensor | None) -> Tensor:
    """The four columns [copy, 4]; NaN where there is no loss."""
    import torch

    y, z = plain.states.double(), outcome.states.double()
    u, v = y / y.norm(dim=-1, keepdim=True), z / z.norm(dim=-1, keepdim=True)
    change = ((u - v).square().sum(-1) / 2).flatten(1).mean(1)
    growth = (z.norm(dim=-1) / y.norm(dim=-1) - 1).flatten(1).mean(1)
    loss = gain = change * torch.nan
    if plain.losses is not None:
        of_tokens = outcome.losses.double() - plain.losses.double()
        loss = of_tokens.mean(1)  # NaN if there are none, as below
        assert repeated is not None, "a language model has token ids"
        gain = of_tokens[:, repeated].mean(1) - of_tokens[:, ~repeated].mean(1)
    return torch.stack((change, growth, loss, gain), 1)


TABLE = Table(
    name="ablations",
    row="sequence × stack × layer × part × head",
    kind="ragged",
    keys=(
        SEQUENCE_ID,
        DOCUMENT_ID,
        STACK,
        LAYER,
        Column(name="part", dtype="stack", formula=" | ".join(_PARTS), meaning="What is left out."),
        Column(
            name="head",
            dtype="int16",
            formula="number of the head within its layer, from 0; −1 for a whole sublayer",
            signed=True,
        ),
    ),
    facts=(
        Column(
            name="final_change",
            formula="mean over tokens of 1 − cos(y, y'), y and y' the model's last hidden states with and without the part",
            meaning="How much of the result hangs on the part: what pruning candidates are checked against.",
            bounds=(0, 2),
            reference="Michel 2019",
            nullable=True,
        ),
        Column(
            name="final_norm_change",
            formula="mean over tokens of ‖y'‖ / ‖y‖ − 1",
            meaning="How much larger or smaller the result is without the part.",
            bounds=(-1, None),
            nullable=True,
        ),
        Column(
            name="loss_change_nats",
            unit="nats",
            formula="mean loss of the next token without the part less that with it; null unless the model is a causal "
            "language model with its head",
            meaning="How much worse the model predicts without the part.",
            nullable=True,
        ),
        Column(
            name="repeat_gain_change_nats",
            unit="nats",
            formula="mean loss_change_nats of next tokens that have occurred in the sequence, less that of the others; null if there "
            "are none of either, or where loss_change_nats is",
            meaning="How much less the model gains from repetition without the part: on random-repeats, what its induction hangs on.",
            reference="Olsson 2022",
            nullable=True,
        ),
    ),
    order=("stack", "layer", "part", "head", "sequence_id"),
    on_request=True,
    example="SELECT stack, layer, head, AVG({column}) AS {column} FROM ablations WHERE part = 'head' GROUP BY ALL ORDER BY {column} DESC LIMIT 5",
    needs=lambda columns: Needs(ablations=True),
    recorder=AblationRecorder,
    notes=f"""\
{OF_SAMPLE} `--ablate` chooses the parts (`heads`, `attention`, `mlp`) and what they are set to at every token: `zero`, or with `mean`
a head's contexts and a sublayer's update are set to their mean over all tokens of the sample of all shards (of `measure`: of the
batch), padding left out. So `--ablate mean` says what hangs on how a part differs from token to token, and not on what it always
adds. Heads whose contexts can't be reached have no rows. With `mean`, neither have parts that show other positions than the
sequence's tokens, such as heads over padded windows, or in a model that pads a text to a multiple of its blocks.""",
)
