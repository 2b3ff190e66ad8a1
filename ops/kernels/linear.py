"""Multiply by a weight matrix: out = a @ b.T (* scales) (+ bias), see `accumulate` for kinds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.accumulate import (
    accumulate,
    check_operands,
    scale_strides,
    tile_options,
    weight_bytes,
)
from hal.ops.kernels.common import launch, offsets_need_64_bits, program_tile
from hal.ops.tiles import Tile


# A size that changes from call to call must not compile a new kernel.
@triton.jit(do_not_specialize=["n_rows"])
def _gemm_kernel(
    a_ptr, b_ptr, out_ptr, a_scales_ptr, b_scales_ptr, bias_ptr,
    n_rows, n_columns, k_size,
    stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    stride_asm, stride_ask, stride_bsn, stride_bsk,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SCALES: tl.constexpr,
    A_SCALED: tl.constexpr, DECODE: tl.constexpr, FNUZ: tl.constexpr, INTEGER: tl.constexpr,
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
    result = accumulate(
        a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
        b_ptr + columns[None, :] * stride_bn + inner[:, None] * stride_bk,
        row_inside, columns, n_columns, k_size, stride_ak, stride_bk,
        a_scales_ptr + rows * stride_asm, b_scales_ptr, stride_ask, stride_bsn, stride_bsk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, SWAP,
        SCALES, A_SCALED, DECODE, FNUZ, INTEGER, WIDE,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
        result += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on,
        result.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    a_scales: torch.Tensor | None = None,
    b_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kind: str,
    tile: Tile,
    fnuz: bool = False,
) -> None:
    """Write a [m, k] @ b [n, k].T to out [m, n] (bf16, fp16 or f32).

    channel: a_scales [m] f32 (not for decode kinds), b_scales [n] f32. block128: a_scales
    [m, ceil(k / 128)], b_scales [ceil(n / 128), ceil(k / 128)]. bias [n]. Decode kinds read
    fp8 weights, or their bytes as uint8 with `fnuz` telling the encoding.
    """
    b, fnuz = weight_bytes(kind, b, fnuz)
    check_operands(kind, a, b, a_scales, b_scales, tile)
    (m, k), n = a.shape, b.shape[0]
    if out.shape != (m, n):
        raise ValueError(f"gemm: out is {list(out.shape)}, must be [{m}, {n}]")
    if bias is not None and (bias.shape[0] != n or bias.stride(0) != 1):
        raise ValueError(f"gemm: bias must be [{n}] and contiguous")
    if m == 0 or n == 0:
        return
    # Not read when absent, but a kernel argument must be something.
    unused = out
    launch(
        _gemm_kernel, (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        a, b, out,
        unused if a_scales is None else a_scales,
        unused if b_scales is None else b_scales,
        unused if bias is None else bias,
        m, n, k, *a.stride(), *b.stride(), *out.stride(),
        *scale_strides(kind, a_scales, b_scales),
        HAS_BIAS=bias is not None, WIDE=offsets_need_64_bits(a, b, out),
        **tile_options(kind, tile, n, k, fnuz),
    )  # fmt: skip
