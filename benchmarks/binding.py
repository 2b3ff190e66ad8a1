"""Measure the device memory and the time that binding experts takes.

Usage: python benchmarks/binding.py [--experts 128] [--hidden 2048] [--intermediate 768]

`peak` is the most memory allocated while binding, the weights given included, as a multiple of
their bytes: `new` leaves the weights as they were, `in place` is `FusedMoE(..., inplace=True)`.
`ms` is the time of a second binding, all done on the device, and `GB/s` the weights' bytes, read
once, over it.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch

import hal
from hal.ops import FusedMoE
from hal.quant import SCHEMES, QTensor, input_scale, quantize

SCALE_OF = 4.0
"""Largest activation that static schemes are told of: it changes no time."""


def main() -> None:
    """Print a line for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    options = parser.parse_args()
    spec = hal.current_platform().device(0)
    print(f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}, "
          f"{options.experts} experts, {options.hidden} x {options.intermediate}")  # fmt: skip
    print(
        f"{'scheme':<25}{'kernel':<24}{'MB':>8}{'peak new':>10}{'in place':>10}{'ms':>8}{'GB/s':>8}"
    )
    shapes = (
        (options.experts, 2 * options.intermediate, options.hidden),
        (options.experts, options.hidden, options.intermediate),
    )
    for scheme in SCHEMES:
        weights = [weight(shape, scheme) for shape in shapes]
        size = sum(part.nbytes for part in weights)
        bind(weights)  # compiles what it needs
        bound, peak, seconds = measured(weights, inplace=False)
        kernel = bound.kernel
        del bound
        _, rewritten, _ = measured(weights, inplace=True)
        print(f"{scheme:<25}{kernel:<24}{size / 1e6:>8.1f}{1 + peak / size:>10.3f}"
              f"{1 + rewritten / size:>10.3f}{seconds * 1e3:>8.2f}{size / seconds / 1e9:>8.0f}",
              flush=True)  # fmt: skip
        del weights


def weight(shape: tuple[int, ...], scheme: str) -> QTensor:
    """Return a random weight under a scheme."""
    static = {"input_scale": input_scale(SCALE_OF, scheme)} if SCHEMES[scheme].static else {}
    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return quantize(values, scheme, **static)


def bind(weights: list[QTensor], *, inplace: bool = False) -> FusedMoE:
    """Bind for a middling number of tokens."""
    return FusedMoE(*weights, tokens=128, top_k=8, inplace=inplace)


def measured(weights: list[QTensor], *, inplace: bool) -> tuple[FusedMoE, int, float]:
    """Return what was bound, the bytes that this took at most, and the seconds."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    bound = bind(weights, inplace=inplace)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return bound, torch.cuda.max_memory_allocated() - before, seconds


if __name__ == "__main__":
    main()
