"""Compare every Triton kernel with the reference at sizes of real layers, on a GPU.

Small problems take small tiles: those of many rows, with all their stages and warps, are only
chosen here. The reference quantizes activations as the kernel does, so the tolerance is that of
the matrix instruction and of one rounding of the intermediate rows, not of the scheme.
"""

from __future__ import annotations

import math

import pytest
import torch

from hal.errors import HalError
from hal.ops import FusedMoE, Linear, Routing
from hal.quant import SCHEMES, quantize
from hal.registry import Level, find_op

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 2048, 768
# Rows of an expert: 1, 4, 16, 32, 64, 128, 1024.
TOKENS = (1, 16, 64, 128, 256, 512, 4096)
# Rows that keep activations in bf16 differ from the reference of a scheme with 8 or 4 bits.
UNQUANTIZED = {"e4m3fn": 0.06, "e4m3fnuz": 0.06, "int8": 0.03, "e2m1": 0.25}


def cells(op):
    """Return (scheme, kernel) of every kernel of hal's own that compiles with Triton."""
    return [
        (scheme, kernel.name)
        for kernel in find_op(op).kernels
        if kernel.name.startswith("triton") and kernel.level is not Level.REFERENCE
        for scheme in kernel.schemes
    ]


def tolerance(op, scheme, kernel):
    """Return the relative error allowed in the Frobenius norm."""
    level = next(found.level for found in find_op(op).kernels if found.name == kernel)
    own = SCHEMES[scheme].activation.format
    if level is Level.WEIGHT_ONLY and own:
        return UNQUANTIZED[own]
    # Quantized activations at the edge of two codes fall to either side.
    return {None: 0.008, "e2m1": 0.04}.get(own, 0.02)


def assert_near(found, wanted, allowed):
    assert found.isfinite().all(), f"{(~found.isfinite()).sum()} of {found.numel()} not finite"
    error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
    assert error <= allowed, f"relative error {error:.5f} > {allowed}"


def weights(*shape):
    generator = torch.Generator("cuda").manual_seed(7)
    w = torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    return w / math.sqrt(shape[-1])


@pytest.mark.parametrize(("scheme", "kernel"), cells("fused_moe"))
def test_fused_moe(scheme, kernel):
    w13 = quantize(weights(EXPERTS, 2 * INTERMEDIATE, HIDDEN), scheme)
    w2 = quantize(weights(EXPERTS, HIDDEN, INTERMEDIATE), scheme)
    generator = torch.Generator("cuda").manual_seed(8)
    for tokens in TOKENS:
        options = {"top_k": TOP_K, "tokens": tokens}
        try:
            bound = FusedMoE(w13, w2, force=kernel, **options)
        except HalError as error:
            pytest.skip(f"needs another device: {str(error)[:200]}")
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
        scores = torch.rand(tokens, EXPERTS, device="cuda", generator=generator)
        found, ids = scores.softmax(-1).topk(TOP_K, -1)
        routing = Routing(ids=ids.int(), weights=found)
        wanted = FusedMoE(w13, w2, force="reference", **options)(x, routing)
        for _ in range(2):  # a race may spare the first call
            assert_near(bound(x, routing), wanted, tolerance("fused_moe", scheme, kernel))


@pytest.mark.parametrize(("scheme", "kernel"), cells("linear"))
def test_linear(scheme, kernel):
    weight = quantize(weights(4096, HIDDEN), scheme)
    generator = torch.Generator("cuda").manual_seed(9)
    for rows in (1, 2, 16, 32, 64, 128, 1024, 4096):
        try:
            bound = Linear(weight, force=kernel, tokens=rows)
        except HalError as error:
            pytest.skip(f"needs another device: {str(error)[:200]}")
        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
        wanted = Linear(weight, force="reference", tokens=rows)(x)
        for _ in range(2):
            assert_near(bound(x), wanted, tolerance("linear", scheme, kernel))
