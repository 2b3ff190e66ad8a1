"""Run the binders of W4A8 in Triton's interpreter, for a simulated device with 8-bit products."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.ops.binding import Binding
from hal.ops.fused_moe import FUSED_MOE, activate
from hal.ops.linear import LINEAR
from hal.ops.quantize import fake_quantize
from hal.quant import find_scheme, quantize, to_layout
from hal.selection import choose, options_from

pytestmark = pytest.mark.interpreter
SCHEME, KERNEL = find_scheme("int4_w4a8_fp8"), "triton_w4a8"


def bind(op, problem, weights, *further):
    """Return what the binder gives when it was chosen for a device that is not here."""
    platform = hal.platform("cuda:h100")
    problem = {"dtype": "bfloat16", "tokens": 16, **problem}
    selection = choose(
        op.name, SCHEME.name, platform.device(0), problem, options_from(op.name, force=KERNEL)
    )
    assert selection.kernel is not None, selection
    binding = Binding(selection, platform, SCHEME, torch.device("cpu"))
    planes = [to_layout(weight, "int4_planes", "cpu") for weight in weights]
    return selection.kernel.load()(binding, *planes, *further)


def shown(x):
    """Return rows as the scheme's activations show them, in float64."""
    return fake_quantize(x, SCHEME, "e4m3fn").double()


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "with_bias"),
    [(1, 80, 256, True), (3, 300, 200, False), (33, 72, 131, True)],
)
def test_linear_against_float64(tokens, rows, columns, with_bias):
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:16] = 0
    weight = quantize(weight.bfloat16(), SCHEME)
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    problem = {"in_features": columns, "out_features": rows}
    launch, tensors = bind(LINEAR, problem, [weight], bias)
    wanted = shown(x) @ weight.dequantize().double().T
    if bias is not None:
        wanted += bias.double()
    atol = float(wanted.abs().max()) * 2**-9
    # The interpreter truncates where a device rounds the output to bf16.
    torch.testing.assert_close(launch(x, tensors).double(), wanted, rtol=2**-7, atol=atol)


# Rows of absent slots are never written, so that the activation sees whatever memory held.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(5, 128, 64), (20, 136, 72)])
def test_experts_against_float64(tokens, hidden, intermediate):
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k = 4, 2
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator).bfloat16() * 0.1
    w2 = torch.randn(experts, hidden, intermediate, generator=generator).bfloat16() * 0.1
    w13, w2 = quantize(w13, SCHEME), quantize(w2, SCHEME)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    ids[0, 0] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    problem = {
        "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate,
        "activation": "silu",
    }  # fmt: skip
    launch, tensors = bind(FUSED_MOE, problem, [w13, w2])
    found = launch(x, ids, weights, tensors)
    wide13, wide2, rows = w13.dequantize().double(), w2.dequantize().double(), shown(x)
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(top_k):
            expert = int(ids[token, slot])
            if expert >= 0:
                h = activate(rows[token] @ wide13[expert].T, "silu").bfloat16()[None]
                wanted[token] += weights[token, slot].double() * (wide2[expert] @ shown(h)[0])
    # h is rounded to 8 bits after truncated sums: some of its codes fall to the other side.
    atol = float(wanted.abs().max()) * 0.03
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=atol)
