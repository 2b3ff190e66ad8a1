"""Quantize rows of bf16 to packed e2m1 codes, two numbers an instruction where that is exact.

The results are those of `quantize`, bit for bit, at half the instructions: with 4-bit codes these
bound the speed on a device whose memory brings an element every 18 instruction slots (H200).
A thread loads eight numbers as four words and stores their codes as one word.

- Under scales that are powers of two (mxfp4), ratios keep bf16's eight bits. The three lines of
  `encode_e2m1` are then packed multiply-adds to 96 + 0, 1 and 2, where bf16 counts in halves.
- Under nvfp4's scales, ratios are float32. A divisor's reciprocal is the sum of two float32
  numbers, so that one multiplication and one multiply-add divide; see `reciprocal_parts`.
- Codes and signs are gathered byte by byte, four a `prmt`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED, launch
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
    fma_pair,
    four_words,
    high_number,
    largest_pair,
    low_number,
    multiply_pair,
    round_pair,
    smallest_pair,
)
from hal.ops.kernels.source import activate, beyond_count, gate_numbers

HALF_PAIR = tl.constexpr(0x3F003F00)
ONE_PAIR = tl.constexpr(0x3F803F80)
LINE = tl.constexpr(0x42C042C0)  # 96 twice: from here to 128, bf16 counts in halves
SECOND_LINE = tl.constexpr(0x42C242C2)
THIRD_LINE = tl.constexpr(0x42C442C4)
HUGE_BITS = tl.constexpr(0x71800000)  # 2^100
SHRINK_PAIR = tl.constexpr(0x1F801F80)  # 2^-64 twice
TOP_RECIPROCAL = tl.constexpr(0.0003720238164532930)  # 1 / 2688 in float32


@triton.jit
def codes_of_pairs(sizes, factor, second, third):
    """Return 96 in bf16 plus the e2m1 code of each number of words, under packed factors."""
    line = fma_pair(sizes, factor, tl.full(sizes.shape, LINE, tl.int32))
    other = fma_pair(sizes, second, tl.full(sizes.shape, SECOND_LINE, tl.int32))
    line = smallest_pair(line, other)
    other = fma_pair(sizes, third, tl.full(sizes.shape, THIRD_LINE, tl.int32))
    return smallest_pair(line, other)


@triton.jit
def four_signs(x, y):
    """Return a byte for each number of two words, as `choose_bytes` 0x6240: 255 if negative."""
    return choose_bytes(x, y, 0xFBD9)


@triton.jit
def word_of_fours(x, y):
    """Return a word whose nibbles are the lower ones of the bytes of x and y.

    These are numbers 0, 2, 1, 3 and 4, 6, 5, 7, as `four_signs` has them.
    """
    even, odd = choose_bytes(x, y, 0x5410), choose_bytes(x, y, 0x7632)
    return choose_bits(even, odd << 4, 0x0F0F0F0F)


@triton.jit
def mxfp4_words(w0, w1, w2, w3, ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr):
    """Quantize groups of 32, words [groups, 4] each; return code words and e8m0 bytes [groups].

    ADDEND and TOP_EXPONENT are the rule of `hal.quant.mx.exponent_rule`.
    """
    s0, s1, s2, s3 = w0 & SIZES, w1 & SIZES, w2 & SIZES, w3 & SIZES
    top = largest_pair(largest_pair(s0, s1), largest_pair(s2, s3))
    top = tl.max(largest_pair(top, choose_bytes(top, top, 0x1032)), axis=1)
    broken = top >= INFINITY_BITS
    # The lower half never carries: the rule looks at the bits of the upper one alone.
    byte = ((tl.where(broken, 0, top) + ADDEND) >> 23) - TOP_EXPONENT
    byte = tl.maximum(byte, 0)
    # 2^(127 - byte), which is 2^-126 at least.
    factor = tl.broadcast_to(((254 - byte) * 0x00800080)[:, None], w0.shape)
    half = tl.full(w0.shape, HALF_PAIR, tl.int32)
    second = multiply_pair(factor, half)
    third = multiply_pair(second, half)
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
    codes = tl.where(broken[:, None], 0, word_of_fours(front, back))
    return codes, tl.where(broken, 255, byte)


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
def nvfp4_words(w0, w1, w2, w3, scale_floor, ENCODING: tl.constexpr):
    """Quantize blocks of 16, all of one row: words [2, blocks] each, by halves of blocks.

    Returns code words [2, blocks], e4m3fn bytes [blocks] and the float32 scale [1].
    ENCODING: e4m3fn, or empty where the hardware converts.
    """
    s0, s1, s2, s3 = w0 & SIZES, w1 & SIZES, w2 & SIZES, w3 & SIZES
    top = largest_pair(largest_pair(s0, s1), largest_pair(s2, s3))
    top = largest_pair(top, choose_bytes(top, top, 0x1032))
    top = tl.max(top, axis=0) & -0x10000
    broken = top >= INFINITY_BITS
    largest = tl.max(top, axis=0)
    if largest >= INFINITY_BITS:
        # Rare: numbers beside a NaN count, the NaN does not.
        finite = tl.maximum(
            tl.maximum(_larger_finite(s0), _larger_finite(s1)),
            tl.maximum(_larger_finite(s2), _larger_finite(s3)),
        )
        largest = tl.max(tl.ravel(finite), axis=0)
    row = (tl.full((1,), 0, tl.int32) + largest).to(tl.float32, bitcast=True)
    outer = tl.maximum(divide_sizes(row, 448.0 * 6.0, TOP_RECIPROCAL), scale_floor)
    amax = tl.where(broken, 0, top).to(tl.float32, bitcast=True)
    # Where numbers are too small for an exact quotient, the scale is the least one anyway.
    wanted = divide_sizes(amax, 6.0, SIXTH)
    wanted = divide_sizes(wanted, outer, tl.div_rn(tl.full((1,), 1.0, tl.float32), outer))
    wanted = tl.maximum(wanted, 2.0**-9)
    if ENCODING == "":
        scale = wanted.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        scale = encode_fp8(wanted, ENCODING).to(tl.int32)
    # The bits of e4m3 at their place in a float32, which has 120 more in its exponent.
    factor = (scale << 20).to(tl.float32, bitcast=True) * 2.0**120
    factor = factor * tl.broadcast_to(outer, amax.shape)
    if largest >= HUGE_BITS:
        # Rare: the second part of a reciprocal would be too small for a float32.
        factor *= 2.0**-64
        shrink = tl.full(s0.shape, SHRINK_PAIR, tl.int32)
        s0, s1 = multiply_pair(s0, shrink), multiply_pair(s1, shrink)
        s2, s3 = multiply_pair(s2, shrink), multiply_pair(s3, shrink)
    first, second = reciprocal_parts(factor)
    factor, first, second = factor[None, :], first[None, :], second[None, :]
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
    codes = tl.where(broken[None, :], 0, codes | (signs & -0x77777778))
    return codes, tl.where(broken, 0x7F, scale), outer


@triton.jit
def _larger_finite(sizes):
    """Return the larger finite number of each word without signs, bits of f32, or 0."""
    low, high = sizes << 16, sizes & -0x10000
    low = tl.where(low >= INFINITY_BITS, 0, low)
    return tl.maximum(low, tl.where(high >= INFINITY_BITS, 0, high))


@triton.jit
def _quantize_pairs_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    n_words, n_groups, stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    scale_floor, epsilon, alpha, limit, capacity,
    GROUPS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    COUNTED: tl.constexpr, TWO_LEVELS: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    first_group = tl.program_id(1) * GROUPS
    word = tl.arange(0, 4)[None, None, :]
    if TWO_LEVELS:
        # First halves of blocks come first, so that both halves of one meet in a thread.
        half, block = tl.arange(0, 2)[:, None], tl.arange(0, GROUPS)[None, :]
        eighths = block * 2 + half
    else:
        group, part = tl.arange(0, GROUPS)[:, None], tl.arange(0, 4)[None, :]
        eighths = (first_group + group) * 4 + part
    places = eighths[:, :, None] * 4 + word
    inside = places < n_words
    x_ptr += row * stride_xm
    words = tl.load(x_ptr + places, mask=inside, other=0)
    if ACTIVATION != "":
        low, high = low_number(words), high_number(words)
        if GATED:
            up = tl.load(x_ptr + n_words + places, mask=inside, other=0)
            low = gate_numbers(low, low_number(up), alpha, limit, ACTIVATION, CLAMPED)
            high = gate_numbers(high, high_number(up), alpha, limit, ACTIVATION, CLAMPED)
        else:
            low, high = activate(low, alpha, ACTIVATION), activate(high, alpha, ACTIVATION)
        words = round_pair(low, high)
    if NORM:
        weight = tl.load(weight_ptr + places, mask=inside, other=0)
        if RESIDUAL:
            added = tl.load(residual_ptr + row * stride_rm + places, mask=inside, other=0)
            words = fma_pair(words, tl.full(words.shape, ONE_PAIR, tl.int32), added)
            tl.store(total_ptr + row * stride_tm + places, words, mask=inside)
        low, high = low_number(words), high_number(words)
        square = tl.sum(low * low, axis=2) + tl.sum(high * high, axis=2)
        square = tl.sum(tl.sum(square, axis=1), axis=0)
        root = tl.rsqrt(square / (2 * n_words) + epsilon)
        words = multiply_pair(round_pair(low * root, high * root), weight)
    w0, w1, w2, w3 = four_words(words)
    if TWO_LEVELS:
        codes, scales, second = nvfp4_words(w0, w1, w2, w3, scale_floor, ENCODING)
        tl.store(second_ptr + row + tl.arange(0, 1), second)
    else:
        codes, scales = mxfp4_words(w0, w1, w2, w3, ADDEND, TOP_EXPONENT)
    tl.store(values_ptr + row * stride_vm + eighths, codes, mask=eighths * 4 < n_words)
    groups = first_group + tl.arange(0, GROUPS)
    target = scales_ptr + row * stride_sm + groups * stride_sg
    tl.store(target, scales.to(tl.uint8), mask=groups < n_groups)


def quantize_pairs(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    groups: int,
    warps: int,
    addend: int,
    top_exponent: int,
    scale_floor: float,
    encoding: str,
    norm: Any,
    gate: dict[str, Any],
    alpha: float,
    limit: float,
    counts: torch.Tensor | None,
    capacity: int,
    second: torch.Tensor | None,
) -> None:
    """Launch what `hal.ops.kernels.quantize.quantize` found to be rows of words; see there.

    Args:
        x: bf16 [rows, columns], or gate and up beside each other; `are_words` holds for it.
        values: int32 [rows, columns / 8].
        scales: [rows, groups].
        groups: Groups of a program, a power of two.
        warps: Warps of a program.
        addend: Of `exponent_rule`, as top_exponent.
        top_exponent: See addend.
        scale_floor: Smallest second scale.
        encoding: Of nvfp4's scales if the kernel encodes them itself, else empty.
        norm: A `Norm`, or None.
        gate: What `gate_options` returns, not interleaved.
        alpha: Of the activation.
        limit: Of the activation.
        counts: [experts], or None.
        capacity: Rows of an expert.
        second: [rows] float32, of nvfp4.
    """
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    words = x.view(torch.int32)
    weight = norm.weight.view(torch.int32) if norm else words
    others = [None if part is None else part.view(torch.int32) for part in (residual, total)]
    columns, n_groups = values.shape[1] * 8, scales.shape[1]
    gate = {name: value for name, value in gate.items() if name != "INTERLEAVED"}
    launch(
        _quantize_pairs_kernel, (x.shape[0], -(-n_groups // groups)),
        words, *(words if part is None else part for part in others), weight, values,
        scales.view(torch.uint8), scales if second is None else second,
        x if counts is None else counts, columns // 2, n_groups, words.stride(0),
        *(0 if part is None else part.stride(0) for part in others), values.stride(0),
        *scales.stride(), scale_floor, norm.epsilon if norm else 0.0, alpha, limit, capacity,
        GROUPS=groups, NORM=norm is not None, RESIDUAL=residual is not None,
        **gate, COUNTED=counts is not None, TWO_LEVELS=second is not None, ENCODING=encoding,
        ADDEND=addend, TOP_EXPONENT=top_exponent, num_warps=warps,
    )  # fmt: skip


def are_words(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Say whether rows of bf16 consist of words: x [rows, columns], and others as long or [n]."""
    if x.dtype is not torch.bfloat16:
        return False
    return all(
        part is None
        or (
            part.dtype is torch.bfloat16
            and part.data_ptr() % 4 == 0
            and part.storage_offset() % 2 == 0
            and all(stride % 2 == 0 for stride in part.stride()[:-1])
        )
        for part in (x, *others)
    )
