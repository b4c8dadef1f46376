"""What heads do on generated corpora: perfect heads by hand, heads that training makes, and retrieval against an oracle."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

from attlas.extract import measure
from attlas.extract.corpus.generated import IN_ANSWER, IN_NEEDLE, generation_of
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.quantities import ROW_QUANTITIES, known_quantities
from attlas.extract.engines.reference import rows_of
from attlas.extract.engines.rows import AttentionCall, Reading
from attlas.extract.engines.sums import head_sums
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from attlas.extract.errors import Refusal
from attlas.extract.model.id_documents import id_documents
from attlas.extract.options import RunOptions
from attlas.extract.tables import TABLES, measured_columns, needs_of
from attlas.extract.tables.heads import HeadQuantities
from tests.extract.checkpoints import model_of
from tests.extract.models import eager_patterns
from tests.extract.runs import complete_run

LENGTH = 16
RETRIEVAL = ("retrieval_score", "retrieval_copy_score")


def columns_of(
    attended: np.ndarray, ids: np.ndarray, *, causal: bool = True, reading: Reading | None = None
) -> dict[str, float]:
    """The columns of a head whose row i gives all of its weight to key attended[i]."""
    n = len(ids)
    pattern = torch.zeros(n, n)
    pattern[torch.arange(n), torch.from_numpy(attended)] = 1
    visible = torch.ones(n, n, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    assert bool(visible[pattern > 0].all())
    mask = torch.where(pattern > 0, 0.0, -1e4).where(visible, torch.finfo(torch.float32).min)[None, None]
    zeros = torch.zeros(1, dtype=torch.int64)
    seen = visibility_from_mask(mask, causal=False, queries=Axis(zeros, zeros + n, n))
    flat = torch.zeros(1, 1, n, 4)
    call = AttentionCall(
        flat, flat, flat, seen, 1.0, token_ids=torch.from_numpy(ids.astype(np.int64))[None], reading=reading
    )
    rows = rows_of(call, flat, known_quantities(ROW_QUANTITIES, call.facts))
    names = needs_of({"heads": TABLES["heads"].facts}).head_names
    quantities = HeadQuantities(names, head_sums(HeadObservation(rows, seen), names, profiles=False).values.numpy())
    return {c.name: float(c.compute(quantities).item()) for c in TABLES["heads"].facts if c.compute is not None}


@pytest.fixture(scope="module")
def repeated(demo) -> np.ndarray:
    """[CLS] block block [SEP]."""
    (document,) = id_documents(generation_of("random-repeats", blocks=1, length=LENGTH), demo.tokenizer)
    return np.array([101, *document.ids, 102])


def test_a_perfect_duplicate_head_has_all_rows_that_see_a_copy_on_it(repeated: np.ndarray) -> None:
    n, places = len(repeated), np.arange(len(repeated))
    second = (places > LENGTH) & (places <= 2 * LENGTH)
    causal = columns_of(np.where(second, places - LENGTH, 0), repeated)
    assert causal["mass_same_token"] == pytest.approx(LENGTH / n) and causal["mass_induction"] == 0
    first = (places > 0) & (places <= LENGTH)
    both = np.where(second, places - LENGTH, np.where(first, places + LENGTH, 0))
    assert columns_of(both, repeated, causal=False)["mass_same_token"] == pytest.approx(2 * LENGTH / n)


def test_a_perfect_induction_head_has_all_rows_of_the_second_copy_on_what_followed_the_first(repeated) -> None:
    places = np.arange(len(repeated))
    second = (places > LENGTH) & (places <= 2 * LENGTH)
    got = columns_of(np.where(second, places - LENGTH + 1, 0), repeated)
    assert got["mass_induction"] == pytest.approx(LENGTH / len(repeated)) and got["mass_same_token"] == 0


def test_a_head_that_looks_evenly_has_little_of_either_by_chance(repeated: np.ndarray) -> None:
    n = len(repeated)
    pairs = [(i, j) for i in range(n) for j in range(i) if repeated[i] == repeated[j]]
    assert len(pairs) == LENGTH
    chance = sum(1 / (i + 1) for i, _ in pairs) / n
    assert chance < 0.02


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_perfect_retrieval_head_scores_one_and_one_that_looks_elsewhere_nothing(demo, ahead: int) -> None:
    (document,) = id_documents(generation_of("needle", blocks=1, length=60, depths="50"), demo.tokenizer)
    ids, marks = document.ids, document.marks
    assert marks is not None
    answer, needle = np.flatnonzero(marks == IN_ANSWER), np.flatnonzero(marks == IN_NEEDLE)
    said = needle[-1 - len(answer) : -1]  # before the full stop
    assert ids[said].tolist() == ids[answer].tolist()
    rows = torch.from_numpy(marks == IN_ANSWER).roll(-ahead)[None]
    span = slice(int(answer[0]) - ahead, int(answer[-1]) + 1 - ahead)
    reading = Reading(rows, torch.from_numpy(marks == IN_NEEDLE)[None], span, ahead)
    scores = {}
    for name, keys in (("copies", said), ("looks", np.full(len(answer), needle[0])), ("rests", answer * 0)):
        attended = np.zeros(len(ids), int)
        attended[answer - ahead] = keys
        got = columns_of(attended, ids, reading=reading)
        scores[name] = tuple(got[column] for column in RETRIEVAL)
    assert scores == {"copies": (1, 1), "looks": (1, 0), "rests": (0, 0)}


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_retrieval_equals_the_oracle_on_eager_patterns(demo, tmp_path: Path, family: str, engine: str) -> None:
    """Largest weights of the eager patterns, in the rows that are left when the marks are read from the corpus."""
    model = model_of(family, vocab_size=len(demo.tokenizer))
    model.save_pretrained(tmp_path / "model")
    demo.tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    asked = RunOptions(
        model=str(tmp_path / "model"),
        corpus="needle",
        out=out,
        blocks=2,
        length=40,
        depths="0,70",
        statistics=RETRIEVAL,
        stacks="all",
        engine=engine,
        batch_tokens=1000,
    )
    complete_run(asked)
    heads = pl.read_parquet(out / "heads" / "*.parquet")
    documents = list(id_documents(asked.generation, demo.tokenizer))
    for sequence, document in enumerate(documents):
        ids = np.array([101, *document.ids, 102])
        marks = np.pad(document.marks, 1)
        for stack, layer, pattern in patterns_of(model, ids):
            ahead = int(stack != "encoder")
            rows = [r for r in range(len(ids) - ahead) if marks[r + ahead] == IN_ANSWER]
            best = pattern[:, rows].argmax(-1)
            found = (marks[best] == IN_NEEDLE).mean(-1)
            copied = ((marks[best] == IN_NEEDLE) & (ids[best] == ids[[r + ahead for r in rows]])).mean(-1)
            got = heads.filter(sequence_id=sequence, layer=layer).filter(pl.col("stack").cast(pl.String) == stack)
            np.testing.assert_allclose(got.sort("head")["retrieval_score"], found, atol=1e-6)
            np.testing.assert_allclose(got.sort("head")["retrieval_copy_score"], copied, atol=1e-6)
    assert heads["retrieval_score"].sum() > 0
    assert (
        heads["stack"].cast(pl.String).unique().sort().to_list()
        == {
            "bert": ["encoder"],
            "llama": ["decoder"],
            "t5": ["cross", "decoder", "encoder"],
        }[family]
    )


def patterns_of(model, ids: np.ndarray):
    """(stack, layer, [head, query, key]) of every layer of a model on one sequence, from its eager attention."""
    tokens = torch.from_numpy(ids)[None]
    if not model.config.is_encoder_decoder:
        stack = "encoder" if model.config.model_type == "bert" else "decoder"
        patterns = eager_patterns(model, input_ids=tokens)
        return [(stack, layer, pattern[0].numpy()) for layer, pattern in enumerate(patterns)]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        given = model(input_ids=tokens, decoder_input_ids=tokens, output_attentions=True)
    names = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
    return [(stack, n, p[0].numpy()) for stack, name in names.items() for n, p in enumerate(given[name])]


def test_retrieval_is_refused_by_name_and_left_out_of_all_without_a_needle(demo) -> None:
    inputs = demo.tokenizer("no needle here", return_tensors="pt")
    for statistics in ("all", "heads"):
        assert not {c.name for c in measured_columns(statistics)["heads"]} & set(RETRIEVAL)
    assert {c.name for c in measured_columns("all", corpus="needle")["heads"]} >= set(RETRIEVAL)
    for name in ("retrieval_score", "heads.retrieval_copy_score"):
        with pytest.raises(Refusal, match="is measured on the corpus needle alone; there is none here; leave it out"):
            measure(demo.model, statistics=("query_norm", name), **inputs)


# --- a model that learns to copy


class AttentionLayer(nn.Module):
    """Causal attention over the stream; positions enter queries and keys alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        made = (self.query(y + positions), self.key(y + positions), self.value(y))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in made)
        contexts = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(contexts.transpose(1, 2).flatten(2))


class AttentionOnly(nn.Module):
    """A decoder of two layers of attention and nothing else."""

    def __init__(self, vocabulary: int, positions: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.layers = nn.ModuleList(AttentionLayer(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, self.positions.weight[: input_ids.shape[1]])
        return self.head(self.norm(x))


def repeated_blocks(sequences: int, length: int, vocabulary: int) -> torch.Tensor:
    """Token 0, then a block of others, twice."""
    blocks = torch.rand(sequences, vocabulary - 1).argsort(1)[:, :length] + 1
    return torch.cat((torch.zeros(sequences, 1, dtype=torch.long), blocks, blocks), 1)


def test_training_on_repeats_makes_an_induction_head_where_there_was_none() -> None:
    """Of the rows of second copies, which alone can look at what followed, the best head gives well over half of its weight."""
    vocabulary, longest = 24, 12
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AttentionOnly(vocabulary, 2 * longest + 1)
        ids = repeated_blocks(16, longest, vocabulary)
        before = strongest_induction(model, ids)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(300):
            # of different lengths, so that counting back does not do
            length = int(torch.randint(6, longest + 1, ()))
            given = repeated_blocks(64, length, vocabulary)
            scores = model.train()(given)[:, length + 1 : -1]
            loss = functional.cross_entropy(scores.flatten(0, 1), given[:, length + 2 :].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = strongest_induction(model, ids)
    assert before < 0.1 and after > 0.5


def strongest_induction(model: nn.Module, ids: torch.Tensor) -> float:
    """The largest mass_induction of any head, as a share of the rows that follow an earlier copy."""
    heads = pl.DataFrame(measure(model.eval(), tables=("heads",), input_ids=ids)["heads"])
    largest = heads.group_by("layer", "head").agg(pl.col("mass_induction").mean())["mass_induction"].max()
    assert isinstance(largest, float)
    tokens = ids.shape[1]
    return largest * tokens / ((tokens - 1) / 2)
