"""Quantize rows of bf16 words to nvfp4, with as few instructions as are exact.

A ratio, times 2^-14, is truncated to float16, two at once: then the bits of float16 over 2^9 are
its e2m1 code but for rounding, `word_of_halves`. What is left is to have each ratio on the right
side of the ties between codes, of which every other one belongs to the code above.

Where a row's scale is a number of bf16 over 2688, as that of a row's own largest number is, two
factors that `hal.ops.kernels.reciprocals` chose take the place of the division and of that choice.

All others are divided in float32, and then ties are moved, `truncated_quotients`. A divisor's
reciprocal is the sum of two float32 numbers, so that one multiplication and one multiply-add
divide; see `reciprocal_parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.encode import INFINITY_BITS, SIXTH, divide_sizes, encode_fp8
from hal.ops.kernels.pairs import (
    high_number,
    limited_halves,
    look_up,
    low_number,
    multiply_pair,
    quick_reciprocal,
    truncated_products,
    truncated_quotients,
    word_of_halves,
)

HUGE_BITS = tl.constexpr(0x71800000)  # 2^100
HUGE_OUTER = tl.constexpr(2.0**88)  # of such a row
SHRINK_PAIR = tl.constexpr(0x1F801F80)  # 2^-64 twice
LAST_HALVES = tl.constexpr(0x0EFF0EFF)  # the last below 7 * 2^-14, twice: its code is 7
TOP_RECIPROCAL = tl.constexpr(0.0003720238164532930)  # 1 / 2688 in float32


@triton.jit
def reciprocal_parts(divisor):
    """Return two f32 numbers, above 0, whose sum is 1 / divisor, too large by one part in 2^40.

    The sum is off by less than 2^-43, apart from that: see `quotient`.
    """
    if INTERPRETED:
        first = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    else:
        first = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [divisor], tl.float32, is_pure=True, pack=1
        )
    # Less than 1 / divisor, so that the second is no negative number: of infinite products of both
    # the sum is infinite, and no NaN.
    first *= 1.0 - 2.0**-21
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
        # Not infinite, of which the interpreter would warn.
        wide = x.to(tl.float64) / tl.broadcast_to(divisor, x.shape).to(tl.float64)
        wide = tl.where(wide > 2.0**100, 2.0**100, tl.where(wide < -(2.0**100), -(2.0**100), wide))
        return wide.to(tl.float32)
    return tl.fma(x, tl.broadcast_to(first, x.shape), x * second)


@triton.jit
def quick_factors(largest, scale_floor, factors_ptr):
    """Return where the eight first factors of a row lie, given its largest bits, and the second.

    factors_ptr: `reciprocal_table`. The second is 0 where they do not hold.
    """
    # Rows of 128 mantissas have eight factors each, and then the second ones.
    mantissa = (largest >> 16) & 0x7F
    second = tl.load(factors_ptr + 1024 + mantissa)
    second = tl.where(largest.to(tl.float32, bitcast=True) < scale_floor * 2700.0, 0.0, second)
    return factors_ptr + mantissa * 8, tl.where(largest >= HUGE_BITS, 0.0, second)


@triton.jit
def largest_under(outer):
    """Return the bits of the number of bf16 that has outer, f32 [], for its scale, if any does.

    It does if `quick_outer` of them is outer.
    """
    top = (tl.minimum(outer, 2.0**100) * 2688.0).to(tl.int32, bitcast=True)
    return (top + 0x8000) & -0x10000


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
    if tl.max(outer, axis=0) >= HUGE_OUTER:
        # Rare: the second part of a reciprocal would be too small for a float32.
        factor *= 2.0**-64
    first, second = reciprocal_parts(factor)
    return scale, factor, first, second


@triton.jit
def _two_quotients(x, y, factor, first, second, SIGNED: tl.constexpr):
    """Divide numbers, f32 [blocks] each, as `exact_scales` says; return them as float16."""
    halves = truncated_quotients(
        quotient(x, factor, first, second), quotient(y, factor, first, second)
    )
    return limited_halves(halves, LAST_HALVES, SIGNED)


@triton.jit
def exact_word(w0, w1, w2, w3, factor, first, second, outer, broken, SIGNED: tl.constexpr):
    """Quantize eight numbers of each block, words [blocks] each, to one word of codes.

    factor, first, second: `exact_scales`. outer: the scale [1] of the row. broken: blocks whose
    codes are zeros. SIGNED: `limited_halves`.
    """
    # Instead of this branch one could multiply all quotients by the same number. Without it, ptxas
    # mixes the instructions of all words, in up to twice the registers.
    if tl.max(outer, axis=0) >= HUGE_OUTER:
        shrink = tl.full(w0.shape, SHRINK_PAIR, tl.int32)
        w0, w1 = multiply_pair(w0, shrink), multiply_pair(w1, shrink)
        w2, w3 = multiply_pair(w2, shrink), multiply_pair(w3, shrink)
    codes = word_of_halves(
        _two_quotients(low_number(w0), low_number(w1), factor, first, second, SIGNED),
        _two_quotients(high_number(w0), high_number(w1), factor, first, second, SIGNED),
        _two_quotients(low_number(w2), low_number(w3), factor, first, second, SIGNED),
        _two_quotients(high_number(w2), high_number(w3), factor, first, second, SIGNED),
    )
    return tl.where(broken, 0, codes)


@triton.jit
def quick_outer(largest):
    """Return the scale of a row, given the bits of its largest number: as f32 [].

    As `divide_sizes` does, for all threads at once.
    """
    size = largest.to(tl.float32, bitcast=True)
    if INTERPRETED:
        return tl.div_rn(size, size * 0.0 + 2688.0)
    quotient = size * TOP_RECIPROCAL
    return tl.fma(tl.fma(quotient, -2688.0, size), TOP_RECIPROCAL, quotient)


@triton.jit
def outer_reciprocal(outer):
    """Return 1 / outer, f32 [], of what `quick_outer` returns."""
    first = quick_reciprocal(outer)
    return tl.fma(tl.fma(first, outer, -1.0), first * -1.0, first)


@triton.jit
def quick_scales(top, outer, reciprocal, factors_ptr, ENCODING: tl.constexpr):
    """Return the e4m3fn bytes of blocks and what to multiply by, f32, in place of dividing.

    top: the largest sizes of blocks, finite bits of f32, none larger than the row's own. outer:
    `quick_outer`. reciprocal: of it. factors_ptr: the eight first factors of this row, of
    `hal.ops.kernels.reciprocals`.
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
def _two_products(x, y, factor, second, SIGNED: tl.constexpr):
    """Return the ratios of numbers, f32 [blocks] each, as float16."""
    return limited_halves(truncated_products(x, y, factor, second), LAST_HALVES, SIGNED)


@triton.jit
def quick_word(w0, w1, w2, w3, factor, second, SIGNED: tl.constexpr):
    """Quantize eight numbers of each block, words [blocks] each, to one word of codes.

    factor: `quick_scales`. second: of the row, `quick_factors`. SIGNED: `limited_halves`.
    """
    return word_of_halves(
        _two_products(low_number(w0), low_number(w1), factor, second, SIGNED),
        _two_products(high_number(w0), high_number(w1), factor, second, SIGNED),
        _two_products(low_number(w2), low_number(w3), factor, second, SIGNED),
        _two_products(high_number(w2), high_number(w3), factor, second, SIGNED),
    )
