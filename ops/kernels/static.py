"""Quantize rows under a scale that is fixed beforehand: a saturating cast, no search for a maximum.

    value = round_to_nearest_even(clamp(x / scale, -quant_max, quant_max))       true division

    with a zero point:  value = clamp(round_to_nearest_even(x / scale) + zero, -128, 127)

Each row gets the scale too, as the kernels of products read one a row: NaN where the row holds a
NaN or an infinity. The values of such a row are NaN where the format has one, else 0. With a zero
point each row gets that as well, 0 for such a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import divide, encode_fp8
from hal.ops.kernels.quantize import MAX_ROW, stored_values


@triton.jit
def _static_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, given_ptr, n_columns, stride_xm, stride_vm, quant_max,
    WIDTH: tl.constexpr, ENCODING: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = columns < n_columns
    x = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(given_ptr + tl.zeros((1,), tl.int32))
    # NaN compares false, so this catches NaN and infinity.
    broken = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1) > 0
    # A quotient that overflows would spoil the division; beyond this bound all saturate anyway.
    bound = tl.broadcast_to(scale[:, None] * (4 * quant_max), x.shape)
    x = tl.where(broken[:, None], 0.0, tl.minimum(tl.maximum(x, -bound), bound))
    quotient = divide(x, scale)
    rows = row + tl.zeros((1,), tl.int32)
    if SHIFTED:
        # Adding 1.5 * 2^23 leaves no fraction bits: the add itself rounds half to even.
        zero = tl.where(broken, 0.0, tl.load(given_ptr + 1 + tl.zeros((1,), tl.int32)))
        steps = ((quotient + 12582912.0) - 12582912.0) + zero[:, None]
        quotient = tl.minimum(tl.maximum(steps, -quant_max - 1.0), quant_max)
        tl.store(zeros_ptr + rows, zero.to(tl.int8))
    else:
        quotient = tl.minimum(tl.maximum(quotient, -quant_max), quant_max)
    if ENCODING == "e4m3fnuz":
        values = tl.where(broken[:, None], 0x80, encode_fp8(quotient, ENCODING)).to(tl.uint8)
    elif ENCODING != "":
        values = tl.where(broken[:, None], 0x7F, encode_fp8(quotient, ENCODING)).to(tl.uint8)
    elif values_ptr.dtype.element_ty.is_int():
        values = ((quotient + 12582912.0) - 12582912.0).to(values_ptr.dtype.element_ty)
    else:
        quotient = tl.where(broken[:, None], float("nan"), quotient)
        values = quotient.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * stride_vm + columns, values, mask=inside)
    tl.store(scales_ptr + rows, tl.where(broken, float("nan"), scale))


def quantize_static(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    given: torch.Tensor,
    quant_max: float,
    zeros: torch.Tensor | None = None,
) -> None:
    """Quantize x [rows, columns] to values (fp8 or int8) by given [] f32; scales [rows] f32.

    With zeros [rows] int8, values are int8 and given is [2] f32: scale and zero point.
    """
    rows, columns = x.shape
    if columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} are read in one piece")
    if x.stride(1) != 1 or values.stride(1) != 1 or scales.stride(0) != 1:
        raise ValueError("quantize_static: x, values and scales must be contiguous along rows")
    needed = 1 if zeros is None else 2
    if given.numel() != needed or given.dtype != torch.float32:
        found = f"{given.dtype} {list(given.shape)}"
        raise ValueError(f"quantize_static: given is {found}, needs {needed} of torch.float32")
    if rows == 0 or columns == 0:
        return
    values, encoding = stored_values(values)
    width = max(triton.next_power_of_2(columns), 16)
    launch(
        _static_kernel, (rows,),
        x, values, scales, scales if zeros is None else zeros, given, columns, x.stride(0),
        values.stride(0), quant_max,
        WIDTH=width, ENCODING=encoding, SHIFTED=zeros is not None,
        num_warps=min(max(width // 1024, 1), 16),
    )  # fmt: skip
