"""Quantize words of two bf16 numbers to codes of eight bits, four to a word.

What comes before codes are (the largest size, a norm, a gate) is done for both numbers at once; a
quotient is float32 and divided truly, as `hal.ops.kernels.encode` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.encode import INFINITY_BITS, ROUNDER, divide_by, encode_fp8
from hal.ops.kernels.pairs import choose_bytes, high_number, low_number, quick_reciprocal


@triton.jit
def four_bytes(a, b, c, d, INTEGER: tl.constexpr):
    """Return four numbers in range as codes in a word, a lowest: int8 if INTEGER, else e4m3fn."""
    if INTEGER:
        # Adding 1.5 * 2^23 leaves the integer in the last bits: the add itself rounds.
        front = choose_bytes(_bits(a + ROUNDER), _bits(b + ROUNDER), 0x0040)
        back = choose_bytes(_bits(c + ROUNDER), _bits(d + ROUNDER), 0x0040)
        return choose_bytes(front, back, 0x5410)
    elif INTERPRETED:
        return _byte(a) | (_byte(b) << 8) | (_byte(c) << 16) | (_byte(d) << 24)
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high};}",
            "=r,r,r,r,r", [a, b, c, d], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def four_shifted(a, b, c, d, least, most, zero, CLAMP: tl.constexpr):
    """Return four quotients as int8 codes of a zero point [n], f32, in a word, a lowest.

    CLAMP: to least and most [n], which have ROUNDER added; see `scale_and_zero`.
    """
    zero = zero[:, None]
    a, b, c, d = a + ROUNDER, b + ROUNDER, c + ROUNDER, d + ROUNDER
    if CLAMP:
        low, high = least[:, None], most[:, None]
        a, b = tl.minimum(tl.maximum(a, low), high), tl.minimum(tl.maximum(b, low), high)
        c, d = tl.minimum(tl.maximum(c, low), high), tl.minimum(tl.maximum(d, low), high)
    # Integers below 2^24: these sums are exact.
    front = choose_bytes(_bits(a + zero), _bits(b + zero), 0x0040)
    back = choose_bytes(_bits(c + zero), _bits(d + zero), 0x0040)
    return choose_bytes(front, back, 0x5410)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _byte(x):
    return encode_fp8(x, "e4m3fn").to(tl.int32)


@triton.jit
def scales_of_pairs(top, quant_max, inverse_max, scale_floor):
    """Return the scales of groups given the f32 bits of each one's largest size, and the broken.

    inverse_max: 1 / quant_max in float32. The quotients are true: `tests/kernels/test_quotients.py`
    tries all sizes of bf16.
    """
    broken = top >= INFINITY_BITS
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    if INTERPRETED:
        scale = tl.div_rn(amax, tl.full(amax.shape, quant_max, tl.float32))
    else:
        scale = amax * inverse_max
        scale = tl.fma(tl.fma(scale, -quant_max, amax), inverse_max, scale)
    return tl.maximum(scale, scale_floor), broken


@triton.jit
def reciprocals(scale):
    """Return 1 / scale as rounded, of what `scales_of_pairs` returns; tested as it is."""
    if INTERPRETED:
        return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    first = quick_reciprocal(scale)
    return tl.fma(tl.fma(first, scale, -1.0), first * -1.0, first)


@triton.jit
def byte_words(
    w0, w1, w2, w3, factor, reciprocal, broken, MULTIPLIED: tl.constexpr, INTEGER: tl.constexpr
):
    """Quantize the eight numbers of words [groups, eighths] each to two words of codes.

    factor [groups] f32: what numbers are divided by, reciprocal being 1 / factor, or, if
    MULTIPLIED, their exact factor. broken [groups]: codes are zeros.
    """
    first = four_bytes(
        _ratio(low_number(w0), factor, reciprocal, MULTIPLIED),
        _ratio(high_number(w0), factor, reciprocal, MULTIPLIED),
        _ratio(low_number(w1), factor, reciprocal, MULTIPLIED),
        _ratio(high_number(w1), factor, reciprocal, MULTIPLIED), INTEGER,
    )  # fmt: skip
    second = four_bytes(
        _ratio(low_number(w2), factor, reciprocal, MULTIPLIED),
        _ratio(high_number(w2), factor, reciprocal, MULTIPLIED),
        _ratio(low_number(w3), factor, reciprocal, MULTIPLIED),
        _ratio(high_number(w3), factor, reciprocal, MULTIPLIED), INTEGER,
    )  # fmt: skip
    return tl.where(broken[:, None], 0, first), tl.where(broken[:, None], 0, second)


@triton.jit
def _ratio(x, factor, reciprocal, MULTIPLIED: tl.constexpr):
    if MULTIPLIED:
        return x * factor[:, None]
    else:
        return divide_by(x, factor, reciprocal)


@triton.jit
def bounded_word(
    first, second, scale, reciprocal, least, most, zero,
    FIXED: tl.constexpr, SHIFTED: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Quantize the four numbers of two words [groups, eighths] to a word of codes.

    scale, reciprocal = 1 / scale, zero: [groups] f32. FIXED: numbers are clamped to least and most,
    else SHIFTED codes are; see `fixed_scale` and `scale_and_zero`.
    """
    a = _bounded_ratio(low_number(first), scale, reciprocal, least, most, FIXED)
    b = _bounded_ratio(high_number(first), scale, reciprocal, least, most, FIXED)
    c = _bounded_ratio(low_number(second), scale, reciprocal, least, most, FIXED)
    d = _bounded_ratio(high_number(second), scale, reciprocal, least, most, FIXED)
    if SHIFTED:
        return four_shifted(a, b, c, d, least, most, zero, not FIXED)
    else:
        return four_bytes(a, b, c, d, INTEGER)


@triton.jit
def _bounded_ratio(x, scale, reciprocal, least, most, FIXED: tl.constexpr):
    if FIXED:
        x = tl.minimum(tl.maximum(x, least[:, None]), most[:, None])
    return divide_by(x, scale, reciprocal)
