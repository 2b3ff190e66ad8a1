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
from hal.ops.kernels.encode import (
    divide,
    encode_values,
    magnitude_bits,
    mx_tile,
    nvfp4_tile,
    nvfp4_tile_under,
    scaled_tile,
    scales_of,
)
from hal.ops.kernels.pair_sources import Rows
from hal.ops.kernels.quantize_fours import quantize_fours
from hal.ops.kernels.quantize_pairs import are_words, encodes_fp8, quantize_pairs
from hal.ops.kernels.row_shapes import (
    GATED_REGISTERS,
    IN_PAIRS,
    MOST_PARTS,
    PER_LANE,
    SHIFTED_LANE,
    WANTED_PARTS,
    are_many,
    fours_shape,
    group_shape,
    warps_of,
)
from hal.ops.kernels.scale_order import ScaleOrder, scale_of_group, scale_of_row
from hal.ops.kernels.source import (
    beyond_count,
    gated_tile,
    group_columns,
    normalized_tile,
    summed_tile,
    tile_columns,
)
from hal.quant.mx import exponent_rule

GROUP = 128
FLAT = 8192
"""Length of the rows that a contiguous matrix is taken as, so that no program is partly empty."""


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
def _tile(
    row_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load columns of a row and return what is quantized, f32, and the sum with the residual."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    if ACTIVATION != "":
        total = gated_tile(
            row_ptr, columns, inside, n_columns, alpha, limit, columns.shape[0], columns.shape[1],
            ACTIVATION, GATED, CLAMPED, INTERLEAVED,
        ).to(DTYPE).to(tl.float32)  # fmt: skip
    else:
        total = summed_tile(row_ptr, residual_ptr, columns, inside, RESIDUAL)
    x = total
    if NORM:
        x = normalized_tile(total, root, weight_ptr, columns, inside, DTYPE)
    return x, total


@triton.jit
def _quantize_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, values_ptr, scales_ptr, second_ptr, counts_ptr,
    fixed_ptr, n_columns, n_words, n_groups,
    stride_xm, stride_rm, stride_tm, stride_vm, stride_sm, stride_sg,
    quant_max, scale_floor, epsilon, alpha, limit, capacity,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
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
    VALUE_DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    x_ptr += row * stride_xm
    residual_ptr += row * stride_rm
    scales_ptr += scale_of_row(row, stride_sm, ORDER)
    # What a row needs as a whole comes first. Its parts are loaded again for each of these loops,
    # which the compiler leaves out where there is one part.
    root = 0.0
    if NORM:
        squares = 0.0
        for part in tl.static_range(PARTS):
            columns, inside = tile_columns(
                n_columns, first_group + part * GROUPS, GROUPS, WIDTH, CODEC
            )
            x = summed_tile(x_ptr, residual_ptr, columns, inside, RESIDUAL)
            squares = x * x if part == 0 else squares + x * x
        square = tl.sum(tl.sum(squares, axis=1), axis=0)
        root = tl.rsqrt(square / n_columns + epsilon)
    if WHOLE:
        top = 0
        for part in tl.static_range(PARTS):
            columns, inside = group_columns(n_columns, first_group + part, 1, WIDTH)
            x, total = _tile(
                x_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
                NORM, RESIDUAL, ACTIVATION, GATED, CLAMPED, INTERLEAVED,
            )  # fmt: skip
            bits = magnitude_bits(x)
            top = bits if part == 0 else tl.maximum(top, bits)
        scale, broken = scales_of(tl.max(top, axis=1), quant_max, scale_floor)
    for part in tl.static_range(PARTS):
        columns, inside = tile_columns(n_columns, first_group + part * GROUPS, GROUPS, WIDTH, CODEC)
        x, total = _tile(
            x_ptr, residual_ptr, weight_ptr, columns, inside, n_columns, root, alpha, limit,
            NORM, RESIDUAL, ACTIVATION, GATED, CLAMPED, INTERLEAVED,
        )  # fmt: skip
        if RESIDUAL:
            total = total.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * stride_tm + columns, total, mask=inside)
        if WHOLE:
            codes = encode_values(divide(x, scale), broken, VALUE_DTYPE, ENCODING)
        elif CODEC == "nvfp4":
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
            columns, inside = group_columns(
                n_words, first_group + part * GROUPS, GROUPS, WIDTH // PER_WORD
            )
            codes = codes.to(VALUE_DTYPE)
        tl.store(values_ptr + row * stride_vm + columns, codes, mask=inside)
        if not WHOLE:
            groups = first_group + part * GROUPS + tl.arange(0, GROUPS)
            target = scales_ptr + scale_of_group(groups, stride_sg, ORDER)
            tl.store(target, scales, mask=groups < n_groups)
    if WHOLE:
        tl.store(scales_ptr + tl.arange(0, 1), tl.where(broken, float("nan"), scale))


def quantize_rows(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] to values (fp8 or int8) with scales [rows] f32."""
    quantize_matrix(x, values, scales, quant_max, scale_floor, group=None)


def quantize_groups(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    quant_max: float,
    scale_floor: float,
) -> None:
    """Quantize x [rows, columns] per 1x128; scales [rows, ceil(columns / 128)] f32."""
    quantize_matrix(x, values, scales, quant_max, scale_floor, group=GROUP)


def stored_values(values: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return how a kernel shall store fp8 values: as they are, or as bytes that it encodes itself.

    Triton refuses the fp8 types, or takes a minute to compile them, where the hardware does not
    convert; the interpreter truncates. The name of the encoding is empty for int8 and hardware.
    """
    if not is_fp8(values.dtype) or converts_fp8(values.dtype):
        return values, ""
    return values.view(torch.uint8), str(values.dtype).removeprefix("torch.float8_")


def quantize_matrix(
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
    packed = values.dtype is torch.uint8
    codec = "nvfp4" if second is not None else "mxfp4" if packed else "mx"
    codec = codec if packed or scales.dtype is torch.uint8 else "scaled"
    scales = scales.unsqueeze(-1) if group is None else scales
    alone = gate is None and counts is None and order is None
    whole = group is None or second is not None or norm is not None
    if not whole and alone and _can_be_flat(x, values, scales, group):
        x, values = x.view(-1, FLAT), values.view(-1, FLAT // 2 if packed else FLAT)
        scales = scales.view(x.shape[0], -1)
        rows, columns = x.shape
    order = ScaleOrder("", *scales.stride()) if order is None else order
    before = Before(norm, gate, counts, fixed)
    words = as_words(values, columns)
    if words is not None and in_pairs(x, values.dtype, codec, before):
        quantize_words(
            x, words, scales, (rows, columns), quant_max, scale_floor, before, order,
            codec=codec, group=group, whole=whole, integer=values.dtype is torch.int8,
            second=second,
        )  # fmt: skip
        return
    fnuz = codec == "mx" and values.dtype is getattr(torch, "float8_e4m3fnuz", None)
    addend, top_exponent = exponent_rule("e2m1" if packed else "e4m3fn")
    # By integers everywhere: ptxas 12.8 merges conversions to e4m3, and then errs.
    encoding = "" if second is None else "e4m3fn"
    parts, groups, width, n_groups, warps = group_shape(
        rows, columns, group, whole=whole, most_parts=before.most_parts, sums=norm is not None
    )
    per_word = 1
    if packed:
        values, per_word = (values, 2) if words is None else (words, 8)
    elif fnuz:
        # The codes are e4m3fn's, whatever the device converts.
        values, encoding = values.view(torch.uint8), "e4m3fn"
    else:
        values, encoding = stored_values(values)
    if second is not None:
        # Both halves of a group lie in one tile there.
        parts, groups = 1, triton.next_power_of_2(n_groups)
        warps = warps_of(groups * width, PER_LANE)
    residual, total = (norm.residual, norm.total) if norm else (None, None)
    launch(
        _quantize_kernel, (rows, triton.cdiv(n_groups, groups * parts)),
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
        *before.activation, row_capacity(rows, counts),
        PARTS=parts, GROUPS=groups, WIDTH=width, WHOLE=group is None,
        NORM=norm is not None, RESIDUAL=residual is not None,
        **gate_options(gate), COUNTED=counts is not None,
        CODEC="mx" if codec == "mxfp4" else codec, PER_WORD=per_word, ENCODING=encoding,
        ADDEND=addend, TOP_EXPONENT=top_exponent, FNUZ=fnuz, ORDER=order.name,
        FIXED=fixed is not None, num_warps=warps,
    )  # fmt: skip


def row_capacity(rows: int, counts: torch.Tensor | None) -> int:
    """Return how many of the rows an expert has."""
    return 1 if counts is None else rows // counts.numel()


class Before(NamedTuple):
    """What comes before codes; see `quantize_matrix`."""

    norm: Norm | None
    gate: Activation | None
    counts: torch.Tensor | None
    fixed: torch.Tensor | None

    @property
    def activation(self) -> tuple[float, float]:
        """Return the alpha and the limit of the gate."""
        return (self.gate.alpha, self.gate.limit) if self.gate else (1.0, 0.0)

    @property
    def kind(self) -> str:
        """Return the name of it."""
        if self.gate:
            return "gate"
        if self.norm is None:
            return "plain" if self.fixed is None else "fixed"
        if self.norm.residual is not None:
            return "residual"
        return "norm" if self.fixed is None else "fixed_norm"

    @property
    def most_parts(self) -> int:
        """Return in how many parts a row is taken at most."""
        # What waits for memory anyway is better off with a row in one piece.
        return 1 if self.kind == "residual" else MOST_PARTS


def quantize_words(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    quant_max: float,
    scale_floor: float,
    before: Before,
    order: ScaleOrder,
    *,
    codec: str,
    group: int | None,
    whole: bool,
    integer: bool,
    second: torch.Tensor | None = None,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
    zeros: torch.Tensor | None = None,
) -> None:
    """Quantize rows two numbers at a time.

    given, zeros: What `quantize_pairs` calls fixed and zeros; `before.fixed` is of nvfp4.
    """
    norm, gate, counts, fixed = before
    wanted = WANTED_PARTS.get((codec, before.kind))
    four_bits, many, registers = codec in ("nvfp4", "mxfp4"), are_many(*shape), 0
    if wanted is None:
        searches = norm is not None and zeros is not None and given is None
        lane = SHIFTED_LANE if searches else PER_LANE
        how = group_shape(*shape, group, whole=whole, lane=lane, sums=norm is not None)
        registers = GATED_REGISTERS if four_bits else 0
    else:
        assert group is not None
        if not many and norm is None:
            # More threads for each row. A norm's sum depends on that, and not on other rows.
            wanted = 1
        how = fours_shape(*shape, group, whole=whole, wanted=wanted)
    rows = Rows(
        norm, gate_options(gate), *before.activation, counts, row_capacity(shape[0], counts),
        scale_floor, exponent_rule("e2m1" if four_bits else "e4m3fn"), order,
        how.n_groups, how.parts, how.groups, how.warps, registers,
    )  # fmt: skip
    if wanted is None:
        quantize_pairs(
            x, words, scales, rows, group=group, width=how.groups * how.width, codec=codec,
            integer=integer, quant_max=quant_max, fixed=given, zeros=zeros,
        )  # fmt: skip
    else:
        encoding = "" if second is None or converts_fp8(scales.dtype) else "e4m3fn"
        quantize_fours(
            x, words, scales, rows, group=how.width, late=norm is not None and many,
            encoding=encoding, second=second, fixed=fixed,
        )  # fmt: skip


def in_pairs(x: torch.Tensor, dtype: torch.dtype, codec: str, before: Before) -> bool:
    """Say whether rows, whose codes are whole words, are taken two numbers at a time."""
    norm, gate = before.norm, before.gate
    taken = (codec, before.kind)
    if taken not in WANTED_PARTS and taken not in IN_PAIRS:
        return False
    if not has_pairs() or (gate and gate.gated and gate.interleaved):
        return False
    if is_fp8(dtype) and not (dtype is torch.float8_e4m3fn and encodes_fp8()):
        return False
    return are_words(x, *((norm.weight, norm.residual, norm.total) if norm else ()))


def as_words(values: torch.Tensor, columns: int) -> torch.Tensor | None:
    """Return codes as int32, or None where a thread's eight of each row are no whole words."""
    aligned = values.data_ptr() % 4 == 0 and values.stride(0) % 4 == 0
    if columns % 8 == 0 and aligned and values.storage_offset() % 4 == 0:
        return values.view(torch.int32)
    return None


def _can_be_flat(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, group: int | None
) -> bool:
    """Tell whether groups may be counted through the whole matrix instead of row by row."""
    assert group is not None
    contiguous = x.is_contiguous() and values.is_contiguous() and scales.is_contiguous()
    return contiguous and x.shape[1] % group == 0 and x.numel() % FLAT == 0
