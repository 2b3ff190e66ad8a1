"""Print the relative error of every kernel that can run here, against float64.

Usage: python benchmarks/errors.py [--device cpu] [--schemes fp8_channel,mxfp8]

`error`: the formula is computed in float64 on exactly the operands that the kernel claims to use:
weights as they were quantized, activations as the scheme quantizes them for levels `native`,
`emulated` and `reference`, and as they are for `weight_only` and `dequant`. What is left is the
kernel's own rounding: of bf16 results, of the bf16 activated rows between two products, and of
codes of those rows that fall to the other side.

`cost`: the same result against the unquantized operands in float64, which is what the scheme costs.
Activations are normal numbers; scales of static schemes are fixed by these very activations.
"""

from __future__ import annotations

import argparse

import torch

import hal
from hal.errors import ForcedKernelError
from hal.ops import FusedMoE, Linear, Routing, route
from hal.ops.fused_moe import activate
from hal.ops.linear import fixed_scale
from hal.ops.quantize import fake_quantize
from hal.quant import QTensor, quantize
from hal.quant.calibrate import fixed_arguments
from hal.registry import Level, find_op

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 16, 4, 1024, 512
EXACT = (Level.WEIGHT_ONLY, Level.DEQUANT)


def seen(rows: torch.Tensor, weight: QTensor, level: Level) -> torch.Tensor:
    if level in EXACT or weight.scales is None:
        return rows.double()
    fixed = (*fixed_scale(weight), None)[0]
    return fake_quantize(rows, weight.scheme, weight.encoding, fixed).double()


def quantize_for(rows: torch.Tensor, weight: torch.Tensor, scheme: str) -> QTensor:
    """Return the weight, with what `rows` fix of activations if the scheme is static."""
    return quantize(weight, scheme, **fixed_arguments(scheme, rows.amin(), rows.amax()))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def linear_errors(kernel: str, scheme: str, device: torch.device) -> tuple[float, float]:
    """Return error and cost of one kernel of linear."""
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    dense = (torch.randn(INTERMEDIATE, HIDDEN, device=device) * 0.03).bfloat16()
    weight = quantize_for(x, dense, scheme)
    bound = Linear(weight, force=kernel, tokens=TOKENS)
    wanted = seen(x, weight, bound.selection.level) @ weight.dequantize().double().T
    found = bound(x)
    return error(found, wanted), error(found, x.double() @ dense.double().T)


def moe_errors(kernel: str, scheme: str, device: torch.device) -> tuple[float, float]:
    """Return error and cost of one kernel of fused_moe."""
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    dense13, dense2 = (
        (torch.randn(shape, device=device) * shape[2] ** -0.5).bfloat16() for shape in shapes
    )
    routing: Routing = route(torch.randn(TOKENS, EXPERTS, device=device), TOP_K)
    w13 = quantize_for(x, dense13, scheme)
    w2 = quantize_for(activate(x @ dense13.mT, "silu"), dense2, scheme)
    bound = FusedMoE(w13, w2, force=kernel, tokens=TOKENS, top_k=TOP_K)
    level = bound.selection.level
    rows = seen(x, w13, level)
    first, second = w13.dequantize().double(), w2.dequantize().double()
    wanted, exact = torch.zeros_like(rows), torch.zeros_like(rows)
    for expert in range(EXPERTS):
        token, slot = (routing.ids == expert).nonzero(as_tuple=True)
        share = routing.weights[token, slot].double().unsqueeze(-1)
        h = activate(rows[token] @ first[expert].T, "silu").bfloat16()
        wanted.index_add_(0, token, seen(h, w2, level) @ second[expert].T * share)
        plain = activate(x[token].double() @ dense13[expert].double().T, "silu")
        exact.index_add_(0, token, plain @ dense2[expert].double().T * share)
    found = bound(x, routing)
    return error(found, wanted), error(found, exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = hal.current_platform().torch_device_type
    parser.add_argument("--device", default=default)
    parser.add_argument("--schemes", help="these alone, separated by commas")
    options = parser.parse_args()
    device, wanted = torch.device(options.device), (options.schemes or "").split(",")
    torch.manual_seed(20261124)
    print(f"{device}, torch {torch.__version__}")
    print(f"{'op':<10} {'scheme':<24} {'kernel':<25} {'level':<12} {'error':<8} cost")
    for op, measure in (("linear", linear_errors), ("fused_moe", moe_errors)):
        for kernel in find_op(op).kernels:
            for scheme in kernel.schemes:
                if options.schemes and scheme not in wanted:
                    continue
                try:
                    hal.select(op, scheme=scheme, force=kernel.name)  # before weights are made
                    found, cost = measure(kernel.name, scheme, device)
                except ForcedKernelError:
                    continue
                print(f"{op:<10} {scheme:<24} {kernel.name:<25} {kernel.level!s:<12} "
                      f"{found:<8.5f} {cost:.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
