"""The inputs of a page: a text, a file or an image for a model by its name, or tensors for a module."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from attlas.extract.batch_inputs import SequenceInput, batch_inputs
from attlas.extract.capture.compiled import unwrap_model
from attlas.extract.capture.discovery.patch_layout import PIXELS, grids_of
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.modes import eval_mode, refuse_training
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.corpus import Document, open_corpus
from attlas.extract.corpus.documents import make_document
from attlas.extract.corpus.names import readable_name
from attlas.extract.engines import choose
from attlas.extract.errors import Refusal
from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.layouts import layout_of, with_current_layout
from attlas.extract.measurement import observe, refuse_added_mask, split_batch
from attlas.extract.model.arguments import bind_inputs
from attlas.extract.model.folder import check_model_name
from attlas.extract.model.images import Unreadable, decode_image, read_image_file
from attlas.extract.model.inputs import batch_of, main_input
from attlas.extract.model.modality import measured_part
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.options import RunOptions
from attlas.extract.plan.encoding import encode
from attlas.extract.shard import observe_batch
from attlas.extract.view.content import Axis, Content
from attlas.extract.view.labels import text_axis
from attlas.extract.view.observer import ViewObserver

# patterns come from the reference engine whichever engine is asked, and it has nothing to compile
ENGINE = "reference"
_TOO_SHORT = "a view needs at least one token; {} has none{}; give some words"


class Observed(NamedTuple):
    """What a page shows, a name of the model, and what it was given."""

    content: Content
    model: str
    given: str


def observe_text(text: str, options: RunOptions) -> Observed:
    """The model's pass over a text, fed as a run would. Raises Refusal."""
    document = make_document("the text", text)
    if document.dropped_reason is not None:
        raise Refusal(
            _TOO_SHORT.format("the text", "") if not text else f"a text must be valid; {document.dropped_reason}"
        )
    check_model_name(options.model, trust_remote_code=options.trust_remote_code)
    instrument = open_instrument(options, images=None, progress=_no_progress)
    ids = _sequence_of(document, instrument, options)
    axis = text_axis(ids.tolist(), instrument.encoder.tokenizer)
    texts = dict.fromkeys(instrument.measured_model.inputs, axis)
    return _observe_sequence(instrument, SequenceInput(len(ids), ids.astype(np.int64)), text, texts=texts)


def read_text(file: Path) -> str:
    """The text of a file. Raises Refusal unless it holds exactly one."""
    if file.is_dir():
        raise Refusal(f"--file takes a text file; {file} is a folder; give the name of a file in it")
    if not file.exists():
        raise Refusal(f"--file takes a text file; there is none at {file}; check the path")
    corpus = open_corpus(str(file), limit=2)
    if corpus.has_images:
        raise Refusal(f"--file takes a text file; {file} is an image; use --image")
    documents = list(corpus)
    if len(documents) != 1:
        raise Refusal(f"a view shows one text; {file} holds {'several' if documents else 'none'}; give a file of one")
    (document,) = documents
    if document.dropped_reason == "empty":
        raise Refusal(_TOO_SHORT.format(file, ""))
    if document.dropped_reason is not None:
        raise Refusal(f"--file takes a text file; {file} is {document.dropped_reason}; give its text as UTF-8")
    return document.text


def observe_image(file: Path, options: RunOptions) -> Observed:
    """The vision model's pass over an image, preprocessed as a run would. Raises Refusal."""
    data = _read_image(file)
    check_model_name(options.model, trust_remote_code=options.trust_remote_code)
    instrument = open_instrument(options, images=file.parent, progress=_no_progress)
    images = instrument.measured_model.images
    assert images is not None, "an image model was examined"
    content = (readable_name(file.name), hashlib.sha256(data).hexdigest())
    sequence = SequenceInput(images.preprocessing.tokens, content)
    pixels = images.pixels(*content)
    picture = _picture_of(pixels, images.preprocessing.processor)
    return _observe_sequence(instrument, sequence, file.name, picture=picture)


def observe_tensors(
    model: nn.Module, arguments: tuple[Any, ...], inputs: Mapping[str, Any], tokenizer: Any
) -> Observed:
    """The pass of a module over the inputs of one sequence, as `measure` takes them. Raises Refusal and CaptureError."""
    model = unwrap_model(model)
    given = bind_inputs(model, arguments, inputs, options=("tokenizer",))
    model = measured_part(model, given)
    batch_of(model, given)  # refuses what can't be measured before the model runs
    refuse_training(model, given)
    with eval_mode(model):
        content = with_current_layout(model, lambda: _observe_inputs(model, given, tokenizer))
    return Observed(content, type(model).__name__, _description(given, tokenizer))


def _no_progress(_stage: str, _done: int, _total: int | None) -> None:
    """Loading a model for one input is not worth a progress bar."""


def _sequence_of(document: Document, instrument: Instrument, options: RunOptions) -> np.ndarray:
    """The token ids of a text with its special tokens. Raises Refusal if there are none, or too many."""
    tokenizer = instrument.encoder.tokenizer
    special = special_tokens(tokenizer)
    (encoded,) = encode(tokenizer, [document], keep_text=False)
    if encoded is None or not len(encoded.ids):
        raise Refusal(_TOO_SHORT.format("the text", " besides special ones"))
    ids = special.around(encoded.ids)
    if len(ids) > instrument.max_length:
        raise Refusal(
            f"a view shows one sequence; the text has {len(ids):,} tokens with its special ones, and {options.model} is given "
            f"at most {instrument.max_length:,}; shorten it{_hint_of_length(instrument, len(ids))}"
        )
    return ids


def _hint_of_length(instrument: Instrument, tokens: int) -> str:
    limit = instrument.encoder.max_positions
    return (
        f", or use --max-length {tokens}"
        if limit is None or tokens <= limit
        else f"; the model has {limit:,} positions"
    )


def _read_image(file: Path) -> bytes:
    try:
        data = read_image_file(file)
    except (OSError, Unreadable) as error:
        why = getattr(error, "strerror", None) or error
        raise Refusal(f"--image takes an image file; {file}: {why}; check the path") from error
    try:
        decode_image(data)
    except Unreadable as error:
        raise Refusal(f"--image takes a PNG, JPEG, WebP, BMP or TIFF file; {file} is {error}; convert it") from error
    return data


def _observe_sequence(
    instrument: Instrument,
    sequence: SequenceInput,
    given: str,
    *,
    texts: Mapping[str, Axis] | None = None,
    picture: bytes | None = None,
) -> Observed:
    measured_model = instrument.measured_model
    inputs, batch = batch_inputs(instrument, [sequence])
    observer = ViewObserver(measured_model.layout, texts or {}, batch.grids)
    observe_batch(instrument, inputs, batch, observer)
    encoder = instrument.encoder
    content = observer.content(notes=_notes(measured_model.layout), picture=picture)
    return Observed(content, encoder.title or encoder.name, given)


def _observe_inputs(model: nn.Module, given: Mapping[str, Any], tokenizer: Any) -> Content:
    parts = split_batch(model, given)
    sequences = sum(len(part.places) for part in parts)
    if sequences != 1:
        raise Refusal(f"a view shows one sequence; these inputs hold {sequences}; give those of one, such as ids[:1]")
    inputs = parts[0].inputs
    layout = layout_of(model, inputs)
    refuse_added_mask(model, layout, given)
    grids = grids_of(model, layout, inputs)
    batch = batch_of(model, inputs)
    texts = {
        name: text_axis(tokens.ids[0][tokens.axis.real[0]].tolist(), tokenizer)
        for name, tokens in batch.texts.items()
        if tokens.ids is not None and tokens.axis is not None
    }
    observer = ViewObserver(layout, texts, grids)
    with fixed_rng():
        observe(
            model,
            layout,
            inputs,
            batch=replace(batch, grids=grids),
            engine=choose(ENGINE, device=main_input(model, inputs).device.type),
            collector=observer,
        )
    pixels = given.get(PIXELS)
    has_image = bool(grids) and pixels is not None and pixels.dim() == 4
    picture = _picture_of(pixels[0].detach().float().cpu().numpy()) if has_image and pixels is not None else None
    return observer.content(notes=_notes(layout), picture=picture)


def _description(given: Mapping[str, Any], tokenizer: Any) -> str:
    """The text of the ids, or the names and shapes of the tensors."""
    ids = given.get("input_ids")
    if tokenizer is not None and ids is not None:
        return str(tokenizer.decode(ids[0].tolist(), skip_special_tokens=True))
    shapes = {name: value.shape for name, value in given.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} [{' × '.join(map(str, shape))}]" for name, shape in shapes.items())


def _notes(layout: Layout) -> list[str]:
    """What the page lacks, and why."""
    notes = [f"The residual stream is not shown: {layout.residual_refusal}."] if layout.residual_refusal else []
    notes += [
        f"The stream of the {stack} is incomplete: {reason}." for stack, reason in layout.residual_refusals.items()
    ]
    if layout.without_pattern:
        notes.append(f"{len(layout.without_pattern)} layers have no attention and are not shown.")
    return notes


def _picture_of(pixels: np.ndarray, processor: Any = None) -> bytes | None:
    """The pixels [channel, row, column] as the model reads them, as PNG; scaled to their range if it is not known."""
    from PIL import Image

    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is not None and std is not None and getattr(processor, "do_normalize", False):
        pixels = pixels * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    else:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) / max(high - low, 1e-12)
    colours = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    if colours.shape[-1] not in (1, 3):
        return None
    buffer = io.BytesIO()
    Image.fromarray(colours[..., 0] if colours.shape[-1] == 1 else colours).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
