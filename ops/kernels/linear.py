"""Multiply by a weight matrix: out = a @ b.T (* scales) (+ bias), see `accumulate` for kinds."""

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
from hal.ops.kernels.common import (
    launch,
    offsets_need_64_bits,
    program_tile,
    wait_for_previous,
)
from hal.ops.kernels.packed import accumulate_packed
from hal.ops.tiles import Tile


# A size that changes from call to call must not compile a new kernel.
@triton.jit(do_not_specialize=["n_rows"])
def _gemm_kernel(
    a_ptr, b_ptr, out_ptr, a_scales_ptr, b_scales_ptr, bias_ptr, b_zeros_ptr, b_second_ptr,
    a_shifts_ptr, b_sums_ptr,
    n_rows, n_columns, k_size, k_split,
    stride_am, stride_ak, stride_bn, stride_bk, stride_os, stride_om, stride_on,
    stride_asm, stride_ask, stride_bsn, stride_bsk, stride_b2n,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, PER_ITEM: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SCALES: tl.constexpr,
    A_SCALED: tl.constexpr, DECODE: tl.constexpr, FNUZ: tl.constexpr, INTEGER: tl.constexpr,
    PACKED: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SUMS: tl.constexpr, SECOND: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(
        tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N), GROUP_M
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_inside = rows < n_rows
    column_inside = columns < n_columns
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
        inner = inner.to(tl.int64)
    if SPLIT:
        # k_split is a multiple of all steps and groups, so that a part is a product by itself.
        split = tl.program_id(1).to(tl.int64)
        first = split * k_split
        a_ptr += first * stride_ak
        b_ptr += first // PER_ITEM * stride_bk
        a_scales_ptr += first // GROUP * stride_ask
        b_scales_ptr += first // GROUP * stride_bsk
        b_zeros_ptr += first // GROUP * stride_bsk
        out_ptr += split * stride_os
        k_size = tl.minimum(k_size - split.to(tl.int32) * k_split, k_split)
    if PACKED:
        result = accumulate_packed(
            a_ptr + rows * stride_am, b_ptr,
            row_inside, columns, n_columns, k_size, stride_ak, stride_bn, stride_bk,
            b_scales_ptr, b_zeros_ptr, stride_bsn, stride_bsk, b_second_ptr, stride_b2n,
            a_scales_ptr + rows * stride_asm,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, SWAP, LANES,
            DECODE, FNUZ, WORDS, SCALE_FORMAT, GROUP, SCALE_ROWS, SUMS, SECOND, A_SCALED, WIDE,
            PTX,
        )  # fmt: skip
    else:
        result = accumulate(
            a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
            b_ptr + columns[None, :] * stride_bn + inner[:, None] * stride_bk,
            row_inside, columns, n_columns, k_size, stride_ak, stride_bk,
            a_scales_ptr + rows * stride_asm, b_scales_ptr, stride_ask, stride_bsn, stride_bsk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, SWAP,
            SCALES, A_SCALED, DECODE, INTEGER, SCALE_FORMAT, WIDE,
        )  # fmt: skip
    if SHIFTED:
        shifts = tl.load(a_shifts_ptr + rows, mask=row_inside, other=0.0)
        sums = tl.load(b_sums_ptr + columns, mask=column_inside, other=0.0)
        if SPLIT:
            # The parts are added up: one of them takes the shift.
            shifts = tl.where(tl.program_id(1) == 0, shifts, 0.0)
        result -= shifts[:, None] * sums[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
        result += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on,
        result.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )


@triton.jit
def _add_splits_kernel(
    parts_ptr, out_ptr, bias_ptr, n_columns, splits, stride_ps, stride_pm, stride_om, stride_on,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = parts_ptr + row * stride_pm + columns
    for _ in range(0, splits):
        total += tl.load(part_ptrs, mask=inside, other=0.0)
        part_ptrs += stride_ps
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * stride_om + columns.to(tl.int64) * stride_on
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor | Weight,
    out: torch.Tensor,
    *,
    a_scales: torch.Tensor | None = None,
    b_scales: torch.Tensor | None = None,
    b_zeros: torch.Tensor | None = None,
    b_second: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    a_shifts: torch.Tensor | None = None,
    b_sums: torch.Tensor | None = None,
    kind: str,
    tile: Tile,
    fnuz: bool = False,
) -> None:
    """Write a [m, k] @ b [n, k].T to out [m, n] (bf16, fp16 or f32).

    channel: a_scales [m] f32 (not for decode kinds), b_scales [n] f32. block128: a_scales
    [m, ceil(k / 128)], b_scales [ceil(n / 128), ceil(k / 128)]. tensor: b_scales [] or [n] f32.
    bias [n]. a_shifts [m] and b_sums [n], f32: their product is subtracted, for zero points of a:
    zeros * a_scales and b.sum(1) * b_scales. Decode kinds read fp8 weights, or their bytes as uint8
    with `fnuz` telling the encoding. Groups: b [n, ceil(k / 2)] uint8 of 4-bit codes, the low
    nibble first, or [n, k] of e4m3; b_scales [n, ceil(k / group)] in the format of the kind;
    b_zeros uint8 shaped like them (uint4); b_second [] or [n] f32 (nvfp4). Scales are read fastest
    where n is contiguous. int4_group_fp8: a of e4m3 or
    e4m3fnuz, a_scales [m], b in layout int4_planes, b_scales times `FP8_UNITS`.
    b may be a `Weight` made by `as_weight` before, which then holds all of this.
    """
    weight = (
        b
        if isinstance(b, Weight)
        else as_weight(kind, a.shape[-1], b, b_scales, b_zeros, b_second, fnuz=fnuz)
    )
    check_operands(kind, a, a_scales, weight, tile)
    m, n = a.shape[0], weight.codes.shape[0]
    if out.shape != (m, n):
        raise ValueError(f"gemm: out is {list(out.shape)}, must be [{m}, {n}]")
    if bias is not None and (bias.shape[0] != n or bias.stride(0) != 1):
        raise ValueError(f"gemm: bias must be [{n}] and contiguous")
    if (a_shifts is None) != (b_sums is None):
        raise ValueError("gemm: needs both a_shifts and b_sums, or neither")
    for name, shift, size in (("a_shifts", a_shifts, m), ("b_sums", b_sums, n)):
        if shift is not None and (shift.shape != (size,) or shift.dtype != torch.float32):
            raise ValueError(f"gemm: {name} must be float32 [{size}]")
    if m == 0 or n == 0:
        return
    options = tile_options(kind, tile, n, weight, a.dtype)
    splits, k_split = _splits(weight, tile.split_k, options["BLOCK_K"])
    # Not read when absent, but a kernel argument must be something. (triton.cdiv takes 2 us.)
    unused, parts, strides = out, out, (0, *out.stride())
    if splits > 1:
        parts = torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
        strides = parts.stride()
    launch(
        _gemm_kernel, (-(-m // tile.block_m) * -(-n // options["BLOCK_N"]), splits),
        a, weight.codes, parts,
        unused if a_scales is None else a_scales,
        unused if weight.scales is None else weight.scales,
        unused if bias is None else bias,
        unused if weight.zeros is None else weight.zeros,
        unused if weight.second is None else weight.second,
        unused if a_shifts is None else a_shifts, unused if b_sums is None else b_sums,
        m, n, weight.k, k_split, *a.stride(), *weight.codes.stride(), *strides,
        *scale_strides(kind, a_scales, weight, 2),
        HAS_BIAS=bias is not None and splits == 1,
        WIDE=offsets_need_64_bits(a, weight.codes, out), SPLIT=splits > 1,
        PER_ITEM=weight.codes.itemsize * weight.per_byte, SHIFTED=a_shifts is not None,
        **options,
    )  # fmt: skip
    if splits > 1:
        add_splits(parts, out, bias)


def add_splits(
    parts: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, dependent: bool = False
) -> None:
    """Write the sum of parts [splits, m, n], f32 and contiguous, and bias [n] to out [m, n].

    dependent: The launch may begin while the one before ends; see `common.starts_dependent`.
    """
    splits, m, n = parts.shape
    block = min(triton.next_power_of_2(n), 1024)
    launch(
        _add_splits_kernel, (m, triton.cdiv(n, block)),
        parts, out, out if bias is None else bias, n, splits, *parts.stride()[:2],
        *out.stride(), HAS_BIAS=bias is not None, BLOCK=block, DEPENDENT=dependent,
        num_warps=4, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def _splits(weight: Weight, most: int, block_k: int) -> tuple[int, int]:
    """Return how many programs share a tile of out, and the elements of k that each takes."""
    if most == 1:
        return 1, weight.k
    whole = max(block_k, weight.group, 128)
    k_split = max(-(-weight.k // (most * whole)), 1) * whole
    return max(-(-weight.k // k_split), 1), k_split
