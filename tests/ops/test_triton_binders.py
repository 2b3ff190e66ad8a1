"""Run the binders of weight-only kernels in Triton's interpreter, for a simulated device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hal
from hal.ops import decoded, expanded_experts, tiles
from hal.ops.binding import Binding
from hal.ops.fused_moe import FUSED_MOE, activate
from hal.ops.linear import LINEAR
from hal.quant import find_scheme, quantize
from hal.quant.uint4 import encode_uint4
from hal.selection import choose, options_from

pytestmark = pytest.mark.interpreter
BINDERS = ("triton_decode", "triton_packed")
# One for each way of `hal.ops.decoded`: few, some and many rows, the last expanded in parts.
SIZES = [(1, 80, 256, True), (3, 80, 256, False), (33, 72, 200, True), (130, 136, 128, True)]


def cases(op):
    return [(name, scheme) for name in BINDERS for scheme in sorted(op.find(name).schemes)]


def bind(op, kernel, problem, scheme, *operands):
    """Return what a binder gives when it was chosen for a device that is not here."""
    platform = hal.platform("cuda:a100")
    problem = {"dtype": "bfloat16", "tokens": 16, **problem}
    options = options_from(op.name, force=kernel)
    selection = choose(op.name, scheme, platform.device(0), problem, options)
    assert selection.kernel is not None, selection
    assert selection.kernel.name == kernel
    binding = Binding(selection, platform, find_scheme(scheme), torch.device("cpu"))
    return selection.kernel.load()(binding, *operands)


def with_zeros(weight):
    """Return a bf16 weight as int4 with zero points, in groups of 32."""
    like = quantize(weight, "int4_w4a16_g32")
    values, scales, zeros = encode_uint4(weight, 32)
    return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")


def assert_near(found, wanted, rtol):
    atol = float(wanted.abs().max()) * rtol / 4
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("kernel", "scheme"), [*cases(LINEAR), ("triton_packed", "uint4"), ("triton", "bf16")]
)
@pytest.mark.parametrize(("tokens", "rows", "columns", "with_bias"), SIZES)
def test_linear_against_float64(monkeypatch, kernel, scheme, tokens, rows, columns, with_bias):
    monkeypatch.setattr(decoded, "EXPANDED_BYTES", 128 * 2 * columns)
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:16] = 0
    weight = weight.bfloat16()
    weight = with_zeros(weight) if scheme == "uint4" else quantize(weight, scheme)
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    problem = {"in_features": columns, "out_features": rows}
    launch, tensors = bind(LINEAR, kernel, problem, weight.scheme.name, weight, bias)
    wanted = x.double() @ weight.dequantize().double().T
    if bias is not None:
        wanted += bias.double()
    # The interpreter truncates where a device rounds to bf16: outputs, and expanded weights.
    assert_near(launch(x, tensors), wanted, 2**-7 if tokens < 100 else 2**-6)


@pytest.mark.parametrize(
    ("kernel", "scheme"), [*cases(FUSED_MOE), ("triton_packed", "uint4 and int4")]
)
# Rows of absent slots are never written, so that the activation sees whatever memory held.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "expanded"),
    [(5, 128, 64, False), (40, 136, 72, False), (9, 136, 72, True)],
)
def test_experts_against_float64(
    monkeypatch, kernel, scheme, tokens, hidden, intermediate, expanded
):
    if expanded:  # two experts at a time
        monkeypatch.setattr(tiles, "rows_before_expanding", lambda *_, **__: 0)
        monkeypatch.setattr(expanded_experts, "EXPANDED_BYTES", 2 * 2 * 2 * intermediate * hidden)
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k = 4, 2
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator).bfloat16() * 0.1
    w2 = torch.randn(experts, hidden, intermediate, generator=generator).bfloat16() * 0.1
    if scheme == "uint4 and int4":
        w13, w2 = with_zeros(w13), quantize(w2, "int4_w4a16_g32")
    else:
        w13, w2 = quantize(w13, scheme), quantize(w2, scheme)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    ids[0, 0] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    problem = {
        "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate,
        "activation": "silu",
    }  # fmt: skip
    launch, tensors = bind(FUSED_MOE, kernel, problem, w13.scheme.name, w13, w2)
    found = launch(x, ids, weights, tensors)

    wide13, wide2 = w13.dequantize().double(), w2.dequantize().double()
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(top_k):
            expert = int(ids[token, slot])
            if expert >= 0:
                h = activate(x[token].double() @ wide13[expert].T, "silu")
                wanted[token] += weights[token, slot].double() * (wide2[expert] @ h)
    # gate, up and h are truncated to bf16 on the way.
    assert_near(found, wanted, 0.03)
