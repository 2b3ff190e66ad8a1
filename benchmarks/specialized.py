"""Time products of experts whose warps specialize, with every tile, beside the ordinary product.

Usage: python benchmarks/specialized.py [--kinds int4_group_decode,...] [--shapes mixtral,...]
                                        [--tokens 8,32,128,512] [--seconds 150] [--jobs 16]

Of the kinds that `warp_specialized_packed` decodes, on a Hopper GPU: microseconds, the median of
CUDA-graph replays with a cold L2 cache (`hal.timing`). Kernels are compiled first, in processes
of their own. Each result is compared with the ordinary one, whose sums are in another order. Where
layers do so, rows of 16 bits are brought into the order of codes; that is not in the time.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from moe import BANDWIDTH, SHAPES

from hal.ops.align import align_triton
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import ALL_KINDS, as_weight
from hal.ops.specialized_experts import ROWS_IN_ORDER
from hal.ops.tiles import OPERAND_BYTES, SPECIALIZED_KINDS, Tile, choose_tile
from hal.timing import time_graph

REPLAY_US, SHARED_BYTES, TOLERANCE = 3.5, 232448 - 8192, 4e-3
DEVICE = {"platform": "cuda", "arch": "sm_90", "shared_memory_bytes": 232448, "compute_units": 132}


class Operands(NamedTuple):
    """Hold random operands of one product."""

    kind: str
    rows: torch.Tensor
    codes: torch.Tensor
    scales: dict[str, torch.Tensor]
    row_scales: torch.Tensor | None

    def product(self, special: bool, ids: torch.Tensor, divisor: int, tile: Tile, out: Any) -> Any:
        """Return the call of one of the kernels, with slots aligned for its tile."""
        slots = ids.shape[0] if divisor > 1 else ids.numel()
        places = align_triton(ids, self.codes.shape[0], tile.block_m)
        rows, scales = self.rows[:slots], self.row_scales
        a_scales = None if scales is None else scales[:slots]
        shared = {"top_k_divisor": divisor, "tile": tile, "a_scales": a_scales}
        if not special:
            return partial(
                grouped_gemm,
                rows,
                self.codes,
                out,
                *places,
                kind=self.kind,
                **self.scales,
                **shared,
            )
        from hal.ops.kernels.step_order import order_rows
        from hal.ops.kernels.warp_specialized_packed import Coded, warp_specialized_packed_gemm

        ordered = scales is None and tile.block_m >= ROWS_IN_ORDER
        rows = order_rows(rows, tile.block_k) if ordered else rows
        coded = Coded(self.kind, rows.shape[1], self.codes, **self.scales)
        units = DEVICE["compute_units"]
        return partial(
            warp_specialized_packed_gemm,
            rows,
            coded,
            out,
            *places,
            programs=units,
            ordered=ordered,
            **shared,
        )


def operands(kind: str, experts: int, n: int, k: int, group: int, rows: int) -> Operands:
    """Make random operands, with scales of neighbouring channels side by side as in layers."""
    spec = ALL_KINDS[kind]
    random = partial(torch.rand, device="cuda")
    codes = torch.randint(
        0, 127, (experts, n, k // spec.per_byte), device="cuda", dtype=torch.uint8
    )
    x = torch.randn(rows, k, device="cuda")
    if spec.scales == "tensor":
        scales = {"b_scales": random(experts, n) / 50 + 1e-3}
    elif spec.scale_format == "float32":
        size = experts, k // group, -(-n // spec.scale_rows)
        scales = {"b_scales": (random(*size) / 50 + 1e-3).mT}
    else:
        low, high = (120, 130) if spec.scale_format == "e8m0" else (40, 100)
        size = experts, k // spec.groups[0], n
        stored = torch.randint(low, high, size, device="cuda", dtype=torch.uint8)
        scales = {"b_scales": stored.mT}
    if spec.second:
        scales["b_second"] = random(experts)
    if spec.a_scaled:
        return Operands(kind, (x * 30).to(torch.float8_e4m3fn), codes, scales, random(rows) + 0.1)
    return Operands(kind, x.bfloat16(), codes, scales, None)


def tiles(kind: str, step: int) -> Iterator[Tile]:
    """Return tiles of `warp_specialized_packed`, with rings as `specialized_tile` makes them."""
    a_bytes, b_bytes = OPERAND_BYTES[kind]
    for block_m, block_n in itertools.product((16, 32, 64, 128), (128, 256)):
        if block_m == 128 and block_n == 256 and a_bytes > 1:
            continue
        held = int(step * (block_m * a_bytes + block_n * b_bytes)) + 8 * block_n
        yield Tile(block_m, block_n, step, 4, min(SHARED_BYTES // held, 6 if step > 64 else 12), 16)


def group_of(kind: str, shape: str) -> int:
    """Return the group of float32 scales: one that divides gpt-oss's 2880 columns."""
    return 64 if shape == "gptoss" and kind.startswith("int4") else 128


def compile_one(job: tuple[str, Tile, int, int, int]) -> str:
    """Compile a tile's kernel by a small call; return what went wrong."""
    kind, tile, divisor, group, k = job
    try:
        given = operands(kind, 4, 512, k, group, 64)
        ids = torch.randint(4, (64, divisor), device="cuda").int()
        out = torch.empty(ids.numel(), 512, device="cuda", dtype=torch.bfloat16)
        given.product(True, ids, divisor, tile, out)()
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{job}: {type(problem).__name__}: {problem}"
    return ""


def products(shape: str) -> tuple[tuple[int, int, int], ...]:
    """Return (n, k, slots a row) of both products."""
    _, top_k, hidden, intermediate = SHAPES[shape]
    return (2 * intermediate, hidden, top_k), (hidden, intermediate, 1)


def step_of(kind: str, k: int, group: int) -> int:
    """Return the elements along k of a step; 0 where the kernel does not read such rows."""
    from hal.ops.kernels import warp_specialized_packed as kernel

    spec = ALL_KINDS[kind]
    with torch.device("meta"):
        codes = torch.empty(1, 64, k // spec.per_byte, dtype=torch.uint8)
        size = {"tensor": (1, 64)}.get(spec.scales, (1, -(-k // (spec.groups or (group,))[0]), 64))
        if spec.scale_format == "float32" and spec.scales == "group":
            size = (1, -(-k // group), -(-64 // spec.scale_rows))
        stored = torch.float32 if spec.scale_format == "float32" else torch.uint8
        scales = torch.empty(size, dtype=stored)
        second = torch.empty(1) if spec.second else None
    scales = scales if spec.scales == "tensor" else scales.mT
    weight = as_weight(kind, k, codes, scales, None, second)
    return kernel.step_of(kind, weight) if kernel.fits(kind, weight) else 0


def main() -> None:
    """Print one line for each kind, shape, product and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(sorted(SPECIALIZED_KINDS)))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="8,32,128,512")
    parser.add_argument("--seconds", type=float, default=600.0, help="nothing is begun later")
    parser.add_argument("--jobs", type=int, default=16)
    options = parser.parse_args()
    began, kinds, shapes = time.monotonic(), options.kinds.split(","), options.shapes.split(",")
    cases = [
        (kind, shape, which, *product, group_of(kind, shape), step)
        for kind in kinds
        for shape in shapes
        for which, product in enumerate(products(shape))
        if (step := step_of(kind, product[1], group_of(kind, shape)))
    ]
    jobs = {
        (kind, tile, divisor, group, 8 * step if step > 64 else 9 * step)
        for kind, _, _, _, _, divisor, group, step in cases
        for tile in tiles(kind, step)
    }
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for problem in filter(None, pool.map(compile_one, sorted(jobs, key=str))):
            print(problem)
    print(f"{'kind':<20}{'shape':<9}{'product':>7}{'tokens':>7}{'floor':>7}{'ordinary':>10}  tiles")
    for kind, shape, which, n, k, divisor, group, step in cases:
        experts, top_k = SHAPES[shape][:2]
        most = max(map(int, options.tokens.split(",")))
        given = operands(kind, experts, n, k, group, most * (1 if divisor > 1 else top_k))
        for tokens in map(int, options.tokens.split(",")):
            if time.monotonic() - began > options.seconds:
                return
            print(f"{kind:<20}{shape:<9}{which:>7}{tokens:>7}", end="", flush=True)
            print(time_case(given, shape, tokens, divisor, step), flush=True)
        del given
        torch.cuda.empty_cache()


def time_case(given: Operands, shape: str, tokens: int, divisor: int, step: int) -> str:
    """Return the floor, the time of the ordinary product, and those of tiles of a fitting size."""
    experts, top_k = SHAPES[shape][:2]
    _, n, _ = given.codes.shape
    k = given.rows.shape[1]
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k, -1)[1].int()
    rows = -(-ids.numel() // experts)
    ordinary = choose_tile(given.kind, rows, n, k, matrices=min(experts, ids.numel()), **DEVICE)
    expected = torch.empty(ids.numel(), n, device="cuda", dtype=torch.bfloat16)
    found = torch.empty_like(expected)
    base = time_graph(given.product(False, ids, divisor, ordinary, expected), replays=9)
    weights = (given.codes, *given.scales.values())
    moved = len(ids.unique()) * sum(part[0].nbytes for part in weights) + expected.nbytes
    moved += given.rows[: ids.shape[0] if divisor > 1 else ids.numel()].nbytes
    cells = [f"{moved / BANDWIDTH * 1e6 + REPLAY_US:>7.0f}{base:>10.1f} "]
    for tile in tiles(given.kind, step):
        if not tile.block_m / 4 <= max(rows, 6) <= 6 * tile.block_m:
            continue
        call = given.product(True, ids, divisor, tile, found)
        call()
        error = ((found - expected).float().norm() / expected.float().norm()).item()
        wrong = "" if error < TOLERANCE else f" (error {error:.1e})"
        cells.append(f"{tile.block_m}x{tile.block_n}:{time_graph(call, replays=9):.1f}{wrong}")
    return " ".join(cells)


if __name__ == "__main__":
    main()
