"""Time every kernel of `hal.ops.Linear` that can run on the GPU here, beside what torch has.

Usage: python benchmarks/linear.py [--shapes 4096x4096,...] [--rows 1,16,...] [--schemes ...]
                                   [--kernels triton_packed,...] [--dirty] [--out results.json]

Each time is the median of CUDA-graph replays with a cold L2 cache that has nothing to write back
(128 MB are written and 256 MB read before each replay; `--dirty`: the former alone, which adds 1 to
5 us to reading 9 to 59 MB on an H200), in microseconds, from activations in bf16 to the output: the
quantization of activations is part of it. `torch.mm bf16`, `torch._scaled_mm rows` and `scaled_mm
blocks` are torch's own products, the latter two with activations quantized beforehand. `bound`:
bytes of weight, scales, activations and output at 4.05 TB/s, plus an empty replay of this run.
`chosen`: what selection takes when it is told the number of rows, and its time over that of the
best candidate. `error`: relative to float64 on the quantized weight, in the Frobenius norm of 16
rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hal
from hal import torch_compat
from hal.errors import HalError
from hal.ops import Linear
from hal.ops import quantize as quantize_rows
from hal.quant import quantize
from hal.registry import Level, find_op
from hal.timing import time_graph

BANDWIDTH = 4.05e12
SHAPES = "4096x4096,14336x4096,7168x2048,2112x7168"
SCHEMES = (
    "bf16,fp8_channel,fp8_block128,int8_channel,fp8_w8a16,fp8_w8a16_block128,int8_w8a16,"
    "int4_w4a16,int4_w4a16_g32,int4_w4a8_fp8,mxfp8,mxfp4_w4a16,nvfp4_w4a16"
)
# Weights expanded when they are bound take the memory of bf16: timed, and never counted as best.
OTHER_MEMORY = "torch_dequant"


def main() -> None:
    """Print one line for each shape, number of rows, scheme and kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default="4096x4096,14336x4096,7168x2048,2112x7168", help="n x k"
    )
    parser.add_argument("--rows", default="1,16,128,1024,8192")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--kernels", default="")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--dirty", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    spec = hal.current_platform().device(0)
    tiny = torch.zeros(1, device="cuda")
    replay_us = time_graph(lambda: tiny.add_(1), options.replays, clean=not options.dirty)
    print(f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}, "
          f"empty replay {replay_us:.1f} us")  # fmt: skip
    rows = []
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        rows += time_shape(n, k, replay_us, options)
    if options.out:
        options.out.write_text(json.dumps({"device": spec.key, "rows": rows}, indent=1))


def time_shape(
    n: int, k: int, replay_us: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time one shape under every scheme."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    dense /= math.sqrt(k)
    wanted = [name for name in options.kernels.split(",") if name]
    print(f"\n{n} x {k}\n{'rows':>5} {'scheme':<19}{'kernel':<26}{'us':>9}{'bound':>8}{'ratio':>7}"
          f"{'/bf16':>7}{'error':>9}")  # fmt: skip
    found = []
    for m in map(int, options.rows.split(",")):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        bf16_us = 0.0
        for name, call in torch_products(x, dense):
            us = time_graph(call, options.replays, clean=not options.dirty)
            bf16_us = bf16_us or us
            line(m, "", name, us, math.nan, us / bf16_us, math.nan)
            found.append({"n": n, "k": k, "rows": m, "scheme": "", "kernel": name, "us": us})
        for scheme in options.schemes.split(","):
            weight = dense if scheme == "bf16" else quantize(dense, scheme)
            bound = (weight.nbytes + x.nbytes + 2 * m * n) / BANDWIDTH * 1e6 + replay_us
            times = {}
            for kernel in find_op("linear").kernels:
                unwanted = wanted and kernel.name not in wanted
                if kernel.level is Level.REFERENCE or scheme not in kernel.schemes or unwanted:
                    continue
                try:
                    layer = Linear(weight, force=kernel.name, tokens=m)
                    us = time_graph(lambda: layer(x), options.replays, clean=not options.dirty)  # noqa: B023
                except HalError:
                    continue
                times[kernel.name] = us
                error = relative_error(layer, x, weight)
                line(m, scheme, kernel.name, us, bound, us / bf16_us, error)
                found.append(
                    {
                        "n": n, "k": k, "rows": m, "scheme": scheme, "kernel": kernel.name,
                        "us": us, "bound_us": bound, "error": error,
                    }
                )  # fmt: skip
            rivals = {name: us for name, us in times.items() if name != OTHER_MEMORY} or times
            if rivals and not wanted:
                chosen, best = Linear(weight, tokens=m).kernel, min(rivals.values())
                print(f"{m:>5} {scheme:<19}{'chosen: ' + chosen:<34}{times[chosen] / best:>8.2f}",
                      flush=True)  # fmt: skip
    return found


def line(
    m: int, scheme: str, kernel: str, us: float, bound: float, of_bf16: float, error: float
) -> None:
    """Print one line."""
    print(f"{m:>5} {scheme:<19}{kernel:<26}{us:>9.1f}{bound:>8.1f}{us / bound:>7.2f}"
          f"{of_bf16:>7.2f}{error:>9.1e}", flush=True)  # fmt: skip


def torch_products(
    x: torch.Tensor, dense: torch.Tensor
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield torch's own products: bf16, and fp8 under scales per row and per block."""
    yield "torch.mm bf16", lambda: torch.mm(x, dense.T)
    weight, (codes, scales) = quantize(dense, "fp8_channel"), quantize_rows(x, "fp8_channel")
    rows = torch_compat.scaled_mm_rowwise_function()
    yield (
        "torch scaled_mm rows",
        lambda: rows(codes, weight.values.t(), scales, weight.scales, x.dtype),
    )
    if dense.shape[0] % 128 or dense.shape[1] % 128:
        return
    block = quantize(dense, "fp8_block128")
    wide = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 4))
    given, factors = quantize_rows(wide, "fp8_block128")
    of_rows = torch_compat.block128_activation_scales(factors, "cuda")
    of_weight = torch_compat.block128_weight_scales(block.scales, "cuda")
    blocks = torch_compat.scaled_mm_block128_function()
    yield (
        "torch scaled_mm blocks",
        lambda: blocks(given, block.values.t(), of_rows, of_weight, x.dtype),
    )


def relative_error(layer: Linear, x: torch.Tensor, weight: Any) -> float:
    """Return the error of the first 16 rows in the Frobenius norm."""
    few = x[:16]
    wide = (weight if isinstance(weight, torch.Tensor) else weight.dequantize()).double()
    wanted = few.double() @ wide.T
    return float((layer(few).double() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
