"""Run binders that quantize under more than a scale per token, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from calibrated import quantize

import hal
from hal.ops.binding import Binding
from hal.ops.fused_moe import FUSED_MOE, activate
from hal.ops.linear import LINEAR
from hal.ops.quantize import fake_quantize
from hal.selection import choose, options_from

pytestmark = pytest.mark.interpreter
CASES = [
    ("triton_fp8", "fp8_static"),
    ("triton_fp8", "fp8_static_channel"),
    ("triton_int8", "int8_static"),
]
SHIFTED = [
    ("triton_int8", "int8_channel_asymmetric"),
    ("triton_int8", "int8_weight_zeros"),
    ("triton_decode", "int8_weight_zeros_w8a16"),
]


def bind(op, kernel, problem, *operands):
    """Return what a binder gives when it was chosen for a device that is not here."""
    platform, scheme = hal.platform("cuda:h100"), operands[0].scheme
    problem = {"dtype": "bfloat16", "tokens": 16, **problem}
    options = options_from(op.name, force=kernel)
    selection = choose(op.name, scheme.name, platform.device(0), problem, options)
    assert selection.kernel is not None, selection
    binding = Binding(selection, platform, scheme, torch.device("cpu"))
    return selection.kernel.load()(binding, *operands)


def seen(x, weight):
    fixed = None if weight.input_scale is None else weight.input_scale.amax()
    return fake_quantize(x, weight.scheme, weight.encoding, fixed).double()


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("kernel", "scheme"), [*CASES, *SHIFTED])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(3, 80, 256), (2, 144, 256), (33, 72, 200)]
)
def test_linear_against_float64(kernel, scheme, with_bias, tokens, rows, columns):
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(rows, columns, generator=generator).bfloat16() * 0.05
    # Channels on one side of 0 too, where there are zero points that say so.
    weight[::3] = weight[::3].abs() + 0.02
    weight = quantize(weight, scheme)
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(tokens, columns, generator=generator).bfloat16() + 0.5
    x[1, 3] = torch.nan
    problem = {"in_features": columns, "out_features": rows}
    launch, tensors = bind(LINEAR, kernel, problem, weight, bias)
    found = launch(x, tensors)
    assert found[1].isnan().all()
    wanted = seen(x, weight) @ weight.dequantize().double().T
    if bias is not None:
        wanted += bias.double()
    keep = [row for row in range(tokens) if row != 1]
    # The interpreter truncates where a device rounds to bf16.
    assert error(found[keep], wanted[keep]) < 2**-7.5


# Rows of absent slots are never written, so that the activation sees whatever memory held.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kernel", "scheme"), CASES)
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(5, 128, 64), (40, 136, 72)])
def test_experts_against_float64(kernel, scheme, tokens, hidden, intermediate):
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k = 4, 2
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator).bfloat16() * 0.1
    w2 = torch.randn(experts, hidden, intermediate, generator=generator).bfloat16() * 0.1
    w13, w2 = quantize(w13, scheme), quantize(w2, scheme, amax=3.0)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    ids[0, 0] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    problem = {
        "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate,
        "activation": "silu",
    }  # fmt: skip
    launch, tensors = bind(FUSED_MOE, kernel, problem, w13, w2)
    found = launch(x, ids, weights, tensors)

    wide13, wide2, rows = w13.dequantize().double(), w2.dequantize().double(), seen(x, w13)
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(top_k):
            expert = int(ids[token, slot])
            if expert >= 0:
                h = activate((wide13[expert] @ rows[token]).bfloat16().double(), "silu").bfloat16()
                y = wide2[expert] @ seen(h[None], w2)[0]
                wanted[token] += weights[token, slot].double() * y
    # gate, up and h are truncated to bf16 on the way, which moves codes of h by a step.
    assert error(found, wanted) < 0.03
