"""Quantize rows of bf16 words, two numbers an instruction where that is exact.

The results are those of `quantize`, bit for bit, at two thirds to half of the instructions: these
bound the speed on a device whose memory brings an element every 18 instruction slots (H200).
A thread loads eight numbers as four words and stores their codes as one word, or as two.

What becomes of the words is in `mxfp4_pairs`, `nvfp4_pairs` and `byte_pairs`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hal.ops.kernels.byte_pairs import byte_words, reciprocals, scales_of_pairs
from hal.ops.kernels.common import INTERPRETED, converts_fp8, has_signed_pairs, launch
from hal.ops.kernels.encode import INFINITY_BITS
from hal.ops.kernels.mxfp4_pairs import exponent_byte, mxfp4_words
from hal.ops.kernels.nvfp4_pairs import (
    exact_nvfp4_words,
    largest_finite,
    outer_scale,
    quick_factors,
    quick_nvfp4_words,
)
from hal.ops.kernels.pairs import (
    fma_pair,
    four_words,
    high_number,
    largest_of_words,
    low_number,
    multiply_pair,
    quick_power,
    quick_reciprocal,
    round_pair,
    unpack_again,
)
from hal.ops.kernels.reciprocals import reciprocal_table
from hal.ops.kernels.scale_order import ScaleOrder, scale_of_group, scale_of_row
from hal.ops.kernels.source import activate, beyond_count, gate_numbers

ONE_PAIR = tl.constexpr(0x3F803F80)


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
def _eighths(
    first_group, part, n_words, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, FORM: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return the numbers of the eights of a part of a row, whether they exist, and their words.

    FORM: "lanes": [groups * EIGHTHS], side by side in lanes. "thread": [groups, EIGHTHS], those of
    a group in one thread. "halves": [2, groups], the same of groups of two.
    """
    first_group += part * GROUPS
    if FORM == "halves":
        # First halves come first, so that both of a group meet in a thread.
        half, block = tl.arange(0, 2)[:, None], tl.arange(0, GROUPS)[None, :]
        eighths = (first_group + block) * 2 + half
    elif FORM == "thread":
        group, piece = tl.arange(0, GROUPS)[:, None], tl.arange(0, EIGHTHS)[None, :]
        eighths = (first_group + group) * EIGHTHS + piece
    else:
        eighths = first_group * EIGHTHS + tl.arange(0, GROUPS * EIGHTHS)
    inside = eighths * 4 < n_words
    # Beyond a row its last eight numbers are read once more, which changes no maximum.
    first = (eighths if FULL else tl.minimum(eighths, n_words // 4 - 1)) * 4
    if FORM == "lanes":
        return eighths, inside, first[:, None] + tl.arange(0, 4)[None, :]
    else:
        return eighths, inside, first[:, :, None] + tl.arange(0, 4)[None, None, :]


@triton.jit
def _loaded(pointers, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, FORM: tl.constexpr):
    """Load words, [groups, EIGHTHS, 4] or [2, groups, 4] of them."""
    words = tl.load(pointers)
    if FORM == "lanes":
        words = tl.reshape(words, (GROUPS, EIGHTHS, 4))
    return words


@triton.jit
def _source_words(
    x_ptr, residual_ptr, places, n_words, alpha, limit,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Load words of a row, gated, or with those of another added."""
    words = _loaded(x_ptr + places, GROUPS, EIGHTHS, FORM)
    if RESIDUAL:
        added = _loaded(residual_ptr + places, GROUPS, EIGHTHS, FORM)
        words = fma_pair(words, tl.full(words.shape, ONE_PAIR, tl.int32), added)
    if ACTIVATION != "":
        low, high = low_number(words), high_number(words)
        if GATED:
            up = _loaded(x_ptr + n_words + places, GROUPS, EIGHTHS, FORM)
            low = quick_gate(low, low_number(up), alpha, limit, ACTIVATION, CLAMPED)
            high = quick_gate(high, high_number(up), alpha, limit, ACTIVATION, CLAMPED)
        else:
            low, high = activate(low, alpha, ACTIVATION), activate(high, alpha, ACTIVATION)
        words = round_pair(low, high)
    return words


@triton.jit
def _coded(
    w0, w1, w2, w3, scale, broken, outer, largest, quick, factors_ptr, quant_max, inverse_max,
    scale_floor, CODEC: tl.constexpr, WHOLE: tl.constexpr, INTEGER: tl.constexpr,
    FIXED: tl.constexpr, ENCODING: tl.constexpr, ADDEND: tl.constexpr,
    TOP_EXPONENT: tl.constexpr, SIGNED: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """Quantize words; return one word of codes of each eight numbers or two, scales and outer.

    scale, broken: Of a row, if WHOLE. outer, largest, quick, factors_ptr: of nvfp4.
    """
    if CODEC == "nvfp4":
        top = tl.max(largest_of_words(w0, w1, w2, w3, SIGNED), axis=0)
        if FIXED:
            codes, scales = exact_nvfp4_words(w0, w1, w2, w3, top, outer, ENCODING, True)
            second = tl.sum(outer, axis=0)
        elif not QUICK:
            codes, scales, second = _divided(w0, w1, w2, w3, top, largest, scale_floor, ENCODING)
        elif quick > 0.0:
            size = largest.to(tl.float32, bitcast=True)
            codes, scales, second = quick_nvfp4_words(
                w0, w1, w2, w3, top, size, factors_ptr, ENCODING
            )
        else:
            codes, scales, second = _divided(w0, w1, w2, w3, top, largest, scale_floor, ENCODING)
        return codes, codes, scales, second
    elif CODEC == "mxfp4" or CODEC == "mx":
        top = tl.max(largest_of_words(w0, w1, w2, w3, SIGNED), axis=1)
        byte, broken = exponent_byte(top, ADDEND, TOP_EXPONENT)
        if CODEC == "mxfp4":
            first = mxfp4_words(w0, w1, w2, w3, byte, broken)
            second = first
        else:
            factor = ((254 - byte) << 23).to(tl.float32, bitcast=True)
            first, second = byte_words(w0, w1, w2, w3, factor, factor, broken, True, INTEGER)
        return first, second, tl.where(broken, 255, byte), outer
    else:
        if not WHOLE:
            top = tl.max(largest_of_words(w0, w1, w2, w3, SIGNED), axis=1)
            scale, broken = scales_of_pairs(top, quant_max, inverse_max, scale_floor)
        first, second = byte_words(
            w0, w1, w2, w3, scale, reciprocals(scale), broken, False, INTEGER
        )
        return first, second, tl.where(broken, float("nan"), scale), outer


@triton.jit
def _divided(w0, w1, w2, w3, top, largest, scale_floor, ENCODING: tl.constexpr):
    outer = outer_scale(largest, scale_floor)
    codes, scales = exact_nvfp4_words(w0, w1, w2, w3, top, outer, ENCODING, False)
    return codes, scales, tl.sum(outer, axis=0)


@triton.jit
def _quantize_pairs_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    fixed_ptr, factors_ptr, n_words, n_groups,
    stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    quant_max, inverse_max, scale_floor, epsilon, alpha, limit, capacity,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, EIGHTHS: tl.constexpr, WHOLE: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, COUNTED: tl.constexpr,
    CODEC: tl.constexpr, INTEGER: tl.constexpr, FIXED: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FULL: tl.constexpr,
    SIGNED: tl.constexpr, QUICK: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    FORM: tl.constexpr = "halves" if CODEC == "nvfp4" else "thread" if CODEC == "mxfp4" else "lanes"
    AXIS: tl.constexpr = 0 if CODEC == "nvfp4" else 1  # along which a group lies
    first_group = tl.program_id(1) * GROUPS
    x_ptr += row * stride_xm
    residual_ptr += row * stride_rm
    # All loads come before any store: those behind a store would wait for it.
    totals, words, weights = (), (), ()
    sums = 0.0
    for part in tl.static_range(PARTS):
        _, inside, places = _eighths(first_group, part, n_words, GROUPS, EIGHTHS, FORM, FULL)
        total = _source_words(
            x_ptr, residual_ptr, places, n_words, alpha, limit, RESIDUAL, ACTIVATION, GATED,
            CLAMPED, GROUPS, EIGHTHS, FORM,
        )  # fmt: skip
        totals += (total,)  # type: ignore[assignment]
        w0, w1, w2, w3 = four_words(total)
        words += (w0, w1, w2, w3)  # type: ignore[assignment]
        if NORM:
            v0, v1, v2, v3 = four_words(_loaded(weight_ptr + places, GROUPS, EIGHTHS, FORM))
            weights += (v0, v1, v2, v3)  # type: ignore[assignment]
            squared = squares(w1, squares(w0, tl.zeros(w0.shape, tl.float32)))
            squared = squares(w3, squares(w2, squared))
            if not FULL:
                squared = tl.where(tl.reshape(inside, squared.shape), squared, 0.0)
            sums = squared if part == 0 else sums + squared
    if NORM:
        # First what one thread has.
        square = tl.sum(tl.sum(sums, axis=AXIS), axis=0)
        root = tl.rsqrt(square / (2 * n_words) + epsilon)
        rows = ()
        for word in tl.static_range(4 * PARTS):
            rows += (normalized(words[word], root, weights[word]),)  # type: ignore[assignment]
        words = rows
    scale, broken, outer, largest, quick = 0.0, False, 0.0, 0, 0.0
    if FIXED:
        outer = tl.load(fixed_ptr + tl.arange(0, 1))
    elif WHOLE:
        tops = 0
        for part in tl.static_range(PARTS):
            top = largest_of_words(
                words[4 * part], words[4 * part + 1], words[4 * part + 2], words[4 * part + 3],
                SIGNED,
            )  # fmt: skip
            tops = top if part == 0 else tl.maximum(tops, top)
        tops = tl.max(tops, axis=AXIS)
        if CODEC == "nvfp4":
            largest = tl.max(tops, axis=0)
            if QUICK:
                factors_ptr, quick = quick_factors(largest, scale_floor, factors_ptr)
            if largest >= INFINITY_BITS:
                # Rare: numbers beside a NaN count, the NaN does not.
                largest = 0
                for word in tl.static_range(4 * PARTS):
                    largest = tl.maximum(largest, largest_finite(words[word]))
        else:
            scale, broken = scales_of_pairs(tops, quant_max, inverse_max, scale_floor)
    results = ()
    for part in tl.static_range(PARTS):
        codes, others, scales, second = _coded(
            words[4 * part], words[4 * part + 1], words[4 * part + 2], words[4 * part + 3],
            scale, broken, outer, largest, quick, factors_ptr, quant_max, inverse_max, scale_floor,
            CODEC, WHOLE, INTEGER, FIXED, ENCODING, ADDEND, TOP_EXPONENT, SIGNED, QUICK,
        )  # fmt: skip
        results += (codes, others, scales)  # type: ignore[assignment]
    values_ptr += row * stride_vm
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    for part in tl.static_range(PARTS):
        eighths, inside, places = _eighths(first_group, part, n_words, GROUPS, EIGHTHS, FORM, FULL)
        if RESIDUAL:
            target = total_ptr + row * stride_tm + places
            store_words(target, totals[part], inside[:, :, None], FULL)
        if FORM == "lanes":
            target = values_ptr + eighths[:, None] * 2 + tl.arange(0, 2)[None, :]
            codes = tl.reshape(
                tl.join(results[3 * part], results[3 * part + 1]), (GROUPS * EIGHTHS, 2)
            )
            store_words(target, codes, inside[:, None], FULL)
        else:
            store_words(values_ptr + eighths, results[3 * part], inside, FULL)
        if CODEC != "scaled" or not WHOLE:
            groups = first_group + part * GROUPS + tl.arange(0, GROUPS)
            target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
            codes = results[3 * part + 2].to(scales_ptr.dtype.element_ty)
            store_words(target, codes, groups < n_groups, FULL)
    if CODEC == "nvfp4":
        tl.store(second_ptr + row, second)
    elif WHOLE:
        tl.store(scales_ptr + tl.arange(0, 1), results[2])  # type: ignore[misc]


def quantize_pairs(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    codec: str,
    parts: int,
    groups: int,
    group: int | None,
    warps: int,
    registers: int,
    addend: int,
    top_exponent: int,
    quant_max: float,
    scale_floor: float,
    encoding: str,
    norm: Any,
    gate: dict[str, Any],
    alpha: float,
    limit: float,
    counts: torch.Tensor | None,
    capacity: int,
    second: torch.Tensor | None,
    fixed: torch.Tensor | None,
    n_groups: int,
    order: ScaleOrder,
    integer: bool,
    width: int,
) -> None:
    """Launch what `hal.ops.kernels.quantize.quantize` found to be rows of words; see there.

    Args:
        x: bf16 [rows, columns], or gate and up beside each other; `are_words` holds for it.
        values: int32 [rows, columns / 8], of codes of eight bits [rows, columns / 4].
        scales: As order says.
        codec: `nvfp4`, `mxfp4`, or with codes of eight bits `mx` (e8m0) or `scaled` (float32).
        parts: How many times as many groups a program takes.
        groups: Groups of a part, a power of two; 1 where a row is a group.
        group: Numbers that share a scale, at least eight; None is a row.
        warps: Warps of a program.
        registers: Most registers of a thread; 0 leaves that to the compiler.
        addend: Of `exponent_rule`, as top_exponent.
        top_exponent: See addend.
        quant_max: Largest code under float32 scales.
        scale_floor: Smallest float32 scale.
        encoding: Of nvfp4's scales if the kernel encodes them itself, else empty.
        norm: A `Norm`, or None.
        gate: What `gate_options` returns, not interleaved.
        alpha: Of the activation.
        limit: Of the activation.
        counts: [experts], or None.
        capacity: Rows of an expert.
        second: [rows] float32, of nvfp4.
        fixed: What to take for all of second, float32 [], or None.
        n_groups: Groups of a row.
        order: Where scales belong.
        integer: Whether codes of eight bits are int8.
        width: Numbers of a part, a multiple of eight.
    """
    table = None if second is None or fixed is not None else reciprocal_table(x.device)
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    words = x.view(torch.int32)
    weight = norm.weight.view(torch.int32) if norm else words
    others = [None if part is None else part.view(torch.int32) for part in (residual, total)]
    columns = values.shape[1] * (8 if codec in ("nvfp4", "mxfp4") else 4)
    programs = -(-n_groups // (parts * groups))
    full = columns == programs * parts * width
    gate = {name: value for name, value in gate.items() if name != "INTERLEAVED"}
    launch(
        _quantize_pairs_kernel, (x.shape[0], programs),
        words, *(words if part is None else part for part in others), weight, values,
        scales if codec == "scaled" else scales.view(torch.uint8),
        scales if second is None else second,
        x if counts is None else counts,
        words if fixed is None else fixed, words if table is None else table,
        columns // 2, n_groups, words.stride(0),
        *(0 if part is None else part.stride(0) for part in others), values.stride(0),
        order.row, order.group, quant_max, 1.0 / quant_max if quant_max else 0.0, scale_floor,
        norm.epsilon if norm else 0.0,
        alpha, limit, capacity,
        PARTS=parts, GROUPS=groups, EIGHTHS=width // groups // 8,
        WHOLE=group is None or second is not None, NORM=norm is not None,
        RESIDUAL=residual is not None, **gate, COUNTED=counts is not None, CODEC=codec,
        INTEGER=integer, FIXED=fixed is not None, ENCODING=encoding, ADDEND=addend,
        TOP_EXPONENT=top_exponent, ORDER=order.name,
        SIGNED=has_signed_pairs(), QUICK=table is not None, FULL=full, num_warps=warps,
        **({"maxnreg": registers} if registers else {}),
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
