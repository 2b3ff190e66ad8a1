"""Expand coded weights to bf16 or fp16 in memory, for products with many rows.

    out[n, k] = round(second[n] * scale[n, k // group] * (code[n, k] - zero[n, k // group]))

From about a hundred rows on, matrix units wait for weights that are decoded in the loop of a
product; decoding them once, into memory that lives as long as the call, costs less. Products with
scales are float32 and rounded once.

Source: as for `packed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, offsets_need_64_bits
from hal.ops.kernels.kinds import (
    ALL_KINDS,
    Weight,
    by_row,
    decode_options,
    rows_of,
    scale_arguments,
)
from hal.ops.kernels.packed import load_words, scale_number, unpack, unpack_int8

# Elements of n and k that a program expands; a row's part is whole cache lines in both forms.
BLOCK_N, BLOCK_K, WARPS = 8, 512, 4


@triton.jit
def _expand_kernel(
    b_ptr, out_ptr, scales_ptr, zeros_ptr, second_ptr, n_columns, k_size,
    stride_be, stride_bn, stride_bk, stride_oe, stride_on, stride_ok,
    stride_se, stride_sn, stride_sk, stride_2e, stride_2n,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CODES: tl.constexpr, FNUZ: tl.constexpr,
    WORDS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SECOND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    FOUR_BITS: tl.constexpr = (CODES == "int4" or CODES == "uint4") or CODES == "e2m1"
    PER_BYTE: tl.constexpr = 2 if FOUR_BITS else 1
    PER_WORD: tl.constexpr = 4 * PER_BYTE
    expert = tl.program_id(1).to(tl.int64)
    b_ptr += expert * stride_be
    out_ptr += expert * stride_oe
    scales_ptr += expert * stride_se
    zeros_ptr += expert * stride_se
    second_ptr += expert * stride_2e
    steps = tl.cdiv(k_size, BLOCK_K)
    columns = tl.program_id(0) // steps * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % steps * BLOCK_K
    inner = first + tl.arange(0, BLOCK_K)
    column_inside = columns < n_columns
    if WIDE:
        columns = columns.to(tl.int64)
        inner = inner.to(tl.int64)
    inside = column_inside[:, None] & (inner < k_size)[None, :]
    b_ptr += columns[:, None] * stride_bn
    word = tl.arange(0, BLOCK_K // PER_WORD)
    start = first // (PER_WORD if WORDS else PER_BYTE)
    words = load_words(
        b_ptr + (start + word * (1 if WORDS else 4))[None, :] * stride_bk, stride_bk,
        word * PER_WORD, k_size - first, column_inside, PER_BYTE, WORDS, EVEN_N, EVEN_K,
    )  # fmt: skip
    if CODES == "int8":
        value = unpack_int8(words, BLOCK_N, BLOCK_K)
    else:
        value = unpack(words, CODES, DTYPE, FNUZ, BLOCK_N, BLOCK_K).to(tl.float32)
    if SCALE_FORMAT != "":
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        groups = first // GROUP + tl.arange(0, GROUPS)
        offsets = (columns // SCALE_ROWS)[:, None] * stride_sn + groups[None, :] * stride_sk
        has_scale = column_inside[:, None] & (groups < tl.cdiv(k_size, GROUP))[None, :]
        scale = tl.load(scales_ptr + offsets, mask=has_scale, other=0)
        value = value.reshape(BLOCK_N, GROUPS, GROUP)
        if CODES == "uint4":
            zero = tl.load(zeros_ptr + offsets, mask=has_scale, other=0).to(tl.float32)
            value = value - (zero + (128.0 if DTYPE == tl.bfloat16 else 1024.0))[:, :, None]
        value = value * scale_number(scale, SCALE_FORMAT, tl.float32)[:, :, None]
        value = value.reshape(BLOCK_N, BLOCK_K)
    if SECOND:
        second = tl.load(second_ptr + columns * stride_2n, mask=column_inside, other=0.0)
        value = value * second[:, None]
    out_ptrs = out_ptr + columns[:, None] * stride_on + inner[None, :] * stride_ok
    tl.store(out_ptrs, value.to(DTYPE), mask=inside)


def expand(weight: Weight, out: torch.Tensor, *, kind: str, first: int = 0) -> None:
    """Write the rows of a weight from `first` on to out [rows, k] (bf16 or fp16).

    Args:
        weight: Made by `as_weight` for `kind`, which decodes its weights.
        out: Output; its dtype decides the rounding.
        kind: One of `ALL_KINDS`.
        first: Row of the weight that comes first; a multiple of 128 under scales of blocks.
    """
    part = rows_of(by_row(kind, weight), kind, first, out.shape[0])
    _start(kind, _batch(part), out.unsqueeze(0))


def expand_experts(weight: Weight, out: torch.Tensor, *, kind: str, first: int = 0) -> None:
    """Write the matrices of a weight [experts, n, k] from `first` on to out [count, n, k]."""
    last = first + out.shape[0]
    held = (None if tensor is None else tensor[first:last] for tensor in weight[:4])
    codes, scales, zeros, second = held
    assert codes is not None
    part = weight._replace(codes=codes, scales=scales, zeros=zeros, second=second)
    _start(kind, by_row(kind, part), out)


def _batch(weight: Weight) -> Weight:
    """Return one matrix as if it were that of the only expert."""
    scales, zeros = weight.scales, weight.zeros
    return weight._replace(
        codes=weight.codes.unsqueeze(0),
        scales=None if scales is None else scales.unsqueeze(0),
        zeros=None if zeros is None else zeros.unsqueeze(0),
        second=None if weight.second is None else weight.second.reshape(1, -1),
    )


def _start(kind: str, weight: Weight, out: torch.Tensor) -> None:
    if not ALL_KINDS[kind].decode:
        raise ValueError(f"{kind}: has no codes to expand")
    experts, rows, k = out.shape
    if 0 in out.shape:
        return
    scales, second = weight.scales, weight.second
    second_strides = (0, 0)
    if second is not None:
        row = 0 if second.dim() == 1 or second.shape[1] == 1 else second.stride(1)
        second_strides = second.stride(0), row
    launch(
        _expand_kernel, (-(-rows // BLOCK_N) * -(-k // BLOCK_K), experts),
        weight.codes, out, *scale_arguments(weight, out), rows, k,
        *weight.codes.stride(), *out.stride(),
        *((0, 0, 0) if scales is None else scales.stride()), *second_strides,
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        EVEN_N=rows % BLOCK_N == 0, EVEN_K=k % BLOCK_K == 0,
        WIDE=offsets_need_64_bits(weight.codes, out, skip=1),
        num_warps=WARPS, num_stages=1, **decode_options(kind, weight),
    )  # fmt: skip
