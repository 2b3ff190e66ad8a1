"""The quantization formulas again, slowly, in float64 and from the formats' definitions.

Nothing here uses hal's codec or torch's casts: values of a format are enumerated from its bits
and rounding looks for the nearest of them, ties to the even code.
"""

from __future__ import annotations

import functools
import math

import numpy as np

BLOCK = 128
FLOOR = np.float32(1e-12)
TOP = {"e4m3fn": 448.0, "e4m3fnuz": 224.0, "e5m2": 57344.0, "int8": 127.0}


@functools.cache
def byte_values(encoding: str) -> np.ndarray:
    """Return what each of the 256 bytes means, in float64 (OCP FP8 1.0; fnuz: bias 8)."""
    if encoding == "e5m2":
        return e5m2_values()
    bias = {"e4m3fn": 7, "e4m3fnuz": 8}[encoding]
    values = np.empty(256)
    for byte in range(256):
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        if exponent:
            value = (1 + mantissa / 8) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / 8 * 2.0 ** (1 - bias)
        values[byte] = -value if byte & 128 else value
    if encoding == "e4m3fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[0x80] = np.nan
    return values


def e5m2_values() -> np.ndarray:
    """Return the same for e5m2: bias 15, infinities and NaN at the top exponent."""
    values = np.empty(256)
    for byte in range(256):
        exponent, mantissa = (byte >> 2) & 31, byte & 3
        if exponent == 31:
            value = np.nan if mantissa else np.inf
        elif exponent:
            value = (1 + mantissa / 4) * 2.0 ** (exponent - 15)
        else:
            value = mantissa / 4 * 2.0**-14
        values[byte] = -value if byte & 128 else value
    return values


def blocks(shape: tuple[int, ...], granularity: str):
    """Yield (index of the scale, index of the values) for each block of `[..., rows, columns]`."""
    *lead, rows, columns = shape
    for place in np.ndindex(*lead):
        if granularity in ("channel", "token"):
            for row in range(rows):
                yield (*place, row), (*place, row, slice(None))
        else:
            tall = BLOCK if granularity == "block128" else 1
            for i in range(math.ceil(rows / tall)):
                for j in range(math.ceil(columns / BLOCK)):
                    box = (slice(i * tall, (i + 1) * tall), slice(j * BLOCK, (j + 1) * BLOCK))
                    yield (*place, i, j), (*place, *box)


def round_to(ratio: np.ndarray, encoding: str) -> np.ndarray:
    """Return the nearest representable value within the quantization maximum, ties to even."""
    top = TOP[encoding]
    if encoding == "int8":
        grid, even = np.arange(0.0, 128), np.arange(128) % 2 == 0
    else:
        grid = byte_values(encoding)[:127]
        grid = grid[grid <= top]
        even = np.arange(len(grid)) % 2 == 0
    size = np.minimum(np.abs(ratio), top)
    above = np.searchsorted(grid, size)
    below = np.maximum(above - 1, 0)
    low, high = size - grid[below], grid[above] - size
    up = (high < low) | ((high == low) & even[above])
    return np.copysign(np.where(up, grid[above], grid[below]), ratio)


def quantize(x: np.ndarray, encoding: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (represented codes in float64, float32 scales) of float32 `x`."""
    codes = np.empty(x.shape)
    scales: dict[tuple[int, ...], np.float32] = {}
    top = TOP[encoding]
    for place, box in blocks(x.shape, granularity):
        part = x[box].astype(np.float64)
        largest = np.abs(part).max()
        if np.isfinite(largest):
            # float64 keeps more than twice the bits of float32: rounding twice is rounding once
            scale = max(np.float32(largest / top), FLOOR)
            ratio = (part / np.float64(scale)).astype(np.float32).astype(np.float64)
            codes[box] = round_to(ratio, encoding)
        else:
            scale = np.float32(np.nan)
            codes[box] = np.nan
        scales[place] = scale
    shape = tuple(max(index) + 1 for index in zip(*scales, strict=True))
    out = np.empty(shape, dtype=np.float32)
    for place, scale in scales.items():
        out[place] = scale
    return codes, out
