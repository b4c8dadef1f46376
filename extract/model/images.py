"""Images of a corpus, as a model sees them: read safely, then made into pixels by the model's own preprocessor."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from extract.corpus.names import readable_name
from extract.errors import Refusal, first_line

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_MOST_PIXELS = 89_478_485  # Pillow's own limit, above which a small file may be a bomb
_LONGEST = 100  # times its other side: a strip one pixel high would become a huge image when that side is fitted
# what Pillow's readers raise for damaged files
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
# of more than 8 bits a channel: Pillow cuts such values off at 255 instead of scaling them
_DEEP = ("I", "F")


class Unreadable(Exception):
    """Why an image can't be used, in the words of `dropped_reason`."""


def decoded(data: bytes) -> Image.Image:
    """The image in these bytes, upright and in RGB; raises Unreadable."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(*image.size)
        if image.mode.startswith(_DEEP):
            raise Unreadable(f"more than 8 bits a channel ({image.mode})")
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"too large: more than {_MOST_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unreadable("unreadable: no image of a known format") from None
    except _DAMAGED as error:
        raise Unreadable(f"unreadable: {type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise Unreadable(f"too large: more than {_MOST_PIXELS:,} pixels")
    if max(width, height) > _LONGEST * min(width, height):
        raise Unreadable(f"too narrow: one side is more than {_LONGEST} times the other")


@dataclass(frozen=True)
class Eye:
    """A model's preprocessor, and what the model makes of an image: `tokens`, `special` ones that are no patches among them."""

    processor: Any
    shape: tuple[int, ...]  # channels, rows and columns of the pixels
    tokens: int
    special: int

    def pixels(self, data: bytes) -> Float[np.ndarray, "channel row column"]:
        """The pixels that the model is given for an image file; raises Unreadable, and Refusal where their shape is another."""
        pixels = pixels_of(self.processor, decoded(data))
        if pixels.shape != self.shape:
            raise Refusal(
                f"all images become pixels of one shape; this model's preprocessor makes {pixels.shape} of one and "
                f"{self.shape} of another; give its preprocessor_config.json a fixed size, or a crop"
            )
        return pixels


def pixels_of(processor: Any, image: Image.Image) -> Float[np.ndarray, "channel row column"]:
    made = processor(images=image, return_tensors="np")
    pixels = np.asarray(made["pixel_values"])
    if pixels.ndim != 4 or len(pixels) != 1:
        raise Refusal(
            f"an image becomes one array of pixels [1, channel, row, column]; {type(processor).__name__} makes "
            f"{list(pixels.shape)} of it; models that cut images into tiles or frames are not measured by a run"
        )
    return pixels[0].astype(np.float32)


def load_processor(name: str, path: str, **options: Any) -> Any:
    """The preprocessor that comes with a model, in its Pillow and NumPy form on every machine. Raises Refusal."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        said = first_line(error)
        raise Refusal(
            f"a model that reads images comes with its preprocessor_config.json; none could be loaded from {name} "
            f"({said}); save the image processor into the same folder"
        ) from error


def processor_digest(processor: Any) -> str:
    """SHA-256 over what the preprocessor does, as it writes it down itself; over its name where it is a user's own."""
    written = processor.to_json_string() if hasattr(processor, "to_json_string") else type(processor).__qualname__
    return hashlib.sha256(written.encode()).hexdigest()


def read_again(path: Path, sha256: str) -> bytes:
    """The bytes of an image file, which must be those that were planned. Raises Refusal."""
    shown = readable_name(str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refusal(f"the images of a run must stay until it ends; {shown}: {error.strerror}; put it back") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Refusal(
            f"the images of a run must stay as they are; {shown} has changed since the run was planned; put it back, or begin anew in another folder"
        )
    return data
