"""Time products with packed weights beside torch.mm in bf16 and what memory allows.

Usage: python benchmarks/linear_decode.py [--kinds mxfp4_decode,...] [--rows 1,16,128,1024]
       [--shapes 4096x4096,14336x4096] [--tiles] [--out results.json]

Each time is the median of CUDA-graph replays with a cold L2 cache (128 MB are written before each
replay), in microseconds. `floor`: bytes of weight, scales, activations and output at 4.05 TB/s;
`replay`: the same plus 4 us, what a replay costs at least. `error` is that of the output against
float64 on the decoded weights, relative to the largest output: above 1% nothing is timed. Scales
lie with n contiguous. `--tiles` also times variants of the chosen tile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from moe import time_graph

from hal.ops.kernels.accumulate import WEIGHT_ONLY_KINDS, Weight, as_weight
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import Tile, choose_tile, fit
from hal.platforms.tables import device_spec

BANDWIDTH, REPLAY_US = 4.05e12, 4.0
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def main() -> None:
    """Print one line for each shape, number of rows and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(WEIGHT_ONLY_KINDS))
    parser.add_argument("--rows", default="1,16,128,1024")
    parser.add_argument("--shapes", default="4096x4096,14336x4096", help="n x k")
    parser.add_argument("--group", type=int, default=128, help="of int4 and uint4")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'n':>6}{'k':>6}{'rows':>5} {'kind':<20}{'us':>8}{'floor':>7}{'ratio':>6}{'replay':>7}"
          f"{'/bf16':>6}{'error':>9}  tile")  # fmt: skip
    rows = []
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        rows += time_shape(n, k, options)
    if options.out:
        options.out.write_text(json.dumps({"device": name, "rows": rows}, indent=1))


def time_shape(n: int, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one shape with every number of rows and every kind."""
    torch.manual_seed(0)
    found = []
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    weights = {kind: random_weight(kind, n, k, options.group) for kind in options.kinds.split(",")}
    for m in map(int, options.rows.split(",")):
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        bf16_us = time_graph(lambda: torch.mm(a, dense.T, out=out))  # noqa: B023
        shared = (a.nbytes + out.nbytes) / BANDWIDTH * 1e6
        floor = dense.nbytes / BANDWIDTH * 1e6 + shared
        report(n, k, m, "torch.mm bf16", bf16_us, floor, 1.0, 0.0, "")
        for kind, (weight, value) in weights.items():
            error = relative_error(a, weight, value, kind, chosen(kind, m, n, k))
            if not error < 1e-2:
                print(f"{n:>6}{k:>6}{m:>5} {kind:<20} WRONG: error {error:.3g}", flush=True)
                continue
            held = (weight.codes, weight.scales, weight.zeros, weight.second)
            floor = sum(t.nbytes for t in held if t is not None) / BANDWIDTH * 1e6 + shared
            for tile in variants(chosen(kind, m, n, k), kind, options.tiles):
                try:
                    us = time_graph(lambda: gemm(a, weight, out, kind=kind, tile=tile))  # noqa: B023
                except Exception as problem:  # a tile that the compiler refuses is a result
                    print(f"{kind} {tile}: {str(problem).splitlines()[0][:120]}", flush=True)
                    continue
                report(n, k, m, kind, us, floor, us / bf16_us, error, short(tile))
                found.append(
                    {
                        "n": n, "k": k, "rows": m, "kind": kind, "us": us, "floor_us": floor,
                        "bf16_us": bf16_us, "error": error, "tile": short(tile),
                    }
                )  # fmt: skip
    return found


def report(
    n: int, k: int, m: int, kind: str, us: float, floor: float, of_bf16: float, error: float,
    tile: str,
) -> None:  # fmt: skip
    """Print one line."""
    print(f"{n:>6}{k:>6}{m:>5} {kind:<20}{us:>8.1f}{floor:>7.1f}{us / floor:>6.2f}"
          f"{us / (floor + REPLAY_US):>7.2f}{of_bf16:>6.2f}{error:>9.1e}  {tile}",
          flush=True)  # fmt: skip


def random_weight(kind: str, n: int, k: int, group: int) -> tuple[Weight, torch.Tensor]:
    """Return a random weight as the kernels read it, and its exact value [n, k] in float64."""
    spec = WEIGHT_ONLY_KINDS[kind]
    group = group if len(spec.groups) > 1 else spec.groups[0] if spec.groups else k

    def codes(*size: int, top: int = 256, low: int = 0) -> torch.Tensor:
        return torch.randint(low, top, size, device="cuda", dtype=torch.uint8)

    if spec.decode == "e4m3":
        b = codes(n, k)
        b[(b & 0x7F) == 0x7F] = 0
        value = b.view(torch.float8_e4m3fn).double()
    else:
        b = codes(n, k // 2)
        nibbles = torch.stack((b & 15, b >> 4), -1).flatten(1).long()
        value = nibbles.double()
        if spec.decode == "e2m1":
            value = torch.tensor(E2M1, device="cuda").double()[nibbles]
        elif spec.decode == "int4":
            value = torch.where(nibbles > 7, nibbles - 16, nibbles).double()
    options: dict[str, torch.Tensor] = {}
    if spec.scales == "tensor":
        scales = torch.tensor(0.01, device="cuda")
        return as_weight(kind, k, b, scales), value * scales.double()
    groups = k // group
    if spec.decode == "uint4":
        options["b_zeros"] = codes(groups, n, top=16).T
        value = value - options["b_zeros"].double().repeat_interleave(group, 1)
    if spec.scale_format == "float32":
        scales = (torch.rand(groups, n, device="cuda") / 50 + 1e-3).T
        exact = scales.double()
    elif spec.scale_format == "e8m0":
        scales = codes(groups, n, low=116, top=124).T
        exact = torch.exp2(scales.double() - 127)
    else:
        scales = codes(groups, n, top=0x7F).T
        exact = scales.contiguous().view(torch.float8_e4m3fn).double()
    if spec.second:
        options["b_second"] = torch.tensor(1e-3, device="cuda")
        value = value * options["b_second"].double()
    value = value * exact.repeat_interleave(group, 1)
    return as_weight(kind, k, b, scales, **options), value


def chosen(kind: str, m: int, n: int, k: int) -> Tile:
    """Return the tile that the ops would choose."""
    return choose_tile(kind, m, n, k, **facts())


def facts() -> dict[str, Any]:
    """Return what decides tiles on the device here."""
    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    limit = device_spec("cuda", arch).shared_memory_bytes
    return {
        "platform": "cuda", "arch": arch, "shared_memory_bytes": limit,
        "compute_units": properties.multi_processor_count,
    }  # fmt: skip


def variants(tile: Tile, kind: str, several: bool) -> Iterator[Tile]:
    """Yield the chosen tile, and others like it if asked."""
    yield tile
    if not several:
        return
    changes: list[dict[str, Any]] = [
        {"lanes": not tile.lanes}, {"swap": not tile.swap, "lanes": False},
        {"block_k": 64}, {"block_k": 128}, {"block_k": 256},
        {"block_n": 32}, {"block_n": 64}, {"block_n": 128}, {"stages": 3}, {"stages": 6},
        {"split_k": 1}, {"split_k": 2}, {"split_k": 4}, {"split_k": 8},
        {"block_m": 64, "warps": 4}, {"block_m": 128, "warps": 8}, {"block_m": 256, "warps": 8},
    ]  # fmt: skip
    seen = {tile}
    limit = facts()["shared_memory_bytes"]
    for change in changes:
        if tile.block_m <= 16 and "block_m" in change:
            continue
        if tile.block_m > 16 and "split_k" in change:
            continue
        other = fit(replace(tile, **change), kind, limit, platform="cuda")
        if other not in seen:
            seen.add(other)
            yield other


def short(tile: Tile) -> str:
    """Return a tile in a few letters."""
    return (
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} g{tile.group_m}"
        f"{' swap' if tile.swap else ''}{' lanes' if tile.lanes else ''}"
        f"{f' split{tile.split_k}' if tile.split_k > 1 else ''}"
    )


def relative_error(
    a: torch.Tensor, weight: Weight, value: torch.Tensor, kind: str, tile: Tile
) -> float:
    """Return the largest error of the output against float64, relative to the largest output."""
    out = torch.full((a.shape[0], value.shape[0]), float("nan"), device="cuda", dtype=a.dtype)
    gemm(a, weight, out, kind=kind, tile=tile)
    expected = a.double() @ value.T
    return float((out.double() - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
