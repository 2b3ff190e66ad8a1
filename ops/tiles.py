"""Choose GEMM tile sizes analytically: pure arithmetic over facts of the device.

Measured tables come first (DESIGN section 14); this is the default where none applies. A tile
never needs more shared memory than the device has: stages go first, then the tile shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

# Bytes of an element of (a, b) as they lie in memory, by kind.
OPERAND_BYTES: dict[str, tuple[float, float]] = {
    "bf16": (2, 2),
    "fp8_channel": (1, 1),
    "fp8_block128": (1, 1),
    "fp8_block128_ue8m0": (1, 1),
    "int8_channel": (1, 1),
    "fp8_channel_decode": (2, 1),
    "fp8_e5m2_decode": (2, 1),
    "fp8_block128_decode": (2, 1),
    "int8_channel_decode": (2, 1),
    "int4_group_fp8": (1, 0.5),
    "int4_group_decode": (2, 0.5),
    "uint4_group_decode": (2, 0.5),
    "mxfp8_decode": (2, 1),
    "mxfp4_decode": (2, 0.5),
    "nvfp4_decode": (2, 0.5),
}
# Kinds whose weights come as words of several codes (see ops/kernels/packed.py); of those, the ones
# with float32 scales, which apply to the sum of a group: a second accumulator.
GROUP_SUMS = frozenset(
    ("fp8_block128_decode", "int4_group_decode", "uint4_group_decode", "int4_group_fp8")
)
FP8_PER_MATRIX = frozenset(("fp8_channel_decode", "fp8_e5m2_decode"))
PACKED_KINDS = frozenset(
    (*GROUP_SUMS, *FP8_PER_MATRIX, "mxfp8_decode", "mxfp4_decode", "nvfp4_decode")
)
# Triton adds barriers, reduction and layout-conversion scratch that the estimate cannot see.
SHARED_MEMORY_RESERVE = 1024


@dataclass(frozen=True)
class Tile:
    """Describe how a GEMM is cut: tile sizes in elements, warps (waves), pipeline stages.

    group_m: row tiles that run together to share weights in L2. swap: compute the transpose,
    so that few tokens form the short side of the matrix instruction. lanes: reorder k so that
    packed weights need no exchange between threads. split_k: programs that share one tile of out,
    each with a part of k; a second kernel adds up (of `gemm` alone).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    swap: bool = False
    lanes: bool = False
    split_k: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tile: {name} is {value}, must be a power of two")
        if self.stages < 1 or self.group_m < 1 or self.split_k < 1:
            raise ValueError(
                f"Tile: stages {self.stages}, group_m {self.group_m} and split_k {self.split_k} "
                "must be > 0"
            )

    def shared_memory_bytes(self, kind: str, *, platform: str = "cuda") -> int:
        """Estimate the shared memory (LDS) of one program from above, in bytes.

        All stages of both operands; decoded weights once more in a's width, since the matrix
        instruction may read them from there; at least the tile for the store's transposition.
        """
        a_bytes, b_bytes = OPERAND_BYTES[kind]
        a_tile = self.block_m * self.block_k * a_bytes
        b_tile = self.block_n * self.block_k * b_bytes
        # On AMD the newest stage waits in registers.
        buffers = max(self.stages - 1, 1) if platform == "rocm" else self.stages
        total = buffers * (a_tile + b_tile)
        if kind.endswith("_decode") or kind in PACKED_KINDS:
            total += self.block_n * self.block_k * a_bytes
        if kind in PACKED_KINDS:
            # Scales and zero points: at most a byte for 16 elements, or five for a group.
            total += buffers * self.block_n * max(self.block_k // 16, 5)
        return max(int(total), self.block_m * self.block_n * 4) + SHARED_MEMORY_RESERVE


class Ring(NamedTuple):
    """Describe a program of `kernels.ring_rows`: tiles of 16 rows, and warps that share k of each.

    width: bytes of each row that a warp loads at once, 64 or 128. stages: how many such chunks a
    warp has on their way.
    """

    tiles: int
    splits: int
    width: int
    stages: int = 4


def choose_tile(
    kind: str,
    rows: int,
    n: int,
    k: int,
    *,
    platform: str,
    arch: str,
    shared_memory_bytes: int,
    compute_units: int,
    matrices: int = 1,
) -> Tile:
    """Choose the tile for `rows` rows per weight matrix (tokens per expert, or m of a GEMM).

    Args:
        platform: "cuda" or "rocm".
        arch: "sm_90", "gfx942", ...
        shared_memory_bytes: the most that one program may use on this device.
        compute_units: SMs or CUs; tiles shrink rather than leave most of them idle.
        matrices: weight matrices multiplied at once (experts with tokens).
    """
    if platform == "rocm":
        tile = _rocm_tile(kind, rows, arch)
    elif kind in PACKED_KINDS:
        tile = _cuda_packed_tile(kind, rows, k, arch, several=matrices > 1)
    else:
        tile = _cuda_tile(kind, rows, arch, several=matrices > 1)
    hopper = arch.startswith("sm_9")
    most_rows = 512 if kind == "int4_group_fp8" else 128 if hopper else 16
    splits = kind in PACKED_KINDS and matrices == 1 and rows <= most_rows
    # Sums of groups are better split along k than along n, as far as there are tiles at all, and
    # with more than 16 rows all kinds are (H200).
    tall = splits and hopper and (kind in GROUP_SUMS or rows > 16)
    least = compute_units // 5 if tall else compute_units
    tile = _fill_device(tile, matrices * -(-max(rows, 1) // tile.block_m), n, least)
    tile = _shrink_to_problem(tile, n, k)
    if splits:
        tile = _split(tile, kind, rows, n, k, compute_units)
    return fit(tile, kind, shared_memory_bytes, platform=platform)


def fit(tile: Tile, kind: str, limit_bytes: int, *, platform: str) -> Tile:
    """Reduce stages, then block_k, block_n and block_m, until the tile fits the limit."""
    while tile.shared_memory_bytes(kind, platform=platform) > limit_bytes:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.block_k > 64:
            tile = replace(tile, block_k=tile.block_k // 2)
        elif tile.block_n > 64:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.block_m > 32:
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            raise ValueError(f"tiles: no tile of {kind} fits {limit_bytes} bytes of shared memory")
    return tile


def _cuda_tile(kind: str, rows: int, arch: str, *, several: bool) -> Tile:
    narrow = OPERAND_BYTES[kind] == (1, 1)
    block_k = 128 if narrow or "block128" in kind else 64
    # wgmma and tcgen05 take 64 rows or more: fewer tokens become the instruction's columns.
    warpgroup = arch.startswith(("sm_9", "sm_10", "sm_11"))
    # The rows of several experts are an average, so that many of 32 would need a second tile of
    # 32: with 64 rows it measured 10 to 15% faster on an H200.
    if rows <= (16 if several and warpgroup else 32) or (rows <= 64 and not warpgroup):
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return Tile(block_m, 128 if warpgroup else 64, 128, 4, 4, group_m=1, swap=warpgroup)
    if rows <= 64 or kind.endswith("_decode"):
        # Decoding needs registers for both forms of the weights.
        return Tile(64, 128, block_k, 4, 3 if warpgroup else 4, group_m=1 if rows <= 64 else 8)
    if warpgroup and "block128" in kind:
        # The second accumulator of the promotion takes registers: smaller tiles measured 9% faster.
        return Tile(64, 128, 128, 4, 4)
    if rows <= 128 and not warpgroup:
        return Tile(64, 128, block_k, 4, 4)
    if "block128" in kind:
        # The second accumulator of the promotion takes registers as well.
        return Tile(128, 128, 128, 8, 3)
    return Tile(128, 256 if warpgroup else 128, block_k, 8, 4 if warpgroup else 3)


def _by_rows(*tiles: Tile) -> tuple[tuple[int, Tile], ...]:
    """Pair tiles with the most rows of an expert that they are for."""
    return tuple(zip((32, 64, 128, 1 << 62), tiles, strict=True))


# Tiles of experts with more than 16 rows on sm_90: best, or within 5% of it, on an H200 for mixtral
# and qwen3 of benchmarks/moe.py, whose experts get unlike numbers of rows: with an average of 32,
# half of them would need a second tile of 32, and decode their weights twice.
# Not (128, 128, 64, 4, 3, swap) for e2m1: Triton 3.6 compiles it to wrong sums, and NaN, there.
_SUMS = _by_rows(
    Tile(64, 64, 64, 4, 4, 1, swap=True),
    Tile(64, 64, 64, 4, 4, 1, swap=True),
    Tile(64, 64, 64, 4, 4, swap=True),
    Tile(128, 64, 64, 8, 3, swap=True),
)
_FP8 = _by_rows(
    Tile(64, 128, 64, 4, 4, 1),
    Tile(64, 128, 64, 4, 4, 1),
    Tile(64, 64, 64, 4, 4, swap=True),
    Tile(128, 128, 64, 8, 3, swap=True),
)
_EXPERTS_SM_90 = {
    "fp8_channel_decode": _FP8,
    "fp8_e5m2_decode": _FP8,
    "fp8_block128_decode": _SUMS,
    "int4_group_decode": _SUMS,
    "uint4_group_decode": _SUMS,
    "int4_group_fp8": _by_rows(
        Tile(32, 128, 128, 4, 3, 1, swap=True, lanes=True),
        Tile(64, 64, 128, 4, 4, 1, swap=True),
        Tile(128, 64, 128, 4, 3, swap=True),
        Tile(128, 64, 128, 4, 3, swap=True),
    ),
    "mxfp8_decode": _by_rows(
        Tile(64, 128, 128, 4, 3, 1),
        Tile(64, 128, 128, 4, 3, 1),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 128, 64, 4, 3),
    ),
    "mxfp4_decode": _by_rows(
        Tile(64, 128, 128, 4, 3, 1),
        Tile(64, 128, 128, 4, 3, 1),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 128, 64, 8, 3, swap=True),
    ),
    "nvfp4_decode": _by_rows(
        Tile(64, 128, 64, 4, 4, 1),
        Tile(64, 128, 64, 4, 4, 1),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3, swap=True),
    ),
}


def _cuda_packed_tile(kind: str, rows: int, k: int, arch: str, *, several: bool) -> Tile:
    """Choose for packed weights: on sm_90 measured on an H200, elsewhere by counting."""
    if arch.startswith("sm_9"):
        if several and rows > 16:
            return next(tile for most, tile in _EXPERTS_SM_90[kind] if rows <= most)
        return _matrix_tile_sm_90(kind, rows, k, several=several)
    if kind == "int4_group_fp8" and arch.startswith(("sm_10", "sm_11")):
        # Few rows must be the instruction's columns: of 16 rows Triton makes 16-bit floats.
        return replace(_matrix_tile_sm_90(kind, rows, k, several=several), lanes=False)
    if rows <= 16:
        return Tile(16, 64, 128, 4, 4, 1)
    if rows <= 64:
        return Tile(32 if rows <= 32 else 64, 64, 128, 4, 3, 1)
    # Decoding a tile of weights costs as much as multiplying 128 rows by it.
    return Tile(128, 128, 64, 8, 3)


def _matrix_tile_sm_90(kind: str, rows: int, k: int, *, several: bool) -> Tile:
    """Choose for one packed matrix, or for experts with up to 16 rows each."""
    sums = kind in GROUP_SUMS
    if kind == "int4_group_fp8":
        # Rows of 8 bits leave the decoding at half the instructions, and tiles may be narrow.
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
        stages, group_m = (4, 1) if rows <= 64 else (3, 8)
        return Tile(block_m, 64, 128, 4, stages, group_m, swap=True, lanes=rows <= 16)
    # Of experts with more than 8 rows on average, many have more than 16.
    if rows <= 8 or (rows <= 16 and not (several and kind in FP8_PER_MATRIX)):
        short = several or sums or kind in FP8_PER_MATRIX
        stages = 4 if kind in FP8_PER_MATRIX and not several else 3
        if several and sums:
            return Tile(16, 128, 128, 8, 4, 1, swap=True, lanes=True)
        return Tile(16, 128, 128 if short else 256, 4, stages, 1, swap=True, lanes=True)
    if rows <= 32:
        return Tile(32, 128, 128, 4, 3, 1, swap=True, lanes=True)
    if rows > 64 and kind == "mxfp8_decode":
        return Tile(128, 128, 64, 8, 3)
    block_k = 64 if rows > 64 and (sums or kind in FP8_PER_MATRIX) else 128
    # With more rows the small copies that `lanes` makes of a cost more than they save.
    return Tile(64 if rows <= 64 else 128, 64, block_k, 4, 3, 1 if rows <= 128 else 8, swap=True)


FEW, SOME, MANY = "few", "some", "many"


def way_of(rows: int, few: int, some: int) -> str:
    """Return how many rows a product with coded weights has, as far as that decides how it runs.

    few, some: What `few_rows` and `some_rows` returned.
    """
    return FEW if rows <= few else MANY if rows > some else SOME


def some_rows(kind: str, k: int) -> int:
    """Return the most rows for which weights are decoded in the loop of a product (H200).

    From 129 rows on they would be decoded for two tiles of rows. Short rows are soon expanded, and
    the decoding of mxfp8 is too slow to be done twice.
    """
    return 64 if kind == "mxfp8_decode" or k <= 2048 else 128


def rows_before_expanding(kind: str, *, specialized: bool = False) -> int:
    """Return the most rows an expert for which its weights are decoded in the loop of a product.

    Float32 scales of groups, which apply to sums, are dearest in the loop, but where warps
    specialize: there all but one float32 scale a block of channels are. Measured on an H200
    (benchmarks/moe.py), and taken elsewhere for want of better.
    """
    if specialized:
        return 1024 if kind in ("fp8_channel_decode", "fp8_block128_decode") else 768
    return 256 if kind in GROUP_SUMS else 512


WARP_SPECIALIZED = Tile(128, 256, 128, 4, 4, group_m=16)
"""The tile of `kernels.warp_specialized`; warps are those of each role."""
ROWS_BEFORE_SPECIALIZING = 256
"""Up to so many rows an expert `kernels.grouped_gemm` is faster (H200): its tiles are smaller."""
SPECIALIZED_KINDS = (PACKED_KINDS | {"int8_channel_decode"}) - {
    *("uint4_group_decode", "fp8_e5m2_decode"),
}
"""What `kernels.warp_specialized_packed` decodes."""


@lru_cache(maxsize=1024)
def specialized_tile(
    kind: str,
    rows: int,
    n: int,
    step: int,
    *,
    matrices: int,
    compute_units: int,
    shared_memory_bytes: int,
) -> Tile:
    """Choose the tile of `kernels.warp_specialized_packed` for `rows` rows an expert.

    Experts get unlike numbers of rows, so that with an average of 16 half of them would need a
    second tile of 16. As measured on an H200 for the shapes of benchmarks/moe.py.

    Args:
        step: Elements along k of a step.
        matrices: Experts with rows.
        compute_units: Programs that run at once.
        shared_memory_bytes: The most that one may use.
    """
    a_bytes, b_bytes = OPERAND_BYTES[kind]
    block_m = 16 if rows <= 10 else 32 if rows <= 20 else 64
    if rows > (320 if kind == "int4_group_decode" else 160):
        block_m = 128
    # Two tiles of 128 x 128 beside rows of 16 bits do not fit.
    wide = -(-n // 256) * matrices * 2 > compute_units and block_m * a_bytes < 256
    block_n = 256 if wide else 128
    # Scales of groups take up to 8 bytes a channel and step.
    held = int(step * (block_m * a_bytes + block_n * b_bytes)) + 8 * block_n
    # More are no faster.
    stages = min((shared_memory_bytes - SPECIALIZED_RESERVE) // held, 6 if step > 64 else 12)
    return Tile(block_m, block_n, step, 4, stages, 16)


SPECIALIZED_RESERVE = 8192
"""Bytes beside the ring: what sums are exchanged through, places of rows, barriers."""
SPECIALIZED_US = {
    True: {16: 0.50, 32: 0.53, 64: 0.64, 128: 1.0},
    False: {16: 0.47, 32: 0.48, 64: 0.53, 128: 0.68},
}
"""Microseconds of 128 channels and 128 codes of each by rows of a tile, which are of 16 bits or
(False) of 8: what decoding takes, and from 64 rows on multiplying (H200)."""
SPLIT_US, SPLIT_BYTES_A_US = 2.5, 3e6
"""What adding up the parts of k takes: a launch, and bytes written and read a microsecond."""
MANY_COLUMNS = 4096
"""From so many rows of a weight on, its tiles keep a device busy without too many parts of k."""


def specialized_rows(kind: str, n: int, k: int) -> tuple[int, int]:
    """Return the least and most rows of which one weight `[n, k]` is for the same kernel (H200).

    Fewer are multiplied straight from memory (`kernels.ring_rows`), which has less to begin with;
    for more the weight is expanded, but where rows of 8 bits are what the scheme asks for.
    """
    large = n * k > 1 << 25
    few_columns = n < MANY_COLUMNS
    if kind == "int4_group_fp8":
        return (17, 64) if few_columns else (1 if large else 17, 1 << 62)
    if kind == "int8_channel_decode":
        # Tiles of the ordinary product are slow to decode int8.
        return 3 if large else 9, 128 if few_columns else 256
    if few_columns:
        return (17, 128) if kind == "mxfp8_decode" else (1, 0)
    if OPERAND_BYTES[kind][1] == 1:
        return 3 if large else 9, 256
    return 9 if large else 17, 256


@lru_cache(maxsize=4096)
def specialized_rows_tile(
    kind: str,
    rows: int,
    n: int,
    k: int,
    step: int,
    *,
    compute_units: int,
    shared_memory_bytes: int,
) -> Tile:
    """Choose the tile, and how many share k, that take least by `SPECIALIZED_US`.

    k is shared by no more programs than run at once.

    Args:
        step: Elements along k of a step.
        compute_units: Programs that run at once.
        shared_memory_bytes: The most that one may use.
    """
    a_bytes, b_bytes = OPERAND_BYTES[kind]
    of_rows = SPECIALIZED_US[a_bytes == 2]
    columns, steps = -(-n // 128), k // step

    def time(block_m: int, splits: int) -> float:
        each = -(-steps // splits)
        parts = -(-steps // each)
        waves = -(-columns * -(-rows // block_m) * parts // compute_units)
        if parts > 1 and waves > 1:
            return float("inf")
        added = SPLIT_US + 8 * rows * n * parts / SPLIT_BYTES_A_US if parts > 1 else 0.0
        return waves * each * of_rows[block_m] * step / 128 + added

    tall = [m for m in of_rows if m < 2 * rows or m == 16]
    splits = [count for count in (1, 2, 3, 4, 5, 6, 7, 8) if count == 1 or steps >= 4 * count]
    block_m, split_k = min(((m, s) for m in tall for s in splits), key=lambda choice: time(*choice))
    held = int(step * (block_m * a_bytes + 128 * b_bytes)) + 8 * 128
    stages = min((shared_memory_bytes - SPECIALIZED_RESERVE) // held, 6 if step > 64 else 12)
    return Tile(block_m, 128, step, 4, stages, 16, split_k=split_k)


def specializes_warps(platform: str, arch: str) -> bool:
    """Say whether `kernels.warp_specialized` is for this device: its instructions are Hopper's."""
    return (platform, arch) == ("cuda", "sm_90")


def special_kernels(platform: str, arch: str) -> dict[str, bool]:
    """Say which kernels that not every device has this one may run, by what they are written in."""
    return {"ptx": runs_ptx(platform, arch), "specialized": specializes_warps(platform, arch)}


def few_rows(kind: str, n: int, k: int, *, ptx: bool) -> int:
    """Return the most rows that are multiplied straight from memory.

    Where `kernels.ring_rows` runs, eight, and sixteen under codes of 4 bits. Without matrix
    instructions, on an H200 a second row costs less than a tile only where the launch is much of
    the time.
    """
    if ptx:
        streamed = [rows for rows in (8, 16) if streams_rows(kind, n, k, rows)]
        if streamed:
            return streamed[-1]
    return 2 if n * k <= 1 << 25 else 1


def streams_rows(kind: str, n: int, k: int, rows: int) -> bool:
    """Say whether `kernels.ring_rows` is the kernel for so many rows, as measured on an H200.

    With codes of 8 bits one row is faster without it, two are in small matrices, and more than
    eight in tiles.
    """
    b_bytes = OPERAND_BYTES[kind][1]
    if not kind.endswith("_decode") or k * b_bytes % 16:
        return False
    if b_bytes < 1:
        return 1 <= rows <= 16
    return (3 if n * k <= 1 << 25 else 2) <= rows <= 8


def runs_ptx(platform: str, arch: str) -> bool:
    """Say whether kernels may be written in PTX with bf16 matrix instructions."""
    return platform == "cuda" and int(arch.removeprefix("sm_")) >= 80


@lru_cache(maxsize=4096)
def ring_of(kind: str, n: int, k: int, rows: int, compute_units: int, *, group: int = 128) -> Ring:
    """Choose the program of `kernels.ring_rows`: best, or within 5% of it, on an H200.

    More warps share k where programs are few. Two tiles share what they read of a where that is
    much of the traffic: bytes decode fast (int8) or k is short, or rows are more than eight and
    scales take little of the shared memory.

    Args:
        kind: A kind that decodes its weights.
        n: Rows of the weight.
        k: Elements of each.
        rows: Rows of a, 1 to 16.
        compute_units: Multiprocessors of the device.
        group: Codes that share a scale.

    Source: benchmarks/results/h200_ring_sweep.txt.
    """
    programs = -(-n // 16)
    many = programs >= 2 * compute_units
    if OPERAND_BYTES[kind][1] == 1:
        share = k <= 2048 or (many and kind == "int8_channel_decode")
        return Ring(2, 4, 128, 2) if share and rows <= 8 else Ring(1, 8, 128, 2)
    if rows == 1:
        few = programs < 1.5 * compute_units
        return Ring(1, 8, 64, 3) if few else Ring(1, 4, 128, 4 if k <= 2048 else 2)
    if not many:
        return Ring(1, 8, 64)
    if k <= 2048:
        return Ring(1, 4, 128, 4 if group >= 128 else 2)
    shared = rows > 8 and (group >= 128 or kind == "nvfp4_decode")
    return Ring(2, 2, 128) if shared else Ring(1, 4, 128, 2)


def gemv_tile(kind: str, n: int, k: int) -> Tile:
    """Choose the tile of a product with a few rows: block_n rows of the weight, block_k at a time.

    A lane has 16 bytes of each row on its way, and there are as many lanes as a row of the tile
    needs. Best, or within 10% of it, on an H200 for the shapes of benchmarks/linear.py.
    """
    b_bytes = OPERAND_BYTES[kind][1]
    if b_bytes == 2:
        return Tile(1, 1, 1024, 2, 1)
    if k > 4096:
        # Rows so long are seldom many: more of each row at once.
        if b_bytes < 1:
            return Tile(1, 4, 4096, 4, 1)
        return Tile(1, 2, 2048, 4, 1) if kind == "int8_channel_decode" else Tile(1, 8, 4096, 8, 1)
    return Tile(1, 4, 1024, 2, 1) if b_bytes == 1 else Tile(1, 4, 2048, 2, 1)


def _split(tile: Tile, kind: str, rows: int, n: int, k: int, compute_units: int) -> Tile:
    """Divide k among programs while they are too few to hide the latency of memory.

    Where sums are scaled per group, steps are short and more programs pay; elsewhere a second
    launch costs more than it brings once most compute units have work.
    """
    programs, splits = -(-n // tile.block_n) * -(-max(rows, 1) // tile.block_m), 1
    if kind not in GROUP_SUMS and rows <= 16 and programs >= 0.8 * compute_units:
        return tile
    enough = (3 if kind == "int4_group_fp8" and rows <= 16 else 1.6) * compute_units
    while programs * splits < enough and k // (2 * splits) >= 512:
        splits *= 2
    return replace(tile, split_k=splits)


def _rocm_tile(kind: str, rows: int, arch: str) -> Tile:
    narrow = OPERAND_BYTES[kind] == (1, 1)
    rdna = arch.startswith(("gfx11", "gfx12")) and arch != "gfx1250"
    block_k = 128 if narrow or "block128" in kind else 64
    if rows <= 32:
        return Tile(16 if rows <= 16 else 32, 64, 128, 4, 2, group_m=1)
    if rdna and kind in GROUP_SUMS:
        # A second accumulator, and 64 steps of k, spill.
        return Tile(64, 64, 32, 4, 2)
    if rows <= 128 or rdna or kind.endswith("_decode"):
        return Tile(64, 128 if not rdna else 64, block_k, 4, 2)
    return Tile(128, 128, block_k, 8 if "block128" in kind else 4, 2)


def _fill_device(tile: Tile, row_tiles: int, n: int, compute_units: int) -> Tile:
    """Halve block_n while there are fewer programs than compute units."""
    least = 64 if tile.swap or tile.block_m > 64 else 32
    while tile.block_n > least and row_tiles * -(-n // tile.block_n) < compute_units:
        tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def _shrink_to_problem(tile: Tile, n: int, k: int) -> Tile:
    """Do not compute tiles that are mostly padding, nor spill where loads are narrow."""
    while tile.block_n > (64 if tile.swap else 32) and tile.block_n >= 2 * n:
        tile = replace(tile, block_n=tile.block_n // 2)
    while tile.block_k > 32 and tile.block_k >= 2 * k:
        tile = replace(tile, block_k=tile.block_k // 2)
    if k % 16:
        # Triton then copies to shared memory through registers, which large tiles exhaust.
        tile = replace(tile, block_k=min(tile.block_k, 64))
        while tile.block_m * tile.block_n > 1024 * tile.warps:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile
