"""Time the quantizers beside a copy of the same size and torch.compile of the plain formula.

Usage: python benchmarks/quantize.py [--schemes mxfp8,...] [--before plain,norm,residual,gate]
       [--shapes 32768x4096,...] [--small] [--no-compile] [--pieces] [--out results.json]

Large shapes: `GB/s` counts the bytes that must be read and written; `copy` is what `copy_` of as
many bytes in all reaches, timed in turn with the quantizer, and `of copy` the ratio. `compiled` is
torch.compile of the formula as one would write it for inductor (whose codes may be off by a
rounding), `x` its time over ours: above 1 ours is faster. Times are of CUDA graphs' replays with a
cold L2 cache, so that the host's time does not count: the least of three medians. `--small`: 1, 16
and 128 rows of 4096, one median. `--pieces` tries other shapes of a program.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from hal.ops.activations import Activation
from hal.ops.kernels import quantize as kernels
from hal.ops.quantize import quantize_triton
from hal.ops.quantize_fused import rms_norm_triton, swiglu_triton
from hal.quant import SCHEMES
from hal.quant.mx import exponent_rule
from hal.timing import time_graph

SHAPES = "32768x4096,16384x7168,131072x2048,8192x14336,131072x4096"
WAYS = "fp8_channel,fp8_block128,int8_channel,mxfp8,mxfp4,nvfp4"
EPSILON = 1e-6
Call = Callable[[], Any]


def main() -> None:
    """Print one line for each shape, scheme and what is fused with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default=WAYS)
    parser.add_argument("--before", default="plain,norm,residual,gate")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    rows = []
    shapes = "1x4096,16x4096,128x4096" if options.small else options.shapes
    if options.small:
        print(
            f"{'rows x columns':>16} {'scheme':<13}{'before':<9}{'us':>8}{'compiled':>10}{'x':>6}"
        )
    else:
        print(f"{'rows x columns':>16} {'scheme':<13}{'before':<9}{'us':>8}{'GB/s':>7}{'copy':>6}"
              f"{'of copy':>8}{'compiled':>10}{'x':>6}")  # fmt: skip
    for shape in shapes.split(","):
        tokens, columns = map(int, shape.split("x"))
        for before in options.before.split(","):
            for scheme in options.schemes.split(","):
                row = time_one(tokens, columns, scheme, before, options)
                rows.append({"rows": tokens, "columns": columns, **row})
    if options.out:
        options.out.write_text(json.dumps({"device": name, "rows": rows}, indent=1))


def time_one(
    tokens: int, columns: int, scheme: str, before: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one case and print it."""
    torch.manual_seed(0)
    ours, plain, read = calls(tokens, columns, scheme, before)
    label = f"{tokens:>8} x{columns:>6} {scheme:<13}{before:<9}"
    compiled = None if options.no_compile else torch.compile(plain, fullgraph=True, dynamic=False)
    if options.small:
        us = time_graph(ours)
        other = time_graph(compiled) if compiled else float("nan")
        print(f"{label}{us:>8.2f}{other:>10.2f}{other / us:>6.2f}", flush=True)
        return {"scheme": scheme, "before": before, "us": us, "compiled_us": other}
    moved = read + sum(part.nbytes for part in ours())
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    turns = [ours, lambda: target.copy_(source), *((compiled,) if compiled else ())]
    us, copy, *rest = least_times(turns)
    other = rest[0] if rest else float("nan")
    print(f"{label}{us:>8.1f}{moved / us / 1e3:>7.0f}{moved / copy / 1e3:>6.0f}{copy / us:>8.2f}"
          f"{other:>10.1f}{other / us:>6.2f}", flush=True)  # fmt: skip
    if options.pieces:
        try_pieces(ours, copy)
    return {"scheme": scheme, "before": before, "us": us, "bytes": moved, "copy_us": copy,
            "compiled_us": other}  # fmt: skip


def try_pieces(ours: Call, copy: float) -> None:
    """Time other numbers of elements for a program and for a lane."""
    chosen = kernels.PIECE, kernels.PER_LANE
    for piece in (2048, 4096, 8192):
        for lane in (8, 16, 32, 64):
            kernels.PIECE, kernels.PER_LANE = piece, lane
            (us,) = least_times([ours])
            print(
                f"{'':>20}piece {piece:>5} per lane {lane:>3}{copy / us:>8.2f} of copy", flush=True
            )
    kernels.PIECE, kernels.PER_LANE = chosen


def least_times(turns: list[Call], rounds: int = 3) -> list[float]:
    """Return the least of several medians of each call in microseconds; calls take turns.

    Graphs are replayed, so that no time of the host is counted.
    """
    found = [[time_graph(call, replays=7) for call in turns] for _ in range(rounds)]
    return [min(times) for times in zip(*found, strict=True)]


def calls(tokens: int, columns: int, scheme: str, before: str) -> tuple[Call, Call, int]:
    """Return our call, the plain formula, and the bytes that they read."""
    how = SCHEMES[scheme].activation
    assert how.format is not None
    encoding = how.format
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(tokens, columns * (2 if before == "gate" else 1), **options)
    formula = FORMULAS[scheme]
    if before == "plain":
        return lambda: quantize_triton(x, encoding, how), lambda: formula(x), x.nbytes
    if before == "gate":
        return (
            lambda: swiglu_triton(x, Activation(), encoding, how),
            lambda: formula(swiglu(x)),
            x.nbytes,
        )
    weight = torch.randn(columns, **options)
    if before == "norm":
        return (
            lambda: rms_norm_triton(x, weight, EPSILON, None, encoding, how),
            lambda: formula(norm(x, weight)),
            x.nbytes,
        )
    residual = torch.randn_like(x)

    def add_and_norm() -> tuple[torch.Tensor, ...]:
        total = x + residual
        return (*formula(norm(total, weight)), total)

    return (
        lambda: rms_norm_triton(x, weight, EPSILON, residual, encoding, how),
        add_and_norm,
        2 * x.nbytes,
    )


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalize rows as transformers does."""
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (wide * root).to(x.dtype) * weight


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Gate as the kernels do: in float32, rounded once."""
    gate, up = x.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(x.dtype)


def scaled(group: int | None, dtype: torch.dtype, top: float) -> Callable[..., Any]:
    """Return the formula for float32 scales per row or group."""

    def formula(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float()
        wide = wide.unflatten(-1, (-1, group)) if group else wide
        scales = (wide.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
        ratio = (wide / scales).clamp(-top, top)
        codes = (ratio.round() if dtype is torch.int8 else ratio).to(dtype)
        return codes.view(x.shape), scales.squeeze(-1)

    return formula


def mx(element: str) -> Callable[..., Any]:
    """Return the formula for powers of two per 32."""
    addend, top = exponent_rule(element)

    def formula(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float().unflatten(-1, (-1, 32))
        bits = wide.abs().amax(-1, keepdim=True).view(torch.int32)
        byte = (((bits + addend) >> 23) - top).clamp_min(0)
        ratio = wide * ((254 - byte) << 23).view(torch.float32)
        if element == "e2m1":
            codes = pack(ratio.view(x.shape))
        else:
            codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).view(x.shape)
        return codes, byte.to(torch.uint8).squeeze(-1)

    return formula


def nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Quantize to e2m1 under e4m3 scales per 16 and float32 per row."""
    wide = x.float()
    second = (wide.abs().amax(-1) / 2688).clamp_min(1e-12)
    blocks = wide.unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 / second[:, None]).clamp(2**-9, 448)
    scales = scales.to(torch.float8_e4m3fn)
    ratio = blocks / (scales.float() * second[:, None])[..., None]
    return pack(ratio.view(x.shape)), scales, second


def pack(x: torch.Tensor) -> torch.Tensor:
    """Round to e2m1 and put two codes into a byte."""
    size = x.abs()
    code = torch.minimum((size * 2).round(), size.round() + 2)
    code = torch.minimum(code, (size * 0.5).round() + 4).clamp_max(7).to(torch.uint8)
    code = code | (torch.signbit(x).to(torch.uint8) << 3)
    return code[:, 0::2] | (code[:, 1::2] << 4)


FORMULAS = {
    "fp8_channel": scaled(None, torch.float8_e4m3fn, 448.0),
    "fp8_block128": scaled(128, torch.float8_e4m3fn, 448.0),
    "int8_channel": scaled(None, torch.int8, 127.0),
    "mxfp8": mx("e4m3fn"),
    "mxfp4": mx("e2m1"),
    "nvfp4": nvfp4,
}


if __name__ == "__main__":
    main()
