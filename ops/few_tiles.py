"""Choose how few tokens run through experts in two launches, and how many tokens are few.

Pure arithmetic over sizes, like `tiles`. Both kernels are told in `hal.ops.kernels.few_experts`: a
lane holds 16 bytes of each of its rows. Tiles are among the best of a sweep on an H200, with one
token and with eight, of four models; bounds are from there, too
(benchmarks/results/h200_few_experts.txt). Other devices are served by the same for want of better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hal.ops.tiles import OPERAND_BYTES, Ring

__all__ = ["FewTile", "few_slots", "few_tiles", "held_elements", "ring_tiles"]


@dataclass(frozen=True)
class FewTile:
    """Say how a program is cut.

    rows: of the output; of the first product, activated ones. lanes: along k, of one expert.
    warps: which together have a thread for each lane. experts: how many lie side by side.
    """

    rows: int
    lanes: int
    warps: int
    experts: int = 1


def held_elements(kind: str) -> int:
    """Return how many weights of a kind are 16 bytes."""
    return int(16 / OPERAND_BYTES[kind][1])


def few_slots(
    kind: str, experts: int, *, quantizes: bool, specialized: bool = False, streamed: bool = False
) -> int:
    """Return the most slots, tokens times experts of each, for which two launches are faster.

    Each slot reads and decodes its expert's weights by itself, from L2 if another one has. Where
    activations are quantized, or weights are bf16, matrix instructions on sorted slots soon win.
    Timed for bf16, int4, and fp8 with and without quantized activations; others go by their bytes.
    Beside products whose warps specialize (`specialized`), and where activations are quantized,
    rings (`streamed`) are behind when experts begin to be shared (of 8, 32, 128 and 256 experts on
    an H200).
    """
    if quantizes and streamed:
        share = 2 if kind in ("fp8_channel_decode", "int4_group_fp8") else 4
        return max(experts // (share if 16 <= experts <= 128 else 2 * share), 2)
    if quantizes:
        return experts // 16
    b_bytes = OPERAND_BYTES[kind][1]
    if specialized:
        early = experts > 128 or (experts == 128 and kind in ("mxfp4_decode", "nvfp4_decode"))
        return experts * 3 // 4 if early else experts
    return experts if b_bytes < 1 else experts // 2 if b_bytes == 1 else experts // 4


@cache
def few_tiles(
    kinds: tuple[str, str],
    hidden: int,
    intermediate: int,
    top_k: int,
    threads: int = 32,
    *,
    quantizes: bool = False,
) -> tuple[FewTile, FewTile]:
    """Choose the tiles of both kernels.

    Args:
        kinds: Of the two weights, as the kernels decode them.
        hidden: Elements along k of the first product.
        intermediate: Elements along k of the second.
        top_k: Experts of a token.
        threads: Of a warp.
        quantizes: Whether activations are quantized, which more rows share.
    """
    b_bytes, needed = OPERAND_BYTES[kinds[0]][1], -(-hidden // held_elements(kinds[0]))
    if b_bytes == 2:
        rows, lanes = (2 if needed <= 384 else 1), 128
    elif b_bytes == 1:
        rows, lanes = (2 if quantizes else 1), (32 if needed <= 256 else 64)
    else:
        rows, lanes = (4 if quantizes else 2), 32
    lanes = max(min(lanes, _power(needed)), threads)
    first = FewTile(rows, lanes, lanes // threads)
    needed, side = -(-intermediate // held_elements(kinds[1])), _power(top_k)
    # About three steps along k, and four warps.
    lanes = min(max(_power(-(-needed // 3)), 8), 32 if top_k > 2 else 64)
    side = min(side, 128 // lanes)
    lanes = max(lanes, threads // side)
    return first, FewTile(4, lanes, lanes * side // threads, side)


@cache
def ring_tiles(
    kinds: tuple[str, str], hidden: int, intermediate: int, top_k: int, *, grouped: bool = False
) -> tuple[Ring, Ring]:
    """Choose the rings of both kernels of `kernels.ring_experts`: of several, on an H200.

    Args:
        kinds: Of the two weights.
        hidden: Elements along k of the first product.
        intermediate: Elements along k of the second.
        top_k: Experts of a token, at most 16.
        grouped: Whether activations are quantized in groups of 128, one a chunk.
    """
    b_bytes, side = OPERAND_BYTES[kinds[0]][1], _power(top_k)
    splits = max(8 // side, 1)
    # More tiles share what is loaded of x, where they leave programs enough.
    tiles = 4 if intermediate >= 2048 and (b_bytes == 1 or intermediate < 8192) else 2
    row = intermediate * OPERAND_BYTES[kinds[1]][1]
    wide = row >= 128 * splits and side <= 8
    return (
        Ring(tiles, 2, 128 if hidden * b_bytes >= 256 or grouped else 64),
        Ring(1, splits, 128 if wide or grouped else 64),
    )


def _power(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
