"""One input, every head: a self-contained HTML page to look at.

`view` feeds a model, `observer` packs its patterns as they arrive, `page` writes the page. A page holds all weights of all
patterns, compressed head by head; its script decodes a head when it is looked at, and draws on canvas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from attlas.extract.errors import CaptureError, Refusal
from attlas.extract.model.measured_model import Stacks
from attlas.extract.model.modality import accepts_input
from attlas.extract.options import RunOptions
from attlas.extract.view.page import View
from attlas.extract.view.sources import ENGINE, observe_image, observe_tensors, observe_text, read_text

__all__ = ["View", "view", "view_named"]


def view(model: nn.Module | str, *arguments: Any, tokenizer: Any = None, **inputs: Any) -> View:
    """One input and every head of a model, as an HTML page: shown in a notebook, or written with `.save(path)`.

    model: any attention model, with the inputs of one sequence as `measure` takes them, or with a text and its tokenizer:
    `view(model, "The cat sat", tokenizer=tokenizer)`, `view(model, **batch, tokenizer=tokenizer)`. Tokens are labelled by
    their ids without a tokenizer. Or the name of a model, fed as `run` feeds it: `view("demo", "The cat sat")`,
    `view("folder", image="cat.png")`; see `view_named`.

    Raises Refusal for inputs that cannot be shown, CaptureError where a pattern does not show.
    """
    if isinstance(model, str):
        return view_named(model, *arguments, **inputs)
    text = arguments[0] if arguments and isinstance(arguments[0], str) else None
    if text is not None:
        if tokenizer is None:
            raise Refusal(
                "a text is fed with the model's tokenizer; got none; write view(model, text, tokenizer=tokenizer)"
            )
        inputs = {**_tokenized(model, text, tokenizer), **inputs}
        arguments = arguments[1:]
    observed = observe_tensors(model, arguments, inputs, tokenizer)
    return View(observed.content, model=observed.model, given=observed.given)


def view_named(
    model: str,
    text: str | None = None,
    *,
    file: Path | str | None = None,
    image: Path | str | None = None,
    max_length: int | None = None,
    stacks: Stacks = "encoder",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> View:
    """One text, text file or image and every head of a model by its name: `demo`, a folder, a hub name, `file.py:function`.

    The options are those of `run`. Raises Refusal, also for a model whose patterns cannot be seen.
    """
    given = [name for name, value in (("a text", text), ("--file", file), ("--image", image)) if value is not None]
    if len(given) != 1:
        raise Refusal(
            f"a view is of one text, --file or --image; got {' and '.join(given) or 'none'}; give one of them"
        )
    options = RunOptions(
        model=model,
        corpus="",
        out="",
        engine=ENGINE,
        tokens="none",
        max_length=max_length,
        stacks=stacks,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if max_length is not None and max_length < 1:
        raise Refusal(f"max_length must be at least 1; got {max_length}; give a larger number")
    try:
        if image is not None:
            observed = observe_image(Path(image), options)
        else:
            text = read_text(Path(file)) if file is not None else text
            assert text is not None, "one of the three is given"
            observed = observe_text(text, options)
    except CaptureError as error:
        raise Refusal(f"{model} can't be shown: {error}") from error
    return View(observed.content, model=observed.model, given=observed.given)


def _tokenized(model: nn.Module, text: str, tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of a text, as far as the model takes it."""
    encoded = dict(tokenizer(text, return_tensors="pt", verbose=False))
    if not encoded["input_ids"].numel() or not text:
        raise Refusal("a view needs at least one token; the text has none; give some words")
    return {n: x for n, x in encoded.items() if n in ("input_ids", "attention_mask") or accepts_input(model, n)}
