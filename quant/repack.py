"""Reorder codes into the order that a kernel reads, and rows of scales along with gate and up.

The rows of `CODE_LAYOUTS` are like those of `hal.quant.swizzle`: `forward`, `inverse`, `argument`
and the rule of padding, which is with zero bytes. C counts the tensor's own elements: for 4-bit
codes `[..., N, ceil(K / 2)]` it is bytes, the even k in the low half. k below is the column of the
weight, whatever the width. A padded code is 0 and not the value 0 where the format has an offset
(`uint4b8`, `uint4`): its scale, which is padded with 0, or its activation must be.

| layout | padded to (n, k) | order, slowest first | stored |
|---|---|---|---|
| aiter_16x16 | 16, 32 | N/16, K/32, k/16%2, n%16, k%16 | `[N, K]`; packed codes: k in bytes |
| aiter_16x16_wide | 16, 32 | N/16, K/32, k/8%4, n%16, k%8 | `[N, K]` of 2-byte elements |
| marlin_4bit | 64, 16 | K/16, N/64, n%8, k/2%4, n/16%4, k%2, n/8%2, k/8%2 | `[K/16, 8 N]` |
| marlin_8bit | 64, 16 | K/16, N/64, n%8, k/2%4, n/16%4, n/8%2, k%2, k/8%2 | `[K/16, 16 N]` |
| marlin_4bit_a8 | 64, 32 | K/32, N/32, n%8, k/4%4, n/16%2, n/8%2, k%4, k/16%2 | `[K/16, 8 N]` |
| marlin_8bit_a8 | 64, 32 | K/32, N/32, n%8, k/4%4, n/16%2, n/8%2, k/16%2, k%4 | `[K/16, 16 N]` |
| cutlass_int4 | 16, 32 | K/32, N/16, n%8, k/4%4, k/16%2, n/8%2, k%4 | `[K/32, 16 N]` |
| int4_planes | 1, 8 | n, K/8, k%4, k/4%2 | `[N, K]` |
| bytes_128 | 1, 128 bytes | n, k | `[N, K]` |
| hopper_mxfp4 | 16, 64 | N/16, n/2%4, K/64, n%2, k/2%4, k/16%4, k/8%2, n/8%2, bits | `[N/4, 2 K]` |

Stored 4-bit codes are counted in bytes. Marlin's kernels take the bytes as int32 words, of shape
`[K/16, 16 N / codes a word]`; `_a8` is the order for activations of 8 bits. In int4_planes the low
halves of four bytes are consecutive codes, the high halves the next four, and a code is its sign
in the lowest bit and above it what is left: v where it is not negative, else -1 - v, so that three
instructions make four of them numbers of an 8-bit float. In hopper_mxfp4 the bits of four bytes
are interleaved, so that few instructions decode eight codes to bf16; recent triton_kernels pad to
(256, 128) first: pad the weight so, and the bytes are the same.

Source: with each row of `CODE_LAYOUTS`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from hal.errors import ShapeError
from hal.quant.swizzle import Reorder, transposed

if TYPE_CHECKING:
    import torch

__all__ = ["CODE_LAYOUTS", "interleave_groups", "separate_groups"]


def interleave_groups(
    scales: torch.Tensor, rows: int, *, every: int = 1, block: int = 1
) -> torch.Tensor:
    """Return scales of a `[gate; up]` weight in the order gate, up, gate, up, ...

    Args:
        scales: `[..., ceil(rows / block), any]`: per group, or per block with block = 128.
        rows: Rows N of the weight, gate and up together.
        every: Rows taken from each half in turn, as its codes are interleaved.
        block: Rows that share a scale.

    Raises:
        ShapeError: If rows do not fall into whole turns, or a turn would split a block.
    """
    turns, size = _turns("interleave_groups", scales, rows, every, block)
    parts = scales.unflatten(-2, (2, turns, size))
    return _joined(parts.transpose(-4, -3))


def separate_groups(
    scales: torch.Tensor, rows: int, *, every: int = 1, block: int = 1
) -> torch.Tensor:
    """Undo `interleave_groups`, with the same arguments and errors."""
    turns, size = _turns("separate_groups", scales, rows, every, block)
    parts = scales.unflatten(-2, (turns, 2, size))
    return _joined(parts.transpose(-4, -3))


def _turns(where: str, scales: torch.Tensor, rows: int, every: int, block: int) -> tuple[int, int]:
    """Return the number of turns and the rows of scales in one, or raise."""
    if every < 1 or block < 1 or every % block:
        needed = f"a multiple of {block}, so that no block holds gate and up under one scale"
        raise ShapeError(where, found=f"turns of {every} rows", needed=needed)
    if rows % (2 * every):
        raise ShapeError(where, found=f"{rows} rows", needed=f"a multiple of {2 * every}")
    if scales.ndim < 2 or scales.shape[-2] != rows // block:
        needed = f"[..., {rows // block}, any] for {rows} rows"
        raise ShapeError(where, found=f"scales {list(scales.shape)}", needed=needed)
    return rows // (2 * every), every // block


def _joined(parts: torch.Tensor) -> torch.Tensor:
    import torch

    # clone, since reshape could return the memory of the source
    return parts.clone(memory_format=torch.contiguous_format).flatten(-4, -2)


def _exchange(tiles: torch.Tensor, dim: int) -> torch.Tensor:
    """Swap the place in a byte with the place along `dim`, of size 2; its own inverse."""
    import torch

    first, second = tiles.contiguous().unbind(dim)  # one strided pass, not four
    low, high = (first & 0x0F) | (second << 4), (first >> 4) | (second & 0xF0)
    return torch.stack((low, high), dim)


# Of each of four bytes: bits of its two codes, which go to the two halves of a word, and how far
# they move to the left. So the sign and the rest of three codes lie where 1000000111000000 has
# ones, moved right by 0, 3 and 6, and those of the fourth fill the gaps.
_MOVES = (
    ((0x8, 12), (0x7, 6)),
    ((0x8, 9), (0x7, 3)),
    ((0x8, 6), (0x7, 0)),
    ((0x8, 11), (0x6, 9), (0x1, 13)),
)
_BOTH = 0x00010001


def _twiddle(tiles: torch.Tensor) -> torch.Tensor:
    """Interleave the bits of every four bytes `[..., 2, 2]` of 4-bit codes."""
    import torch

    words = _words_of(tiles.flatten(-2))
    twiddled = torch.zeros_like(words)
    for place, moves in enumerate(_MOVES):
        byte = words >> 8 * place
        halves = (byte & 0x0F) | ((byte & 0xF0) << 12)
        for bits, shift in moves:
            twiddled |= (halves & bits * _BOTH) << shift
    return twiddled.view(torch.uint8).view(tiles.shape)


def _untwiddle(tiles: torch.Tensor) -> torch.Tensor:
    """Undo `_twiddle`."""
    import torch

    words = _words_of(tiles.flatten(-2))
    plain = torch.zeros_like(words)
    for place, moves in enumerate(_MOVES):
        halves = torch.zeros_like(words)
        for bits, shift in moves:
            halves |= (words >> shift) & bits * _BOTH
        plain |= ((halves & 0x0F) | ((halves >> 12) & 0xF0)) << 8 * place
    return plain.view(torch.uint8).view(tiles.shape)


def _words_of(tiles: torch.Tensor) -> torch.Tensor:
    """Return bytes `[..., 4]` as words, in new memory where they do not begin at a whole one."""
    import torch

    tiles = tiles.contiguous()
    return (tiles.clone() if tiles.storage_offset() % 4 else tiles).view(torch.int32)


def _planes(tiles: torch.Tensor) -> torch.Tensor:
    """Bring codes 0 to 3 of every four bytes into their low halves, 4 to 7 into the high ones.

    A code s m2 m1 m0 of two's complement becomes (m2 m1 m0 xor s s s) s.
    """
    import torch

    words = _swapped(tiles, ((8, 0x0000FF00), (4, 0x00F000F0))).view(torch.int32)
    signs = (words >> 3).bitwise_and_(0x11111111)
    words = words.bitwise_and_(0x77777777).bitwise_xor_(signs * 7)
    words = words.bitwise_left_shift_(1).bitwise_or_(signs)
    return words.reshape(-1).view(torch.uint8).view(tiles.shape)


def _from_planes(tiles: torch.Tensor) -> torch.Tensor:
    """Undo `_planes`."""
    import torch

    words = _words_of(tiles)
    signs = words & 0x11111111
    words = (words >> 1).bitwise_and_(0x77777777).bitwise_xor_(signs * 7)
    words = words.bitwise_or_(signs.bitwise_left_shift_(3))
    whole = words.reshape(-1).view(torch.uint8).view(tiles.shape)
    return _swapped(whole, ((4, 0x00F000F0), (8, 0x0000FF00)))


def _swapped(tiles: torch.Tensor, steps: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Swap bits of the words of bytes `[..., 4]`: those of a mask and as many, `shift` above them.

    Source: delta swaps; Knuth, The Art of Computer Programming, section 7.1.3.
    """
    import torch

    words = _words_of(tiles)
    for shift, mask in steps:
        moved = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
        words = (words ^ moved).bitwise_xor_(moved.bitwise_left_shift_(shift))
    return words.view(torch.uint8).view(tiles.shape)


def _words(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return stored.view(torch.int32)


def _reordered_words(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    lines, length = stored.shape[-2:]
    return stored.view(*shape[:-2], length // 16, lines * 16).view(torch.int32).mT


_EIGHT = ("uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_AITER = "ROCm/aiter aiter/ops/shuffle.py (shuffle_weight, layout=(16, 16))"
_MARLIN = (
    "vllm-project/vllm csrc/quantization/marlin/gptq_marlin_repack.cu; IST-DASLab/marlin "
    "marlin/__init__.py (_get_perms)"
)

_ROWS = (
    Reorder("aiter_16x16", (16,), (2, 16), (0, 2, 3, 1, 4), _EIGHT, _AITER),
    Reorder(
        "aiter_16x16_wide", (16,), (4, 8), (0, 2, 3, 1, 4), ("bfloat16", "float16"), _AITER
    ),
    Reorder(
        "marlin_4bit", (4, 2, 8), (2, 4), (4, 0, 3, 6, 1, 5, 2), ("uint8",), _MARLIN,
        by="columns", fold=8, view=_words,
        recode=lambda tiles: _exchange(tiles, -2), decode=lambda tiles: _exchange(tiles, -2),
    ),
    Reorder(
        "marlin_8bit", (4, 2, 8), (2, 4, 2), (4, 0, 3, 6, 1, 2, 7, 5), _EIGHT, _MARLIN,
        by="columns", fold=16, view=_words,
    ),
    Reorder(
        "marlin_4bit_a8", (2, 2, 2, 8), (2, 4, 2), (5, 0, 1, 4, 7, 2, 3, 8, 6), ("uint8",),
        _MARLIN, by="columns", fold=8, view=_words,
        recode=lambda tiles: _exchange(tiles, -1), decode=lambda tiles: _exchange(tiles, -1),
    ),
    Reorder(
        "marlin_8bit_a8", (2, 2, 2, 8), (2, 4, 4), (5, 0, 1, 4, 7, 2, 3, 6, 8), _EIGHT, _MARLIN,
        by="columns", fold=16, view=_words,
    ),
    Reorder(
        "cutlass_int4", (2, 8), (2, 4, 2), (3, 0, 2, 5, 4, 1, 6), ("uint8",),
        "NVIDIA/cutlass examples/55_hopper_mixed_dtype_gemm/mixed_dtype_utils.hpp "
        "(compute_memory_reordering_atom of e4m3, reorder_tensor); vllm-project/vllm "
        "csrc/quantization/cutlass_w4a8/w4a8_mm_entry.cu",
        by="columns", fold=16, view=_reordered_words,
    ),
    Reorder(
        "int4_planes", (), (4,), (0, 1, 2), ("uint8",),
        "hal/ops/kernels/packed.py (unpack_as_fp8)", recode=_planes, decode=_from_planes,
    ),
    Reorder(
        "bytes_128", (), (128,), (0, 1, 2), _EIGHT,
        "triton-lang/triton python/triton_kernels/triton_kernels/tensor_details/layout_details/"
        "blackwell_value.py",
        view=transposed,
    ),
    Reorder(
        "hopper_mxfp4", (2, 4, 2), (4, 2, 4), (0, 2, 4, 3, 7, 5, 6, 1), ("uint8",),
        "triton-lang/triton python/triton_kernels/triton_kernels/tensor_details/layout_details/"
        "hopper_value.py (mma_version=3)",
        fold=4, view=transposed, recode=_twiddle, decode=_untwiddle,
    ),
)  # fmt: skip

CODE_LAYOUTS: MappingProxyType[str, Reorder] = MappingProxyType({row.name: row for row in _ROWS})
"""Every order of codes by name."""
