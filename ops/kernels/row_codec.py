"""Turn units of rows that travel into codes and back: see `dispatch_rows`.

The codes are those of `hal.ops.kernels.quantize`, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from hal.ops.kernels.common import decode_fp8
from hal.ops.kernels.encode import divide, mx_tile, nvfp4_tile, scaled_tile


@dataclass(frozen=True)
class Codec:
    """How the codes of a row are made.

    Attributes:
        kind: `raw`, `scaled` (float32 scales), `mx` or `nvfp4`.
        columns: Of a row.
        groups: Scales of a row, those of padding included.
        width: Columns under one scale, a power of two.
        whole: Whether a row must be known before its first code.
        per_word: Codes in each element of what is stored: 1, 2 (bytes) or 8 (words).
        integer: Whether codes are int8.
        encoding: Of fp8 that the kernel encodes itself; empty where the hardware converts.
        fnuz: Whether codes are e4m3fnuz.
        addend: Of `hal.quant.mx.exponent_rule`, as top_exponent.
        top_exponent: See addend.
        quant_max: Largest code under float32 scales.
        scale_floor: Smallest float32 scale.
    """

    kind: str
    columns: int
    groups: int = 1
    width: int = 1
    whole: bool = False
    per_word: int = 1
    integer: bool = False
    encoding: str = ""
    fnuz: bool = False
    addend: int = 0
    top_exponent: int = 0
    quant_max: float = 1.0
    scale_floor: float = 1.0


@triton.jit
def encoded(
    x, quant_max, scale_floor, CODEC: tl.constexpr, PER_WORD: tl.constexpr,
    INTEGER: tl.constexpr, ENCODING: tl.constexpr, ADDEND: tl.constexpr,
    TOP_EXPONENT: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Return codes as bytes or words, scales [groups], and second scales [1] f32 (of nvfp4)."""
    second = tl.zeros((1,), tl.float32)
    if CODEC == "nvfp4":
        codes, scales, second = nvfp4_tile(x, scale_floor, PER_WORD, ENCODING)
    elif CODEC == "mx":
        codes, scales = mx_tile(
            x, PER_WORD, tl.float8e4nv, ENCODING, ADDEND, TOP_EXPONENT, FNUZ
        )  # fmt: skip
    elif INTEGER:
        codes, scales = scaled_tile(x, quant_max, scale_floor, tl.int8, ENCODING)
    else:
        codes, scales = scaled_tile(x, quant_max, scale_floor, tl.float8e4nv, ENCODING)
    if PER_WORD == 8:
        return codes.to(tl.int32), scales, second
    elif PER_WORD == 2:
        return codes.to(tl.uint8), scales, second
    else:
        return codes.to(tl.uint8, bitcast=True), scales, second


@triton.jit
def decoded(
    codes, scales, second, CODEC: tl.constexpr, PER_WORD: tl.constexpr, INTEGER: tl.constexpr,
    FNUZ: tl.constexpr,
):  # fmt: skip
    """Return the float32 numbers [groups, width] of what `encoded` returns."""
    if PER_WORD > 1:
        places = (tl.arange(0, PER_WORD) * 4)[None, None, :]
        wide = (codes.to(tl.int32)[:, :, None] >> places) & 0xF
        wide = tl.reshape(wide, (codes.shape[0], codes.shape[1] * PER_WORD))
        # The bits of the number: of 2^(e - 1) * 1.m, or of a half or zero, and its sign.
        size = ((((wide >> 1) & 3) + 126) << 23) | ((wide & 1) << 22)
        size = tl.where((wide & 6) == 0, (wide & 1) * 0x3F000000, size)
        x = (size | ((wide & 8) << 28)).to(tl.int32).to(tl.float32, bitcast=True)
    elif INTEGER:
        x = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        x = decode_fp8(codes, tl.float16, FNUZ).to(tl.float32)
    if CODEC == "mx":
        wide = scales.to(tl.int32)
        bits = tl.where(wide == 0, 0x00400000, tl.where(wide == 255, 0x7FC00000, wide << 23))
        return x * bits.to(tl.int32).to(tl.float32, bitcast=True)[:, None]
    elif CODEC == "nvfp4":
        # The bits of e4m3 at their place in a float32, which has 120 more in its exponent.
        scale = (scales.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120
        return x * tl.where(scales == 0x7F, float("nan"), scale)[:, None] * second
    else:
        return x * scales[:, None]


@triton.jit
def _rounded(x):
    """Round x (f32, at most 448 in size) to the nearest e4m3 number, ties to even; NaN stays NaN.

    What the hardware encoded is not decoded from registers: the compiler of CUDA 12.9 gives wrong
    numbers for every second code then (seen on an H200 with Triton 3.6).
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # The add leaves multiples of 2^-9, the distance of subnormal numbers.
    magic = tl.full(x.shape, 1.5 * 2.0**14, tl.float32)
    subnormal = ((tl.abs(x) + magic) - magic).to(tl.int32, bitcast=True) | (bits & -0x80000000)
    rounded = tl.where(tl.abs(x) < 2.0**-6, subnormal, normal).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def decoded_own(
    x, codes, scales, second, CODEC: tl.constexpr, PER_WORD: tl.constexpr,
    INTEGER: tl.constexpr, ENCODING: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """Return what `decoded` makes of the codes of x, while they are in registers."""
    if (PER_WORD > 1 or INTEGER) or ENCODING != "":
        return decoded(codes, scales, second, CODEC, PER_WORD, INTEGER, FNUZ)
    elif CODEC == "mx":
        byte = scales.to(tl.int32)
        factor = ((254 - byte) << 23).to(tl.int32).to(tl.float32, bitcast=True)
        bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
        return _rounded(x * factor[:, None]) * scale[:, None]
    else:
        return _rounded(divide(x, scales)) * scales[:, None]
