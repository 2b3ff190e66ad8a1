"""Multiply a few rows by a weight matrix: out = a @ (decoded b).T, without matrix instructions.

A program takes some rows of b and goes along k in long steps: all of its weight is on its way to
the registers at once, and next to nothing is exchanged between threads before the last sum. With
one row of a or two, that is faster than a tile of 16 rows, which waits for shared memory at every
step. Where PTX runs, 4-bit codes and second rows are `ring_rows`'s. Rows of a are programs of their
own, which share b through L2.

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
    place_e5m2,
    place_fp8,
    scale_number,
)
from hal.ops.tiles import Tile


@triton.jit
def _integer(words, nothing, zero, P: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """Return the codes at bit P of int32 words, integers from LOWEST on, less zero, as float32.

    They become the last bits of a number whose unit is 2^(23 - P): one logical instruction
    and one exact subtraction a code, without a conversion. Negative codes are in two's complement.
    `nothing` is 0, unknown to the compiler: of two constants in a logical instruction one must be
    in a register, and if both are known it prefers two instructions.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << P
    TOP: tl.constexpr = (-LOWEST) << P  # turns two's complement into an offset
    UNIT: tl.constexpr = (150 - P) << 23
    OFFSET: tl.constexpr = 2.0 ** (23 - P) - LOWEST
    placed = ((words & MASK) ^ (nothing + (UNIT | TOP))).to(tl.float32, bitcast=True)
    return placed - (OFFSET + zero)


@triton.jit
def _float(placed, HIGH: tl.constexpr):
    """Return the low (0) or high (1) fp16 of int32 words as float32."""
    return half_of(placed, HIGH, tl.float16).to(tl.float32)


@triton.jit
def _add_bytes(
    sums, words, x0, x1, x2, x3, zero, nothing, CODES: tl.constexpr, FNUZ: tl.constexpr
):  # fmt: skip
    """Return sums [lanes] plus code * x over the four codes of each word; of int8 less zero."""
    if CODES == "int8" or CODES == "int8_zeros":
        high = words >> 16
        sums += _integer(words, nothing, zero, 0, 8, -128) * x0
        sums += _integer(words, nothing, zero, 8, 8, -128) * x1
        sums += _integer(high, nothing, zero, 0, 8, -128) * x2
        sums += _integer(high, nothing, zero, 8, 8, -128) * x3
    else:
        if CODES == "e5m2":
            even, odd = place_e5m2(words, 0, tl.float16), place_e5m2(words, 8, tl.float16)
        else:
            marks = nan_marks(words, FNUZ)
            even = place_fp8(words, marks, 0, tl.float16, FNUZ)
            odd = place_fp8(words, marks, 8, tl.float16, FNUZ)
        sums += _float(even, 0) * x0
        sums += _float(odd, 0) * x1
        sums += _float(even, 1) * x2
        sums += _float(odd, 1) * x3
    return sums


@triton.jit
def _add_nibbles(
    sums, words, x0, x1, x2, x3, x4, x5, x6, x7, zero, nothing, CODES: tl.constexpr
):  # fmt: skip
    """Return sums [lanes] plus (code - zero) * x over eight codes a word."""
    if CODES == "e2m1":
        placed = place(words, 0, CODES, tl.float16)
        sums += _float(placed, 0) * x0
        sums += _float(placed, 1) * x4
        placed = place(words, 4, CODES, tl.float16)
        sums += _float(placed, 0) * x1
        sums += _float(placed, 1) * x5
        placed = place(words, 8, CODES, tl.float16)
        sums += _float(placed, 0) * x2
        sums += _float(placed, 1) * x6
        placed = place(words, 12, CODES, tl.float16)
        sums += _float(placed, 0) * x3
        sums += _float(placed, 1) * x7
    else:
        LOWEST: tl.constexpr = -8 if CODES == "int4" else 0
        # Above bit 19 there is no room for the code: a shift serves three of them.
        high = words >> 12
        sums += _integer(words, nothing, zero, 0, 4, LOWEST) * x0
        sums += _integer(words, nothing, zero, 4, 4, LOWEST) * x1
        sums += _integer(words, nothing, zero, 8, 4, LOWEST) * x2
        sums += _integer(words, nothing, zero, 12, 4, LOWEST) * x3
        sums += _integer(words, nothing, zero, 16, 4, LOWEST) * x4
        sums += _integer(high, nothing, zero, 8, 4, LOWEST) * x5
        sums += _integer(high, nothing, zero, 12, 4, LOWEST) * x6
        sums += _integer(high, nothing, zero, 16, 4, LOWEST) * x7
    return sums


@triton.jit
def _eights_of_x(ptrs, inside, stride, PART: tl.constexpr, MASKED: tl.constexpr):
    """Load part PART of the activations [lanes, 8] that meet a lane's codes."""
    if MASKED:
        return tl.load(ptrs + 8 * PART * stride, mask=inside, other=0.0)
    else:
        return tl.load(ptrs + 8 * PART * stride)


@triton.jit
def _columns_of(x):
    """Return the columns of x [lanes, 8] as eight float32 [lanes]."""
    LANES: tl.constexpr = x.shape[0]
    even, odd = tl.split(x.to(tl.float32).reshape(LANES, 4, 2))
    x04, x26 = tl.split(even.reshape(LANES, 2, 2))
    x15, x37 = tl.split(odd.reshape(LANES, 2, 2))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _add_eight(
    sums, first, second, x, zero, nothing, CODES: tl.constexpr, FNUZ: tl.constexpr
):  # fmt: skip
    """Add eight codes a lane, of one word or of two, times x [lanes, 8] to sums."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _columns_of(x)
    if (CODES == "e4m3" or CODES == "e5m2") or (CODES == "int8" or CODES == "int8_zeros"):
        sums = _add_bytes(sums, first, x0, x1, x2, x3, zero, nothing, CODES, FNUZ)
        return _add_bytes(sums, second, x4, x5, x6, x7, zero, nothing, CODES, FNUZ)
    else:
        return _add_nibbles(sums, first, x0, x1, x2, x3, x4, x5, x6, x7, zero, nothing, CODES)


@triton.jit
def _load_scales(
    ptr, rows, row_inside, first_k, n_groups, stride_n, stride_k,
    LANES: tl.constexpr, HELD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Load the scales of each lane's codes, [rows, lanes], or [rows, 2 * lanes] of short groups."""
    if GROUP < HELD:
        tl.static_assert(2 * GROUP == HELD, "a lane has one group or two")
        groups = first_k // GROUP + tl.arange(0, 2 * LANES)
    else:
        groups = (first_k + tl.arange(0, LANES) * HELD) // GROUP
    offsets = rows[:, None] * stride_n + groups[None, :] * stride_k
    return tl.load(ptr + offsets, mask=row_inside[:, None] & (groups < n_groups)[None, :], other=0)


@triton.jit
def _halves(x):
    """Return the upper and the lower half of the rows of x [rows, any]."""
    return tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))


@triton.jit
def _halves_of_scale(scale, SCALE_FORMAT: tl.constexpr):
    """Return what `_halves` does, of scales if there are any."""
    if SCALE_FORMAT == "":
        return scale, scale
    else:
        return _halves(scale)


@triton.jit
def _one_above_the_other(upper, lower):
    """Undo `_halves` of rows [rows, lanes]."""
    R: tl.constexpr = 2 * upper.shape[0]
    return tl.join(upper, lower).permute(2, 0, 1).reshape(R, upper.shape[1])


@triton.jit
def _product_of_row(
    codes, scale, zeros_ptr, stride_sk, first_k, n_groups, exists, x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Do what `_product` does for one row, whose zero points begin at the pointer.

    Codes `uint4` have a zero point a group, `int8_zeros` one of the row.
    """
    # What `place` leaves out of floats in fp16. Before a scale, whose product might be subnormal.
    E4M3: tl.constexpr = 2.0**7 if FNUZ else 2.0**8
    FACTOR: tl.constexpr = 2.0**14 if CODES == "e2m1" else E4M3 if CODES == "e4m3" else 1.0
    TWO_GROUPS: tl.constexpr = SCALE_FORMAT != "" and GROUP < HELD
    sums = tl.zeros((LANES,), tl.float32)
    first_sums = sums
    zero = 0.0
    if CODES == "uint4":
        # Of one row, so that lane i of the tensor is lane i of the device. Those of all rows went
        # through shared memory, and the product took 1.5 times as long on an H200.
        groups = (first_k + tl.arange(0, LANES) * HELD) // GROUP
        zero = tl.load(zeros_ptr + groups * stride_sk, mask=exists & (groups < n_groups), other=0)
        zero = zero.to(tl.float32)
    elif CODES == "int8_zeros":
        zero = tl.load(zeros_ptr, mask=exists, other=0).to(tl.float32)
    if CODES == "":
        if HELD == 8:
            parts = codes.reshape(LANES, 8).to(tl.float32) * x0.to(tl.float32)
        else:
            first, second = tl.split(codes.reshape(LANES, 2, 8).permute(0, 2, 1))
            parts = first.to(tl.float32) * x0.to(tl.float32)
            parts += second.to(tl.float32) * x1.to(tl.float32)
        sums = tl.sum(parts, axis=1)
    else:
        even, odd = tl.split(codes.reshape(LANES, 2, 2))
        word0, word2 = tl.split(even)
        word1, word3 = tl.split(odd)
        if (CODES == "e4m3" or CODES == "e5m2") or (CODES == "int8" or CODES == "int8_zeros"):
            sums = _add_eight(sums, word0, word1, x0, zero, nothing, CODES, FNUZ)
            sums = _add_eight(sums, word2, word3, x1, zero, nothing, CODES, FNUZ)
        else:
            sums = _add_eight(sums, word0, word0, x0, zero, nothing, CODES, FNUZ)
            sums = _add_eight(sums, word1, word1, x1, zero, nothing, CODES, FNUZ)
            if TWO_GROUPS:
                first_sums = sums
                sums = tl.zeros((LANES,), tl.float32)
            sums = _add_eight(sums, word2, word2, x2, zero, nothing, CODES, FNUZ)
            sums = _add_eight(sums, word3, word3, x3, zero, nothing, CODES, FNUZ)
    sums *= FACTOR
    if SCALE_FORMAT != "":
        scale = scale_number(scale, SCALE_FORMAT, tl.float32)
        if TWO_GROUPS:
            first_scale, second_scale = tl.split(scale.reshape(LANES, 2))
            sums = first_sums * FACTOR * first_scale + sums * second_scale
        else:
            sums *= scale.reshape(LANES)
    return sums


@triton.jit
def _product_1(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the product of the only row of codes with x for each lane, [1, lanes]."""
    sums = _product_of_row(
        codes, scale, zeros_ptr + first_row * stride_sn, stride_sk, first_k, n_groups,
        first_row < n_rows, x0, x1, x2, x3, nothing,
        CODES, FNUZ, SCALE_FORMAT, GROUP, HELD, x0.shape[0],
    )  # fmt: skip
    return sums[None, :]


@triton.jit
def _product_2(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of two rows, [2, lanes]: each half by itself.

    Written for each number of rows: before 3.5 Triton cannot hash a function that calls itself.
    """
    upper, lower = _halves(codes)
    upper_scale, lower_scale = _halves_of_scale(scale, SCALE_FORMAT)
    upper = _product_1(
        upper, upper_scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    lower = _product_1(
        lower, lower_scale, first_row + 1, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    return _one_above_the_other(upper, lower)


@triton.jit
def _product_4(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of 4 rows, [4, lanes]."""
    upper, lower = _halves(codes)
    upper_scale, lower_scale = _halves_of_scale(scale, SCALE_FORMAT)
    upper = _product_2(
        upper, upper_scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    lower = _product_2(
        lower, lower_scale, first_row + 2, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    return _one_above_the_other(upper, lower)


@triton.jit
def _product_8(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of 8 rows, [8, lanes]."""
    upper, lower = _halves(codes)
    upper_scale, lower_scale = _halves_of_scale(scale, SCALE_FORMAT)
    upper = _product_4(
        upper, upper_scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    lower = _product_4(
        lower, lower_scale, first_row + 4, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    return _one_above_the_other(upper, lower)


@triton.jit
def _product_16(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of 16 rows, [16, lanes]."""
    upper, lower = _halves(codes)
    upper_scale, lower_scale = _halves_of_scale(scale, SCALE_FORMAT)
    upper = _product_8(
        upper, upper_scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    lower = _product_8(
        lower, lower_scale, first_row + 8, n_rows, zeros_ptr, stride_sn, stride_sk, first_k,
        n_groups, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    return _one_above_the_other(upper, lower)


@triton.jit
def _product(
    codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
    x0, x1, x2, x3, nothing,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of codes [rows, words or elements] with x for each lane, [rows, lanes].

    scale: what `_load_scales` returned, if there are scales. x0 to x3: [lanes, 8], those that
    there are. Rows are done one by one for the sake of zero points: see `_product_of_row`.
    """
    R: tl.constexpr = codes.shape[0]
    tl.static_assert(R <= 16, "at most 16 rows")
    if R == 1:
        return _product_1(
            codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
    elif R == 2:
        return _product_2(
            codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
    elif R == 4:
        return _product_4(
            codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
    elif R == 8:
        return _product_8(
            codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
    else:
        return _product_16(
            codes, scale, first_row, n_rows, zeros_ptr, stride_sn, stride_sk, first_k, n_groups,
            x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip


@triton.jit
def _gemv_kernel(
    a_ptr, b_ptr, out_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr,
    n_columns, k_size, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    stride_sn, stride_sk, stride_2n,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CODES: tl.constexpr, FNUZ: tl.constexpr,
    WORDS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    WHOLE_LANES: tl.constexpr, HELD: tl.constexpr,
    SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    FOUR_BITS: tl.constexpr = (CODES == "int4" or CODES == "uint4") or CODES == "e2m1"
    PER_BYTE: tl.constexpr = 2 if FOUR_BITS else 1
    PER_WORD: tl.constexpr = 1 if CODES == "" else 4 * PER_BYTE
    STEP: tl.constexpr = BLOCK_K // PER_WORD
    LANES: tl.constexpr = BLOCK_K // HELD
    first_row = tl.program_id(0) * BLOCK_N
    columns = first_row + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    column_inside = columns < n_columns
    # Loaded like this, activations lie in the registers of the lanes whose codes they meet.
    lane = tl.arange(0, LANES)
    inner = (lane * HELD)[:, None] + tl.arange(0, 8)[None, :]
    word = tl.arange(0, STEP)
    rows_of_b = columns
    if WIDE:
        rows_of_b = columns.to(tl.int64)
        first_row = first_row.to(tl.int64)
        inner = inner.to(tl.int64)
    nothing = n_columns >> 31
    n_groups = tl.cdiv(k_size, GROUP)
    a_ptrs = a_ptr + row * stride_am + inner * stride_ak
    bytes_apart: tl.constexpr = 1 if WORDS or CODES == "" else 4
    b_ptrs = b_ptr + (rows_of_b[:, None] * stride_bn + word[None, :] * (bytes_apart * stride_bk))
    # If lanes are wholly inside or outside, all of their loads share a predicate.
    first_k = word // (STEP // LANES) * HELD if WHOLE_LANES else word * PER_WORD
    total = tl.zeros((BLOCK_N, LANES), tl.float32)
    for step in range(0, tl.cdiv(k_size, BLOCK_K)):
        left = k_size - step * BLOCK_K
        if CODES == "":
            if EVEN_N and EVEN_K:
                codes = tl.load(b_ptrs)
            else:
                mask = column_inside[:, None] & (first_k < left)[None, :]
                codes = tl.load(b_ptrs, mask=mask, other=0.0)
        else:
            codes = load_words(
                b_ptrs, stride_bk, first_k, left, column_inside, PER_BYTE, WORDS, EVEN_N, EVEN_K
            )
        inside = (lane * HELD)[:, None] < left if WHOLE_LANES else inner < left
        x0 = _eights_of_x(a_ptrs, inside, stride_ak, 0, not EVEN_K)
        x1, x2, x3 = x0, x0, x0
        if HELD > 8:
            inside = inside if WHOLE_LANES else inner + 8 < left
            x1 = _eights_of_x(a_ptrs, inside, stride_ak, 1, not EVEN_K)
        if HELD > 16:
            inside = inside if WHOLE_LANES else inner + 16 < left
            x2 = _eights_of_x(a_ptrs, inside, stride_ak, 2, not EVEN_K)
            inside = inside if WHOLE_LANES else inner + 24 < left
            x3 = _eights_of_x(a_ptrs, inside, stride_ak, 3, not EVEN_K)
        scale = 0.0
        if SCALE_FORMAT != "":
            scale = _load_scales(
                scales_ptr, rows_of_b // SCALE_ROWS, column_inside, step * BLOCK_K, n_groups,
                stride_sn, stride_sk, LANES, HELD, GROUP,
            )  # fmt: skip
        total += _product(
            codes, scale, first_row, n_columns, zeros_ptr, stride_sn, stride_sk,
            step * BLOCK_K, n_groups, x0, x1, x2, x3, nothing,
            CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += STEP * bytes_apart * stride_bk
    result = tl.sum(total, axis=1)
    if SECOND:
        result *= tl.load(second_ptr + columns * stride_2n, mask=column_inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * stride_om + columns * stride_on
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=column_inside)


_HELD = {"int8": 16, "e4m3": 16, "e5m2": 16, "int4": 32, "uint4": 32, "e2m1": 32}


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
        weight: Made by `as_weight` for `kind`, which is bf16 or decodes its weights. Codes of int8
            may have zero points besides, int8 [n].
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
    strides = row_strides(weight)
    if spec.decode == "int8" and weight.zeros is not None:
        options["CODES"], strides = "int8_zeros", (weight.zeros.stride(0), *strides[1:])
    fp8 = _fp8_dtype(spec.decode, weight.fnuz)
    if fp8 is not None and converts_fp8(fp8):
        weight = weight._replace(codes=weight.codes.view(fp8))
        options["CODES"] = ""
    # A lane holds 16 bytes of codes.
    plain = options["CODES"] == ""
    held = 16 // weight.codes.element_size() if plain else _HELD[spec.decode]
    launch(
        _gemv_kernel, (-(-n // tile.block_n), m),
        a, weight.codes, out, *scale_arguments(weight, out), out if bias is None else bias,
        n, k, *a.stride(), *weight.codes.stride(), *out.stride(), *strides,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN_N=n % tile.block_n == 0, EVEN_K=k % tile.block_k == 0,
        WHOLE_LANES=k % held == 0, HELD=held,
        HAS_BIAS=bias is not None, WIDE=offsets_need_64_bits(a, weight.codes, out),
        num_warps=tile.warps, num_stages=1, **options,
    )  # fmt: skip


def _fp8_dtype(decode: str, fnuz: bool) -> torch.dtype | None:
    if decode == "e4m3":
        return torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    return torch.float8_e5m2 if decode == "e5m2" else None
