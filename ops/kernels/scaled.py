"""Multiply codes under scales per group, both operands, by the device's scaled matrix instruction.

    out[m, n] = sum_g sa[m, g] * sb[n, g] * sum_{k in g} a[m, k] * b[n, k]
    nvfp4: the same, times second_a[m] * second_b

Groups are 32 elements under e8m0 bytes, or 16 under e4m3 (nvfp4). Where an architecture has no such
instruction Triton converts both operands to bf16, which is exact but for products of scales that
bf16 cannot hold; `sums` takes 8-bit products and scales their sums instead (`scaled_sums`).

Source: OCP Microscaling Formats 1.0, section 6; PTX ISA, tcgen05.mma .block_scale and mma
.block_scale; CDNA4 ISA, V_MFMA_SCALE_F32_*_F8F6F4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import dot_scaled, launch, offsets_need_64_bits, program_tile
from hal.ops.kernels.scaled_sums import accumulate_sums, words_of
from hal.ops.tiles import Tile


class Scaled(NamedTuple):
    """Say what one kind of product reads: formats of the codes, and elements of a group."""

    a: str
    b: str
    group: int = 32


SCALED_KINDS = {
    "mxfp8": Scaled("e4m3", "e4m3"),
    "mxfp4": Scaled("e2m1", "e2m1"),
    "mxfp4_w4a8": Scaled("e4m3", "e2m1"),
    "nvfp4": Scaled("e2m1", "e2m1", 16),
}


@triton.jit
def _load(ptrs, inside, left, EVEN_K: tl.constexpr, OTHER: tl.constexpr):
    """Load [rows, items] of codes or scales, of which `left` items of each row are there."""
    if EVEN_K:
        return tl.load(ptrs, mask=inside[:, None], other=OTHER)
    items = tl.arange(0, ptrs.shape[1]) < left
    return tl.load(ptrs, mask=inside[:, None] & items[None, :], other=OTHER)


@triton.jit
def accumulate_scaled(
    a_ptr, b_ptr, a_scales_ptr, b_scales_ptr, rows, columns, row_inside, column_inside,
    steps, items_a, items_b, n_groups,
    stride_am, stride_ak, stride_bn, stride_bk, stride_asm, stride_ask, stride_bsn, stride_bsk,
    A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    EVEN_K: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the product [BLOCK_M, BLOCK_N] f32 of rows of a and of b, under their scales.

    The pointers are those of the matrices' first codes and scales; items are those of one row.
    SWAP computes the transpose: few tokens then form the short side of the instruction.
    """
    PER_A: tl.constexpr = 2 if A == "e2m1" else 1
    PER_B: tl.constexpr = 2 if B == "e2m1" else 1
    # Codes outside are zero: their scale must only be no NaN.
    NO_SCALE: tl.constexpr = 127 if GROUP == 32 else 0.0
    inner_a = tl.arange(0, BLOCK_K // PER_A)
    inner_b = tl.arange(0, BLOCK_K // PER_B)
    groups = tl.arange(0, BLOCK_K // GROUP)
    if WIDE:
        inner_a = inner_a.to(tl.int64)
        inner_b = inner_b.to(tl.int64)
        groups = groups.to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + inner_a[None, :] * stride_ak
    b_ptrs = b_ptr + columns[:, None] * stride_bn + inner_b[None, :] * stride_bk
    a_scale_ptrs = a_scales_ptr + rows[:, None] * stride_asm + groups[None, :] * stride_ask
    b_scale_ptrs = b_scales_ptr + columns[:, None] * stride_bsn + groups[None, :] * stride_bsk
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        # Counted in items, whose number is a multiple of 16: wide loads need to know.
        left_a = items_a - step * (BLOCK_K // PER_A)
        left_b = items_b - step * (BLOCK_K // PER_B)
        left = n_groups - step * (BLOCK_K // GROUP)
        a = _load(a_ptrs, row_inside, left_a, EVEN_K, 0.0)
        b = _load(b_ptrs, column_inside, left_b, EVEN_K, 0.0)
        a_scale = _load(a_scale_ptrs, row_inside, left, EVEN_K, NO_SCALE)
        b_scale = _load(b_scale_ptrs, column_inside, left, EVEN_K, NO_SCALE)
        if SWAP:
            acc = dot_scaled(b, b_scale, B, tl.trans(a), a_scale, A, acc)
        else:
            acc = dot_scaled(a, a_scale, A, tl.trans(b), b_scale, B, acc)
        a_ptrs += BLOCK_K // PER_A * stride_ak
        b_ptrs += BLOCK_K // PER_B * stride_bk
        a_scale_ptrs += BLOCK_K // GROUP * stride_ask
        b_scale_ptrs += BLOCK_K // GROUP * stride_bsk
    return tl.trans(acc) if SWAP else acc


@triton.jit(do_not_specialize=["n_rows"])
def _scaled_kernel(
    a_ptr, b_ptr, out_ptr, a_scales_ptr, b_scales_ptr, a_second_ptr, b_second_ptr, bias_ptr,
    n_rows, n_columns, steps, items_a, items_b, n_groups,
    stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    stride_asm, stride_ask, stride_bsn, stride_bsk,
    A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(
        tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N), GROUP_M
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n_rows
    column_inside = columns < n_columns
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    if SUMS:
        result = accumulate_sums(
            a_ptr, b_ptr, a_scales_ptr, b_scales_ptr, rows, columns, row_inside, column_inside,
            n_groups, stride_am, stride_bn, stride_asm, stride_bsn,
            B, WIDE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K // 32,
        )  # fmt: skip
    else:
        result = accumulate_scaled(
            a_ptr, b_ptr, a_scales_ptr, b_scales_ptr, rows, columns, row_inside, column_inside,
            steps, items_a, items_b, n_groups, stride_am, stride_ak, stride_bn, stride_bk,
            stride_asm, stride_ask, stride_bsn, stride_bsk,
            A, B, GROUP, WIDE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if SECOND:
        second = tl.load(a_second_ptr + rows, mask=row_inside, other=0.0) * tl.load(b_second_ptr)
        result *= second[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
        result += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on,
        result.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )


def scaled_gemm(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out: torch.Tensor,
    *,
    k: int,
    kind: str,
    tile: Tile,
    bias: torch.Tensor | None = None,
    a_second: torch.Tensor | None = None,
    b_second: torch.Tensor | None = None,
    sums: bool = False,
) -> None:
    """Write a [m, k] @ b [n, k].T under their scales to out [m, n] (bf16, fp16 or f32).

    Codes are e4m3fn, or of e2m1 two in a byte of uint8, the even k in the low half and a last high
    half of zero. Scales are [rows, ceil(k / group)]: bytes of e8m0, or e4m3fn under nvfp4, which
    also has a_second [m] and b_second [] f32. bias is [n]. sums: multiply by `accumulate_sums`; a,
    and b of e4m3, may then be e4m3fnuz, and rows of codes and scales begin at words.
    """
    spec = SCALED_KINDS[kind]
    m, n = a.shape[0], b.shape[0]
    check_operand(kind, "a", spec.a, spec.group, k, a, a_scales, fnuz=sums)
    check_operand(kind, "b", spec.b, spec.group, k, b, b_scales, fnuz=sums)
    n_groups = a_scales.shape[1]
    if sums:
        b, a_scales, b_scales = operands_of_sums(kind, k, a, a_scales, b, b_scales)
    if out.shape != (m, n):
        raise ValueError(f"{kind}: out is {list(out.shape)}, must be [{m}, {n}]")
    if bias is not None and (bias.shape != (n,) or bias.stride(0) != 1):
        raise ValueError(f"{kind}: bias must be [{n}] and contiguous")
    for name, second, shape in (("a_second", a_second, (m,)), ("b_second", b_second, ())):
        if (second is not None) != (spec.group == 16):
            raise ValueError(f"{kind}: needs {name}: {spec.group == 16}")
        if second is None:
            continue
        if second.dtype != torch.float32 or second.shape != shape or not second.is_contiguous():
            raise ValueError(f"{kind}: {name} must be float32 {list(shape)} and contiguous")
    if m == 0 or n == 0:
        return
    # Not read when absent, but a kernel argument must be something.
    launch(
        _scaled_kernel, (-(-m // tile.block_m) * -(-n // tile.block_n),),
        a, b, out, a_scales, b_scales,
        out if a_second is None else a_second, out if b_second is None else b_second,
        out if bias is None else bias,
        m, n, -(-k // tile.block_k), a.shape[1], b.shape[1], n_groups,
        *a.stride(), *b.stride(), *out.stride(), *a_scales.stride(), *b_scales.stride(),
        A=spec.a, B=spec.b, GROUP=spec.group, SECOND=a_second is not None,
        HAS_BIAS=bias is not None, WIDE=offsets_need_64_bits(a, b, out, a_scales, b_scales),
        EVEN_K=k % tile.block_k == 0, SWAP=tile.swap, SUMS=sums,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def check_operand(
    kind: str,
    name: str,
    fmt: str,
    group: int,
    k: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    fnuz: bool,
) -> None:
    """Raise ValueError unless codes, which may be `fnuz`, and scales are those of `k` elements."""
    rows = list(codes.shape[:-1])
    dtype, items = (torch.uint8, -(-k // 2)) if fmt == "e2m1" else (torch.float8_e4m3fn, k)
    if fnuz and fmt == "e4m3" and codes.dtype is getattr(torch, "float8_e4m3fnuz", None):
        dtype = codes.dtype
    if codes.dtype != dtype or list(codes.shape) != [*rows, items]:
        raise ValueError(
            f"{kind}: {name} is {codes.dtype} {list(codes.shape)}, must be {dtype} [rows, {items}]"
        )
    dtype, items = (torch.uint8 if group == 32 else torch.float8_e4m3fn), -(-k // group)
    if scales.dtype != dtype or list(scales.shape) != [*rows, items]:
        raise ValueError(
            f"{kind}: {name}_scales is {scales.dtype} {list(scales.shape)}, must be {dtype} "
            f"{[*rows, items]}"
        )


def operands_of_sums(
    kind: str,
    k: int,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return b, a_scales and b_scales as `accumulate_sums` reads them; raise ValueError if not."""
    spec = SCALED_KINDS[kind]
    if spec.a != "e4m3" or spec.group != 32 or k % 32:
        raise ValueError(f"{kind}: sums are of e4m3 rows in whole groups of 32, not k = {k}")
    if a.stride(1) != 1 or b.stride(-1) != 1:
        raise ValueError(f"{kind}: rows of a and b must be contiguous")
    if spec.b == "e4m3" and a.dtype != b.dtype:
        raise ValueError(f"{kind}: cannot multiply {a.dtype} by {b.dtype}")
    words = words_of(f"{kind}: b", b) if spec.b == "e2m1" else b
    return (
        words,
        words_of(f"{kind}: a_scales", a_scales),
        words_of(f"{kind}: b_scales", b_scales),
    )
