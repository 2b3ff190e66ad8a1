"""Quantize rows of bf16 to packed e2m1 codes, two numbers an instruction where that is exact.

The results are those of `quantize`, bit for bit, at half the instructions: with 4-bit codes these
bound the speed on a device whose memory brings an element every 18 instruction slots (H200).
A thread loads eight numbers as four words and stores their codes as one word.

- Under scales that are powers of two (mxfp4), ratios keep bf16's eight bits. The three lines of
  `encode_e2m1` are then packed multiply-adds to 96 + 0, 1 and 2, where bf16 counts in halves.
- nvfp4 is in `nvfp4_pairs`.
- Codes and signs are gathered byte by byte, four a `prmt`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import has_signed_pairs, launch
from hal.ops.kernels.encode import INFINITY_BITS
from hal.ops.kernels.nvfp4_pairs import nvfp4_words
from hal.ops.kernels.pairs import (
    SIZES,
    choose_bits,
    choose_bytes,
    fma_pair,
    four_signs,
    four_words,
    high_number,
    largest_pair,
    low_number,
    multiply_pair,
    quick_power,
    quick_reciprocal,
    round_pair,
    smallest_pair,
    unpack_again,
    word_of_fours,
)
from hal.ops.kernels.reciprocals import reciprocal_table
from hal.ops.kernels.scale_order import ScaleOrder, scale_of_group, scale_of_row
from hal.ops.kernels.source import activate, beyond_count, gate_numbers

HALF_PAIR = tl.constexpr(0x3F003F00)
ONE_PAIR = tl.constexpr(0x3F803F80)
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
def squares(words, total):
    """Add the squares of the two numbers of each word to total, f32."""
    low, high = low_number(words), high_number(words)
    return tl.fma(high, high, tl.fma(low, low, total))


@triton.jit
def normalized(words, root, weight):
    """Return words times root, rounded, times weight, rounded."""
    low, high = unpack_again(words)
    return multiply_pair(round_pair(low * root, high * root), weight)


@triton.jit
def store_words(places, words, inside, FULL: tl.constexpr):
    """Store to places, all of them or those inside."""
    if FULL:
        tl.store(places, words)
    else:
        tl.store(places, words, mask=inside)


@triton.jit
def quick_gate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr):
    """Return activation(gate) * up, f32; see `gate_numbers`.

    A sigmoid below 2^-126 is 0.
    """
    if ACTIVATION == "silu":
        if CLAMPED:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return gate * quick_reciprocal(1.0 + quick_power(gate * -1.4426950408889634)) * up
    else:
        return gate_numbers(gate, up, alpha, limit, ACTIVATION, CLAMPED)


@triton.jit
def _quantize_pairs_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    factors_ptr, n_words, n_groups,
    stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    scale_floor, epsilon, alpha, limit, capacity,
    GROUPS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    COUNTED: tl.constexpr, TWO_LEVELS: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FULL: tl.constexpr,
    SIGNED: tl.constexpr, QUICK: tl.constexpr, ORDER: tl.constexpr,
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
    inside = eighths * 4 < n_words
    # Beyond a row its last eight numbers are read once more, which changes no maximum.
    places = (eighths if FULL else tl.minimum(eighths, n_words // 4 - 1))[:, :, None] * 4 + word
    x_ptr += row * stride_xm
    words = tl.load(x_ptr + places)
    if ACTIVATION != "":
        low, high = low_number(words), high_number(words)
        if GATED:
            up = tl.load(x_ptr + n_words + places)
            low = quick_gate(low, low_number(up), alpha, limit, ACTIVATION, CLAMPED)
            high = quick_gate(high, high_number(up), alpha, limit, ACTIVATION, CLAMPED)
        else:
            low, high = activate(low, alpha, ACTIVATION), activate(high, alpha, ACTIVATION)
        words = round_pair(low, high)
    if NORM:
        weight = tl.load(weight_ptr + places)
        if RESIDUAL:
            added = tl.load(residual_ptr + row * stride_rm + places)
            words = fma_pair(words, tl.full(words.shape, ONE_PAIR, tl.int32), added)
            store_words(total_ptr + row * stride_tm + places, words, inside[:, :, None], FULL)
        w0, w1, w2, w3 = four_words(words)
        square = squares(w3, squares(w2, squares(w1, squares(w0, tl.zeros(w0.shape, tl.float32)))))
        if not FULL:
            square = tl.where(inside, square, 0.0)
        # First what one thread has.
        AXIS: tl.constexpr = 0 if TWO_LEVELS else 1
        square = tl.sum(tl.sum(square, axis=AXIS), axis=0)
        root = tl.rsqrt(square / (2 * n_words) + epsilon)
        v0, v1, v2, v3 = four_words(weight)
        w0, w1 = normalized(w0, root, v0), normalized(w1, root, v1)
        w2, w3 = normalized(w2, root, v2), normalized(w3, root, v3)
    else:
        w0, w1, w2, w3 = four_words(words)
    if TWO_LEVELS:
        codes, scales, second = nvfp4_words(
            w0, w1, w2, w3, scale_floor, factors_ptr, QUICK, ENCODING, SIGNED
        )
        tl.store(second_ptr + row, second)
    else:
        codes, scales = mxfp4_words(w0, w1, w2, w3, ADDEND, TOP_EXPONENT)
    store_words(values_ptr + row * stride_vm + eighths, codes, inside, FULL)
    groups = first_group + tl.arange(0, GROUPS)
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
    store_words(target, scales.to(tl.uint8), groups < n_groups, FULL)


def quantize_pairs(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    groups: int,
    warps: int,
    registers: int,
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
    n_groups: int,
    order: ScaleOrder,
) -> None:
    """Launch what `hal.ops.kernels.quantize.quantize` found to be rows of words; see there.

    Args:
        x: bf16 [rows, columns], or gate and up beside each other; `are_words` holds for it.
        values: int32 [rows, columns / 8].
        scales: As order says.
        groups: Groups of a program, a power of two.
        warps: Warps of a program.
        registers: Most registers of a thread; 0 leaves that to the compiler.
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
        n_groups: Groups of a row.
        order: Where scales belong.
    """
    table = None if second is None else reciprocal_table(x.device)
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    words = x.view(torch.int32)
    weight = norm.weight.view(torch.int32) if norm else words
    others = [None if part is None else part.view(torch.int32) for part in (residual, total)]
    columns, group = values.shape[1] * 8, 32 if second is None else 16
    full = n_groups % groups == 0 and columns == n_groups * group
    gate = {name: value for name, value in gate.items() if name != "INTERLEAVED"}
    launch(
        _quantize_pairs_kernel, (x.shape[0], -(-n_groups // groups)),
        words, *(words if part is None else part for part in others), weight, values,
        scales.view(torch.uint8), scales if second is None else second,
        x if counts is None else counts,
        words if table is None else table, columns // 2, n_groups, words.stride(0),
        *(0 if part is None else part.stride(0) for part in others), values.stride(0),
        order.row, order.group, scale_floor, norm.epsilon if norm else 0.0, alpha, limit, capacity,
        GROUPS=groups, NORM=norm is not None, RESIDUAL=residual is not None,
        **gate, COUNTED=counts is not None, TWO_LEVELS=second is not None, ENCODING=encoding,
        ADDEND=addend, TOP_EXPONENT=top_exponent, ORDER=order.name,
        SIGNED=has_signed_pairs(), QUICK=table is not None, FULL=full, num_warps=warps,
        **({"maxnreg": registers} if registers else {}),
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
