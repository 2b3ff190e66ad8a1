"""Say which products an op consists of, and which tiles are worth trying for each: pure arithmetic.

`hal tune` compiles and times what `candidates` returns. Nothing is returned that cannot fit the
shared memory of the device, or whose accumulators would not leave registers for anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hal.device import version_at_least
from hal.errors import ArgumentError
from hal.ops import tiles
from hal.ops.linear import product_kind
from hal.ops.tiles import GROUP_SUMS, OPERAND_BYTES, PACKED_KINDS, Tile, choose_tile
from hal.ops.tuned import ProductSizes, fits
from hal.quant.scheme import find_scheme, group_of

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.quant.scheme import Quantization

__all__ = [
    "APART",
    "QUICK",
    "THOROUGH",
    "TUNABLE",
    "candidates",
    "default_tile",
    "products_of",
    "runs_specialized",
]

TUNABLE: Mapping[str, tuple[str, ...]] = {
    "linear": ("triton", "triton_fp8", "triton_int8", "triton_decode", "triton_packed",
               "triton_w4a8"),
    "fused_moe": ("triton", "triton_fp8", "triton_int8", "triton_decode", "triton_packed",
                  "triton_w4a8"),
}  # fmt: skip
"""Kernels whose tiles `hal.ops.linear.TileChoice` chooses, by op."""
NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("in_features", "out_features"),
    "fused_moe": ("experts", "top_k", "hidden", "intermediate"),
}
ACCUMULATOR_REGISTERS = 128
"""Of a thread's 255 registers; what the rest is for takes about as many (H200: more spills)."""
LANES = {"cuda": 32, "rocm": 64}
ROWS, COLUMNS, INNER = (16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256)
WARPS, STAGES = (4, 8), (2, 3, 4, 5)
MOST_ROWS_SPLIT = 128
QUICK, APART, THOROUGH = 1, 2, len(fields(Tile))
"""In how many respects tiles may differ from the rules' one."""


def products_of(
    op: str,
    scheme: str,
    kernel: str,
    problem: Mapping[str, Any],
    tokens: int,
    spec: DeviceSpec | None = None,
) -> tuple[ProductSizes, ...]:
    """Return the products of a call with so many tokens, in the order of their binder.

    Without the facts of a device they are those of one where no warps specialize.

    Raises:
        ArgumentError: If the kernel has no tiles to choose, or a size is not given.
    """
    if kernel not in TUNABLE.get(op, ()):
        known = ", ".join(f"{name}: {', '.join(of)}" for name, of in TUNABLE.items())
        raise ArgumentError(f"tune {op}", found=f"kernel {kernel}", needed=f"one of {known}")
    missing = [name for name in NEEDED[op] if not problem.get(name)]
    if missing:
        raise ArgumentError(
            f"tune {op}", found=f"no {', '.join(missing)}", needed=", ".join(NEEDED[op])
        )
    kind = _kind(scheme, kernel)
    if op == "linear":
        rows = _rounded(tokens)
        return (ProductSizes(kind, problem["out_features"], problem["in_features"], rows),)
    rows = _rows_of_expert(problem, tokens)
    expands = kind.endswith("_decode") and rows > tiles.rows_before_expanding(kind)
    if spec is not None and runs_specialized(op, scheme, kernel, problem, tokens, spec):
        expands = False
    if expands and _is_wide(problem):
        kind = "bf16"  # weights are expanded first
    rows = _rounded(rows)
    matrices = _rounded(min(problem["experts"], tokens * problem["top_k"]))
    gated = 2 if problem.get("gated", True) else 1
    hidden, intermediate = problem["hidden"], problem["intermediate"]
    first = ProductSizes(kind, gated * intermediate, hidden, rows, matrices)
    return first, ProductSizes(kind, hidden, intermediate, rows, matrices)


def runs_specialized(
    op: str,
    scheme: str,
    kernel: str,
    problem: Mapping[str, Any],
    tokens: int,
    spec: DeviceSpec,
) -> bool:
    """Say whether warps specialize in a call's products, with tiles that no table sets.

    `specialized_experts` and `specialized_linear` decide by tensors, this by the sizes they have.
    """
    newer = version_at_least(spec.software.triton or "3.6", "3.6")
    if not newer or not tiles.specializes_warps(spec.platform, spec.arch.name):
        return False
    kind, how = _kind(scheme, kernel), find_scheme(scheme).weight
    group = 128 if how.granularity == "block128" else group_of(how.granularity) or 1
    inner = ("in_features",) if op == "linear" else ("hidden", "intermediate")
    if any(problem[name] % max(group, 64) for name in inner):
        return False
    if op == "linear":
        if kind not in tiles.SPECIALIZED_KINDS or not how.symmetric or _small_groups(how):
            return False
        least, most = tiles.specialized_rows(kind, problem["out_features"], problem["in_features"])
        return least <= tokens <= most and (not kind.endswith("_decode") or _is_wide(problem))
    rows = _rows_of_expert(problem, tokens)
    if kind.startswith("fp8_block128") and not kind.endswith("_decode"):
        return rows > tiles.ROWS_BEFORE_SPECIALIZING
    if kind not in tiles.SPECIALIZED_KINDS or _small_groups(how):
        return False
    most_rows = tiles.rows_before_expanding(kind, specialized=True)
    return not kind.endswith("_decode") or (_is_wide(problem) and rows <= most_rows)


def _rows_of_expert(problem: Mapping[str, Any], tokens: int) -> int:
    rows: int = -(-tokens * problem["top_k"] // problem["experts"])
    return rows


def _small_groups(how: Quantization) -> bool:
    """Say whether float32 scales are of fewer codes than a step of the kernel has."""
    return how.scale_format == "float32" and group_of(how.granularity) == 32


def _is_wide(problem: Mapping[str, Any]) -> bool:
    return (problem.get("dtype") or "bfloat16") == "bfloat16"


def _kind(scheme: str, kernel: str) -> str:
    how = find_scheme(scheme)
    if kernel == "triton":
        return "bf16"
    if kernel == "triton_w4a8":
        return "int4_group_fp8"
    if kernel == "triton_decode":
        return f"{product_kind(how)}_decode"
    if kernel == "triton_packed":
        if how.weight.format == "int4":
            return "int4_group_decode"
        packed = "mxfp4_decode" if how.weight.packed else "mxfp8_decode"
        return "nvfp4_decode" if how.weight.scale_format == "e4m3fn" else packed
    return product_kind(how)


def _rounded(count: int) -> int:
    """Return the power of two at or above a number, as `TileChoice` rounds it."""
    return 1 << max(count - 1, 0).bit_length()


def default_tile(sizes: ProductSizes, spec: DeviceSpec, block_m: int = 0) -> Tile:
    """Return the tile that rules give, with `block_m` rows if that is set."""
    tile = choose_tile(
        sizes.kind,
        sizes.rows,
        sizes.n,
        sizes.k,
        platform=spec.platform,
        arch=spec.arch.name,
        shared_memory_bytes=spec.shared_memory_bytes or 0,
        compute_units=spec.compute_units or 64,
        matrices=sizes.matrices,
    )
    return replace(tile, block_m=block_m) if block_m else tile


def candidates(
    sizes: ProductSizes, spec: DeviceSpec, block_m: int = 0, *, apart: int = APART
) -> tuple[Tile, ...]:
    """Return the tiles to try: what rules give first, then what fits and is not absurd.

    Args:
        sizes: The product.
        spec: Facts of the device.
        block_m: Rows that every tile must have; 0 leaves them free.
        apart: In how many respects a tile may differ from the rules' one.
    """
    default = default_tile(sizes, spec, block_m)
    found = dict.fromkeys([default] if fits(default, sizes, spec) else [])
    rows = (block_m,) if block_m else _row_choices(sizes.rows)
    group_m = 1 if sizes.rows <= 64 else 8
    grid = itertools.product(rows, COLUMNS, INNER, WARPS, STAGES)
    for m, n, k, warps, stages in grid:
        for swap, lanes in _orders(sizes, m):
            tile = Tile(m, n, k, warps, stages, group_m, swap, lanes)
            for split in _splits(sizes, tile, spec):
                tried = replace(tile, split_k=split)
                near = _differences(tried, default) <= apart
                if near and _sensible(tried, sizes, spec):
                    found[tried] = None
    return tuple(found)


def _differences(one: Tile, other: Tile) -> int:
    return sum(getattr(one, part.name) != getattr(other, part.name) for part in fields(Tile))


def _row_choices(rows: int) -> tuple[int, ...]:
    """Return block_m from half of the rows to twice as many: more pads, less reads again."""
    return tuple(m for m in ROWS if min(rows, 128) / 2 <= m <= max(2 * rows, 16))


def _orders(sizes: ProductSizes, block_m: int) -> tuple[tuple[bool, bool], ...]:
    """Return (swap, lanes): few rows are the short side of a transposed product."""
    packed = sizes.kind in PACKED_KINDS
    if block_m < 64:
        return ((True, True), (True, False)) if packed else ((True, False), (False, False))
    return ((True, False), (False, False)) if block_m == 64 or packed else ((False, False),)


def _splits(sizes: ProductSizes, tile: Tile, spec: DeviceSpec) -> tuple[int, ...]:
    if sizes.kind not in PACKED_KINDS or sizes.matrices > 1 or sizes.rows > MOST_ROWS_SPLIT:
        return (1,)
    programs = -(-sizes.n // tile.block_n) * -(-sizes.rows // tile.block_m)
    units = spec.compute_units or 64
    return tuple(s for s in (1, 2, 4, 8) if s == 1 or programs * s <= 4 * units)


def _sensible(tile: Tile, sizes: ProductSizes, spec: DeviceSpec) -> bool:
    """Prune before anything is compiled."""
    area, threads = tile.block_m * tile.block_n, tile.warps * LANES.get(spec.platform, 32)
    sums = 2 if sizes.kind in GROUP_SUMS or "block128" in sizes.kind else 1
    if sums * area / threads > ACCUMULATOR_REGISTERS or area / threads < 8:
        return False
    if "block128" in sizes.kind and tile.block_k > 128:
        return False
    if tile.block_n > max(sizes.n, 32) or tile.block_k > max(sizes.k, 32):
        return False
    if sizes.k % 16 and (tile.block_k > 64 or area > 1024 * tile.warps):
        return False  # such rows reach shared memory through registers
    bytes_of_step = tile.block_k * (
        tile.block_n * OPERAND_BYTES[sizes.kind][1] + tile.block_m * OPERAND_BYTES[sizes.kind][0]
    )
    if bytes_of_step < 2048:
        return False  # a step that loads less than 2 KB waits for every load
    steps = -(-sizes.k // (tile.block_k * tile.split_k))
    if tile.stages > max(steps, 2):
        return False
    return fits(tile, sizes, spec)
