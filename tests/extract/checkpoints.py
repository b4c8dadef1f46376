"""Small random models on disk, as save_pretrained writes them, with a tokenizer of a few dozen words."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEXT = (
    "The cat sat on the mat, and the cat was pleased with the mat. "
    "A transformer reads every token at once; attention says which of them matter to which. "
    "Nothing is lost: what was skipped is counted, and the reason is written beside the count."
)
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
VOCABULARY = 80
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_BART = {"encoder": 2, "decoder": 2}
SIZES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": {**_BERT, "max_position_embeddings": 130, "pad_token_id": 0},
    "albert": {**_BERT, "embedding_size": 16},
    "mpnet": {**_BERT, "pad_token_id": 0},
    "modernbert": {**_BERT, **_SPECIAL_IDS, "global_attn_every_n_layers": 2, "local_attention": 8},
    "deberta-v2": {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "llama": _LLAMA,
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 3},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "longformer": {**_BERT, "attention_window": 8, "max_position_embeddings": 130, "pad_token_id": 0},
    "bart": {"d_model": 32}
    | {f"{part}_layers": n for part, n in _BART.items()}
    | {f"{part}_attention_heads": 4 for part in _BART}
    | {f"{part}_ffn_dim": 48 for part in _BART},
}


def model_of(family: str, kind: str = "AutoModel", **changes: Any) -> Any:
    """A random model; `kind` is a class of transformers, an Auto one or the architecture's own."""
    config = transformers.AutoConfig.for_model(family, **{"vocab_size": VOCABULARY} | SIZES[family] | changes)
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made.from_config(config) if kind.startswith("Auto") else made(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def tokenizer_of(
    text: str = TEXT, *, special: Iterable[str] = ("cls_token", "sep_token"), **changes: str | None
) -> PreTrainedTokenizerFast:
    """One id per word of a text. `special`: which of its tokens stand around a sequence; none, for an empty tuple."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    names = {**SPECIAL, **changes}
    tokens = [*SPECIAL.values(), *words]
    tokenizer: Any = Tokenizer(models.WordLevel({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        first, last = (SPECIAL[s] for s in special)
        ids = [(t, tokens.index(t)) for t in (first, last)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v is not None})


def save(model: Any, folder: Path, tokenizer: Any = None, **options: Any) -> Path:
    """The folder, with the model and a tokenizer in it."""
    model.save_pretrained(folder, **options)
    (tokenizer_of() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


def enlarge_queries(folder: Path, times: float) -> None:
    """Make the queries of one layer of a model larger, as another checkpoint's; the file is replaced at once."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    name = min(name for name in weights if "query.weight" in name)
    weights[name] = weights[name] * times
    new = file.with_suffix(".new")
    save_file(weights, new, metadata={"format": "pt"})
    new.replace(file)
