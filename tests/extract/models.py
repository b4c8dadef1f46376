"""Small random models of the families that are measured, and what their own eager attention says."""

from pathlib import Path

import torch
import transformers


def tiny(family: str, **changes):
    """A small random model of a family, with scores large enough for patterns that are not flat."""
    sizes = {
        "bert": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48),
        "roberta": dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=1
        ),
        "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        "albert": dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, embedding_size=16
        ),
        "electra": dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, embedding_size=32
        ),
        "gpt2": dict(n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0),
        "llama": dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
        ),
        "mistral": dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
        ),
        "qwen2": dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=60, **(sizes[family] | changes))
    config._attn_implementation = "sdpa"
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def eager_patterns(model, **inputs) -> list[torch.Tensor]:
    """The model's own patterns, one [batch, head, query, key] per layer, in float64 from its eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [p.double() for p in model(**inputs, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation("sdpa")


def save_with_tokenizer(tokenizer, folder: Path) -> Path:
    """Save a tiny BERT with this tokenizer and a vocabulary of its size; returns the folder."""
    small = tiny("bert")
    small.resize_token_embeddings(len(tokenizer))
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
