"""Quantize rows dynamically, as they are or fused with what comes before them, in one launch.

What codes and scales are is in `hal.ops.kernels.encode`, what is loaded in `source`. A row (or
group) with a NaN or an infinity gets scale NaN and zero codes: it dequantizes to NaN, never
silently to finite numbers. Other rows are not affected.

Where a whole row must be known first (one scale a row, the second scale of nvfp4, a norm), a
program holds a row in registers; otherwise it takes a piece of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hal.ops.activations import Activation
from hal.ops.kernels.common import converts_fp8, has_pairs, is_fp8, launch
from hal.ops.kernels.encode import mx_tile, nvfp4_tile, nvfp4_tile_under, scaled_tile
from hal.ops.kernels.quantize_pairs import are_words, quantize_pairs
from hal.ops.kernels.scale_order import ScaleOrder, scale_of_group, scale_of_row
from hal.ops.kernels.source import (
    beyond_count,
    gated_tile,
    group_columns,
    half_columns,
    normalized_tile,
)
from hal.quant.mx import exponent_rule

GROUP = 128
MAX_ROW = 32768
PIECE = 4096
"""Elements of a program that needs no whole row: 8 KB of bf16 in flight for each."""
FLAT = 8192
"""Length of the rows that a contiguous matrix is taken as, so that no program is partly empty."""
FEW = 1 << 19
"""Elements up to which pieces are smaller, so that all of a device works on them."""
PER_LANE = 32
"""Elements that a lane of 32 holds."""
IN_PAIRS = {
    ("nvfp4", "plain"): (64, 0),
    ("nvfp4", "norm"): (64, 0),
    ("nvfp4", "residual"): (64, 0),
    ("nvfp4", "gate"): (32, 48),
    ("mx", "norm"): (32, 48),
    ("mx", "gate"): (32, 48),
}
"""How many elements a lane holds where rows are taken by pairs, and how many registers a thread may
have (0: what the compiler wants), where that is faster on an H200; else PER_LANE and 0. Not more
than 64: with 128 an H200 stores wrong codes. See benchmarks/results/h200_quantize_pairs.txt."""


class Norm(NamedTuple):
    """Normalize each row by its mean square before quantization.

    weight: [columns]. residual: added to x first, or None. total: takes the sum, or None.
    """

    weight: torch.Tensor
    epsilon: float
    residual: torch.Tensor | None = None
    total: torch.Tensor | None = None


def gate_options(gate: Activation | None) -> dict[str, Any]:
    """Return the constexpr arguments of `gated_tile`; the name is empty without an activation."""
    return {
        "ACTIVATION": gate.name if gate else "",
        "GATED": gate is not None and gate.gated,
        "CLAMPED": gate is not None and gate.clamped,
        "INTERLEAVED": gate is not None and gate.interleaved,
    }


@triton.jit
def _quantize_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    fixed_ptr, n_columns, n_words, n_groups,
    stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    quant_max, scale_floor, epsilon, alpha, limit, capacity,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr, COUNTED: tl.constexpr,
    CODEC: tl.constexpr, PER_WORD: tl.constexpr, ENCODING: tl.constexpr,
    ADDEND: tl.constexpr, TOP_EXPONENT: tl.constexpr, FNUZ: tl.constexpr, ORDER: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if beyond_count(counts_ptr, row, capacity):
            return
    first_group = tl.program_id(1) * GROUPS
    HALVES: tl.constexpr = 2 if CODEC == "nvfp4" else 1
    if CODEC == "nvfp4":
        columns, inside = half_columns(n_columns, GROUPS)
    else:
        columns, inside = group_columns(n_columns, first_group, GROUPS, WIDTH)
    x_ptr += row * stride_xm
    if ACTIVATION != "":
        x = gated_tile(
            x_ptr, columns, inside, n_columns, alpha, limit, GROUPS * HALVES, WIDTH // HALVES,
            ACTIVATION, GATED, CLAMPED, INTERLEAVED,
        )  # fmt: skip
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    elif NORM:
        x = normalized_tile(
            x_ptr, residual_ptr + row * stride_rm, total_ptr + row * stride_tm, weight_ptr,
            columns, inside, n_columns, epsilon, RESIDUAL,
        )  # fmt: skip
    else:
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    VALUE_DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    if CODEC == "nvfp4":
        if FIXED:
            second = tl.load(fixed_ptr + tl.arange(0, 1))
            codes, scales = nvfp4_tile_under(x, second, PER_WORD, ENCODING)
        else:
            codes, scales, second = nvfp4_tile(x, scale_floor, PER_WORD, ENCODING)
        tl.store(second_ptr + row + tl.arange(0, 1), second)
    elif CODEC == "mx":
        codes, scales = mx_tile(x, PER_WORD, VALUE_DTYPE, ENCODING, ADDEND, TOP_EXPONENT, FNUZ)
    else:
        codes, scales = scaled_tile(x, quant_max, scale_floor, VALUE_DTYPE, ENCODING)
    if PER_WORD > 1:
        columns, inside = group_columns(n_words, first_group, GROUPS, WIDTH // PER_WORD)
        codes = codes.to(VALUE_DTYPE)
    tl.store(values_ptr + row * stride_vm + columns, codes, mask=inside)
    groups = first_group + tl.arange(0, GROUPS)
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
    tl.store(target, scales, mask=groups < n_groups)


def quantize_rows(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] to values (fp8 or int8) with scales [rows] f32."""
    quantize(x, values, scales, quant_max, scale_floor, group=None)


def quantize_groups(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] per 1x128; scales [rows, ceil(columns / 128)] f32."""
    quantize(x, values, scales, quant_max, scale_floor, group=GROUP)


def stored_values(values: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return how a kernel shall store fp8 values: as they are, or as bytes that it encodes itself.

    Triton refuses the fp8 types, or takes a minute to compile them, where the hardware does not
    convert; the interpreter truncates. The name of the encoding is empty for int8 and hardware.
    """
    if not is_fp8(values.dtype) or converts_fp8(values.dtype):
        return values, ""
    return values.view(torch.uint8), str(values.dtype).removeprefix("torch.float8_")


def group_shape(
    rows: int, columns: int, group: int | None, *, whole: bool
) -> tuple[int, int, int, int]:
    """Choose (groups per program, padded width, groups in a row, warps) for a row."""
    if whole and columns > MAX_ROW:
        raise ValueError(f"rows of {columns} elements, at most {MAX_ROW} have one scale a row")
    if group is None:
        groups, n_groups, width = 1, 1, max(triton.next_power_of_2(columns), 16)
    else:
        n_groups, width = triton.cdiv(columns, group), group
        groups = triton.next_power_of_2(n_groups)
        if not whole:
            groups = min(groups, (PIECE if rows * columns > FEW else PIECE // 4) // group)
    return groups, width, n_groups, warps_of(groups * width, PER_LANE)


def warps_of(elements: int, lane: int) -> int:
    """Return how many warps hold so many elements, `lane` of them each lane."""
    return min(max(elements // (32 * lane), 1), 16)


def quantize(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
    *,
    group: int | None,
    second: torch.Tensor | None = None,
    norm: Norm | None = None,
    gate: Activation | None = None,
    counts: torch.Tensor | None = None,
    order: ScaleOrder | None = None,
    fixed: torch.Tensor | None = None,
) -> None:
    """Quantize rows to values [rows, columns] or, packed e2m1, [rows, ceil(columns / 2)] uint8.

    Args:
        x: [rows, columns], of gate and up [rows, 2 * columns].
        values: fp8, int8, or uint8 for packed codes; the last dimension contiguous, as in x.
        scales: [rows] or [rows, groups]: float32; of mx e8m0 in uint8; of nvfp4 float8_e4m3fn.
        quant_max: Largest code under float32 scales.
        scale_floor: Smallest float32 scale.
        group: Elements that share a scale, a power of two; None is a row.
        second: [rows] float32, of nvfp4.
        norm: What to do before, or None.
        gate: The same: an activation.
        counts: [experts] where the rows are [experts * capacity]; those beyond an expert's count
            are neither read nor written.
        order: Where in `scales`, of any shape, each belongs; None is [rows, groups].
        fixed: [] float32, of nvfp4: what to take for all second scales, which are stored too.
    """
    rows, columns = x.shape[0], x.shape[1] // (gate.products if gate else 1)
    if rows == 0 or columns == 0:
        return
    if x.stride(1) != 1 or values.stride(1) != 1:
        raise ValueError("quantize: the last dimension of x and values must be contiguous")
    codec = "nvfp4" if second is not None else "mx" if scales.dtype is torch.uint8 else "scaled"
    packed = values.dtype is torch.uint8
    scales = scales.unsqueeze(-1) if group is None else scales
    whole = group is None or second is not None or norm is not None
    alone = gate is None and counts is None and order is None
    if not whole and alone and _can_be_flat(x, values, scales, group):
        x, values = x.view(-1, FLAT), values.view(-1, FLAT // 2 if packed else FLAT)
        scales = scales.view(x.shape[0], -1)
        rows, columns = x.shape
    groups, width, n_groups, warps = group_shape(rows, columns, group, whole=whole)
    order = ScaleOrder("", *scales.stride()) if order is None else order
    fnuz = codec == "mx" and values.dtype is getattr(torch, "float8_e4m3fnuz", None)
    per_word = 1
    if packed:
        values, per_word = _as_words(values, columns)
        encoding = "" if second is None or converts_fp8(scales.dtype) else "e4m3fn"
    elif fnuz:
        # The codes are e4m3fn's, whatever the device converts.
        values, encoding = values.view(torch.uint8), "e4m3fn"
    else:
        values, encoding = stored_values(values)
    addend, top_exponent = exponent_rule("e2m1" if packed else "e4m3fn")
    capacity = row_capacity(rows, counts)
    alpha, limit = (gate.alpha, gate.limit) if gate else (1.0, 0.0)
    # MX codes after a norm of a sum wait for memory: 0.99 of a copy one by one, 0.94 by pairs.
    slower = codec == "mx" and norm is not None and norm.residual is not None
    if per_word == 8 and not slower and fixed is None and _by_pairs(x, norm, gate):
        before = "gate" if gate else "plain" if norm is None else "norm"
        before = "residual" if norm is not None and norm.residual is not None else before
        lane, registers = IN_PAIRS.get((codec, before), (PER_LANE, 0))
        warps = warps_of(groups * width, lane)
        quantize_pairs(
            x, values, scales, groups=groups, warps=warps, registers=registers, addend=addend,
            top_exponent=top_exponent, scale_floor=scale_floor, encoding=encoding, norm=norm,
            gate=gate_options(gate), alpha=alpha, limit=limit, counts=counts, capacity=capacity,
            second=second, n_groups=n_groups, order=order,
        )  # fmt: skip
        return
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    launch(
        _quantize_kernel, (rows, triton.cdiv(n_groups, groups)),
        x, x if residual is None else residual, x if total is None else total,
        norm.weight if norm else x, values,
        scales.view(torch.uint8) if second is not None else scales,
        scales if second is None else second, x if counts is None else counts,
        x if fixed is None else fixed,
        columns, triton.cdiv(columns, per_word), n_groups, x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if total is None else total.stride(0), values.stride(0),
        order.row, order.group,
        quant_max, scale_floor, norm.epsilon if norm else 0.0,
        alpha, limit, capacity,
        GROUPS=groups, WIDTH=width, NORM=norm is not None, RESIDUAL=residual is not None,
        **gate_options(gate), COUNTED=counts is not None,
        CODEC=codec, PER_WORD=per_word, ENCODING=encoding,
        ADDEND=addend, TOP_EXPONENT=top_exponent, FNUZ=fnuz, ORDER=order.name,
        FIXED=fixed is not None, num_warps=warps,
    )  # fmt: skip


def row_capacity(rows: int, counts: torch.Tensor | None) -> int:
    """Return how many of the rows an expert has."""
    return 1 if counts is None else rows // counts.numel()


def _by_pairs(x: torch.Tensor, norm: Norm | None, gate: Activation | None) -> bool:
    """Tell whether rows can be taken two numbers at a time, by instructions for both."""
    if not has_pairs() or (gate is not None and gate.gated and gate.interleaved):
        return False
    return are_words(x, *((norm.weight, norm.residual, norm.total) if norm else ()))


def _as_words(values: torch.Tensor, columns: int) -> tuple[torch.Tensor, int]:
    """Return packed codes as int32 where rows consist of those, and how many codes a word has."""
    aligned = values.data_ptr() % 4 == 0 and values.stride(0) % 4 == 0
    if columns % 8 == 0 and aligned and values.storage_offset() % 4 == 0:
        return values.view(torch.int32), 8
    return values, 2


def _can_be_flat(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, group: int | None
) -> bool:
    """Tell whether groups may be counted through the whole matrix instead of row by row."""
    assert group is not None
    contiguous = x.is_contiguous() and values.is_contiguous() and scales.is_contiguous()
    return contiguous and x.shape[1] % group == 0 and x.numel() % FLAT == 0
