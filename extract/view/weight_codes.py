"""Attention weights as 16-bit codes that are decimal numbers: what a page prints is the weight, rounded once.

A code stands for a number of a few significant digits, so that nothing is rounded a second time when it is shown. Weights from
10⁻⁴ to 1 have 3 or 4 digits, smaller ones 2. Codes rise with the weights: the largest code of a block is that of its largest
weight. `page.js` decodes them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt16

# a key that the query does not see; a row that is not measured; a weight of 0; one below the smallest number
HIDDEN, UNMEASURED, ZERO, BELOW = range(4)
_FIRST = 4
SMALLEST_DECADE = -35
DETAILED_DECADE = -4  # from here on weights have `digits` digits
_SMALL_DIGITS = 2
# weights encoded in one go: what is computed of them stays in the cache
_AT_ONCE = 1 << 16
# sides of a thumbnail in cells, each the largest weight of its part of the pattern
THUMBNAIL = 32


@dataclass(frozen=True)
class WeightCodes:
    """The codes with so many significant digits: 3, or 4 for small inputs."""

    digits: int

    @property
    def _first_detailed(self) -> int:
        return _FIRST + (DETAILED_DECADE - SMALLEST_DECADE) * 9 * 10 ** (_SMALL_DIGITS - 1)

    @property
    def largest(self) -> int:
        """The code of 1."""
        return self._first_detailed - DETAILED_DECADE * 9 * 10 ** (self.digits - 1)

    def encode(self, weights: Float[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
        """The codes of weights between 0 and 1, correctly rounded."""
        flat = weights.reshape(-1)
        codes = np.empty(len(flat), np.uint16)
        for first in range(0, len(flat), _AT_ONCE):
            codes[first : first + _AT_ONCE] = self._encode(flat[first : first + _AT_ONCE].astype(np.float64))
        return codes.reshape(weights.shape)

    def _encode(self, exact: Float[np.ndarray, " weight"]) -> UInt16[np.ndarray, " weight"]:
        with np.errstate(divide="ignore"):
            decade = np.floor(np.log10(exact)).clip(-999, 0).astype(np.int16)
        mantissa = self._mantissas(exact, decade)
        overflow = mantissa >= 10 ** self._digits_of(decade)  # rounded up to the next decade
        decade = decade + overflow
        mantissa = np.where(overflow, 10 ** (self._digits_of(decade) - 1), mantissa)
        detailed = self._first_detailed + (decade - DETAILED_DECADE) * (9 * 10 ** (self.digits - 1))
        small = _FIRST + (decade - SMALLEST_DECADE) * (9 * 10 ** (_SMALL_DIGITS - 1))
        first = np.where(decade >= DETAILED_DECADE, detailed, small)
        codes = first + mantissa - 10 ** (self._digits_of(decade) - 1)
        codes = np.where(decade < SMALLEST_DECADE, BELOW, np.minimum(codes, self.largest))
        return np.where(exact == 0, ZERO, codes).astype(np.uint16)

    def decode(self, codes: UInt16[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The weights of codes; 0 for those that are not numbers or below the smallest, NaN in rows that are not measured."""
        return self._values[codes]

    @cached_property
    def _values(self) -> Float[np.ndarray, " code"]:
        """The weight of every code."""
        values = np.zeros(1 << 16)
        values[UNMEASURED] = np.nan
        code = _FIRST
        for decade in range(SMALLEST_DECADE, 0):
            digits = self.digits if decade >= DETAILED_DECADE else _SMALL_DIGITS
            mantissas = range(10 ** (digits - 1), 10**digits)
            values[code : code + len(mantissas)] = [float(f"{m}e{decade - digits + 1}") for m in mantissas]
            code += len(mantissas)
        values[code] = 1
        return values

    def _digits_of(self, decade: np.ndarray) -> np.ndarray:
        return np.where(decade >= DETAILED_DECADE, self.digits, _SMALL_DIGITS)

    def _mantissas(self, exact: np.ndarray, decade: np.ndarray) -> np.ndarray:
        shift = self._digits_of(decade) - 1 - np.maximum(decade, SMALLEST_DECADE - 1)
        return np.rint(exact * np.power(10.0, shift)).astype(np.int64)

    def thumbnails(self, codes: UInt16[np.ndarray, "head row key"]) -> UInt8[np.ndarray, "head cell_row cell_key"]:
        """Patterns in a few cells, each its largest weight on a logarithmic scale: 0 for none, 1 for 10⁻⁴ or less, 255 for 1."""
        for axis in (1, 2):
            size = codes.shape[axis]
            if size > THUMBNAIL:
                starts = np.arange(THUMBNAIL) * size // THUMBNAIL
                codes = np.maximum.reduceat(codes, starts, axis=axis)
        return self._shades[codes]

    @cached_property
    def _shades(self) -> UInt8[np.ndarray, " code"]:
        values = np.nan_to_num(self._values)
        decades = np.log10(values, where=values > 0, out=np.full_like(values, -np.inf))
        shades = 1 + 254 * (decades - DETAILED_DECADE).clip(0) / -DETAILED_DECADE
        return np.where(values > 0, np.rint(shades), 0).astype(np.uint8)


def encode_pattern(
    codes: WeightCodes,
    pattern: Float[np.ndarray, "batch head row key"],
    visible: Bool[np.ndarray, "batch group row key"],
    measured: Bool[np.ndarray, "batch head row"],
) -> UInt16[np.ndarray, "batch head row key"]:
    """The codes of a pattern: hidden keys and rows that are not measured have codes of their own."""
    encoded = np.where(visible, codes.encode(pattern), np.uint16(HIDDEN))
    return np.where(measured[..., None], encoded, np.uint16(UNMEASURED))


def compress_codes(codes: UInt16[np.ndarray, "*shape"]) -> bytes:
    """Codes deflated, all high bytes before all low bytes: neighbouring weights share the former."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    planes = np.stack([flat >> 8, flat & 255]).astype(np.uint8)
    return zlib.compress(planes.tobytes(), 1)
