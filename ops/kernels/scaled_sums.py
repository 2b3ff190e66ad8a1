"""Multiply codes under scales per 32 of a row, both operands, by 8-bit matrix instructions.

    out[m, n] = sum_g sa[m, g] * sb[n, g] * sum_{k in g} a[m, k] * b[n, k]

For devices that multiply 8-bit floats and take no scales with them: the sum of a group is the
instruction's own, and both scales apply to it in float32. Codes of e2m1 are e4m3 numbers, exactly:
their bits, moved, are the code times 2^-6 (2^-7 in e4m3fnuz), and the factor follows at the end.

Source: OCP Microscaling Formats 1.0, sections 5.3 and 6; OCP 8-bit Floating Point 1.0 (e4m3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import dot
from hal.ops.kernels.packed import scale_number

GROUP = tl.constexpr(32)
GROUPS = 4
"""Groups of a step: their scales are the bytes of one word."""


@triton.jit
def _code(words, B: tl.constexpr, DTYPE: tl.constexpr):
    """Return byte B of int32 words as an 8-bit float."""
    return (words >> (8 * B)).to(tl.int8).to(DTYPE, bitcast=True)


@triton.jit
def _placed(magnitudes, signs, FNUZ: tl.constexpr):
    """Return e4m3 bytes of which `magnitudes` has bits 2 to 4 and `signs` bit 7."""
    magnitudes = magnitudes & 0x1C1C1C1C
    signs = signs & -0x7F7F7F80
    if FNUZ:
        # A negative zero would be NaN: a sign stays where a magnitude is.
        signs = signs & (magnitudes + 0x7C7C7C7C)
    return magnitudes | signs


@triton.jit
def e2m1_as_fp8(words, DTYPE: tl.constexpr, FNUZ: tl.constexpr):
    """Return int32 words [rows, items] of e2m1 codes as 8-bit floats [rows, 8 * items].

    A factor is missing: 2^6 of e4m3fn, 2^7 of e4m3fnuz.
    """
    even = _placed(words << 2, words << 4, FNUZ)
    odd = _placed(words >> 2, words, FNUZ)
    first = tl.join(_code(even, 0, DTYPE), _code(odd, 0, DTYPE))
    second = tl.join(_code(even, 1, DTYPE), _code(odd, 1, DTYPE))
    third = tl.join(_code(even, 2, DTYPE), _code(odd, 2, DTYPE))
    fourth = tl.join(_code(even, 3, DTYPE), _code(odd, 3, DTYPE))
    # k = 4 * (which half of the word) + 2 * (which byte of it) + parity
    x = tl.join(tl.join(first, third), tl.join(second, fourth)).permute(0, 1, 3, 4, 2)
    return x.reshape(words.shape[0], 8 * words.shape[1])


@triton.jit
def _number(words, place, group, n_groups, EVEN_K: tl.constexpr):
    """Return the scale in a byte of int32 words in float32; 1 where there is no such group."""
    byte = (words >> (8 * place)) & 0xFF
    if not EVEN_K:
        byte = tl.where(group < n_groups, byte, 127)
    return scale_number(byte, "e8m0", tl.float32)


@triton.jit
def accumulate_sums(
    a_ptr, b_ptr, a_scales_ptr, b_scales_ptr, rows, columns, row_inside, column_inside, n_groups,
    stride_am, stride_bn, stride_asm, stride_bsn,
    B: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_STEP: tl.constexpr,
):  # fmt: skip
    """Return the product [BLOCK_M, BLOCK_N] f32 of rows of a and of b, under their scales.

    The pointers are those of the matrices' first codes (int32 words of e2m1) and scales (words of
    four e8m0 bytes); strides count items of those, which lie side by side in a row.
    """
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    FNUZ: tl.constexpr = DTYPE == tl.float8e4b8
    ITEMS_B: tl.constexpr = GROUP // 8 if B == "e2m1" else GROUP
    NO_CODE: tl.constexpr = 0 if B == "e2m1" else 0.0
    inner_a = tl.arange(0, GROUP)
    inner_b = tl.arange(0, ITEMS_B)
    if WIDE:
        inner_a = inner_a.to(tl.int64)
        inner_b = inner_b.to(tl.int64)
    a_ptrs = a_ptr + (rows[:, None] * stride_am + inner_a[None, :])
    b_ptrs = b_ptr + (columns[:, None] * stride_bn + inner_b[None, :])
    a_scale_ptrs = a_scales_ptr + rows * stride_asm
    b_scale_ptrs = b_scales_ptr + columns * stride_bsn
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(n_groups, PER_STEP)):
        word = step * PER_STEP // 4
        a_words = tl.load(a_scale_ptrs + word, mask=row_inside, other=0)
        b_words = tl.load(b_scale_ptrs + word, mask=column_inside, other=0)
        for g in tl.static_range(PER_STEP):
            group = step * PER_STEP + g
            if EVEN_K:
                a = tl.load(a_ptrs + g * GROUP, mask=row_inside[:, None], other=0.0)
                b = tl.load(b_ptrs + g * ITEMS_B, mask=column_inside[:, None], other=NO_CODE)
            else:
                there = group < n_groups
                a = tl.load(a_ptrs + g * GROUP, mask=row_inside[:, None] & there, other=0.0)
                b = tl.load(
                    b_ptrs + g * ITEMS_B, mask=column_inside[:, None] & there, other=NO_CODE
                )
            if B == "e2m1":
                b = e2m1_as_fp8(b, DTYPE, FNUZ)
            a_number = _number(a_words, group % 4, group, n_groups, EVEN_K)
            b_number = _number(b_words, group % 4, group, n_groups, EVEN_K)
            # One scale after the other: their product alone may leave the range of float32.
            if SWAP:
                part = dot(b, tl.trans(a), tl.zeros_like(acc))
                acc += part * b_number[:, None] * a_number[None, :]
            else:
                part = dot(a, tl.trans(b), tl.zeros_like(acc))
                acc += part * b_number[None, :] * a_number[:, None]
        a_ptrs += PER_STEP * GROUP
        b_ptrs += PER_STEP * ITEMS_B
    if B == "e2m1":
        acc = acc * (128.0 if FNUZ else 64.0)
    return tl.trans(acc) if SWAP else acc


def in_words(scales: torch.Tensor) -> torch.Tensor:
    """Return e8m0 bytes [..., rows, groups] whose rows begin at words: copied if they did not."""
    groups = scales.shape[-1]
    if groups % GROUPS == 0 and scales.is_contiguous() and scales.storage_offset() % GROUPS == 0:
        return scales
    width = -(-groups // GROUPS) * GROUPS
    wide = scales.new_full((*scales.shape[:-1], width), 127)
    wide[..., :groups] = scales
    return wide[..., :groups]


def words_of(name: str, items: torch.Tensor) -> torch.Tensor:
    """View bytes [..., rows, items] as int32 words; a last word of a row may be less than whole.

    Raises:
        ValueError: If rows do not begin at words.
    """
    *outer, inner = items.stride()
    if inner != 1 or any(stride % 4 for stride in outer) or items.storage_offset() % 4:
        raise ValueError(f"{name}: rows of bytes must begin at words, strides {items.stride()}")
    words = -(-items.shape[-1] // 4)
    shape, strides = (*items.shape[:-1], words), (*(stride // 4 for stride in outer), 1)
    whole = items.as_strided((*items.shape[:-1], 4 * words), items.stride())
    found = whole.view(torch.int32)
    assert found.shape == shape
    assert found.stride() == strides
    return found
