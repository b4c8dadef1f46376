"""Models and batches for the benchmarks, with a measured and a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attlas.extract.batching import windows
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.collector import open_collector
from attlas.extract.corpus import open_corpus
from attlas.extract.engines import choose
from attlas.extract.engines.visibility import Axis
from attlas.extract.measurement import layout_of, observe
from attlas.extract.model.encoder import Encoder, load_encoder
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.model.token_classes import token_classes
from attlas.extract.tables import measured_columns


@dataclass(frozen=True)
class Workload:
    """A model and a right-padded batch, with the token ids and classes that a run has."""

    model: nn.Module
    ids: Tensor
    length: Tensor

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def inputs(self) -> dict[str, Tensor]:
        real = torch.arange(self.ids.shape[1]) < self.length[:, None]
        return {"input_ids": self.ids, "attention_mask": real.long()}

    @property
    def batch(self) -> Batch:
        # classes of the demo tokenizer, repeated for the vocabulary of a random model
        classes = np.resize(_demo_classes(), int(self.ids.max()) + 1).astype(np.int64)
        axis = Axis(torch.zeros_like(self.length), self.length, self.ids.shape[1])
        texts = {"input_ids": Tokens(axis, self.ids, torch.from_numpy(classes)[self.ids])}
        # as many as a run has in its sample, 8 of the 256 sequences of a shard; at least one
        sample = torch.arange(len(self.ids)) < max(1, len(self.ids) * 8 // 256)
        return Batch(len(self.ids), texts, sample=sample)


def measured_pass(work: Workload) -> Callable[[], None]:
    """A forward pass with everything that a run does per batch; columns and tables are made once per shard."""
    model, inputs, batch = work.model, work.inputs, work.batch
    layout = layout_of(model)
    engine = choose("auto")
    numbers = np.arange(len(work.ids))
    collector = open_collector(measured_columns(), model, layout, sequence_ids=numbers, document_ids=numbers)

    def run() -> None:
        observe(model, layout, inputs, batch=batch, engine=engine, collector=collector)

    return run


def plain_pass(work: Workload) -> Callable[[], None]:
    """The same pass without attlas."""
    model, inputs = work.model, work.inputs

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    return run


@cache
def demo() -> Encoder:
    return load_encoder("demo", device="cpu", dtype="float32")


@cache
def _demo_classes() -> np.ndarray:
    return token_classes(demo().tokenizer)


def minilm(sequences: int, tokens: int) -> Workload:
    """The demo model on full windows of the demo corpus."""
    return _padded(_demo_windows(sequences, tokens))


def minilm_padded(sequences: int, tokens: int) -> Workload:
    """The same with evenly increasing lengths, so that a third of all positions is padding."""
    special = special_tokens(demo().tokenizer)
    lengths = np.linspace(tokens // 3, tokens, sequences).round().astype(int)
    rows = []
    for row, length in zip(_demo_windows(sequences, tokens), lengths, strict=True):
        content = row[len(special.before) : len(row) - len(special.after)]
        rows.append(special.around(content[: length - special.count]))
    return _padded(rows)


def bert_base(sequences: int, tokens: int, *, layers: int = 12) -> Workload:
    """BERT-base's shape, random weights, random ids."""
    from transformers import BertConfig, BertModel

    config = BertConfig(max_position_embeddings=max(512, tokens), num_hidden_layers=layers)
    return _of_random_weights(BertModel, config, "sdpa", sequences, tokens)


def mpnet(sequences: int, tokens: int) -> Workload:
    """MPNet-base's shape, which computes softmax itself, random weights, random ids."""
    from transformers import MPNetConfig, MPNetModel

    config = MPNetConfig(max_position_embeddings=tokens + 2)
    return _of_random_weights(MPNetModel, config, "eager", sequences, tokens)


def longformer(sequences: int, tokens: int) -> Workload:
    """Four layers of Longformer-base's shape, which attends within windows, random weights, random ids."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        num_hidden_layers=4, attention_window=512, max_position_embeddings=tokens + 2, vocab_size=30_522
    )
    return _of_random_weights(LongformerModel, config, "eager", sequences, tokens)


def _of_random_weights(kind: Any, config: Any, attention: str, sequences: int, tokens: int) -> Workload:
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = kind(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("query.weight", "key.weight", "attn.q.weight", "attn.k.weight")):
            weight.mul_(_SHARPENED)
    return _random(model, sequences, tokens)


def gpt2(sequences: int, tokens: int) -> Workload:
    """GPT-2's shape, random weights, random ids, no cache."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_positions=max(1024, tokens), use_cache=False)
    config._attn_implementation = "sdpa"
    model = GPT2Model(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("c_attn.weight"):  # queries, keys and values side by side
            weight[:, : 2 * config.n_embd].mul_(_SHARPENED)
    return _random(model, sequences, tokens)


# with initial weights the scores deviate by 0.3 and patterns are flat; with larger ones by 2, as in trained models
_SHARPENED = 2.5


def _random(model: nn.Module, sequences: int, tokens: int) -> Workload:
    # the range of ordinary words in both vocabularies
    ids = torch.randint(1000, 30000, (sequences, tokens))
    return Workload(model, ids, torch.full((sequences,), tokens))


def _padded(rows: list[np.ndarray]) -> Workload:
    length = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(length.max())), demo().tokenizer.pad_token_id)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return Workload(demo().model, ids, length)


def _demo_windows(count: int, tokens: int) -> list[np.ndarray]:
    """Windows of exactly `tokens` tokens, spread over the demo corpus."""
    tokenizer = demo().tokenizer
    special = special_tokens(tokenizer)
    texts = [document.text for document in open_corpus("demo")]
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    size = tokens - special.count
    cut = [window for ids in documents for _, window in windows(ids, size=size, stride=0) if len(window) == size]
    assert len(cut) >= count, f"the demo corpus has {len(cut)} windows of {tokens} tokens"
    return [special.around(np.asarray(window)) for window in cut[:: len(cut) // count][:count]]
