"""Quantize rows dynamically: one scale per row, or per group of 128 elements of a row.

    scale = max(amax(|x|) / quant_max, scale_floor)        in float32, true division
    value = round_to_nearest_even(clamp(x / scale, -quant_max, quant_max))

A row (or group) with a NaN or an infinity gets scale NaN and zero values: it dequantizes to NaN,
never silently to finite numbers. Other rows are not affected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED, converts_fp8, is_fp8, launch

GROUP = 128
MAX_ROW = 32768


@triton.jit
def _encode_fp8(x, ENCODING: tl.constexpr):
    """Encode x (f32, finite and in range) as the nearest even fp8 number's byte."""
    if ENCODING == "e5m2":
        DROPPED: tl.constexpr = 21
        LEAST_NORMAL: tl.constexpr = 2.0**-14
    elif ENCODING == "e4m3fnuz":
        DROPPED: tl.constexpr = 20
        LEAST_NORMAL: tl.constexpr = 2.0**-7
    else:
        DROPPED: tl.constexpr = 20
        LEAST_NORMAL: tl.constexpr = 2.0**-6
    # Added to a subnormal, this leaves the code in the last bits: the add itself rounds.
    MAGIC: tl.constexpr = LEAST_NORMAL * 1.5 * 2.0 ** (DROPPED)
    signed = x.to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    magnitude = bits.to(tl.float32, bitcast=True)
    magic = tl.full(x.shape, MAGIC, tl.float32)
    subnormal = (magnitude + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
    # The least normal number has the code that follows the largest subnormal one.
    first = tl.full(x.shape, LEAST_NORMAL, tl.float32).to(tl.int32, bitcast=True) >> DROPPED
    half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    normal = ((bits + half) >> DROPPED) - first + (1 << (23 - DROPPED))
    code = tl.where(magnitude < LEAST_NORMAL, subnormal, normal)
    sign = (signed >> 24) & 0x80
    if ENCODING == "e4m3fnuz":
        # A negative zero would be this encoding's NaN.
        sign = tl.where(code == 0, 0, sign)
    return (code | sign).to(tl.uint8)


@triton.jit
def _divide(x, divisor):
    """Divide each row of x [rows, width] by divisor [rows], rounded as a true division is.

    One true division a row gives the reciprocal, and one step of correction the quotient: three
    instructions instead of ten. Source: Markstein, "Computation of elementary functions on the
    IBM RISC System/6000 processor" (1990), theorem on quotients.
    """
    if INTERPRETED:
        # Its fma rounds twice.
        return tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    divisor = tl.broadcast_to(divisor[:, None], x.shape)
    reciprocal = tl.broadcast_to(reciprocal[:, None], x.shape)
    quotient = x * reciprocal
    corrected = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    # The correction would turn a negative zero into a positive one.
    return tl.where(x == 0, x, corrected)


@triton.jit
def quantize_tile(x, quant_max, scale_floor, VALUE_DTYPE: tl.constexpr, ENCODING: tl.constexpr):
    """Quantize each row of x [rows, width] f32; return values and scales [rows] f32."""
    magnitude = tl.abs(x)
    # NaN compares false, so this catches NaN and infinity.
    broken = tl.max(tl.where(magnitude < float("inf"), 0, 1), axis=1) > 0
    amax = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, quant_max, tl.float32)), scale_floor)
    quotient = _divide(x, scale)
    quotient = tl.where(broken[:, None], 0.0, quotient)
    quotient = tl.minimum(tl.maximum(quotient, -quant_max), quant_max)
    scale = tl.where(broken, float("nan"), scale)
    if ENCODING != "":
        return _encode_fp8(quotient, ENCODING), scale
    elif VALUE_DTYPE.is_int():
        # Adding 1.5 * 2^23 leaves no fraction bits: the add itself rounds half to even.
        return ((quotient + 12582912.0) - 12582912.0).to(VALUE_DTYPE), scale
    else:
        return quotient.to(VALUE_DTYPE), scale


@triton.jit
def store_quantized(
    x, row, first_group, columns, inside,
    values_ptr, scales_ptr, n_groups, stride_vm, stride_sm, stride_sg,
    quant_max, scale_floor, GROUPS: tl.constexpr, ENCODING: tl.constexpr,
):  # fmt: skip
    """Quantize x [GROUPS, width] f32, groups of one row, and store values and scales."""
    values, scales = quantize_tile(x, quant_max, scale_floor, values_ptr.dtype.element_ty, ENCODING)
    tl.store(values_ptr + row * stride_vm + columns, values, mask=inside)
    groups = first_group + tl.arange(0, GROUPS)
    tl.store(scales_ptr + row * stride_sm + groups * stride_sg, scales, mask=groups < n_groups)


@triton.jit
def group_columns(n_columns, first_group, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the column numbers [GROUPS, WIDTH] of some groups of a row, and which exist."""
    columns = first_group * WIDTH
    columns += tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return columns, columns < n_columns


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, n_columns, n_groups,
    stride_xm, stride_vm, stride_sm, stride_sg, quant_max, scale_floor,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ENCODING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    columns, inside = group_columns(n_columns, first_group, GROUPS, WIDTH)
    x = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
    store_quantized(
        x, row, first_group, columns, inside,
        values_ptr, scales_ptr, n_groups, stride_vm, stride_sm, stride_sg,
        quant_max, scale_floor, GROUPS, ENCODING,
    )  # fmt: skip


def quantize_rows(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] to values (fp8 or int8) with scales [rows] f32."""
    _launch(x, values, scales.unsqueeze(-1), quant_max, scale_floor, per_row=True)


def quantize_groups(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] per 1x128; scales [rows, ceil(columns / 128)] f32."""
    _launch(x, values, scales, quant_max, scale_floor, per_row=False)


def stored_values(values: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return how a kernel shall store fp8 values: as they are, or as bytes that it encodes itself.

    Triton refuses the fp8 types, or takes a minute to compile them, where the hardware does not
    convert; the interpreter truncates. The name of the encoding is empty for int8 and hardware.
    """
    if not is_fp8(values.dtype) or converts_fp8(values.dtype):
        return values, ""
    return values.view(torch.uint8), str(values.dtype).removeprefix("torch.float8_")


def group_shape(columns: int, *, per_row: bool) -> tuple[int, int, int, int]:
    """Choose (groups per program, padded width, groups in a row, warps) for a row."""
    if per_row:
        if columns > MAX_ROW:
            raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} have one scale a row")
        width = max(triton.next_power_of_2(columns), 16)
        return 1, width, 1, min(max(width // 1024, 1), 16)
    n_groups = triton.cdiv(columns, GROUP)
    groups = min(triton.next_power_of_2(n_groups), 16)
    return groups, GROUP, n_groups, min(max(groups // 4, 1), 4)


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    *,
    per_row: bool,
) -> None:
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    if x.stride(1) != 1 or values.stride(1) != 1:
        raise ValueError("quantize: the last dimension of x and values must be contiguous")
    groups, width, n_groups, warps = group_shape(columns, per_row=per_row)
    values, encoding = stored_values(values)
    launch(
        _quantize_kernel, (rows, triton.cdiv(n_groups, groups)),
        x, values, scales, columns, n_groups,
        x.stride(0), values.stride(0), scales.stride(0), scales.stride(1), quant_max, scale_floor,
        GROUPS=groups, WIDTH=width, ENCODING=encoding, num_warps=warps,
    )  # fmt: skip
