"""Print the relative error of every kernel that can run here, against float64.

Usage: python benchmarks/errors.py [--device cpu]

The formula is computed in float64 on exactly the operands that the kernel claims to use: weights as
they were quantized, activations as the scheme quantizes them for levels `native`, `emulated` and
`reference`, and as they are for `weight_only` and `dequant`. What is left is the kernel's own
rounding: of bf16 results, of the bf16 activated rows between two products, and of 8-bit codes of
those rows that fall to the other side.
"""

from __future__ import annotations

import argparse

import torch

import hal
from hal.errors import ForcedKernelError
from hal.ops import FusedMoE, Linear, Routing, route
from hal.ops.fused_moe import activate
from hal.ops.quantize import fake_quantize
from hal.quant import QTensor, quantize
from hal.registry import Level, find_op

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 16, 4, 1024, 512
EXACT = (Level.WEIGHT_ONLY, Level.DEQUANT)


def seen(rows: torch.Tensor, weight: QTensor, level: Level) -> torch.Tensor:
    if level in EXACT or weight.scales is None:
        return rows.double()
    return fake_quantize(rows, weight.scheme, weight.encoding).double()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def linear_error(kernel: str, scheme: str, device: torch.device) -> float:
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    weight = quantize((torch.randn(INTERMEDIATE, HIDDEN, device=device) * 0.03).bfloat16(), scheme)
    bound = Linear(weight, force=kernel, tokens=TOKENS)
    wanted = seen(x, weight, bound.selection.level) @ weight.dequantize().double().T
    return error(bound(x), wanted)


def moe_error(kernel: str, scheme: str, device: torch.device) -> float:
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    w13, w2 = (
        quantize((torch.randn(shape, device=device) * shape[2] ** -0.5).bfloat16(), scheme)
        for shape in shapes
    )
    routing: Routing = route(torch.randn(TOKENS, EXPERTS, device=device), TOP_K)
    bound = FusedMoE(w13, w2, force=kernel, tokens=TOKENS, top_k=TOP_K)
    level = bound.selection.level
    first, second = w13.dequantize().double(), w2.dequantize().double()
    rows = seen(x, w13, level)
    wanted = torch.zeros_like(rows)
    for expert in range(EXPERTS):
        token, slot = (routing.ids == expert).nonzero(as_tuple=True)
        h = activate(rows[token] @ first[expert].T, "silu").bfloat16()
        y = seen(h, w2, level) @ second[expert].T
        wanted.index_add_(0, token, y * routing.weights[token, slot].double().unsqueeze(-1))
    return error(bound(x, routing), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = hal.current_platform().torch_device_type
    parser.add_argument("--device", default=default)
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(20261124)
    print(f"{device}, torch {torch.__version__}")
    print(f"{'op':<10} {'scheme':<13} {'kernel':<25} {'level':<12} error")
    for op, measure in (("linear", linear_error), ("fused_moe", moe_error)):
        for kernel in find_op(op).kernels:
            for scheme in kernel.schemes:
                try:
                    found = measure(kernel.name, scheme, device)
                except ForcedKernelError:
                    continue
                print(f"{op:<10} {scheme:<13} {kernel.name:<25} {kernel.level!s:<12} {found:.5f}")


if __name__ == "__main__":
    main()
