"""Accumulate one output tile of a (quantized) matrix product: the loop every GEMM here shares.

    acc[m, n] = sum_k a[m, k] * b[n, k], then * a_scales[m] * b_scales[n]           (channel)
    acc[m, n] = sum_g a_scales[m, g] * b_scales[n // 128, g] * sum_{k in g} ...     (block128)

`KINDS` names the products: what is scaled how, and how weights are decoded in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import decode_fp8, dot, is_fp8
from hal.ops.tiles import Tile

# Elements of n and k that share a scale of the block128 kinds.
SCALE_BLOCK = tl.constexpr(128)


@dataclass(frozen=True)
class Kind:
    """Say how one kind of product is scaled ("", "channel", "block128") and decoded."""

    scales: str = ""
    decode: str = ""  # "", "fp8" or "int8": the format of weights that become a's dtype
    a_scaled: bool = False
    integer: bool = False


KINDS = {
    "bf16": Kind(),
    "fp8_channel": Kind("channel", a_scaled=True),
    "fp8_block128": Kind("block128", a_scaled=True),
    "int8_channel": Kind("channel", a_scaled=True, integer=True),
    "fp8_channel_decode": Kind("channel", decode="fp8"),
    "fp8_block128_decode": Kind("block128", decode="fp8"),
    "int8_channel_decode": Kind("channel", decode="int8"),
}


@triton.jit
def accumulate(
    a_ptrs, b_ptrs, row_inside, columns, n_columns, k_size, stride_ak, stride_bk,
    a_scale_ptrs, b_scale_ptr, stride_ask, stride_bsn, stride_bsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
    SCALES: tl.constexpr, A_SCALED: tl.constexpr, DECODE: tl.constexpr,
    FNUZ: tl.constexpr, INTEGER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the scaled product [BLOCK_M, BLOCK_N] f32.

    a_ptrs [BLOCK_M, BLOCK_K] and b_ptrs [BLOCK_K, BLOCK_N] point at the first step's elements,
    a_scale_ptrs [BLOCK_M] at each row's first scale, b_scale_ptr at the matrix's first scale.
    SWAP computes the transpose: few tokens then form the short side of the instruction.
    WIDE: a step along k may itself pass 2^31 elements (a long dimension comes first in memory).
    """
    inner = tl.arange(0, BLOCK_K)
    column_inside = columns < n_columns
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    ROWS: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    COLUMNS: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    STEP: tl.constexpr = tl.int64 if WIDE else tl.int32
    a_step = tl.full((), BLOCK_K, STEP) * stride_ak
    b_step = tl.full((), BLOCK_K, STEP) * stride_bk
    if SCALES == "block128":
        # A tile of at most 128 columns lies within one block of scales.
        if BLOCK_N <= SCALE_BLOCK:
            b_scale_ptrs = b_scale_ptr + tl.min(columns, axis=0) // SCALE_BLOCK * stride_bsn
        else:
            b_scale_ptrs = b_scale_ptr + columns // SCALE_BLOCK * stride_bsn
    for step in range(0, tl.cdiv(k_size, BLOCK_K)):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_inside[:, None], other=0.0)
            if EVEN_N:
                b = tl.load(b_ptrs)
            else:
                b = tl.load(b_ptrs, mask=column_inside[None, :], other=0.0)
        else:
            left = inner < k_size - step * BLOCK_K
            a = tl.load(a_ptrs, mask=row_inside[:, None] & left[None, :], other=0.0)
            if EVEN_N:
                b = tl.load(b_ptrs, mask=left[:, None], other=0.0)
            else:
                b = tl.load(b_ptrs, mask=left[:, None] & column_inside[None, :], other=0.0)
        if DECODE == "fp8":
            b = decode_fp8(b, a.dtype, FNUZ)
        elif DECODE == "int8":
            # Through f32: exact, what hardware does, and all that the interpreter can.
            b = b.to(tl.float32).to(a.dtype)
        if SCALES == "block128":
            group = step * BLOCK_K // SCALE_BLOCK
            if SWAP:
                part = dot(tl.trans(b), tl.trans(a), tl.zeros((ROWS, COLUMNS), ACC))
            else:
                part = dot(a, b, tl.zeros((ROWS, COLUMNS), ACC))
            if BLOCK_N <= SCALE_BLOCK:
                b_scale = tl.load(b_scale_ptrs + group * stride_bsk)
            else:
                b_scale = tl.load(b_scale_ptrs + group * stride_bsk, mask=column_inside, other=0.0)
                b_scale = b_scale[:, None] if SWAP else b_scale[None, :]
            if A_SCALED:
                a_scale = tl.load(a_scale_ptrs + group * stride_ask, mask=row_inside, other=0.0)
                a_scale = a_scale[None, :] if SWAP else a_scale[:, None]
                acc += part * (a_scale * b_scale)
            else:
                acc += part * b_scale
        elif SWAP:
            acc = dot(tl.trans(b), tl.trans(a), acc)
        else:
            acc = dot(a, b, acc)
        a_ptrs += a_step
        b_ptrs += b_step
    result = acc.to(tl.float32)
    if SWAP:
        result = tl.trans(result)
    if SCALES == "channel":
        b_scale = tl.load(b_scale_ptr + columns * stride_bsn, mask=column_inside, other=0.0)
        result = result * b_scale[None, :]
        if A_SCALED:
            a_scale = tl.load(a_scale_ptrs, mask=row_inside, other=0.0)
            result = result * a_scale[:, None]
    return result


def weight_bytes(kind: str, b: torch.Tensor, fnuz: bool) -> tuple[torch.Tensor, bool]:
    """View fp8 weights that are decoded in the loop as uint8; return them and whether fnuz."""
    if kind in KINDS and KINDS[kind].decode == "fp8" and is_fp8(b.dtype):
        return b.view(torch.uint8), b.dtype is torch.float8_e4m3fnuz
    return b, fnuz


def check_operands(
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor | None,
    b_scales: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Check that the operands are what `kind` reads; raise ValueError naming what is not."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    spec = KINDS[kind]
    if (b_scales is not None) != bool(spec.scales) or (a_scales is not None) != spec.a_scaled:
        raise ValueError(f"{kind}: needs a_scales: {spec.a_scaled}, b_scales: {bool(spec.scales)}")
    if spec.scales == "block128" and 128 % tile.block_k:
        raise ValueError(f"{kind}: block_k is {tile.block_k}, must divide 128")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{kind}: a has {a.shape[-1]} inner elements, b {b.shape[-1]}")
    if not _dtypes_match(spec, a.dtype, b.dtype):
        raise ValueError(f"{kind}: cannot multiply {a.dtype} by {b.dtype}")


def _dtypes_match(spec: Kind, a: torch.dtype, b: torch.dtype) -> bool:
    if spec.decode:
        stored = torch.uint8 if spec.decode == "fp8" else torch.int8
        return a.is_floating_point and a.itemsize == 2 and b == stored
    if spec.integer:
        return a == torch.int8 and b == torch.int8
    if spec.scales:
        return is_fp8(a) and is_fp8(b)
    return a == b and a.is_floating_point and a.itemsize >= 2


def scale_strides(
    kind: str, a_scales: torch.Tensor | None, b_scales: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """Return the strides (row, group) of a_scales, then (column, group) of b_scales.

    b_scales may have a leading dimension of experts, which does not count here.
    """
    blocks = KINDS[kind].scales == "block128"
    row = group = column = column_group = 0
    if a_scales is not None:
        row = a_scales.stride(0)
        group = a_scales.stride(1) if blocks else 0
    if b_scales is not None:
        column = b_scales.stride(-2) if blocks else b_scales.stride(-1)
        column_group = b_scales.stride(-1) if blocks else 0
    return row, group, column, column_group


def tile_options(kind: str, tile: Tile, n: int, k: int, fnuz: bool) -> dict[str, object]:
    """Return the constexpr arguments and compile options that all GEMM kernels take."""
    spec = KINDS[kind]
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "EVEN_N": n % tile.block_n == 0,
        "EVEN_K": k % tile.block_k == 0,
        "SWAP": tile.swap,
        "SCALES": spec.scales,
        "A_SCALED": spec.a_scaled,
        "DECODE": spec.decode,
        "FNUZ": fnuz,
        "INTEGER": spec.integer,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
