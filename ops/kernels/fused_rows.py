"""Quantize what a norm or a gate gives, under a fixed scale, or with a zero point for each row.

`static` and `asymmetric` have the formulas and do the same to rows as they are; `source` has those
of what comes before. A fixed scale saturates and waits for no maximum, so that a gate reads its
rows once; a norm, and a zero point that is found, need the whole row first. A row with a NaN or an
infinity gets scale NaN, zero point 0 and values NaN, or 0 where the format has none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.activations import Activation
from hal.ops.kernels.asymmetric import WIDEST
from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import (
    ROUNDER,
    divide,
    encode_fp8,
    fixed_scale,
    scale_and_zero,
    shifted_steps,
    spoiled,
)
from hal.ops.kernels.quantize import (
    Before,
    Norm,
    as_words,
    gate_options,
    in_pairs,
    quantize_words,
    stored_values,
)
from hal.ops.kernels.row_shapes import MAX_ROW, lanes_of, row_parts
from hal.ops.kernels.scale_order import ScaleOrder
from hal.ops.kernels.source import gated_tile, normalized_tile, summed_tile
from hal.ops.kernels.static import fixed_parts


@triton.jit
def _columns(part, n_columns, WIDTH: tl.constexpr):
    columns = (part * WIDTH + tl.arange(0, WIDTH))[None, :]
    return columns, columns < n_columns


@triton.jit
def _numbers(
    x_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return what is quantized of some columns [1, WIDTH], f32, and the sum with the residual."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if ACTIVATION != "":
        total = gated_tile(
            x_ptr, columns, inside, n_columns, alpha, limit, columns.shape[0], columns.shape[1],
            ACTIVATION, GATED, CLAMPED, INTERLEAVED,
        ).to(DTYPE).to(tl.float32)  # fmt: skip
        x = total
    else:
        total = summed_tile(x_ptr, residual_ptr, columns, inside, RESIDUAL)
        x = normalized_tile(total, root, weight_ptr, columns, inside, DTYPE)
    return x, total


@triton.jit
def _fused_rows_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, zeros_ptr, given_ptr,
    given_zero_ptr, n_columns, stride_xm, stride_rm, stride_tm, stride_vm,
    quant_max, scale_floor, epsilon, alpha, limit,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ENCODING: tl.constexpr,
    FIXED: tl.constexpr, SHIFTED: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_rm
    total_ptr += row * stride_tm
    values_ptr += row * stride_vm
    VALUE_DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    one = tl.zeros((1,), tl.int32)
    spoils = tl.zeros((1, WIDTH), tl.float32)
    # What a row needs as a whole comes first; its parts are loaded again, from the cache.
    root = 0.0
    if ACTIVATION == "":
        squares = tl.zeros((1, WIDTH), tl.float32)
        for part in tl.static_range(PARTS):
            columns, inside = _columns(part, n_columns, WIDTH)
            x = summed_tile(x_ptr, residual_ptr, columns, inside, RESIDUAL)
            squares += x * x
        square = tl.sum(tl.sum(squares, axis=1), axis=0)
        root = tl.rsqrt(square / n_columns + epsilon)
    if FIXED:
        scale, zero, least, most = fixed_scale(given_ptr, given_zero_ptr, quant_max, SHIFTED)
    else:
        lows, highs = spoils, spoils
        for part in tl.static_range(PARTS):
            columns, inside = _columns(part, n_columns, WIDTH)
            x, total = _numbers(
                x_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
                RESIDUAL, ACTIVATION, GATED, CLAMPED, INTERLEAVED,
            )  # fmt: skip
            spoils = spoiled(x, spoils)
            lows, highs = tl.minimum(lows, x), tl.maximum(highs, x)
        broken = tl.sum(spoils, axis=1) != 0.0
        scale, zero, least, most = scale_and_zero(
            tl.min(lows, axis=1), tl.max(highs, axis=1), broken, scale_floor
        )
    for part in tl.static_range(PARTS):
        columns, inside = _columns(part, n_columns, WIDTH)
        x, total = _numbers(
            x_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
            RESIDUAL, ACTIVATION, GATED, CLAMPED, INTERLEAVED,
        )  # fmt: skip
        if RESIDUAL:
            tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=inside)
        if FIXED:
            spoils = spoiled(x, spoils)
            quotient = divide(tl.minimum(tl.maximum(x, least[:, None]), most[:, None]), scale)
            if ENCODING != "":
                values = encode_fp8(quotient, ENCODING)
            elif VALUE_DTYPE == tl.int8:
                values = shifted_steps(quotient, zero, SHIFTED).to(VALUE_DTYPE)
            else:
                values = quotient.to(VALUE_DTYPE)
        else:
            steps = tl.minimum(
                tl.maximum(divide(x, scale) + ROUNDER, least[:, None]), most[:, None]
            )
            values = steps.to(tl.int32, bitcast=True) + zero.to(tl.int32)[:, None]
            values = values.to(VALUE_DTYPE)
        tl.store(values_ptr + columns, values, mask=inside)
    if FIXED:
        if tl.sum(tl.sum(spoils, axis=1), axis=0) != 0.0:
            # Rare, and so written over.
            tl.debug_barrier()
            scale, zero = scale * float("nan"), zero * 0.0
            for again in range(PARTS):
                columns, inside = _columns(again, n_columns, WIDTH)
                if ENCODING == "e4m3fnuz":
                    values = tl.full((1, WIDTH), 0x80, VALUE_DTYPE)
                elif ENCODING != "":
                    values = tl.full((1, WIDTH), 0x7F, VALUE_DTYPE)
                elif VALUE_DTYPE == tl.int8:
                    values = tl.zeros((1, WIDTH), VALUE_DTYPE)
                else:
                    values = tl.full((1, WIDTH), float("nan"), tl.float32).to(VALUE_DTYPE)
                tl.store(values_ptr + columns, values, mask=inside)
    else:
        scale = tl.where(broken, float("nan"), scale)
    if SHIFTED:
        tl.store(zeros_ptr + row + one, zero.to(tl.int8))
    tl.store(scales_ptr + row + one, scale)


def quantize_fused(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    *,
    norm: Norm | None = None,
    gate: Activation | None = None,
    fixed: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    zeros: torch.Tensor | None = None,
) -> None:
    """Quantize rows to values [rows, columns] (fp8 or int8) with scales [rows] f32.

    Args:
        x: [rows, columns], of gate and up [rows, 2 * columns].
        values: The last dimension contiguous, as in x.
        scales: [rows].
        quant_max: Largest code, without zero points.
        scale_floor: Smallest scale that is found.
        norm: What to do before; or
        gate: the same.
        fixed: Scale, with zeros also zero point, as `static.fixed_parts` takes them; None finds
            both for each row.
        zeros: [rows] int8; None where there is no zero point.
    """
    rows, columns = x.shape[0], x.shape[1] // (gate.products if gate else 1)
    if (norm is None) == (gate is None):
        raise ValueError("quantize_fused: either a norm or a gate comes before")
    if columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} are read in one piece")
    if x.stride(1) != 1 or values.stride(1) != 1 or scales.stride(0) != 1:
        raise ValueError("quantize_fused: x, values and scales must be contiguous along rows")
    if fixed is None and zeros is None:
        raise ValueError("quantize_fused: a scale alone is found by hal.ops.kernels.quantize")
    given = None
    if fixed is not None:
        given = fixed_parts("quantize_fused", fixed, shifted=zeros is not None)
    if rows == 0 or columns == 0:
        return
    words, before = as_words(values, columns), Before(norm, gate, None, None)
    if words is not None and in_pairs(x, values.dtype, "scaled", before):
        quantize_words(
            x, words, scales.unsqueeze(-1), (rows, columns), quant_max, scale_floor, before,
            ScaleOrder("", 1, 1), codec="scaled", group=None, whole=True,
            integer=values.dtype is torch.int8, given=given, zeros=zeros,
        )  # fmt: skip
        return
    values, encoding = stored_values(values)
    lanes = None if norm else lanes_of(rows, columns)
    parts, width, warps = row_parts(columns, lanes, WIDEST)
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    launch(
        _fused_rows_kernel, (rows,),
        x, x if residual is None else residual, x if total is None else total,
        norm.weight if norm else x, values, scales, scales if zeros is None else zeros,
        *(given or (scales, scales)), columns, x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if total is None else total.stride(0), values.stride(0), quant_max, scale_floor,
        norm.epsilon if norm else 0.0, *((gate.alpha, gate.limit) if gate else (1.0, 0.0)),
        PARTS=parts, WIDTH=width, ENCODING=encoding, FIXED=fixed is not None,
        SHIFTED=zeros is not None, RESIDUAL=residual is not None, **gate_options(gate),
        num_warps=warps,
    )  # fmt: skip
