"""Run the binder of scaled products around an imitation of the kernel, and the kernel on a GPU.

The interpreter has no `tl.dot_scaled`. The imitation takes codes and scales apart bit by bit.
"""

from __future__ import annotations

import adapter_fakes as fakes
import pytest
import torch
from calibrated import quantize

from hal.errors import ForcedKernelError
from hal.ops import Linear
from hal.ops.quantize import fake_quantize
from hal.registry import find_op

NATIVE = [
    ("triton_scaled", "mxfp8"),
    ("triton_scaled", "mxfp4"),
    ("triton_scaled_mixed", "mxfp4_w4a8"),
    ("triton_scaled_nvfp4", "nvfp4"),
    ("triton_scaled_nvfp4", "nvfp4_static"),
]
SUMS = [("triton_scaled_fp8", scheme) for scheme in ("mxfp8", "mxfp4_w4a8")]
EMULATED = [("triton_scaled_emulated", scheme) for scheme in ("mxfp8", "mxfp4", "mxfp4_w4a8")]


def numbers(codes, scales, k):
    """Return operands in float64: e2m1 or e4m3 under e8m0 bytes or e4m3."""
    if codes.dtype is torch.uint8:
        codes = fakes.E2M1[fakes.columns_of_bytes(codes)]
    scales = 2.0 ** (scales.double() - 127) if scales.dtype is torch.uint8 else scales.double()
    return codes[:, :k].double() * scales.repeat_interleave(-(-k // scales.shape[1]), 1)[:, :k]


def scaled_gemm(
    a, a_scales, b, b_scales, out, *, k, kind, tile, bias=None, a_second=None, b_second=None
):
    assert out.shape == (a.shape[0], b.shape[0])
    assert (kind == "nvfp4") == (a_second is not None) == (b_second is not None)
    result = numbers(a, a_scales, k) @ numbers(b, b_scales, k).T
    if a_second is not None:
        result *= a_second.double()[:, None] * b_second.double()
    out.copy_(result if bias is None else result + bias.double())


def inputs(scheme, rows, columns, tokens, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(rows + tokens)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.rand(columns // 32, generator=generator).repeat_interleave(32) + 0.1
    weight[rows // 2] = 0
    x = torch.randn(tokens, columns, generator=generator)
    x *= torch.logspace(-3, 3, tokens)[:, None]
    bias = torch.randn(rows, generator=generator)
    weight, x, bias = (tensor.to(dtype).to(device) for tensor in (weight, x, bias))
    return quantize(weight, scheme, amax=8.0), x, bias


def assert_near(found, weight, x, bias):
    """Compare row by row, since tokens differ by orders of magnitude."""
    wanted = fake_quantize(x, weight.scheme, weight.encoding, weight.input_scale).double()
    wanted = wanted @ weight.dequantize().double().T
    wanted = wanted if bias is None else wanted + bias.double()
    difference = (found.double() - wanted).norm(dim=-1)
    assert (difference <= 2**-7 * wanted.norm(dim=-1)).all()


@pytest.mark.parametrize("device", ["cuda:b200", "rocm:mi355x"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("kernel", "scheme"), NATIVE)
def test_the_binder_hands_over_every_operand(monkeypatch, device, kernel, scheme, with_bias):
    if device == "rocm:mi355x" and scheme.startswith("nvfp4"):
        with pytest.raises(AssertionError, match="needs sm_100"):
            fakes.bind(device, kernel, inputs(scheme, 16, 64, 1)[0])
        return
    monkeypatch.setattr("hal.ops.kernels.scaled.scaled_gemm", scaled_gemm)
    monkeypatch.setattr("hal.ops.scaled.quantizer", fakes.reference_quantizer)
    for tokens, rows, columns in ((1, 48, 64), (5, 33, 160), (130, 72, 256)):
        weight, x, bias = inputs(scheme, rows, columns, tokens)
        bias = bias if with_bias else None
        assert_near(fakes.bind(device, kernel, weight, bias)(x), weight, x, bias)


@pytest.mark.parametrize(
    ("device", "scheme", "able"),
    [
        ("cuda:b200", "nvfp4", {"triton_scaled_nvfp4"}),
        ("cuda:rtx-5090", "mxfp4", {"triton_scaled"}),
        ("cuda:rtx-5090", "mxfp4_w4a8", {"triton_scaled_fp8"}),
        ("cuda:rtx-4090", "mxfp4_w4a8", {"triton_scaled_fp8"}),
        ("cuda:rtx-3090", "mxfp4_w4a8", set()),
        ("rocm:mi355x", "mxfp4_w4a8", {"triton_scaled_mixed"}),
        ("rocm:mi300x", "mxfp8", {"triton_scaled_fp8"}),
        ("rocm:mi300x", "mxfp4", set()),
        ("cuda:h200", "mxfp8", {"triton_scaled_emulated", "triton_scaled_fp8"}),
        ("cuda:h200", "nvfp4", set()),
    ],
)
def test_where_it_is_a_candidate(device, scheme, able):
    problem = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16", "tokens": 512}
    selection = fakes.select(device, scheme, **problem)
    names = [kernel.name for kernel in find_op("linear").kernels if "triton_scaled" in kernel.name]
    found = {
        name
        for name in names
        if scheme in find_op("linear").find(name).schemes and selection.candidate(name).can_run
    }
    assert found == able
    assert selection.kernel.name != "triton_scaled_emulated"
    odd = fakes.select(device, scheme, **{**problem, "in_features": 4088})
    for name in able:
        assert "multiple of 32" in "; ".join(map(str, odd.candidate(name).failures))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 1, 32), (3, 33, 96), (16, 100, 160), (17, 1000, 1056), (65, 129, 224), (300, 257, 544)],
)
@pytest.mark.parametrize(("kernel", "scheme"), [*NATIVE, *SUMS, *EMULATED])
def test_odd_sizes_against_float64(device, kernel, scheme, tokens, rows, columns, dtype):
    weight, x, bias = inputs(scheme, rows, columns, tokens, dtype, device)
    try:
        bound = Linear(weight, bias, force=kernel, tokens=tokens, dtype=dtype)
    except ForcedKernelError as error:
        failures = error.selection.candidate(kernel).failures
        pytest.skip(f"{kernel}: " + "; ".join(map(str, failures)))
    assert_near(bound(x), weight, x, bias)
    poisoned = x.clone()
    poisoned[tokens // 2, columns // 2] = float("nan")
    found = bound(poisoned)
    assert found[tokens // 2].isnan().all()
    keep = [row for row in range(tokens) if row != tokens // 2]
    assert torch.equal(found[keep], bound(x)[keep])
