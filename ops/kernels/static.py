"""Quantize rows under a scale that is fixed beforehand: a saturating cast, no search for a maximum.

    value = round_to_nearest_even(clamp(x / scale, -quant_max, quant_max))       true division

    with a zero point:  value = clamp(round_to_nearest_even(x / scale) + zero, -128, 127)

Each row gets the scale too, as the kernels of products read one a row: NaN where the row holds a
NaN or an infinity. The values of such a row are NaN where the format has one, else 0. With a zero
point each row gets that as well, 0 for such a row.

x is clamped instead of the quotient, to the product of scale and bound. That is off by 2^-24 at
most, which no code sees: what lies so close to a bound rounds to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.encode import ROUNDER, divide, encode_fp8, spoiled
from hal.ops.kernels.quantize import stored_values
from hal.ops.kernels.row_shapes import MAX_ROW, row_parts


@triton.jit
def _static_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, given_ptr, n_columns, stride_xm, stride_vm, quant_max,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ENCODING: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    values_ptr += row * stride_vm
    one = tl.zeros((1,), tl.int32)
    VALUE_DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    scale = tl.load(given_ptr + one)
    if SHIFTED:
        zero = tl.load(given_ptr + 1 + one)
        least, most = scale * (-128.0 - zero), scale * (127.0 - zero)
    else:
        zero = one.to(tl.float32)
        least, most = scale * -quant_max, scale * quant_max
    spoils = tl.zeros((1, WIDTH), tl.float32)
    for part in tl.static_range(PARTS):
        columns = (part * WIDTH + tl.arange(0, WIDTH))[None, :]
        inside = columns < n_columns
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        spoils = spoiled(x, spoils)
        x = tl.minimum(tl.maximum(x, least[:, None]), most[:, None])
        quotient = divide(x, scale)
        if ENCODING != "":
            values = encode_fp8(quotient, ENCODING)
        elif VALUE_DTYPE == tl.int8:
            steps = (quotient + ROUNDER).to(tl.int32, bitcast=True)
            values = (steps + zero.to(tl.int32)[:, None]).to(VALUE_DTYPE)
        else:
            values = quotient.to(VALUE_DTYPE)
        tl.store(values_ptr + columns, values, mask=inside)
    if tl.sum(tl.sum(spoils, axis=1), axis=0) != 0.0:
        # Rare, and so written over.
        tl.debug_barrier()
        scale, zero = scale * float("nan"), zero * 0.0
        for again in range(PARTS):
            columns = (again * WIDTH + tl.arange(0, WIDTH))[None, :]
            if ENCODING == "e4m3fnuz":
                values = tl.full((1, WIDTH), 0x80, VALUE_DTYPE)
            elif ENCODING != "":
                values = tl.full((1, WIDTH), 0x7F, VALUE_DTYPE)
            elif VALUE_DTYPE == tl.int8:
                values = tl.zeros((1, WIDTH), VALUE_DTYPE)
            else:
                values = tl.full((1, WIDTH), float("nan"), tl.float32).to(VALUE_DTYPE)
            tl.store(values_ptr + columns, values, mask=columns < n_columns)
    if SHIFTED:
        tl.store(zeros_ptr + row + one, zero.to(tl.int8))
    tl.store(scales_ptr + row + one, scale)


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
    parts, width, warps = row_parts(columns)
    launch(
        _static_kernel, (rows,),
        x, values, scales, scales if zeros is None else zeros, given, columns, x.stride(0),
        values.stride(0), quant_max,
        PARTS=parts, WIDTH=width, ENCODING=encoding, SHIFTED=zeros is not None, num_warps=warps,
    )  # fmt: skip
