"""Run the binders of weight-only products in Triton's interpreter, for a simulated device."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.ops.binding import Binding
from hal.ops.linear import LINEAR
from hal.quant import find_scheme, quantize
from hal.selection import choose, options_from

pytestmark = pytest.mark.interpreter
BINDERS = ("triton_decode", "triton_packed")
CASES = [(kernel, scheme) for kernel in BINDERS for scheme in sorted(LINEAR.find(kernel).schemes)]


def bind(kernel, weight, bias, device, dtype):
    """Return what a binder gives when it was chosen for a device that is not here."""
    platform = hal.platform(device)
    rows, columns = weight.shape
    problem = {"in_features": columns, "out_features": rows, "dtype": dtype, "tokens": 16}
    selection = choose(
        "linear",
        weight.scheme.name,
        platform.device(0),
        problem,
        options_from("linear", force=kernel),
    )
    assert selection.kernel is not None, selection
    assert selection.kernel.name == kernel
    binding = Binding(selection, platform, find_scheme(weight.scheme), torch.device("cpu"))
    return selection.kernel.load()(binding, weight, bias)


@pytest.mark.parametrize(("kernel", "scheme"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 80, 256), (33, 72, 200)])
def test_against_float64(kernel, scheme, with_bias, tokens, rows, columns):
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:16] = 0
    weight = quantize(weight.bfloat16(), scheme)
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    launch, tensors = bind(kernel, weight, bias, "cuda:a100", "bfloat16")
    found = launch(x, tensors).double()
    wanted = x.double() @ weight.dequantize().double().T
    if bias is not None:
        wanted += bias.double()
    # The interpreter truncates where the device rounds to bf16.
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=float(wanted.abs().max()) * 2e-6)
