"""Quantize rows of bf16 words side by side, two numbers an instruction where that is exact.

The results are those of `quantize`, bit for bit, at two thirds of the instructions. A thread loads
eight numbers as four words, beside those of its neighbours, and stores their codes as two words, or
of four bits as one. What becomes of them is in `byte_pairs` and `mxfp4_pairs`. `quantize_fours` is
faster where instructions are what one waits for, and slower where it is memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.byte_pairs import bounded_word, byte_words, reciprocals, scales_of_pairs
from hal.ops.kernels.common import INTERPRETED, converts_fp8, launch
from hal.ops.kernels.encode import INFINITY_BITS, fixed_scale, scale_and_zero
from hal.ops.kernels.mxfp4_pairs import exponent_byte, mxfp4_factors, mxfp4_word
from hal.ops.kernels.pair_sources import (
    Rows,
    add_square,
    gated_words,
    normalized,
    store_words,
)
from hal.ops.kernels.pairs import (
    SIZES,
    four_words,
    high_number,
    highest_pair,
    larger_pair,
    largest_of_pair,
    largest_of_words,
    low_number,
    lowest_pair,
)
from hal.ops.kernels.scale_order import scale_of_group, scale_of_row
from hal.ops.kernels.source import beyond_count


@triton.jit
def _eighths(
    first_group, part, n_words, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, FOURS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return the numbers of the eights of a part of a row, whether they exist, and their words.

    [groups * EIGHTHS] side by side, or of FOURS [groups, EIGHTHS], which leaves codes where they
    are stored from. Beyond a row its last eight numbers are read once more, which changes no
    maximum.
    """
    first_group += part * GROUPS
    if FOURS:
        group, piece = tl.arange(0, GROUPS)[:, None], tl.arange(0, EIGHTHS)[None, :]
        eighths = (first_group + group) * EIGHTHS + piece
        first = (eighths if FULL else tl.minimum(eighths, n_words // 4 - 1)) * 4
        return eighths, eighths * 4 < n_words, first[:, :, None] + tl.arange(0, 4)[None, None, :]
    else:
        eighths = first_group * EIGHTHS + tl.arange(0, GROUPS * EIGHTHS)
        first = (eighths if FULL else tl.minimum(eighths, n_words // 4 - 1)) * 4
        return eighths, eighths * 4 < n_words, first[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _loaded(pointers, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr):
    """Load words [groups, EIGHTHS, 4]."""
    return tl.reshape(tl.load(pointers), (GROUPS, EIGHTHS, 4))


@triton.jit
def _quantize_pairs_kernel(
    x_ptr, weight_ptr, values_ptr, scales_ptr, zeros_ptr, counts_ptr, given_ptr, given_zero_ptr,
    n_words, n_groups,
    stride_xm, stride_vm, stride_sm, stride_sg,
    quant_max, inverse_max, scale_floor, epsilon, alpha, limit, capacity,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, COUNTED: tl.constexpr,
    EXPONENTS: tl.constexpr, FOURS: tl.constexpr, INTEGER: tl.constexpr,
    FIXED: tl.constexpr, SHIFTED: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FULL: tl.constexpr,
    SIGNED: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    first_group = tl.program_id(1) * GROUPS
    # Codes of rows that hold a NaN or an infinity: NaN where the format has one.
    SPOILED: tl.constexpr = 0 if INTEGER else 0x7F7F7F7F
    x_ptr += row * stride_xm
    # All loads come before any store: those behind a store would wait for it.
    words, weights = (), ()
    sums = 0.0
    for part in tl.static_range(PARTS):
        _, inside, places = _eighths(first_group, part, n_words, GROUPS, EIGHTHS, FOURS, FULL)
        row_words = _loaded(x_ptr + places, GROUPS, EIGHTHS)
        if ACTIVATION != "":
            up = _loaded(x_ptr + n_words + places, GROUPS, EIGHTHS) if GATED else row_words
            row_words = gated_words(row_words, up, alpha, limit, ACTIVATION, GATED, CLAMPED)
        words += four_words(row_words)
        if NORM:
            weights += four_words(_loaded(weight_ptr + places, GROUPS, EIGHTHS))
            squared = tl.zeros((GROUPS, EIGHTHS), tl.float32)
            for word in tl.static_range(4 * part, 4 * part + 4):
                squared = add_square(low_number(words[word]), squared)
                squared = add_square(high_number(words[word]), squared)
            if not FULL:
                squared = tl.where(tl.reshape(inside, squared.shape), squared, 0.0)
            sums = squared if part == 0 else sums + squared
    if NORM:
        # First what one thread has.
        square = tl.sum(tl.sum(sums, axis=1), axis=0)
        root = tl.rsqrt(square / (2 * n_words) + epsilon)
        rows = ()
        for word in tl.static_range(4 * PARTS):
            rows += (normalized(words[word], root, weights[word]),)  # type: ignore[assignment]
        words = rows
    scale, broken = 0.0, False
    if WHOLE:
        if SHIFTED and not FIXED:
            lows, highs = _bounds_of_row(words, PARTS)
            sizes = larger_pair(lows & SIZES, highs & SIZES, SIGNED)
            tops = tl.max(largest_of_pair(sizes, SIGNED), axis=1)
            broken = tops >= INFINITY_BITS
            low = tl.min(tl.minimum(low_number(lows), high_number(lows)), axis=1)
            high = tl.max(tl.maximum(low_number(highs), high_number(highs)), axis=1)
            scale, zero, least, most = scale_and_zero(low, high, broken, scale_floor)
        else:
            tops = 0
            for part in tl.static_range(PARTS):
                top = largest_of_words(
                    words[4 * part], words[4 * part + 1], words[4 * part + 2], words[4 * part + 3],
                    SIGNED,
                )  # fmt: skip
                tops = top if part == 0 else tl.maximum(tops, top)
            tops = tl.max(tops, axis=1)
            if FIXED:
                broken = tops >= INFINITY_BITS
                scale, zero, least, most = fixed_scale(
                    given_ptr, given_zero_ptr, quant_max, SHIFTED
                )
            else:
                scale, broken = scales_of_pairs(tops, quant_max, inverse_max, scale_floor)
        if FIXED or SHIFTED:
            reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    results = ()
    for part in tl.static_range(PARTS):
        w0, w1 = words[4 * part], words[4 * part + 1]  # type: ignore[var-annotated]
        w2, w3 = words[4 * part + 2], words[4 * part + 3]  # type: ignore[var-annotated]
        if not WHOLE:
            top = tl.max(largest_of_words(w0, w1, w2, w3, SIGNED), axis=1)
            if not EXPONENTS:
                scale, broken = scales_of_pairs(top, quant_max, inverse_max, scale_floor)
        if EXPONENTS:
            byte, broken = exponent_byte(top, ADDEND, TOP_EXPONENT)
            scales = tl.where(broken, 255, byte)
            if FOURS:
                first, second, third = mxfp4_factors(byte)
                codes = mxfp4_word(
                    w0, w1, w2, w3, tl.broadcast_to(first[:, None], w0.shape),
                    tl.broadcast_to(second[:, None], w0.shape),
                    tl.broadcast_to(third[:, None], w0.shape), broken[:, None],
                )  # fmt: skip
                others = codes
            else:
                factor = ((254 - byte) << 23).to(tl.float32, bitcast=True)
                codes, others = byte_words(w0, w1, w2, w3, factor, factor, broken, True, INTEGER)
        elif FIXED or SHIFTED:
            scales = tl.where(broken, float("nan"), scale)
            codes = bounded_word(
                w0, w1, scale, reciprocal, least, most, zero, FIXED, SHIFTED, INTEGER
            )
            others = bounded_word(
                w2, w3, scale, reciprocal, least, most, zero, FIXED, SHIFTED, INTEGER
            )
            codes = tl.where(broken[:, None], SPOILED, codes)  # type: ignore[index]
            others = tl.where(broken[:, None], SPOILED, others)  # type: ignore[index]
        else:
            scales = tl.where(broken, float("nan"), scale)
            codes, others = byte_words(
                w0, w1, w2, w3, scale, reciprocals(scale), broken, False, INTEGER
            )
        results += (codes, others, scales)  # type: ignore[assignment]
    values_ptr += row * stride_vm
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    for part in tl.static_range(PARTS):
        eighths, inside, _ = _eighths(first_group, part, n_words, GROUPS, EIGHTHS, FOURS, FULL)
        if FOURS:
            store_words(values_ptr + eighths, results[3 * part], inside, FULL)
        else:
            target = values_ptr + eighths[:, None] * 2 + tl.arange(0, 2)[None, :]
            codes = tl.join(results[3 * part], results[3 * part + 1])
            store_words(target, tl.reshape(codes, (GROUPS * EIGHTHS, 2)), inside[:, None], FULL)
        if not WHOLE:
            groups = first_group + part * GROUPS + tl.arange(0, GROUPS)
            target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
            codes = results[3 * part + 2].to(scales_ptr.dtype.element_ty)
            store_words(target, codes, groups < n_groups, FULL)
    if WHOLE:
        tl.store(scales_ptr + tl.arange(0, 1), results[2])  # type: ignore[misc]
        if SHIFTED:
            zero = tl.where(broken, 0.0, zero).to(tl.int8)
            tl.store(zeros_ptr + row + tl.arange(0, 1), zero)


@triton.jit
def _bounds_of_row(words, PARTS: tl.constexpr):
    """Return what each thread has lowest and highest in words, as pairs: NaN is the highest."""
    lows, highs = words[0], words[0]
    for word in tl.static_range(1, 4 * PARTS):
        lows, highs = lowest_pair(lows, words[word]), highest_pair(highs, words[word])
    return lows, highs


def quantize_pairs(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    rows: Rows,
    *,
    group: int | None,
    width: int,
    codec: str,
    integer: bool,
    quant_max: float,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None,
    zeros: torch.Tensor | None = None,
) -> None:
    """Launch what `hal.ops.kernels.quantize.quantize_matrix` found to be rows of words; see there.

    Args:
        x: bf16 [rows, columns], or gate and up beside each other; `are_words` holds for it.
        values: int32 [rows, columns / 4], of mxfp4 [rows, columns / 8].
        scales: As `rows.order` says.
        rows: What comes before, and how programs take rows.
        group: Numbers that share a scale, at least eight; None is a row.
        width: Numbers of a part, a multiple of eight.
        codec: `scaled` (float32 scales); with scales that are powers of two, as bytes, `mx` or,
            of four bits, `mxfp4`.
        integer: Whether codes are int8.
        quant_max: Largest code under float32 scales.
        fixed: Tensors of a scale that is fixed for all rows and of a zero point, which is read
            where there are zeros; or None.
        zeros: [rows] int8, for zero points, or None.
    """
    norm, order, fours, exponents = rows.norm, rows.order, codec == "mxfp4", codec != "scaled"
    words, columns = x.view(torch.int32), values.shape[1] * (8 if fours else 4)
    launch(
        _quantize_pairs_kernel, (x.shape[0], rows.programs),
        words, norm.weight.view(torch.int32) if norm else words, values,
        scales.view(torch.uint8) if exponents else scales, scales if zeros is None else zeros,
        x if rows.counts is None else rows.counts, *(fixed or (scales, scales)),
        columns // 2, rows.n_groups, words.stride(0), values.stride(0), order.row, order.group,
        quant_max, 1.0 / quant_max if quant_max else 0.0, rows.scale_floor,
        norm.epsilon if norm else 0.0, rows.alpha, rows.limit, rows.capacity,
        EIGHTHS=width // rows.groups // 8, WHOLE=group is None, EXPONENTS=exponents,
        FOURS=fours, INTEGER=integer, FIXED=fixed is not None, SHIFTED=zeros is not None,
        FULL=columns == rows.programs * rows.parts * width,
        **rows.options(),
    )  # fmt: skip


def encodes_fp8() -> bool:
    """Say whether the device has the instruction of `byte_pairs` for e4m3fn, or interprets it."""
    return INTERPRETED.value or converts_fp8(torch.float8_e4m3fn)


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
