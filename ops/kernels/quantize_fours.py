"""Quantize rows of bf16 words to codes of four bits, two numbers an instruction where exact.

The results are those of `quantize`, bit for bit, at half of the instructions: these bound the speed
on a device whose memory brings an element every 18 instruction slots (H200). A thread holds whole
groups, so that what is done once a group is done by one thread and no lane asks another for its
maximum; it loads eight numbers at once, and the next eight beside them by another load.

What becomes of the words is in `mxfp4_pairs` and `nvfp4_pairs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import INFINITY_BITS
from hal.ops.kernels.mxfp4_pairs import exponent_byte, mxfp4_factors, mxfp4_word
from hal.ops.kernels.nvfp4_pairs import (
    exact_scales,
    exact_word,
    largest_under,
    outer_reciprocal,
    outer_scale,
    quick_factors,
    quick_outer,
    quick_scales,
    quick_word,
)
from hal.ops.kernels.pair_sources import (
    Rows,
    add_square,
    gated_words,
    normalized,
    store_words,
    sum_of_words,
)
from hal.ops.kernels.pairs import (
    four_words,
    high_number,
    larger_finite_pair,
    larger_pair,
    largest_of_pair,
    low_number,
    pair_of_largest,
)
from hal.ops.kernels.reciprocals import reciprocal_table
from hal.ops.kernels.scale_order import scale_of_group, scale_of_row
from hal.ops.kernels.source import beyond_count


@triton.jit
def _eighths(
    first_group, n_words, PIECE: tl.constexpr, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """Return the numbers of eights, piece PIECE of each group's EIGHTHS * parts, and their words.

    Beyond a row its last eight numbers are read once more, which changes no maximum. INSIDE: none
    lies there.
    """
    eighths = (first_group + PIECE // EIGHTHS * GROUPS) * EIGHTHS + PIECE % EIGHTHS
    first = (eighths if INSIDE else tl.minimum(eighths, n_words // 4 - 1)) * 4
    return eighths, first[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _quantize_fours_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    fixed_ptr, factors_ptr, n_words, n_groups,
    stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    scale_floor, epsilon, alpha, limit, capacity,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, LATE: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, COUNTED: tl.constexpr,
    NVFP4: tl.constexpr, FIXED: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, SIGNED: tl.constexpr, QUICK: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    top, quick = 0, 0.0
    if FIXED:  # noqa: SIM102
        if QUICK:
            # Before the row, whose numbers take longer to come.
            given = tl.load(fixed_ptr)
            top = largest_under(given)
            factors_ptr, quick = quick_factors(top, scale_floor, factors_ptr)
            quick = tl.where(quick_outer(top) == given, quick, 0.0)
    first_group = tl.program_id(1) * (PARTS * GROUPS) + tl.arange(0, GROUPS)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_rm
    # Only the last part may reach beyond the row.
    BEFORE: tl.constexpr = PARTS * EIGHTHS if FULL else (PARTS - 1) * EIGHTHS
    # All loads of the row come before any store: those behind a store would wait for it.
    totals, words, weights = (), (), ()
    low_sums = tl.zeros((GROUPS,), tl.float32)
    high_sums = low_sums
    for piece in tl.static_range(PARTS * EIGHTHS):
        eighths, places = _eighths(first_group, n_words, piece, GROUPS, EIGHTHS, piece < BEFORE)
        total = tl.load(x_ptr + places)
        if RESIDUAL:
            total = sum_of_words(total, tl.load(residual_ptr + places))
            totals += (total,)  # type: ignore[assignment]
        if ACTIVATION != "":
            up = tl.load(x_ptr + n_words + places) if GATED else total
            total = gated_words(total, up, alpha, limit, ACTIVATION, GATED, CLAMPED)
        words += four_words(total)
        if NORM:
            if not LATE:
                weights += four_words(tl.load(weight_ptr + places))
            low, high = low_sums, high_sums
            for word in tl.static_range(4 * piece, 4 * piece + 4):
                low = add_square(low_number(words[word]), low)
                high = add_square(high_number(words[word]), high)
            if piece >= BEFORE:
                inside = eighths * 4 < n_words
                low, high = tl.where(inside, low, low_sums), tl.where(inside, high, high_sums)
            low_sums, high_sums = low, high
    if RESIDUAL:
        total_ptr += row * stride_tm
        for piece in tl.static_range(PARTS * EIGHTHS):
            eighths, places = _eighths(first_group, n_words, piece, GROUPS, EIGHTHS, piece < BEFORE)
            inside = (eighths * 4 < n_words)[:, None]
            store_words(total_ptr + places, totals[piece], inside, piece < BEFORE)
    if NORM:
        square = tl.sum(low_sums + high_sums, axis=0)
        root = tl.rsqrt(square / (2 * n_words) + epsilon)
        rows = ()
        for piece in tl.static_range(PARTS * EIGHTHS):
            if LATE:
                _, places = _eighths(first_group, n_words, piece, GROUPS, EIGHTHS, piece < BEFORE)
                weights += four_words(tl.load(weight_ptr + places))
            for word in tl.static_range(4 * piece, 4 * piece + 4):
                rows += (normalized(words[word], root, weights[word]),)  # type: ignore[assignment]
        words = rows
    tops = ()
    for part in tl.static_range(PARTS):
        largest = 0
        for piece in tl.static_range(part * EIGHTHS, part * EIGHTHS + EIGHTHS):
            more = pair_of_largest(
                words[4 * piece], words[4 * piece + 1], words[4 * piece + 2],
                words[4 * piece + 3], SIGNED,
            )  # fmt: skip
            largest = more if piece % EIGHTHS == 0 else larger_pair(largest, more, SIGNED)
        tops += (largest_of_pair(largest, SIGNED),)  # type: ignore[assignment]
    start = row * stride_vm
    # Of a stride Triton knows that it is a multiple of 16, or nothing.
    values_ptr += tl.multiple_of(start, EIGHTHS) if EVEN else start
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    if not NVFP4:
        _store_parts(
            values_ptr, scales_ptr, _by_exponents(words, tops, PARTS, ADDEND, TOP_EXPONENT),
            first_group, n_words, n_groups, stride_sg, PARTS, GROUPS, 4, FULL, EVEN, ORDER,
        )  # fmt: skip
    else:
        if not FIXED:
            largest = tops[0]  # type: ignore[misc]
            for part in tl.static_range(1, PARTS):
                largest = tl.maximum(largest, tops[part])
            top = tl.max(largest, axis=0)
            if QUICK:
                factors_ptr, quick = quick_factors(top, scale_floor, factors_ptr)
        # Each way stores by itself: what two ways both return is copied.
        if quick > 0.0:
            outer = quick_outer(top)
            tl.store(second_ptr + row, outer)
            _store_parts(
                values_ptr, scales_ptr,
                _by_factors(
                    words, tops, top, outer, factors_ptr, quick, PARTS, ENCODING, FIXED, SIGNED
                ),
                first_group, n_words, n_groups, stride_sg, PARTS, GROUPS, 2, FULL, EVEN, ORDER,
            )  # fmt: skip
        else:
            if FIXED:
                divisor = tl.load(fixed_ptr + tl.arange(0, 1))
            else:
                if top >= INFINITY_BITS:
                    # Rare: numbers beside a NaN count, the NaN does not.
                    finite = tl.zeros((GROUPS,), tl.int32)
                    for word in tl.static_range(8 * PARTS):
                        finite = larger_finite_pair(finite, words[word])
                    top = tl.max(largest_of_pair(finite, SIGNED), axis=0)
                divisor = outer_scale(top, scale_floor)
            tl.store(second_ptr + row + tl.arange(0, 1), divisor)
            _store_parts(
                values_ptr, scales_ptr,
                _by_division(words, tops, divisor, PARTS, ENCODING, FIXED, SIGNED),
                first_group, n_words, n_groups, stride_sg, PARTS, GROUPS, 2, FULL, EVEN, ORDER,
            )  # fmt: skip


@triton.jit
def _by_exponents(
    words, tops, PARTS: tl.constexpr, ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr
):
    """Return the scale and the four words of codes of each part of mxfp4, all in one tuple."""
    results = ()
    for part in tl.static_range(PARTS):
        byte, broken = exponent_byte(tops[part], ADDEND, TOP_EXPONENT)
        first, second, third = mxfp4_factors(byte)
        results += (tl.where(broken, 255, byte),)  # type: ignore[assignment]
        for piece in tl.static_range(4 * part, 4 * part + 4):
            code = mxfp4_word(
                words[4 * piece], words[4 * piece + 1], words[4 * piece + 2],
                words[4 * piece + 3], first, second, third, broken,
            )  # fmt: skip
            results += (code,)  # type: ignore[assignment]
    return results


@triton.jit
def _by_factors(
    words, tops, largest, outer, factors_ptr, second, PARTS: tl.constexpr, ENCODING: tl.constexpr,
    FIXED: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Return the scale and the two words of codes of each part of nvfp4, by a row's factors.

    largest: Bits of the number that outer reaches to. FIXED: There may be larger ones, and others
    that are not finite.
    """
    results = ()
    reciprocal = outer_reciprocal(outer)
    for part in tl.static_range(PARTS):
        top = tops[part]
        broken = top >= INFINITY_BITS
        if FIXED:
            top = tl.minimum(top, largest)
        scale, factor = quick_scales(top, outer, reciprocal, factors_ptr, ENCODING)
        if FIXED:
            scale = tl.where(broken, 0x7F, scale)
        results += (scale,)  # type: ignore[assignment]
        for piece in tl.static_range(2 * part, 2 * part + 2):
            code = quick_word(
                words[4 * piece], words[4 * piece + 1], words[4 * piece + 2],
                words[4 * piece + 3], factor, second, SIGNED,
            )  # fmt: skip
            if FIXED:
                code = tl.where(broken, 0, code)
            results += (code,)  # type: ignore[assignment]
    return results


@triton.jit
def _by_division(
    words, tops, outer, PARTS: tl.constexpr, ENCODING: tl.constexpr, SATURATES: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Return what `_by_factors` does, of any row."""
    results = ()
    for part in tl.static_range(PARTS):
        scale, factor, first, second = exact_scales(tops[part], outer, ENCODING, SATURATES)
        broken = tops[part] >= INFINITY_BITS
        results += (tl.where(broken, 0x7F, scale),)  # type: ignore[assignment]
        for piece in tl.static_range(2 * part, 2 * part + 2):
            code = exact_word(
                words[4 * piece], words[4 * piece + 1], words[4 * piece + 2],
                words[4 * piece + 3], factor, first, second, outer, broken, SIGNED,
            )  # fmt: skip
            results += (code,)  # type: ignore[assignment]
    return results


@triton.jit
def _store_parts(
    values_ptr, scales_ptr, results, first_group, n_words, n_groups, stride_sg,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Store the scale and the EIGHTHS words of codes of each part. EVEN: groups are whole."""
    for part in tl.static_range(PARTS):
        groups = first_group + part * GROUPS
        inside = groups < n_groups
        target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
        scale = results[part * (EIGHTHS + 1)].to(scales_ptr.dtype.element_ty)
        store_words(target, scale, inside, FULL or part < PARTS - 1)
        if EVEN:
            codes = tl.join(results[part * (EIGHTHS + 1) + 1], results[part * (EIGHTHS + 1) + 2])
            if EIGHTHS == 4:
                # Joined once more, a new last dimension comes between.
                others = tl.join(results[part * 5 + 3], results[part * 5 + 4])
                codes = tl.reshape(tl.permute(tl.join(codes, others), (0, 2, 1)), (GROUPS, 4))
            places = groups[:, None] * EIGHTHS + tl.arange(0, EIGHTHS)[None, :]
            store_words(values_ptr + places, codes, inside[:, None], FULL or part < PARTS - 1)
        else:
            for piece in tl.static_range(EIGHTHS):
                eighths = groups * EIGHTHS + piece
                codes = results[part * (EIGHTHS + 1) + 1 + piece]
                store_words(values_ptr + eighths, codes, eighths * 4 < n_words, False)


def quantize_fours(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    rows: Rows,
    *,
    group: int,
    late: bool,
    encoding: str,
    second: torch.Tensor | None,
    fixed: torch.Tensor | None,
) -> None:
    """Launch what `hal.ops.kernels.quantize.quantize_matrix` found to be rows of words; see there.

    Args:
        x: bf16 [rows, columns], or gate and up beside each other; `are_words` holds for it.
        values: int32 [rows, columns / 8].
        scales: Bytes, as `rows.order` says.
        rows: What comes before, and how programs take rows: a group of each thread is best.
        group: Numbers that share a scale: 16 of nvfp4, 32 of mxfp4.
        late: Whether the norm's weight is loaded when it is needed, to hold less.
        encoding: Of nvfp4's scales if the kernel encodes them itself, else empty.
        second: [rows] float32, of nvfp4.
        fixed: What to take for all of second, float32 [], or None.
    """
    table = None if second is None else reciprocal_table(x.device)
    norm, order, eighths = rows.norm, rows.order, group // 8
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    words, columns = x.view(torch.int32), values.shape[1] * 8
    others = [None if part is None else part.view(torch.int32) for part in (residual, total)]
    launch(
        _quantize_fours_kernel, (x.shape[0], rows.programs),
        words, *(words if part is None else part for part in others),
        norm.weight.view(torch.int32) if norm else words,
        values, scales.view(torch.uint8), scales if second is None else second,
        x if rows.counts is None else rows.counts,
        words if fixed is None else fixed, words if table is None else table,
        columns // 2, rows.n_groups, words.stride(0),
        *(0 if part is None else part.stride(0) for part in others), values.stride(0),
        order.row, order.group,
        rows.scale_floor, norm.epsilon if norm else 0.0, rows.alpha, rows.limit, rows.capacity,
        EIGHTHS=eighths, LATE=late, NVFP4=second is not None, FIXED=fixed is not None,
        ENCODING=encoding, QUICK=table is not None, RESIDUAL=residual is not None,
        EVEN=columns % group == 0 and values.stride(0) % eighths == 0,
        FULL=columns == rows.programs * rows.parts * rows.groups * group, **rows.options(),
    )  # fmt: skip
