"""Decode the images of a corpus safely, and turn them into pixels with the model's own image processor."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from attlas.extract.corpus.names import readable_name
from attlas.extract.errors import Refusal, first_line
from attlas.extract.files import open_regular

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_MAX_FILE_BYTES = 1 << 29  # as much as the most pixels take uncompressed
_MAX_PIXELS = 89_478_485  # Pillow's own limit, above which a small file may be a decompression bomb
_MAX_ASPECT_RATIO = 100  # resizing the short side of a thin strip would make a huge image
# exceptions of Pillow's decoders for damaged files
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(struct.error, zlib.error),
)
# modes of more than 8 bits per channel, whose values Pillow clips at 255 instead of scaling them
_DEEP_MODES = ("I", "F")


class Unreadable(Exception):
    """An image that can't be used; the message is its `dropped_reason`."""


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file. Raises OSError, and Unreadable for one that is larger than any image."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_FILE_BYTES:
            raise Unreadable(f"too large: more than {_MAX_FILE_BYTES:,} bytes")
        return file.read()


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB, rotated upright. Raises Unreadable."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(*image.size)
        if image.mode.startswith(_DEEP_MODES):
            raise Unreadable(f"more than 8 bits a channel ({image.mode})")
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"too large: more than {_MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unreadable("unreadable: no image of a known format") from None
    except _DECODING_ERRORS as error:
        raise Unreadable(f"unreadable: {type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise Unreadable(f"too large: more than {_MAX_PIXELS:,} pixels")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise Unreadable(f"too narrow: one side is more than {_MAX_ASPECT_RATIO} times the other")


@dataclass(frozen=True)
class ImagePreprocessing:
    """A model's image processor, the shape of the pixels it makes, and the number of tokens the model makes of them."""

    processor: Any
    shape: tuple[int, ...]  # channels, rows and columns
    tokens: int
    special: int  # tokens among them that are not patches

    def pixels(self, data: bytes) -> Float[np.ndarray, "channel row column"]:
        """The pixels of an image file. Raises Unreadable, and Refusal if their shape differs from `shape`."""
        pixels = preprocess_image(self.processor, decode_image(data))
        if pixels.shape != self.shape:
            raise Refusal(
                f"all images must become pixels of the same shape; this model's image processor makes {pixels.shape} of one "
                f"and {self.shape} of another; set a fixed size or a crop in its preprocessor_config.json"
            )
        return pixels


def preprocess_image(processor: Any, image: Image.Image) -> Float[np.ndarray, "channel row column"]:
    """Apply an image processor to one image. Raises Refusal if it makes more than one array of pixels."""
    output = processor(images=image, return_tensors="np")
    pixels = np.asarray(output["pixel_values"])
    if pixels.ndim != 4 or len(pixels) != 1:
        raise Refusal(
            f"an image must become one array of pixels [1, channel, row, column]; {type(processor).__name__} makes "
            f"{list(pixels.shape)} of it; a run does not measure models that cut images into tiles or frames"
        )
    return pixels[0].astype(np.float32)


def load_image_processor(name: str, path: str, **options: Any) -> Any:
    """Load a model's image processor, with the Pillow and NumPy backend on every machine. Raises Refusal."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise Refusal(
            f"a vision model comes with its preprocessor_config.json; none could be loaded from {name} "
            f"({first_line(error)}); save the image processor to the same folder"
        ) from error


def processor_digest(processor: Any) -> str:
    """SHA-256 of the image processor's own JSON; of its class name if it is a user's own."""
    text = processor.to_json_string() if hasattr(processor, "to_json_string") else type(processor).__qualname__
    return hashlib.sha256(text.encode()).hexdigest()


def read_planned_image(path: Path, sha256: str) -> bytes:
    """Read an image file and check that it has not changed since the run was planned. Raises Refusal."""
    name = readable_name(str(path))
    try:
        data = read_image_file(path)
    except OSError as error:
        raise Refusal(
            f"the images of a run must stay in place until it ends; {name}: {error.strerror}; put it back"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Refusal(
            f"the images of a run must not change; {name} has changed since the run was planned; restore it, or start a new "
            "run in another folder"
        )
    return data
