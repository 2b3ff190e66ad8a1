"""Multiply a few rows by a weight matrix: out = a @ (decoded b).T, without matrix instructions.

A program takes some rows of b and goes along k in long steps: all of its weight is on its way to
the registers at once, and nothing is exchanged between threads before the last sum. With one to
four rows of a, that is as fast as memory allows, where a tile of 16 rows is not: it waits for
shared memory at every step. Rows of a are programs of their own, which share b through L2.

Weights are those of `kinds`; codes of a byte come as words too. Products and sums are float32, and
so are scales, which apply to the sum of a group or of the row.

Source: as for `packed`, whose bit patterns in fp16 this reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import converts_fp8, launch, offsets_need_64_bits
from hal.ops.kernels.kinds import (
    ALL_KINDS,
    Weight,
    by_row,
    decode_options,
    row_strides,
    scale_arguments,
)
from hal.ops.kernels.packed import (
    half_of,
    load_words,
    nan_marks,
    place,
    place_fp8,
    scale_number,
)
from hal.ops.tiles import Tile


@triton.jit
def _integer(words, nothing, P: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """Return the codes at bit P of int32 words, integers from LOWEST on, as float32.

    They become the last bits of a number whose unit is 2^(23 - P): one logical instruction
    and one exact subtraction a code, without a conversion. Negative codes are in two's complement.
    `nothing` is 0, unknown to the compiler: of two constants in a logical instruction one must be
    in a register, and if both are known it prefers two instructions.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << P
    TOP: tl.constexpr = (-LOWEST) << P  # turns two's complement into an offset
    UNIT: tl.constexpr = (150 - P) << 23
    OFFSET: tl.constexpr = 2.0 ** (23 - P) - LOWEST
    return ((words & MASK) ^ (nothing + (UNIT | TOP))).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def _float(placed, HIGH: tl.constexpr):
    """Return the low (0) or high (1) fp16 of int32 words as float32."""
    return half_of(placed, HIGH, tl.float16).to(tl.float32)


@triton.jit
def _add_bytes(
    sums, words, x, nothing, CODES: tl.constexpr, FNUZ: tl.constexpr, WORDS: tl.constexpr
):
    """Return sums [BLOCK_N, WORDS] plus code * x over the four codes of each word."""
    # k = 4 * word + 2 * half + parity
    even, odd = tl.split(x.reshape(WORDS, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    if CODES == "int8":
        high = words >> 16
        sums += _integer(words, nothing, 0, 8, -128) * x0[None, :]
        sums += _integer(words, nothing, 8, 8, -128) * x1[None, :]
        sums += _integer(high, nothing, 0, 8, -128) * x2[None, :]
        sums += _integer(high, nothing, 8, 8, -128) * x3[None, :]
    else:
        marks = nan_marks(words, FNUZ)
        even_codes = place_fp8(words, marks, 0, tl.float16, FNUZ)
        odd_codes = place_fp8(words, marks, 8, tl.float16, FNUZ)
        sums += _float(even_codes, 0) * x0[None, :]
        sums += _float(odd_codes, 0) * x1[None, :]
        sums += _float(even_codes, 1) * x2[None, :]
        sums += _float(odd_codes, 1) * x3[None, :]
    return sums


@triton.jit
def _add_nibbles(sums, words, x, zero, nothing, CODES: tl.constexpr, WORDS: tl.constexpr):
    """Return sums [BLOCK_N, WORDS] plus (code - zero) * x over the eight codes of each word."""
    # k = 8 * word + 4 * half + 2 * pair + parity
    even, odd = tl.split(x.reshape(WORDS, 4, 2))
    x04, x26 = tl.split(even.reshape(WORDS, 2, 2))
    x15, x37 = tl.split(odd.reshape(WORDS, 2, 2))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    if CODES == "e2m1":
        placed = place(words, 0, CODES, tl.float16)
        sums += _float(placed, 0) * x0[None, :]
        sums += _float(placed, 1) * x4[None, :]
        placed = place(words, 4, CODES, tl.float16)
        sums += _float(placed, 0) * x1[None, :]
        sums += _float(placed, 1) * x5[None, :]
        placed = place(words, 8, CODES, tl.float16)
        sums += _float(placed, 0) * x2[None, :]
        sums += _float(placed, 1) * x6[None, :]
        placed = place(words, 12, CODES, tl.float16)
        sums += _float(placed, 0) * x3[None, :]
        sums += _float(placed, 1) * x7[None, :]
    else:
        LOWEST: tl.constexpr = -8 if CODES == "int4" else 0
        high = words >> 16
        sums += (_integer(words, nothing, 0, 4, LOWEST) - zero) * x0[None, :]
        sums += (_integer(words, nothing, 4, 4, LOWEST) - zero) * x1[None, :]
        sums += (_integer(words, nothing, 8, 4, LOWEST) - zero) * x2[None, :]
        sums += (_integer(words, nothing, 12, 4, LOWEST) - zero) * x3[None, :]
        sums += (_integer(high, nothing, 0, 4, LOWEST) - zero) * x4[None, :]
        sums += (_integer(high, nothing, 4, 4, LOWEST) - zero) * x5[None, :]
        sums += (_integer(high, nothing, 8, 4, LOWEST) - zero) * x6[None, :]
        sums += (_integer(high, nothing, 12, 4, LOWEST) - zero) * x7[None, :]
    return sums


@triton.jit
def _gemv_kernel(
    a_ptr, b_ptr, out_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr,
    n_columns, k_size, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    stride_sn, stride_sk, stride_2n,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CODES: tl.constexpr, FNUZ: tl.constexpr,
    WORDS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 1 if CODES == "e4m3" or CODES == "int8" else 2
    PER_WORD: tl.constexpr = 1 if CODES == "" else 4 * PER_BYTE
    STEP: tl.constexpr = BLOCK_K // PER_WORD
    # Sums that a step keeps for each row: of words, of a few elements, or of groups.
    OF_WORDS: tl.constexpr = BLOCK_K // 8 if CODES == "" else STEP
    PARTS: tl.constexpr = OF_WORDS if SCALE_FORMAT == "" else BLOCK_K // GROUP
    # What `place` leaves out of floats in fp16. Before a scale, whose product might be subnormal.
    E4M3: tl.constexpr = 2.0**7 if FNUZ else 2.0**8
    FACTOR: tl.constexpr = 2.0**14 if CODES == "e2m1" else E4M3 if CODES == "e4m3" else 1.0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    column_inside = columns < n_columns
    inner = tl.arange(0, BLOCK_K)
    word = tl.arange(0, STEP)
    group = tl.arange(0, PARTS)
    rows_of_b = columns
    if WIDE:
        rows_of_b = columns.to(tl.int64)
        inner = inner.to(tl.int64)
    nothing = n_columns >> 31
    n_groups = tl.cdiv(k_size, GROUP)
    a_ptrs = a_ptr + row * stride_am + inner * stride_ak
    bytes_apart: tl.constexpr = 1 if WORDS or CODES == "" else 4
    b_ptrs = b_ptr + (rows_of_b[:, None] * stride_bn + word[None, :] * (bytes_apart * stride_bk))
    total = tl.zeros((BLOCK_N, PARTS), tl.float32)
    for step in range(0, tl.cdiv(k_size, BLOCK_K)):
        left = k_size - step * BLOCK_K
        if CODES == "":
            if EVEN_N and EVEN_K:
                codes = tl.load(b_ptrs)
            else:
                mask = column_inside[:, None] & (word < left)[None, :]
                codes = tl.load(b_ptrs, mask=mask, other=0.0)
        else:
            codes = load_words(
                b_ptrs, stride_bk, word * PER_WORD, left, column_inside,
                PER_BYTE, WORDS, EVEN_N and EVEN_K,
            )  # fmt: skip
        if EVEN_K:
            x = tl.load(a_ptrs).to(tl.float32)
        else:
            x = tl.load(a_ptrs, mask=inner < left, other=0.0).to(tl.float32)
        if SCALE_FORMAT != "":
            groups = step * (BLOCK_K // GROUP) + group
            offsets = (rows_of_b // SCALE_ROWS)[:, None] * stride_sn + groups[None, :] * stride_sk
            inside = column_inside[:, None] & (groups < n_groups)[None, :]
            scale = tl.load(scales_ptr + offsets, mask=inside, other=0)
            scale = scale_number(scale, SCALE_FORMAT, tl.float32)
        sums = tl.zeros((BLOCK_N, STEP), tl.float32) if SCALE_FORMAT != "" else total
        if CODES == "":
            sums = (codes.to(tl.float32) * x[None, :]).reshape(BLOCK_N, PARTS, BLOCK_K // PARTS)
            sums = tl.sum(sums, axis=2)
        elif PER_BYTE == 1:
            sums = _add_bytes(sums, codes, x, nothing, CODES, FNUZ, STEP)
        else:
            zero = tl.zeros((1, 1), tl.float32)
            if CODES == "uint4":
                groups_of_words = (step * BLOCK_K + word * PER_WORD) // GROUP
                offsets = rows_of_b[:, None] * stride_sn + groups_of_words[None, :] * stride_sk
                inside = column_inside[:, None] & (groups_of_words < n_groups)[None, :]
                zero = tl.load(zeros_ptr + offsets, mask=inside, other=0).to(tl.float32)
            sums = _add_nibbles(sums, codes, x, zero, nothing, CODES, STEP)
        if SCALE_FORMAT != "":
            if CODES != "":
                sums = tl.sum(sums.reshape(BLOCK_N, PARTS, GROUP // PER_WORD), axis=2)
            total += sums * FACTOR * scale
        elif CODES == "":
            total += sums
        else:
            total = sums
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += STEP * bytes_apart * stride_bk
    result = tl.sum(total, axis=1)
    if SCALE_FORMAT == "":
        result *= FACTOR
    if SECOND:
        result *= tl.load(second_ptr + columns * stride_2n, mask=column_inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * stride_om + columns * stride_on
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=column_inside)


def gemv(
    a: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    kind: str,
    tile: Tile,
) -> None:
    """Write a [m, k] @ b [n, k].T to out [m, n] (bf16, fp16 or f32).

    Args:
        a: Rows in bf16 or fp16.
        weight: Made by `as_weight` for `kind`, which is bf16 or decodes its weights.
        out: Output.
        bias: `[n]`, contiguous, or None.
        kind: One of `ALL_KINDS`.
        tile: block_n rows of b a program, block_k elements of them a step.
    """
    spec = ALL_KINDS[kind]
    if spec.a_scaled:
        raise ValueError(f"{kind}: a is quantized; only weights are decoded here")
    (m, k), n = a.shape, weight.codes.shape[0]
    if m == 0 or n == 0:
        return
    weight = by_row(kind, weight)
    options = decode_options(kind, weight)
    fp8 = torch.float8_e4m3fnuz if weight.fnuz else torch.float8_e4m3fn
    if options["CODES"] == "e4m3" and converts_fp8(fp8):
        weight = weight._replace(codes=weight.codes.view(fp8))
        options["CODES"] = ""
    launch(
        _gemv_kernel, (-(-n // tile.block_n), m),
        a, weight.codes, out, *scale_arguments(weight, out), out if bias is None else bias,
        n, k, *a.stride(), *weight.codes.stride(), *out.stride(), *row_strides(weight),
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN_N=n % tile.block_n == 0, EVEN_K=k % tile.block_k == 0,
        HAS_BIAS=bias is not None, WIDE=offsets_need_64_bits(a, weight.codes, out),
        num_warps=tile.warps, num_stages=1, **options,
    )  # fmt: skip
