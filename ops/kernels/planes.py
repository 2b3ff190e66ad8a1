"""Bring codes of four bits into the layout int4_planes in one pass, in place if asked.

The order and the form of codes are those of `hal.quant.repack`: codes 0 to 3 of each word of eight
go to the low halves of its four bytes, 4 to 7 to the high ones, their signs lowest. torch takes
twelve passes and more, a part of the weight at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import INTERPRETED, launch

BLOCK, WARPS = 4096, 8


@triton.jit
def _planes_kernel(source_ptr, target_ptr, n_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_words
    words = tl.load(source_ptr + at, mask=inside, other=0)
    # Source: delta swaps; Knuth, The Art of Computer Programming, section 7.1.3.
    moved = ((words >> 8) ^ words) & 0x0000FF00
    words = words ^ moved ^ (moved << 8)
    moved = ((words >> 4) ^ words) & 0x00F000F0
    words = words ^ moved ^ (moved << 4)
    signs = (words >> 3) & 0x11111111
    words = ((words & 0x77777777) ^ (signs * 7)) << 1 | signs
    tl.store(target_ptr + at, words, mask=inside)


def rewrite_planes(codes: torch.Tensor, target: torch.Tensor) -> bool:
    """Write uint8 codes `[..., N, K / 2]` to a target of that shape in the layout int4_planes.

    The target may be the codes themselves. Returns whether anything was done: both must be whole
    words, contiguous, where Triton can reach them.
    """
    if not codes.numel() or not _reached(codes):
        return False
    if not all(_whole_words(part) for part in (codes, target)):
        return False
    write_planes(*(part.view(-1).view(torch.int32) for part in (codes, target)))
    return True


def write_planes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Write int32 words [n] to a target, which may be the source itself."""
    launch(
        _planes_kernel, (triton.cdiv(source.numel(), BLOCK),), source, target, source.numel(),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _reached(codes: torch.Tensor) -> bool:
    """Say whether a launch reads this memory: that of a simulated device is the host's, or none."""
    where = codes.device.type
    return where != "meta" and (where != "cpu" or bool(INTERPRETED.value))


def _whole_words(part: torch.Tensor) -> bool:
    aligned = part.data_ptr() % 4 == 0 and part.storage_offset() % 4 == 0
    return part.is_contiguous() and part.shape[-1] % 4 == 0 and aligned
