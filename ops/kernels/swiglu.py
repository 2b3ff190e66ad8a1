"""Apply a gated activation, and quantize the result in the same pass if asked.

    out = activation(gate) * up        in float32, rounded once to the activations' dtype

The quantizing variants round to the activations' dtype first, so they equal the two separate
kernels bit for bit. Which activations there are, with their formulas: `hal.ops.activations`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.activations import ACTIVATIONS, SILU, Activation
from hal.ops.kernels.common import launch, let_next_start, wait_for_previous
from hal.ops.kernels.quantize import gate_options, quantize_matrix, row_capacity
from hal.ops.kernels.source import beyond_count, gated_tile, group_columns
from hal.ops.kernels.step_order import in_step_order


@triton.jit
def _gate_kernel(
    gate_up_ptr, out_ptr, counts_ptr, width, stride_gm, stride_om, alpha, limit, capacity,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr, COUNTED: tl.constexpr, STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_previous()
        # Not before: what comes next reads what was done before the product that this waits for.
        let_next_start()
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    columns, inside = group_columns(width, tl.program_id(1) * GROUPS, GROUPS, WIDTH)
    gated = gated_tile(
        gate_up_ptr + row * stride_gm, columns, inside, width, alpha, limit,
        GROUPS, WIDTH, ACTIVATION, GATED, CLAMPED, INTERLEAVED,
    )  # fmt: skip
    gated = in_step_order(gated.to(out_ptr.dtype.element_ty), STEP)
    tl.store(out_ptr + row * stride_om + columns, gated, mask=inside)


def silu_and_mul(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    activation: Activation = SILU,
    counts: torch.Tensor | None = None,
    *,
    step: int = 0,
    dependent: bool = False,
) -> None:
    """Write activation(gate) * up of gate_up [rows, 2 * width] to out [rows, width].

    Without a gate: activation(gate_up) of [rows, width]. counts [experts]: rows are [experts *
    capacity], of which those beyond an expert's count are neither read nor written. step: columns
    are written in the order of `step_order`, which takes whole steps. dependent: the launch may
    begin while the one before ends (`common.starts_dependent`).
    """
    rows, width = _check(gate_up, out, activation)
    if step and width % step:
        raise ValueError(f"swiglu: {width} columns in steps of {step}; needs whole ones")
    if rows == 0 or width == 0:
        return
    columns = min(max(triton.next_power_of_2(width), 16), 1024)
    launch(
        _gate_kernel, (rows, triton.cdiv(width, columns)),
        gate_up, out, gate_up if counts is None else counts, width,
        gate_up.stride(0), out.stride(0), activation.alpha, activation.limit,
        row_capacity(rows, counts),
        GROUPS=1, WIDTH=columns, COUNTED=counts is not None, STEP=step, **gate_options(activation),
        DEPENDENT=dependent, num_warps=4 if columns == 1024 else 1,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def silu_and_mul_quantize_rows(
    gate_up: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    activation: Activation = SILU,
    counts: torch.Tensor | None = None,
) -> None:
    """Write the gated rows as values [rows, width] with scales [rows] f32."""
    _check(gate_up, values, activation)
    quantize_matrix(
        gate_up, values, scales, quant_max, scale_floor, group=None, gate=activation, counts=counts
    )


def silu_and_mul_quantize_groups(
    gate_up: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    activation: Activation = SILU,
    counts: torch.Tensor | None = None,
) -> None:
    """Write the gated rows as values [rows, width], scales [rows, ceil(width / 128)] f32."""
    _check(gate_up, values, activation)
    quantize_matrix(
        gate_up, values, scales, quant_max, scale_floor, group=128, gate=activation, counts=counts
    )


def _check(gate_up: torch.Tensor, out: torch.Tensor, activation: Activation) -> tuple[int, int]:
    """Check the operands; return (rows, width)."""
    if activation.name not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation {activation.name!r} is not one of {ACTIVATIONS}")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("swiglu: the last dimension of gate_up and out must be contiguous")
    rows, width = out.shape
    if gate_up.shape != (rows, activation.products * width):
        raise ValueError(f"swiglu: gate_up is {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    return rows, width
