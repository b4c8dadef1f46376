"""Models of known shapes with random weights on the device, and a measured and a plain pass over a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attlas.extract.batch_inputs import with_sample
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.capture.runtime.instrumented_pass import factors_for
from attlas.extract.collector import open_collector
from attlas.extract.engines import choose
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.rows import AttentionCall, Rows
from attlas.extract.engines.sums import HeadSums
from attlas.extract.engines.visibility import Axis, right_padded_axis, visibility_from_mask, whole_axis
from attlas.extract.measurement import layout_of, observe
from attlas.extract.options import RunOptions
from attlas.extract.tables import measured_columns, needs_of
from tests.gpu.machine import DEVICE, IS_REHEARSAL

BATCH_TOKENS = 64 if IS_REHEARSAL else 16_384
DTYPE = torch.float32 if IS_REHEARSAL else torch.bfloat16
# with initial weights the scores deviate by 0.3 and patterns are flat; with larger ones by 2, as in trained models
_SHARPENED = 2.5
_QUERIES_AND_KEYS = ("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")
_SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=1500)


@dataclass(frozen=True)
class Workload:
    """A model and a batch without padding, with the token ids and classes that a run has, and all of a shard's sample."""

    model: nn.Module
    ids: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}

    def fresh_axis(self) -> Axis:
        """The axis of the batch as a run makes it anew for each: what an axis has computed is kept in it."""
        sequences, tokens = self.ids.shape
        return right_padded_axis([tokens] * sequences, tokens, self.ids.device)

    @property
    def batch(self) -> Batch:
        axis = self.fresh_axis()
        batch = Batch(len(self.ids), {"input_ids": Tokens(axis, self.ids, self.ids % len(TOKEN_CLASSES))})
        return with_sample(batch, np.arange(len(self.ids)) < RunOptions.sample, self.ids.device)


def minilm(tokens: int) -> Workload:
    sizes = dict(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    return bert(tokens, sizes)


def bert_base(tokens: int) -> Workload:
    return bert(tokens, dict(num_attention_heads=12))


def bert(tokens: int, sizes: dict[str, Any]) -> Workload:
    from transformers import BertConfig, BertModel

    small = _SMALL | {"num_attention_heads": 4} if IS_REHEARSAL else {}
    return _batch_for(_model(BertModel, BertConfig, **sizes | small, max_position_embeddings=4096), tokens)


def llama_1b(tokens: int) -> Workload:
    """The shape of Llama 3.2 1B, with a smaller vocabulary: only one row of it is read per token."""
    from transformers import LlamaConfig, LlamaModel

    sizes = dict(
        vocab_size=32_000,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        max_position_embeddings=8192,
        use_cache=False,
    )
    small = _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} if IS_REHEARSAL else {}
    return _batch_for(_model(LlamaModel, LlamaConfig, **sizes | small), tokens)


@cache
def _model(kind: Any, config_class: Any, **sizes: Any) -> nn.Module:
    """A model with random weights."""
    torch.manual_seed(0)
    config = config_class(**sizes)
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        model = kind(config)
    model = model.to(DEVICE, DTYPE).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(_QUERIES_AND_KEYS):
            weight.mul_(_SHARPENED)
    return model


def _batch_for(model: Any, tokens: int) -> Workload:
    """A batch of BATCH_TOKENS tokens in sequences of this length; in a rehearsal of two short ones."""
    length = min(tokens, BATCH_TOKENS // 2) if IS_REHEARSAL else tokens
    ids = torch.randint(1000, model.config.vocab_size, (max(1, BATCH_TOKENS // length), length), device=DEVICE)
    return Workload(model, ids)


def measured_pass(work: Workload) -> Callable[[], None]:
    """A forward pass with everything that a run does per batch, up to the numbers on the host."""
    model, inputs, batch = work.model, work.inputs, work.batch
    layout, engine = layout_of(model), choose("auto", device=DEVICE)
    numbers = np.arange(len(work.ids))
    collector = open_collector(measured_columns(), model, layout, sequence_ids=numbers, document_ids=numbers)
    factors = factors_for(model, layout, collector.needs)  # as a run does, once for a shard

    def run() -> None:
        axis = work.fresh_axis()
        tokens = {name: replace(of, axis=axis) for name, of in batch.texts.items()}
        fresh = replace(batch, texts=tokens)
        vars(fresh)["sampled"] = batch.sampled
        observe(model, layout, inputs, batch=fresh, engine=engine, collector=collector, factors=factors)

    return run


def plain_pass(work: Workload) -> Callable[[], None]:
    """The same pass without attlas."""
    model, inputs = work.model, work.inputs

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    return run


@dataclass(frozen=True)
class AttentionWorkload:
    """One attention call, and what a run needs of it."""

    call: AttentionCall
    causal: bool

    def attend(self) -> tuple[Tensor, Rows]:
        """Output and all core row quantities."""
        needs = needs_of(measured_columns())
        return choose("auto", device=DEVICE).attend(self.call, self.plain, needs.row_quantities)

    def head_sums(self, rows: Rows) -> HeadSums:
        """All core sums of its heads, and their profiles."""
        needs, ids = needs_of(measured_columns()), self.call.token_ids
        classes = None if ids is None else ids % len(TOKEN_CLASSES)
        observed = HeadObservation(rows, self.call.visibility, classes)
        return choose("auto", device=DEVICE).head_sums(observed, needs.head_names, profiles=needs.profiles)

    def plain(self) -> Tensor:
        """torch's own attention, on a GPU by FlashAttention."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = SDPBackend.MATH if IS_REHEARSAL else SDPBackend.FLASH_ATTENTION
        call = self.call
        grouped = call.query.shape[1] != call.key.shape[1]
        with sdpa_kernel(backend):
            return nn.functional.scaled_dot_product_attention(
                call.query, call.key, call.value, is_causal=self.causal, enable_gqa=grouped
            )


def attention(
    *, batch: int, heads: int, tokens: int, width: int, causal: bool = False, key_heads: int | None = None
) -> AttentionWorkload:
    """An AttentionWorkload of random states; in a rehearsal of few tokens."""
    if IS_REHEARSAL:
        batch, heads, key_heads, tokens = 1, 4, key_heads and 2, 40
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(batch, tokens, h, width, device=DEVICE, dtype=DTYPE).transpose(1, 2)
        for h in (heads, key_heads or heads, key_heads or heads)
    )
    axis = whole_axis(batch, tokens, query.device)
    call = AttentionCall(
        query * 1.5,
        key,
        value,
        visibility_from_mask(None, causal=causal, queries=axis),
        width**-0.5,
        write=torch.randn(heads, width, width, device=DEVICE).tril(),
        token_ids=torch.randint(0, 30_000, (batch, tokens), device=DEVICE),
        unmeasured=torch.zeros(1, dtype=torch.int32, device=DEVICE),  # as in a pass, which does not wait for each call
    )
    return AttentionWorkload(call, causal)
