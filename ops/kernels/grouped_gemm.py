"""Multiply each routing slot's row by its expert's weight matrix.

    out[slot] = a[slot // top_k_divisor] @ b[expert(slot)].T (* scales)
                (+ bias[expert(slot)]) (* slot_weights[slot])

The slots come sorted by expert in blocks of BLOCK_M rows (`align`). Padding rows are neither
read nor written, and neither are rows of absent slots. See `accumulate` for the kinds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.accumulate import (
    Weight,
    accumulate,
    as_weight,
    check_operands,
    scale_strides,
    tile_options,
)
from hal.ops.kernels.common import launch, offsets_need_64_bits, program_tile
from hal.ops.kernels.packed import accumulate_packed
from hal.ops.tiles import Tile


# Neither sizes nor places that change from call to call may compile a new kernel.
@triton.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=["n_padded_ptr"])
def _grouped_gemm_kernel(
    a_ptr, b_ptr, out_ptr, a_scales_ptr, b_scales_ptr, slot_weights_ptr,
    sorted_slots_ptr, block_experts_ptr, n_padded_ptr, b_zeros_ptr, b_second_ptr, bias_ptr,
    n_slots, n_columns, k_size,
    stride_am, stride_ak, stride_be, stride_bn, stride_bk, stride_om, stride_on,
    stride_asm, stride_ask, stride_bse, stride_b2e, stride_bsn, stride_bsk, stride_b2n,
    stride_biase,
    TOP_K: tl.constexpr, HAS_SLOT_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDE_ROWS: tl.constexpr, WIDE_MATRIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SCALES: tl.constexpr,
    A_SCALED: tl.constexpr, DECODE: tl.constexpr, FNUZ: tl.constexpr, INTEGER: tl.constexpr,
    PACKED: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SUMS: tl.constexpr, SECOND: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    # The grid covers the worst case; the blocks in use come first.
    n_blocks = tl.load(n_padded_ptr) // BLOCK_M
    column_tiles = tl.cdiv(n_columns, BLOCK_N)
    if tl.program_id(0) >= n_blocks * column_tiles:
        return
    block, column_tile = program_tile(n_blocks, column_tiles, GROUP_M)
    expert = tl.load(block_experts_ptr + block)
    if expert < 0:
        return
    slots = tl.load(sorted_slots_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_inside = slots < n_slots
    column_inside = columns < n_columns
    rows = slots // TOP_K
    if WIDE_ROWS:
        rows = rows.to(tl.int64)
        slots = slots.to(tl.int64)
    if WIDE_MATRIX:
        columns = columns.to(tl.int64)
    if WIDE_ROWS or WIDE_MATRIX:
        inner = inner.to(tl.int64)
    # One scalar a program: 64 bits cost nothing here, whatever the sizes.
    expert = expert.to(tl.int64)
    if PACKED:
        result = accumulate_packed(
            a_ptr + rows * stride_am, b_ptr + expert * stride_be,
            row_inside, columns, n_columns, k_size, stride_ak, stride_bn, stride_bk,
            b_scales_ptr + expert * stride_bse, b_zeros_ptr + expert * stride_bse,
            stride_bsn, stride_bsk, b_second_ptr + expert * stride_b2e, stride_b2n,
            a_scales_ptr + rows * stride_asm,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, SWAP, LANES,
            DECODE, FNUZ, WORDS, SCALE_FORMAT, GROUP, SCALE_ROWS, SUMS, SECOND, A_SCALED,
            WIDE_ROWS or WIDE_MATRIX, PTX,
        )  # fmt: skip
    else:
        result = accumulate(
            a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
            b_ptr + expert * stride_be
            + (columns[None, :] * stride_bn + inner[:, None] * stride_bk),
            row_inside, columns, n_columns, k_size, stride_ak, stride_bk,
            a_scales_ptr + rows * stride_asm, b_scales_ptr + expert * stride_bse,
            stride_ask, stride_bsn, stride_bsk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, SWAP,
            SCALES, A_SCALED, DECODE, INTEGER, SCALE_FORMAT, WIDE_ROWS or WIDE_MATRIX,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * stride_biase + columns, mask=column_inside, other=0.0)
        result += bias.to(tl.float32)[None, :]
    if HAS_SLOT_WEIGHTS:
        weights = tl.load(slot_weights_ptr + slots, mask=row_inside, other=0.0)
        result = result * weights.to(tl.float32)[:, None]
    tl.store(
        out_ptr + slots[:, None] * stride_om + columns[None, :] * stride_on,
        result.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor | Weight,
    out: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    *,
    top_k_divisor: int,
    a_scales: torch.Tensor | None = None,
    b_scales: torch.Tensor | None = None,
    b_zeros: torch.Tensor | None = None,
    b_second: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    slot_weights: torch.Tensor | None = None,
    kind: str,
    tile: Tile,
    fnuz: bool = False,
) -> None:
    """Write out [slots, n] from a [slots / top_k_divisor, k] and b [experts, n, k].

    sorted_slots, block_experts and n_padded come from `align` with block = tile.block_m.
    channel: a_scales [rows] f32 (not for decode kinds), b_scales [experts, n] f32. block128:
    a_scales [rows, ceil(k / 128)], b_scales [experts, ceil(n / 128), ceil(k / 128)].
    tensor, groups, and b as a `Weight`: as for `gemm`, with a leading dimension of experts.
    bias [experts, n] and slot_weights [slots] f32, bf16 or fp16, or None. Any strides of b are
    accepted.
    """
    weight = (
        b
        if isinstance(b, Weight)
        else as_weight(kind, a.shape[-1], b, b_scales, b_zeros, b_second, fnuz=fnuz)
    )
    check_operands(kind, a, a_scales, weight, tile)
    codes = weight.codes
    slots, n = out.shape[0], codes.shape[1]
    blocks = block_experts.numel()
    if blocks * tile.block_m != sorted_slots.numel():
        raise ValueError(
            f"grouped_gemm: {sorted_slots.numel()} sorted slots in {blocks} blocks, but the tile "
            f"has block_m = {tile.block_m}; align with that block"
        )
    if out.shape[1] != n:
        raise ValueError(f"grouped_gemm: out has {out.shape[1]} columns, b {n}")
    if slot_weights is not None and not slot_weights.is_contiguous():
        raise ValueError("grouped_gemm: slot_weights must be contiguous")
    if bias is not None and (tuple(bias.shape) != tuple(codes.shape[:2]) or bias.stride(1) != 1):
        raise ValueError(f"grouped_gemm: bias is {tuple(bias.shape)}, b {tuple(codes.shape)}")
    if slots == 0 or n == 0 or blocks == 0:
        return
    options = tile_options(kind, tile, n, weight, a.dtype)
    # Not read when absent, but a kernel argument must be something.
    unused = out
    launch(
        _grouped_gemm_kernel, (blocks * -(-n // options["BLOCK_N"]),),
        a, codes, out,
        unused if a_scales is None else a_scales,
        unused if weight.scales is None else weight.scales,
        unused if slot_weights is None else slot_weights,
        sorted_slots, block_experts, n_padded,
        unused if weight.zeros is None else weight.zeros,
        unused if weight.second is None else weight.second,
        unused if bias is None else bias,
        slots, n, weight.k, *a.stride(), *codes.stride(), *out.stride(),
        *_expert_scale_strides(kind, a_scales, weight), 0 if bias is None else bias.stride(0),
        TOP_K=top_k_divisor, HAS_SLOT_WEIGHTS=slot_weights is not None, HAS_BIAS=bias is not None,
        WIDE_ROWS=offsets_need_64_bits(a, out), WIDE_MATRIX=offsets_need_64_bits(codes, skip=1),
        **options,
    )  # fmt: skip


def _expert_scale_strides(
    kind: str, a_scales: torch.Tensor | None, weight: Weight
) -> tuple[int, ...]:
    row, group, *columns = scale_strides(kind, a_scales, weight, 3)
    expert, second = (
        0 if scales is None else scales.stride(0) for scales in (weight.scales, weight.second)
    )
    return row, group, expert, second, *columns
