"""Accumulate one output tile of a (quantized) matrix product: the loop every GEMM here shares.

    acc[m, n] = sum_k a[m, k] * b[n, k], then * a_scales[m] * b_scales[n]           (channel)
    acc[m, n] = sum_g a_scales[m, g] * b_scales[n // 128, g] * sum_{k in g} ...     (block128)

Scales of block128 are float32, or, of the kind `_ue8m0`, bytes of exponents.

`KINDS` names the products: what is scaled how, and how weights are decoded in the loop. The
products of `WEIGHT_ONLY_KINDS` read packed weights and have their loop in `packed`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import dot, has_ptx, is_fp8
from hal.ops.kernels.kinds import ALL_KINDS, KINDS, WEIGHT_ONLY_KINDS, Kind, Weight, as_weight
from hal.ops.kernels.packed import scale_number
from hal.ops.tiles import Tile

__all__ = [
    "ALL_KINDS",
    "KINDS",
    "WEIGHT_ONLY_KINDS",
    "Weight",
    "accumulate",
    "as_weight",
    "check_operands",
    "scale_strides",
    "tile_options",
]

# Elements of n and k that share a scale of the block128 kinds.
SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def accumulate(
    a_ptrs, b_ptrs, row_inside, columns, n_columns, k_size, stride_ak, stride_bk,
    a_scale_ptrs, b_scale_ptr, stride_ask, stride_bsn, stride_bsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
    SCALES: tl.constexpr, A_SCALED: tl.constexpr, DECODE: tl.constexpr,
    INTEGER: tl.constexpr, SCALE_FORMAT: tl.constexpr, WIDE: tl.constexpr,
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
        if DECODE == "int8":
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
                b_scale = scale_number(b_scale, SCALE_FORMAT, tl.float32)
            else:
                b_scale = tl.load(b_scale_ptrs + group * stride_bsk, mask=column_inside, other=0)
                b_scale = scale_number(b_scale, SCALE_FORMAT, tl.float32)
                b_scale = b_scale[:, None] if SWAP else b_scale[None, :]
            if A_SCALED:
                a_scale = tl.load(a_scale_ptrs + group * stride_ask, mask=row_inside, other=0)
                a_scale = scale_number(a_scale, SCALE_FORMAT, tl.float32)
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


def check_operands(
    kind: str,
    a: torch.Tensor,
    a_scales: torch.Tensor | None,
    weight: Weight,
    tile: Tile,
) -> None:
    """Check that the operands are what `kind` reads; raise ValueError naming what is not."""
    if kind not in ALL_KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(ALL_KINDS)}")
    spec = ALL_KINDS[kind]
    scaled = weight.scales is not None or (spec.scales == "tensor" and weight.second is not None)
    if scaled != bool(spec.scales) or (a_scales is not None) != spec.a_scaled:
        raise ValueError(f"{kind}: needs a_scales: {spec.a_scaled}, b_scales: {bool(spec.scales)}")
    stored = torch.float32 if spec.scale_format == "float32" else torch.uint8
    for name, scales in (("a_scales", a_scales), ("b_scales", weight.scales)):
        if spec.a_scaled and scales is not None and scales.dtype != stored:
            raise ValueError(f"{kind}: {name} are {scales.dtype}, must be {stored}")
    if spec.scales == "block128" and 128 % tile.block_k:
        raise ValueError(f"{kind}: block_k is {tile.block_k}, must divide 128")
    if a.shape[-1] != weight.k:
        raise ValueError(f"{kind}: a has {a.shape[-1]} inner elements, b {weight.k}")
    if not _dtypes_match(spec, a.dtype, weight.codes.dtype):
        raise ValueError(f"{kind}: cannot multiply {a.dtype} by {weight.codes.dtype}")


def _dtypes_match(spec: Kind, a: torch.dtype, b: torch.dtype) -> bool:
    if spec.packed and spec.a_scaled:
        return is_fp8(a) and b in (torch.uint8, torch.int32)
    if spec.packed:
        return a in (torch.bfloat16, torch.float16) and b in (torch.uint8, torch.int32)
    if spec.decode:
        return a.is_floating_point and a.itemsize == 2 and b == torch.int8
    if spec.integer:
        return a == torch.int8 and b == torch.int8
    if spec.scales:
        return is_fp8(a) and is_fp8(b)
    return a == b and a.is_floating_point and a.itemsize >= 2


def scale_strides(
    kind: str, a_scales: torch.Tensor | None, weight: Weight, dimensions: int
) -> tuple[int, int, int, int, int]:
    """Return the strides (row, group) of a_scales, (column, group) of b's, then of the second.

    dimensions: 2, or 3 where the weight has a leading dimension of experts, which does not count.
    """
    blocks = ALL_KINDS[kind].scales in ("block128", "group")
    row = group = column = column_group = second = 0
    if a_scales is not None:
        row = a_scales.stride(0)
        group = a_scales.stride(1) if a_scales.dim() == 2 else 0
    if weight.scales is not None:
        column = weight.scales.stride(-2) if blocks else weight.scales.stride(-1)
        column_group = weight.scales.stride(-1) if blocks else 0
    factor = weight.second
    if factor is not None and factor.dim() == dimensions - 1 and factor.shape[-1] > 1:
        second = factor.stride(-1)
    return row, group, column, column_group, second


def _with_sums(kind: str, group: int, dtype: torch.dtype, tile: Tile) -> tuple[bool, Tile]:
    """Say whether scales apply to sums of groups, and return the tile for that.

    Float32 scales are exact on sums alone, powers of two also on weights in bf16. A step must then
    lie within a group (more stages make up for shorter ones), and there are two accumulators.
    """
    spec = ALL_KINDS[kind]
    exact = spec.scale_format == "e4m3fn" or (spec.scale_format, dtype) == ("e8m0", torch.bfloat16)
    if spec.scales != "group" or exact:
        return False, tile
    block_k, block_n, stages = min(tile.block_k, group), tile.block_n, tile.stages
    if stages > 2:
        stages = min(stages * (tile.block_k // block_k), 8)
    while tile.block_m * block_n > 2048 * tile.warps:
        block_n //= 2
    return True, replace(tile, block_n=block_n, block_k=block_k, stages=stages)


def tile_options(
    kind: str, tile: Tile, n: int, weight: Weight, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the constexpr arguments and compile options that all GEMM kernels take.

    BLOCK_N and BLOCK_K may be less than the tile's, which knows neither a's dtype nor the group.
    The dict is the same object at each call with the same arguments: do not change it.
    """
    second = weight.second is not None
    return _options(
        kind, tile, n, weight.k, weight.group, weight.fnuz, weight.words_together, second, dtype,
        has_ptx(),
    )  # fmt: skip


# Looked up at each launch: building it takes longer than all else that a launcher does.
@lru_cache(maxsize=4096)
def _options(
    kind: str, tile: Tile, n: int, k: int, group: int, fnuz: bool, words: int, second: bool,
    dtype: torch.dtype, ptx: bool,
) -> dict[str, Any]:  # fmt: skip
    spec = ALL_KINDS[kind]
    sums, tile = _with_sums(kind, group, dtype, tile)
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
        "PACKED": spec.packed,
        "WORDS": words,
        "LANES": tile.lanes,
        "SCALE_FORMAT": spec.scale_format if spec.scales in ("group", "block128") else "",
        "GROUP": group,
        "SUMS": sums,
        "SCALE_ROWS": spec.scale_rows,
        "SECOND": second,
        "PTX": ptx and spec.packed,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
