"""Search tiles of the grouped GEMM on the GPU here; prints the best and the default of each case.

Usage: python benchmarks/moe_tiles.py [--shapes qwen3] [--kinds fp8_channel] [--tokens 1,32,512]
                                      [--jobs 14] [--out tiles.json]

Candidates compile in parallel processes into Triton's cache; then one process times them, by CUDA
graphs with a cold L2. What it finds is what the rules of `hal.ops.tiles` for that architecture
were written from; nothing reads its output at run time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from moe import SHAPES

import hal
from hal.ops.align import align_triton
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.tiles import Tile, choose_tile
from hal.quant.scheme import scale_shape
from hal.timing import time_graph

DTYPES = {"bf16": torch.bfloat16, "int8_channel": torch.int8}


def candidates(kind: str, rows: int, shared_bytes: int) -> list[Tile]:
    """Return tiles that fit and are not absurd for `rows` rows an expert."""
    blocks_m = [
        size for size in (16, 32, 64, 128) if size >= min(rows, 64) / 2 and size <= rows * 16
    ]
    narrow = kind not in ("bf16",)
    found = []
    for block_m, block_n, block_k, warps, stages in itertools.product(
        blocks_m, (64, 128, 256), (64, 128, 256), (4, 8), (3, 4)
    ):
        if "block128" in kind and (block_k != 128 or block_n > 128):
            continue
        area = block_m * block_n
        if area > 128 * 256 or (warps == 8) != (area >= 128 * 128 or (block_n == 256)):
            continue
        if block_k == (64 if narrow else 256) or (block_k == 256 and block_m > 32):
            continue
        for swap in (True,) if block_m < 64 else (True, False) if block_m == 64 else (False,):
            tile = Tile(block_m, block_n, block_k, warps, stages, 1 if rows <= 64 else 8, swap)
            if tile.shared_memory_bytes(kind) <= shared_bytes:
                found.append(tile)
    return found


class Case:
    """One grouped product with its operands on the device."""

    def __init__(self, shape: str, second: bool, kind: str, tokens: int) -> None:
        experts, top_k, hidden, intermediate = SHAPES[shape]
        self.kind, self.experts, self.slots = kind, experts, tokens * top_k
        self.n, self.k = (hidden, intermediate) if second else (2 * intermediate, hidden)
        self.divisor = 1 if second else top_k
        dtype = DTYPES.get(kind, torch.float8_e4m3fn)
        rows = self.slots if second else tokens
        device = "cuda"
        a = torch.randn(rows, self.k, device=device)
        self.a = (a * 8).to(dtype)
        self.b = torch.empty(experts, self.n, self.k, dtype=dtype, device=device)
        for matrix in self.b:
            matrix.copy_((torch.randn(self.n, self.k, device=device) * 8).to(dtype))
        self.out = torch.empty(self.slots, self.n, dtype=torch.bfloat16, device=device)
        self.scales: dict[str, Any] = {"a_scales": None, "b_scales": None}
        if kind != "bf16":
            of_a, of_b = ("group128", "block128") if "block" in kind else ("token", "channel")
            self.scales = {
                "a_scales": torch.ones(scale_shape(of_a, tuple(self.a.shape)), device=device),
                "b_scales": torch.ones(scale_shape(of_b, tuple(self.b.shape)), device=device),
            }
        generator = torch.Generator().manual_seed(0)
        ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
        self.ids = ids.int().to(device)

    @property
    def rows(self) -> int:
        """Return the rows of an average expert."""
        return -(-self.slots // self.experts)

    def call(self, tile: Tile) -> Any:
        """Return a function that runs the product with `tile`."""
        places = align_triton(self.ids, self.experts, tile.block_m)

        def run() -> None:
            grouped_gemm(
                self.a, self.b, self.out, *places, top_k_divisor=self.divisor, kind=self.kind,
                tile=tile, **self.scales,
            )  # fmt: skip

        return run

    def default(self) -> Tile:
        """Return the tile that hal would take."""
        spec = hal.current_platform().device(0)
        return choose_tile(
            self.kind,
            1 << max(self.rows - 1, 0).bit_length(),
            self.n,
            self.k,
            platform=spec.platform,
            arch=spec.arch.name,
            shared_memory_bytes=spec.shared_memory_bytes,
            compute_units=spec.compute_units or 132,
            matrices=min(self.experts, self.slots),
        )


def main() -> None:
    """Compile in children, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen3")
    parser.add_argument("--kinds", default="fp8_channel")
    parser.add_argument("--tokens", default="1,32,128,512,2048,8192")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--share", type=int, default=-1, help="internal: compile this share")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.share < 0 and options.jobs > 1:
        children = [
            subprocess.Popen([sys.executable, *sys.argv, "--share", str(share)])
            for share in range(options.jobs)
        ]
        for child in children:
            child.wait()
    limit = hal.current_platform().device(0).shared_memory_bytes
    rows = []
    count = 0
    for shape, kind, second in itertools.product(
        options.shapes.split(","), options.kinds.split(","), (False, True)
    ):
        for tokens in map(int, options.tokens.split(",")):
            case = Case(shape, second, kind, tokens)
            default = case.default()
            tiles = candidates(kind, case.rows, limit)
            tiles += [default] if default not in tiles else []
            times = []
            for tile in tiles:
                count += 1
                if options.share >= 0 and count % options.jobs != options.share:
                    continue
                try:
                    call = case.call(tile)
                    if options.share >= 0:
                        call()
                    else:
                        times.append((time_graph(call, replays=7), tile))
                except Exception as error:
                    print(f"{kind} {tile}: {str(error)[:80]}", file=sys.stderr)
            if options.share >= 0:
                continue
            times.sort(key=lambda pair: pair[0])
            own = next(time for time, tile in times if tile == default)
            rows.append(
                {
                    "shape": shape, "kind": kind, "gemm": 2 if second else 1, "tokens": tokens,
                    "rows": case.rows, "default_us": own, "default": asdict(default),
                    "best": [[time, *asdict(tile).values()] for time, tile in times[:6]],
                }
            )  # fmt: skip
            best, tile = times[0]
            print(f"{shape} {kind} gemm{2 if second else 1} tokens={tokens} rows={case.rows}: "
                  f"default {own:.1f}, best {best:.1f} {short(tile)} <- {short(default)}",
                  flush=True)  # fmt: skip
    if options.out and options.share < 0:
        options.out.write_text(json.dumps(rows))


def short(tile: Tile) -> str:
    """Return a tile in a few characters."""
    return (
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} "
        f"g{tile.group_m}{' swap' if tile.swap else ''}"
    )


if __name__ == "__main__":
    main()
