"""Apply a gated activation, and quantize the result in the same pass if asked.

    out = activation(gate) * up        in float32, rounded once to the activations' dtype

The quantizing variants round to the activations' dtype first, so they equal the two separate
kernels bit for bit. `interleaved`: gate and up columns alternate (gate first), else halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch
from hal.ops.kernels.quantize import (
    group_columns,
    group_shape,
    store_quantized,
    stored_values,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of gate (f32): silu, gelu (erf) or gelu_tanh."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) * (g + 0.044715 g^3)
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-doubled))


@triton.jit
def gated_tile(
    row_ptr, columns, inside, width,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load gate and up of some columns [GROUPS, WIDTH] and return the product, f32."""
    if INTERLEAVED:
        # One contiguous load of the pairs; two strided ones would touch every sector twice.
        pair = tl.arange(0, 2)[None, None, :]
        pairs = tl.load(
            row_ptr + columns[:, :, None] * 2 + pair,
            mask=tl.broadcast_to(inside[:, :, None], GROUPS, WIDTH, 2),
            other=0.0,
        )
        gate, up = tl.split(pairs)
    else:
        gate = tl.load(row_ptr + columns, mask=inside, other=0.0)
        up = tl.load(row_ptr + width + columns, mask=inside, other=0.0)
    return activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)


@triton.jit
def _gate_kernel(
    gate_up_ptr, out_ptr, width, stride_gm, stride_om,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, inside = group_columns(width, tl.program_id(1) * GROUPS, GROUPS, WIDTH)
    gated = gated_tile(
        gate_up_ptr + row * stride_gm, columns, inside, width,
        GROUPS, WIDTH, ACTIVATION, INTERLEAVED,
    )  # fmt: skip
    gated = gated.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + columns, gated, mask=inside)


@triton.jit
def _gate_quantize_kernel(
    gate_up_ptr, values_ptr, scales_ptr, width, n_groups,
    stride_gm, stride_vm, stride_sm, stride_sg, quant_max, scale_floor,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ENCODING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    columns, inside = group_columns(width, first_group, GROUPS, WIDTH)
    gated = gated_tile(
        gate_up_ptr + row * stride_gm, columns, inside, width,
        GROUPS, WIDTH, ACTIVATION, INTERLEAVED,
    )  # fmt: skip
    rounded = gated.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    store_quantized(
        rounded, row, first_group, columns, inside,
        values_ptr, scales_ptr, n_groups, stride_vm, stride_sm, stride_sg,
        quant_max, scale_floor, GROUPS, ENCODING,
    )  # fmt: skip


def silu_and_mul(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    *,
    interleaved: bool = False,
    activation: str = "silu",
) -> None:
    """Write activation(gate) * up of gate_up [rows, 2 * width] to out [rows, width]."""
    rows, width = _check(gate_up, out, activation)
    if rows == 0 or width == 0:
        return
    columns = min(max(triton.next_power_of_2(width), 16), 1024)
    launch(
        _gate_kernel, (rows, triton.cdiv(width, columns)),
        gate_up, out, width, gate_up.stride(0), out.stride(0),
        GROUPS=1, WIDTH=columns, ACTIVATION=activation, INTERLEAVED=interleaved,
        num_warps=4 if columns == 1024 else 1,
    )  # fmt: skip


def silu_and_mul_quantize_rows(
    gate_up: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    *,
    interleaved: bool = False,
    activation: str = "silu",
) -> None:
    """Write the gated rows as values [rows, width] with scales [rows] f32."""
    _launch_quantize(
        gate_up, values, scales.unsqueeze(-1), quant_max, scale_floor,
        interleaved, activation, per_row=True,
    )  # fmt: skip


def silu_and_mul_quantize_groups(
    gate_up: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    *,
    interleaved: bool = False,
    activation: str = "silu",
) -> None:
    """Write the gated rows as values [rows, width], scales [rows, ceil(width / 128)] f32."""
    _launch_quantize(
        gate_up, values, scales, quant_max, scale_floor,
        interleaved, activation, per_row=False,
    )  # fmt: skip


def _launch_quantize(
    gate_up: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    interleaved: bool,
    activation: str,
    *,
    per_row: bool,
) -> None:
    rows, width = _check(gate_up, values, activation)
    if rows == 0 or width == 0:
        return
    groups, padded, n_groups, warps = group_shape(width, per_row=per_row)
    values, encoding = stored_values(values)
    launch(
        _gate_quantize_kernel, (rows, triton.cdiv(n_groups, groups)),
        gate_up, values, scales, width, n_groups,
        gate_up.stride(0), values.stride(0), scales.stride(0), scales.stride(1),
        quant_max, scale_floor,
        GROUPS=groups, WIDTH=padded, ACTIVATION=activation, INTERLEAVED=interleaved,
        ENCODING=encoding, num_warps=warps,
    )  # fmt: skip


def _check(gate_up: torch.Tensor, out: torch.Tensor, activation: str) -> tuple[int, int]:
    """Check the operands; return (rows, width)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation {activation!r} is not one of {ACTIVATIONS}")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("swiglu: the last dimension of gate_up and out must be contiguous")
    rows, width = out.shape
    if gate_up.shape != (rows, 2 * width):
        raise ValueError(f"swiglu: gate_up is {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    return rows, width
