"""Multiply each routing slot's row by its expert's matrix, both under scales per group.

    out[slot] = a[slot // top_k_divisor] @ b[expert(slot)].T  (+ bias[expert(slot)])

The product is that of `scaled`, the order of slots that of `grouped_gemm`: sorted by expert in
blocks of BLOCK_M rows (`align`). Padding rows and rows of absent slots are neither read nor
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, offsets_need_64_bits, program_tile
from hal.ops.kernels.scaled import (
    SCALED_KINDS,
    accumulate_scaled,
    check_operand,
    operands_of_sums,
)
from hal.ops.kernels.scaled_sums import accumulate_sums
from hal.ops.tiles import Tile


# Neither sizes nor places that change from call to call may compile a new kernel.
@triton.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=["n_padded_ptr"])
def _scaled_experts_kernel(
    a_ptr, b_ptr, out_ptr, a_scales_ptr, b_scales_ptr, a_second_ptr, b_second_ptr, bias_ptr,
    sorted_slots_ptr, block_experts_ptr, n_padded_ptr,
    n_slots, n_columns, steps, items_a, items_b, n_groups,
    stride_am, stride_ak, stride_be, stride_bn, stride_bk, stride_om, stride_on,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_biase,
    TOP_K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
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
    row_inside = slots < n_slots
    column_inside = columns < n_columns
    rows = slots // TOP_K
    if WIDE:
        rows = rows.to(tl.int64)
        slots = slots.to(tl.int64)
        columns = columns.to(tl.int64)
    # One scalar a program: 64 bits cost nothing here, whatever the sizes.
    expert = expert.to(tl.int64)
    if SUMS:
        result = accumulate_sums(
            a_ptr, b_ptr + expert * stride_be, a_scales_ptr, b_scales_ptr + expert * stride_bse,
            rows, columns, row_inside, column_inside,
            n_groups, stride_am, stride_bn, stride_asm, stride_bsn,
            B, WIDE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K // 32,
        )  # fmt: skip
    else:
        result = accumulate_scaled(
            a_ptr, b_ptr + expert * stride_be, a_scales_ptr, b_scales_ptr + expert * stride_bse,
            rows, columns, row_inside, column_inside, steps, items_a, items_b, n_groups,
            stride_am, stride_ak, stride_bn, stride_bk,
            stride_asm, stride_ask, stride_bsn, stride_bsk,
            A, B, GROUP, WIDE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if SECOND:
        second = tl.load(a_second_ptr + rows, mask=row_inside, other=0.0)
        result *= (second * tl.load(b_second_ptr + expert))[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * stride_biase + columns, mask=column_inside, other=0.0)
        result += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + slots[:, None] * stride_om + columns[None, :] * stride_on,
        result.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )


def scaled_experts(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    *,
    top_k_divisor: int,
    k: int,
    kind: str,
    tile: Tile,
    bias: torch.Tensor | None = None,
    a_second: torch.Tensor | None = None,
    b_second: torch.Tensor | None = None,
    sums: bool = False,
) -> None:
    """Write out [slots, n] from a [slots / top_k_divisor, k] and b [experts, n, k].

    Codes and scales are those of `scaled_gemm`, of b with a leading dimension of experts; under
    nvfp4 a_second is [rows of a] and b_second [experts], f32. sorted_slots, block_experts and
    n_padded come from `align` with block = tile.block_m. bias is [experts, n], or None.
    """
    spec = SCALED_KINDS[kind]
    check_operand(kind, "a", spec.a, spec.group, k, a, a_scales, fnuz=sums)
    check_operand(kind, "b", spec.b, spec.group, k, b, b_scales, fnuz=sums)
    experts, n, _ = b.shape
    n_groups = a_scales.shape[1]
    if sums:
        b, a_scales, b_scales = operands_of_sums(kind, k, a, a_scales, b, b_scales)
    slots, blocks = out.shape[0], block_experts.numel()
    if out.shape[1] != n:
        raise ValueError(f"{kind}: out has {out.shape[1]} columns, b {n}")
    if blocks * tile.block_m != sorted_slots.numel():
        raise ValueError(
            f"{kind}: {sorted_slots.numel()} sorted slots in {blocks} blocks, but the tile has "
            f"block_m = {tile.block_m}; align with that block"
        )
    if bias is not None and (bias.shape != (experts, n) or bias.stride(1) != 1):
        raise ValueError(f"{kind}: bias must be [{experts}, {n}] with contiguous rows")
    for name, second, length in (("a_second", a_second, len(a)), ("b_second", b_second, experts)):
        if (second is not None) != (spec.group == 16):
            raise ValueError(f"{kind}: needs {name}: {spec.group == 16}")
        if second is None:
            continue
        if second.dtype != torch.float32 or second.shape != (length,) or second.stride(0) != 1:
            raise ValueError(f"{kind}: {name} must be float32 [{length}] and contiguous")
    if slots == 0 or n == 0 or blocks == 0:
        return
    # Not read when absent, but a kernel argument must be something.
    launch(
        _scaled_experts_kernel, (blocks * -(-n // tile.block_n),),
        a, b, out, a_scales, b_scales,
        out if a_second is None else a_second, out if b_second is None else b_second,
        out if bias is None else bias,
        sorted_slots, block_experts, n_padded,
        slots, n, -(-k // tile.block_k), a.shape[1], b.shape[2], n_groups,
        *a.stride(), *b.stride(), *out.stride(), *a_scales.stride(), *b_scales.stride(),
        0 if bias is None else bias.stride(0),
        TOP_K=top_k_divisor, A=spec.a, B=spec.b, GROUP=spec.group, SECOND=a_second is not None,
        HAS_BIAS=bias is not None,
        WIDE=offsets_need_64_bits(a, out, a_scales) or offsets_need_64_bits(b, b_scales, skip=1),
        EVEN_K=k % tile.block_k == 0, SWAP=tile.swap, SUMS=sums,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
