"""Quantize rows of bf16 words to nvfp4, two numbers an instruction where that is exact.

Ratios are rounded to float16, two at once, after one multiplication each by a factor that
`hal.ops.kernels.reciprocals` chose so that no code comes out another. The three lines of
`encode_e2m1` are then packed multiply-adds to 768 + 0, 1 and 2, where float16 counts in halves.

Rows without such factors are divided in float32. A divisor's reciprocal is the sum of two float32
numbers, so that one multiplication and one multiply-add divide; see `reciprocal_parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.encode import (
    HALVES,
    INFINITY_BITS,
    SIXTH,
    divide_sizes,
    encode_fp8,
)
from hal.ops.kernels.pairs import (
    SIZES,
    choose_bits,
    choose_bytes,
    fma_halves,
    four_signs,
    high_number,
    look_up,
    low_number,
    multiply_pair,
    quick_reciprocal,
    round_halves,
    size_times,
    smallest_halves,
    smallest_pair,
    word_of_fours,
)

HUGE_BITS = tl.constexpr(0x71800000)  # 2^100
HUGE_OUTER = tl.constexpr(2.0**88)  # of such a row
SHRINK_PAIR = tl.constexpr(0x1F801F80)  # 2^-64 twice
ONE_HALVES = tl.constexpr(0x3C003C00)
HALVES_LINE = tl.constexpr(0x62006200)  # 768 twice: from 512 to 1024, float16 counts in halves
TOP_RECIPROCAL = tl.constexpr(0.0003720238164532930)  # 1 / 2688 in float32


@triton.jit
def reciprocal_parts(divisor):
    """Return two f32 numbers whose sum is 1 / divisor, too large by one part in 2^40.

    The sum is off by less than 2^-43, apart from that: see `quotient`.
    """
    if INTERPRETED:
        first = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    else:
        first = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [divisor], tl.float32, is_pure=True, pack=1
        )
    left = tl.fma(-first, divisor, tl.full(divisor.shape, 1.0, tl.float32))
    return first, tl.fma(left, first, first * 2.0**-40)


@triton.jit
def quotient(x, divisor, first, second):
    """Return x / divisor, f32, as exact as its e2m1 code needs; x has no more than eight bits.

    What needs care are quotients that round to a tie between codes, 1, 3, 5 or 7 times a power of
    two. None lies closer than 2^-32 to a bound of those that do, except for divisors of 24 ones:
    2^-48 above the bound. A reciprocal too large by 2^-40 has all of them on the right side.
    """
    if INTERPRETED:
        return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    return tl.fma(x, tl.broadcast_to(first, x.shape), x * second)


@triton.jit
def code_in_halves(size):
    """Return bits whose last four are the e2m1 code of size (f32), or 8 or 9 where it is above."""
    line = (size + HALVES).to(tl.int32, bitcast=True)
    second = (size * 0.5 + (HALVES + 1.0)).to(tl.int32, bitcast=True)
    third = (size * 0.25 + (HALVES + 2.0)).to(tl.int32, bitcast=True)
    return tl.minimum(tl.minimum(line, second), third)


@triton.jit
def two_codes(sizes, divisor, first, second):
    """Return a byte with the codes of a word's two numbers; the bits above mean nothing."""
    low = code_in_halves(quotient(low_number(sizes), divisor, first, second))
    high = code_in_halves(quotient(high_number(sizes), divisor, first, second))
    return low + (high << 4)


@triton.jit
def codes_of_ratios(words, factor):
    """Return 768 in float16 plus half the e2m1 code of each number's size times factor (f32)."""
    ratio = round_halves(
        size_times(low_number(words), factor), size_times(high_number(words), factor)
    )
    line = fma_halves(
        ratio, tl.full(ratio.shape, ONE_HALVES, tl.int32),
        tl.full(ratio.shape, HALVES_LINE, tl.int32),
    )  # fmt: skip
    second = fma_halves(
        ratio, tl.full(ratio.shape, ONE_HALVES - 0x04000400, tl.int32),
        tl.full(ratio.shape, HALVES_LINE + 0x00020002, tl.int32),
    )  # fmt: skip
    third = fma_halves(
        ratio, tl.full(ratio.shape, ONE_HALVES - 0x08000800, tl.int32),
        tl.full(ratio.shape, HALVES_LINE + 0x00040004, tl.int32),
    )  # fmt: skip
    return smallest_halves(smallest_halves(line, second), third)


@triton.jit
def quick_factors(largest, scale_floor, factors_ptr):
    """Return where the eight factors of a row lie, given its largest bits, and whether they hold.

    factors_ptr: `reciprocal_table`. The second is more than 0 if they do.
    """
    # Rows of 128 mantissas have eight factors each, and then whether all of them exist.
    mantissa = (largest >> 16) & 0x7F
    quick = tl.load(factors_ptr + 1024 + mantissa)
    quick = tl.where(largest.to(tl.float32, bitcast=True) < scale_floor * 2700.0, 0.0, quick)
    return factors_ptr + mantissa * 8, tl.where(largest >= HUGE_BITS, 0.0, quick)


@triton.jit
def outer_scale(largest, scale_floor):
    """Return the scale [1] of a row, given the bits of its largest finite number."""
    row = (tl.full((1,), 0, tl.int32) + largest).to(tl.float32, bitcast=True)
    return tl.maximum(divide_sizes(row, 448.0 * 6.0, TOP_RECIPROCAL), scale_floor)


@triton.jit
def byte_of_scale(wanted, ENCODING: tl.constexpr):
    """Return the e4m3fn bytes of scales (f32, in range), int32. ENCODING: as `exact_scales`.

    Each is converted beside a zero: of two conversions ptxas 12.8 makes one that merges into a
    register, and has taken the wrong one.
    """
    if ENCODING != "":
        return encode_fp8(wanted, ENCODING).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1; "
            "cvt.u32.u16 $0, pair;}",
            "=r,r", [wanted], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def factor_of_scale(scale):
    """Return the numbers (f32) of e4m3fn bytes without signs.

    The bits of e4m3 at their place in a float32, which has 120 more in its exponent.
    """
    return (scale << 20).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def exact_scales(top, outer, ENCODING: tl.constexpr, SATURATES: tl.constexpr):
    """Return the scales of blocks: their e4m3fn bytes, and what to divide by in two parts.

    top: the bits of each one's largest size. outer: the scale [1] of the row. ENCODING: e4m3fn, or
    empty where the hardware converts. SATURATES: Sizes may exceed what the scale reaches to.
    Returns also the largest sizes that matter then, twice in a word.
    """
    amax = tl.where(top >= INFINITY_BITS, 0, top).to(tl.float32, bitcast=True)
    if SATURATES:
        # A quotient that overflows would spoil the division; beyond this bound all saturate anyway.
        amax = tl.minimum(amax, tl.broadcast_to(outer * (2 * 448.0 * 6.0), amax.shape))
    # Where numbers are too small for an exact quotient, the scale is the least one anyway.
    wanted = divide_sizes(amax, 6.0, SIXTH)
    wanted = divide_sizes(wanted, outer, tl.div_rn(tl.full((1,), 1.0, tl.float32), outer))
    wanted = tl.maximum(wanted, 2.0**-9)
    if SATURATES:
        wanted = tl.minimum(wanted, 448.0)
    scale = byte_of_scale(wanted, ENCODING)
    factor = factor_of_scale(scale) * tl.broadcast_to(outer, amax.shape)
    # Anything from 5 times the factor on has the last code, up to 9 times without carrying.
    bound = (factor * 7.5).to(tl.int32, bitcast=True) & -0x10000
    bound = bound | (bound >> 16)
    if tl.max(outer, axis=0) >= HUGE_OUTER:
        # Rare: the second part of a reciprocal would be too small for a float32.
        factor *= 2.0**-64
    first, second = reciprocal_parts(factor)
    return scale, factor, first, second, bound


@triton.jit
def exact_word(
    w0, w1, w2, w3, factor, first, second, bound, outer, broken, SATURATES: tl.constexpr
):
    """Quantize eight numbers of each block, words [blocks] each, to one word of codes.

    factor, first, second, bound: `exact_scales`. outer: the scale [1] of the row. broken: blocks
    whose codes are zeros.
    """
    s0, s1, s2, s3 = w0 & SIZES, w1 & SIZES, w2 & SIZES, w3 & SIZES
    if SATURATES:
        s0, s1 = smallest_pair(s0, bound), smallest_pair(s1, bound)
        s2, s3 = smallest_pair(s2, bound), smallest_pair(s3, bound)
    if tl.max(outer, axis=0) >= HUGE_OUTER:
        shrink = tl.full(s0.shape, SHRINK_PAIR, tl.int32)
        s0, s1 = multiply_pair(s0, shrink), multiply_pair(s1, shrink)
        s2, s3 = multiply_pair(s2, shrink), multiply_pair(s3, shrink)
    front = choose_bytes(
        two_codes(s0, factor, first, second), two_codes(s1, factor, first, second), 0x0040
    )
    back = choose_bytes(
        two_codes(s2, factor, first, second), two_codes(s3, factor, first, second), 0x0040
    )
    codes = choose_bytes(front, back, 0x5410)
    # Ratios up to 9, and what is near it, became codes 8 and 9, which must be 7.
    codes = (codes | (((codes >> 3) & 0x11111111) * 7)) & 0x77777777
    signs = word_of_fours(four_signs(w0, w1), four_signs(w2, w3))
    return tl.where(broken, 0, codes | (signs & -0x77777778))


@triton.jit
def quick_outer(largest):
    """Return the scale of a row and 1 / scale, given the bits of its largest number: as f32 [].

    As `divide_sizes` does, for all threads at once.
    """
    size = largest.to(tl.float32, bitcast=True)
    if INTERPRETED:
        outer = tl.div_rn(size, size * 0.0 + 2688.0)
    else:
        quotient = size * TOP_RECIPROCAL
        outer = tl.fma(tl.fma(quotient, -2688.0, size), TOP_RECIPROCAL, quotient)
    first = quick_reciprocal(outer)
    return outer, tl.fma(tl.fma(first, outer, -1.0), first * -1.0, first)


@triton.jit
def quick_scales(top, outer, reciprocal, factors_ptr, ENCODING: tl.constexpr):
    """Return the e4m3fn bytes of blocks and what to multiply by, f32, in place of dividing.

    top: the largest sizes of blocks, finite bits of f32. outer, reciprocal: `quick_outer`.
    factors_ptr: the eight factors of this row, of `hal.ops.kernels.reciprocals`.
    """
    wanted = divide_sizes(top.to(tl.float32, bitcast=True), 6.0, SIXTH)
    wanted = tl.maximum(divide_sizes(wanted, outer, reciprocal), 2.0**-9)
    scale = byte_of_scale(wanted, ENCODING)
    number = factor_of_scale(scale).to(tl.int32, bitcast=True)
    factor = look_up(factors_ptr, (number >> 20) & 7)
    # Exponents of both scales are subtracted from that of a factor for scales in [1, 2).
    exponent = 0x7F000000 - (outer.to(tl.int32, bitcast=True) & INFINITY_BITS)
    factor += exponent - (number & INFINITY_BITS)
    return scale, factor.to(tl.float32, bitcast=True)


@triton.jit
def quick_word(w0, w1, w2, w3, factor):
    """Quantize eight numbers of each block, words [blocks] each, to one word of codes."""
    front = choose_bytes(codes_of_ratios(w0, factor), codes_of_ratios(w1, factor), 0x6240)
    back = choose_bytes(codes_of_ratios(w2, factor), codes_of_ratios(w3, factor), 0x6240)
    codes = word_of_fours(front, back)
    # Ratios up to 9, and what is near it, became codes 8 and 9, which must be 7.
    codes |= ((codes >> 3) & 0x11111111) * 7
    signs = word_of_fours(four_signs(w0, w1), four_signs(w2, w3))
    return choose_bits(codes, signs, 0x77777777)


@triton.jit
def largest_finite(words):
    """Return the f32 bits of the larger number of each word, not counting NaN and infinity."""
    low, high = (words & SIZES) << 16, words & SIZES & -0x10000
    low = tl.where(low >= INFINITY_BITS, 0, low)
    return tl.maximum(low, tl.where(high >= INFINITY_BITS, 0, high))
