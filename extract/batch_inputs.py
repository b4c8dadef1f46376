"""The inputs of a model for a batch of planned sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int

from attlas.extract.capture.runtime.batch import Batch, Needle, Tokens
from attlas.extract.corpus.generated import IN_ANSWER, IN_NEEDLE
from attlas.extract.engines.visibility import right_padded_axis
from attlas.extract.instrument import Instrument
from attlas.extract.model.inputs import MASK_OF
from attlas.extract.model.measured_model import TOKEN_TYPES, ImageCorpus
from attlas.extract.model.modality import accepts_input
from attlas.extract.model.special_tokens import SpecialTokens


class SequenceInput(NamedTuple):
    """A sequence: its length in tokens, its token ids or the name and SHA-256 of its image, whether it is in the sample, and
    the marks of its tokens if its corpus has marks.
    """

    tokens: int
    content: Any
    in_sample: bool = True
    marks: np.ndarray | None = None


def sequence_inputs(instrument: Instrument, sequences: pa.Table, *, sample: int | None) -> list[SequenceInput]:
    """The planned sequences of a shard, the first ones as its sample; None: all of them."""
    sample = len(sequences) if sample is None else sample
    if instrument.measured_model.images is None:
        ids = (np.asarray(row.as_py(), np.int64) for row in sequences["token_ids"])
        marks = [None] * len(sequences)
        if "marks" in sequences.column_names:
            marks = [np.asarray(row.as_py(), np.int8) for row in sequences["marks"]]
        return [SequenceInput(len(row), row, place < sample, marks[place]) for place, row in enumerate(ids)]
    rows = zip(*(sequences[name].to_pylist() for name in ("tokens", "image", "sha256")), strict=True)
    return [
        SequenceInput(tokens, (image, sha256), place < sample) for place, (tokens, image, sha256) in enumerate(rows)
    ]


def batch_inputs(instrument: Instrument, sequences: Sequence[SequenceInput]) -> tuple[dict[str, Any], Batch]:
    """The keyword arguments of the model's forward, and what the capture needs to know about the batch."""
    content = [sequence.content for sequence in sequences]
    images = instrument.measured_model.images
    marks = [sequence.marks for sequence in sequences if sequence.marks is not None]
    inputs, batch = (
        _text_batch(instrument, content, marks) if images is None else _image_batch(instrument, images, content)
    )
    sample = np.array([sequence.in_sample for sequence in sequences])
    return inputs, with_sample(batch, sample, instrument.encoder.device)


def with_sample(batch: Batch, sample: np.ndarray, device: torch.device) -> Batch:
    """The batch with the marks of its sample, whose places are known without asking the device."""
    marked = replace(batch, sample=_to_device(device, sample))
    vars(marked)["sampled"] = _to_device(device, np.flatnonzero(sample))
    return marked


def _image_batch(
    instrument: Instrument, images: ImageCorpus, rows: list[tuple[str, str]]
) -> tuple[dict[str, Any], Batch]:
    """Pixels in the model's type. All images have the same shape, so there is no padding."""
    pixels = np.stack([images.pixels(*row) for row in rows])
    (name,) = instrument.measured_model.inputs
    tensor = _to_device(instrument.encoder.device, pixels).to(instrument.encoder.dtype)
    return {name: tensor}, Batch(len(rows), grids=images.grids)


def _text_batch(
    instrument: Instrument, rows: list[np.ndarray], marks: list[np.ndarray]
) -> tuple[dict[str, Any], Batch]:
    """Token ids, padded on the right, with masks and token types; `marks` are those of the rows, if they have any."""
    encoder, measured_model = instrument.encoder, instrument.measured_model
    tokens = max(len(row) for row in rows)
    padding = encoder.tokenizer.pad_token_id
    ids = np.full((len(rows), tokens), 0 if padding is None else padding, np.int64)
    is_token = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], is_token[place, : len(row)] = row, 1
    id_tensor, mask = _to_device(encoder.device, ids), _to_device(encoder.device, is_token)
    columns: dict[str, Any] = {"needle": _needle(marks, tokens, encoder.device)} if marks else {}
    if instrument.classes is not None:
        columns |= {
            "ids": id_tensor,
            "classes": _to_device(encoder.device, instrument.classes[ids].astype(np.int64)),
        }
    inputs: dict[str, Any] = {}
    if measured_model.special is not None:
        inputs = {TOKEN_TYPES: _to_device(encoder.device, _token_types(measured_model.special, rows, tokens))}
    texts = {}
    for name in measured_model.inputs:
        inputs |= {name: id_tensor, MASK_OF[name]: mask}
        # an axis per input: queries and keys with the same axis are the same tokens
        texts[name] = Tokens(right_padded_axis([len(row) for row in rows], tokens, encoder.device), **columns)
    if _uses_cache(measured_model.model):
        inputs["use_cache"] = False  # for tokens that never come
    return inputs, Batch(len(rows), texts)


def _needle(marks: list[np.ndarray], tokens: int, device: torch.device) -> Needle:
    """The tokens of needles and answers."""
    padded = np.stack([np.pad(row, (0, tokens - len(row))) for row in marks])
    keys, answer = padded == IN_NEEDLE, padded == IN_ANSWER
    places = np.flatnonzero(answer.any(0))
    return Needle(_to_device(device, keys), _to_device(device, answer), slice(int(places[0]), int(places[-1]) + 1))


def _uses_cache(model: torch.nn.Module) -> bool:
    """Whether the model keeps keys and values for later tokens unless told otherwise."""
    return bool(getattr(getattr(model, "config", None), "use_cache", False)) and accepts_input(model, "use_cache")


def _token_types(special: SpecialTokens, rows: list[np.ndarray], tokens: int) -> Int[np.ndarray, "batch token"]:
    """The token types that the tokenizer gives these sequences; 0 at padding."""
    types = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        types[place, : len(row)] = special.types_of(len(row))
    return types


def _to_device(device: torch.device, values: np.ndarray) -> torch.Tensor:
    """The values on a device; to CUDA from pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
