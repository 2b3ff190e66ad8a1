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
from hal.ops.kernels.encode import divide, encode_fp8, fixed_scale, shifted_steps, spoiled
from hal.ops.kernels.quantize import stored_values
from hal.ops.kernels.row_shapes import MAX_ROW, lanes_of, row_parts


@triton.jit
def _static_kernel(
    x_ptr, values_ptr, scales_ptr, zeros_ptr, given_ptr, given_zero_ptr,
    n_columns, stride_xm, stride_vm, quant_max,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ENCODING: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    values_ptr += row * stride_vm
    one = tl.zeros((1,), tl.int32)
    VALUE_DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    scale, zero, least, most = fixed_scale(given_ptr, given_zero_ptr, quant_max, SHIFTED)
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
            values = shifted_steps(quotient, zero, SHIFTED).to(VALUE_DTYPE)
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


def fixed_parts(
    where: str, fixed: torch.Tensor | tuple[torch.Tensor, ...], *, shifted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensors whose first numbers are a fixed scale, f32, and a zero point.

    Args:
        where: Who asks, for messages.
        fixed: [] f32, a scale; with a zero point [2] f32, or both apart, [] f32 and [] int8.
        shifted: Whether there is a zero point; else what is returned second means nothing.

    Raises:
        ValueError: If there are more or fewer numbers, or the scale is not float32.
    """
    parts = fixed if isinstance(fixed, tuple) else (fixed,)
    if shifted and not isinstance(fixed, tuple) and fixed.ndim == 1:
        parts = fixed[:1], fixed[1:]
    single = len(parts) == 1 + shifted and all(part.numel() == 1 for part in parts)
    if not single or parts[0].dtype != torch.float32:
        given = fixed if isinstance(fixed, tuple) else (fixed,)
        found = " and ".join(f"{part.dtype} {list(part.shape)}" for part in given)
        needed = f"{1 + shifted} of torch.float32"
        raise ValueError(f"{where}: what is fixed is {found}, needs {needed}")
    return parts[0], parts[-1]


def quantize_static(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    given: torch.Tensor | tuple[torch.Tensor, ...],
    quant_max: float,
    zeros: torch.Tensor | None = None,
) -> None:
    """Quantize x [rows, columns] to values (fp8 or int8) by given [] f32; scales [rows] f32.

    With zeros [rows] int8, values are int8 and given has a zero point too: see `fixed_parts`.
    """
    rows, columns = x.shape
    if columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} are read in one piece")
    if x.stride(1) != 1 or values.stride(1) != 1 or scales.stride(0) != 1:
        raise ValueError("quantize_static: x, values and scales must be contiguous along rows")
    scale, zero = fixed_parts("quantize_static", given, shifted=zeros is not None)
    if rows == 0 or columns == 0:
        return
    values, encoding = stored_values(values)
    parts, width, warps = row_parts(columns, lanes_of(rows, columns))
    launch(
        _static_kernel, (rows,),
        x, values, scales, scales if zeros is None else zeros, scale, zero, columns, x.stride(0),
        values.stride(0), quant_max,
        PARTS=parts, WIDTH=width, ENCODING=encoding, SHIFTED=zeros is not None, num_warps=warps,
    )  # fmt: skip
