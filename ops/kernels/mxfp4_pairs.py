"""Quantize words of two bf16 numbers to mxfp4: packed multiply-adds in place of comparisons.

Under scales that are powers of two, ratios keep bf16's eight bits. The three lines of `encode_e2m1`
are then packed multiply-adds to 96 + 0, 1 and 2, where bf16 counts in halves. Codes and signs are
gathered byte by byte, four a `prmt`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.encode import INFINITY_BITS
from hal.ops.kernels.pairs import (
    SIZES,
    choose_bits,
    choose_bytes,
    fma_pair,
    four_signs,
    multiply_pair,
    smallest_pair,
    word_of_fours,
)

HALF_PAIR = tl.constexpr(0x3F003F00)
LINE = tl.constexpr(0x42C042C0)  # 96 twice: from here to 128, bf16 counts in halves
SECOND_LINE = tl.constexpr(0x42C242C2)
THIRD_LINE = tl.constexpr(0x42C442C4)


@triton.jit
def codes_of_pairs(sizes, factor, second, third):
    """Return 96 in bf16 plus the e2m1 code of each number of words, under packed factors."""
    line = fma_pair(sizes, factor, tl.full(sizes.shape, LINE, tl.int32))
    other = fma_pair(sizes, second, tl.full(sizes.shape, SECOND_LINE, tl.int32))
    line = smallest_pair(line, other)
    other = fma_pair(sizes, third, tl.full(sizes.shape, THIRD_LINE, tl.int32))
    return smallest_pair(line, other)


@triton.jit
def exponent_byte(top, ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr):
    """Return the e8m0 bytes of groups, given the f32 bits of their sizes, and which are broken.

    ADDEND and TOP_EXPONENT are the rule of `hal.quant.mx.exponent_rule`.
    """
    broken = top >= INFINITY_BITS
    # The lower half never carries: the rule looks at the bits of the upper one alone.
    byte = ((tl.where(broken, 0, top) + ADDEND) >> 23) - TOP_EXPONENT
    return tl.maximum(byte, 0), broken


@triton.jit
def mxfp4_factors(byte):
    """Return 2^(127 - byte), which is 2^-126 at least, a half and a quarter of it, in pairs."""
    factor = (254 - byte) * 0x00800080
    half = tl.full(byte.shape, HALF_PAIR, tl.int32)
    second = multiply_pair(factor, half)
    return factor, second, multiply_pair(second, half)


@triton.jit
def mxfp4_word(w0, w1, w2, w3, factor, second, third, broken):
    """Quantize eight numbers of each group, words [groups] each, to one word of codes.

    factor, second, third: `mxfp4_factors`. broken: groups whose codes are zeros.
    """
    s0, s1, s2, s3 = w0 & SIZES, w1 & SIZES, w2 & SIZES, w3 & SIZES
    # No clamp: the rule keeps ratios below 7, which round to 6.
    front = choose_bytes(
        codes_of_pairs(s0, factor, second, third),
        codes_of_pairs(s1, factor, second, third), 0x6240,
    )  # fmt: skip
    back = choose_bytes(
        codes_of_pairs(s2, factor, second, third),
        codes_of_pairs(s3, factor, second, third), 0x6240,
    )  # fmt: skip
    front = choose_bits(front, four_signs(w0, w1), 0x07070707)
    back = choose_bits(back, four_signs(w2, w3), 0x07070707)
    return tl.where(broken, 0, word_of_fours(front, back))
