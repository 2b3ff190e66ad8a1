"""torch's own packed and block-scaled products: for real on a CPU, against imitations elsewhere."""

from __future__ import annotations

from dataclasses import replace

import adapter_fakes as fakes
import pytest
import torch
from calibrated import quantize

import hal
import hal.ops
from hal import torch_matmul, torch_packed
from hal.errors import ForcedKernelError
from hal.quant.uint4 import encode_uint4

BIAS = pytest.mark.parametrize("with_bias", [False, True])
INT4 = ("int4_w4a16", "int4_w4a16_g64", "int4_w4a16_g32", "uint4")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(4)


@pytest.fixture(autouse=True)
def fresh_getters():
    """Getters keep what they found: look again in each test, and after it."""
    yield
    torch_matmul.scaled_mm_tensorwise_function.cache_clear()
    for name in ("int8pack_function", "scaled_mm_blocked_function"):
        getattr(torch_packed, name).cache_clear()


def make(rows, columns, scheme, generator):
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[rows // 2] = 0
    weight = weight.bfloat16()
    if scheme != "uint4":
        return quantize(weight, scheme)
    like = quantize(weight, "int4_w4a16_g32")
    values, scales, zeros = encode_uint4(weight + 0.1, 32)
    return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")


def bias_of(rows, with_bias, generator, dtype=torch.bfloat16):
    return torch.randn(rows, generator=generator).to(dtype) if with_bias else None


def assert_near(out, want, x, tolerance=5e-3):
    assert out.dtype is x.dtype
    assert out.shape == want.shape
    assert float((out.double() - want).norm() / want.norm()) < tolerance


@BIAS
@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (80, 384), (1040, 256)])
def test_int4_on_a_cpu(scheme, rows, columns, with_bias, generator):
    weight, bias = make(rows, columns, scheme, generator), bias_of(rows, with_bias, generator)
    linear = hal.ops.Linear(weight, bias, force="torch_int4pack_cpu")
    for tokens in (1, 2, 17, 70):
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        assert_near(linear(x), fakes.expected("torch_int4pack_cpu", weight, x, bias), x)
    assert linear(x[:0]).shape == (0, rows)
    wide = torch.randn(5, 2 * columns, generator=generator).bfloat16()[:, ::2]
    assert torch.equal(linear(wide), linear(wide.contiguous()))


@BIAS
@pytest.mark.parametrize("scheme", ["int8_channel", "int8_w8a16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (33, 144), (1040, 256)])
def test_int8_on_a_cpu(scheme, rows, columns, with_bias, generator):
    weight, bias = make(rows, columns, scheme, generator), bias_of(rows, with_bias, generator)
    linear = hal.ops.Linear(weight, bias, force="torch_int8pack_cpu")
    for tokens in (1, 12, 13, 70):
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        want = fakes.expected("torch_int8pack_cpu", weight, x, bias)
        if want.norm():
            assert_near(linear(x), want, x)
    assert linear(x[:0]).shape == (0, rows)


@pytest.mark.parametrize(
    ("kernel", "scheme", "shape", "dtype", "reason"),
    [
        ("torch_int4pack_cpu", "int4_w4a16", (17, 128), torch.bfloat16, "out_features=17"),
        ("torch_int4pack_cpu", "int4_w4a16", (16, 200), torch.bfloat16, "in_features=200"),
        ("torch_int4pack_cpu", "int4_w4a16", (16, 128), torch.float16, "dtype=float16"),
        ("torch_int8pack_cpu", "int8_w8a16", (16, 30), torch.bfloat16, "beyond the end"),
        ("torch_int4pack", "int4_w4a16", (16, 128), torch.bfloat16, "found cpu, needs cuda"),
    ],
)
def test_what_torch_cannot_take_is_refused_before(kernel, scheme, shape, dtype, reason, generator):
    weight = make(*shape, scheme, generator)
    with pytest.raises(ForcedKernelError, match=reason):
        hal.ops.Linear(weight, dtype=dtype, force=kernel)


@BIAS
@pytest.mark.parametrize(
    ("device", "kernel", "rows"),
    [("cuda:h100", "torch_int4pack", 24), ("rocm:mi300x", "torch_int4pack_rocm", 48)],
)
@pytest.mark.parametrize("scheme", INT4)
def test_int4_on_a_gpu(device, kernel, rows, scheme, with_bias, generator, monkeypatch):
    monkeypatch.setattr(torch, "_weight_int4pack_mm", fakes.weight_int4pack_mm)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", fakes.convert_weight_to_int4pack)
    weight, bias = make(rows, 256, scheme, generator), bias_of(rows, with_bias, generator)
    linear = fakes.bind(device, kernel, weight, bias)
    for tokens in (1, 37):
        x = torch.randn(tokens, 512, generator=generator).bfloat16()[:, ::2]
        assert_near(linear(x), fakes.expected(kernel, weight, x, bias), x)


@BIAS
def test_int8_on_an_xpu(with_bias, generator, monkeypatch):
    monkeypatch.setattr(torch, "_weight_int8pack_mm", fakes.weight_int8pack_mm)
    torch_packed.int8pack_function.cache_clear()
    weight, bias = make(40, 96, "int8_w8a16", generator), bias_of(40, with_bias, generator)
    linear = fakes.bind("xpu:arc-b580", "torch_int8pack_xpu", weight, bias)
    x = torch.randn(9, 96, generator=generator).bfloat16()
    assert_near(linear(x), fakes.expected("torch_int8pack_xpu", weight, x, bias), x)


@BIAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel"])
@pytest.mark.parametrize("device", ["cuda:rtx-5090", "cuda:h100", "rocm:mi300x", "rocm:mi355x"])
def test_scaled_mm_with_one_scale(device, scheme, dtype, with_bias, generator, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", fakes.private_scaled_mm)
    monkeypatch.setattr("hal.ops.adapters.scaled_mm_unit.quantizer", fakes.reference_quantizer)
    torch_matmul.scaled_mm_tensorwise_function.cache_clear()
    weight, bias = make(48, 80, scheme, generator), bias_of(48, with_bias, generator, dtype)
    linear = fakes.bind(device, "torch_scaled_mm_unit", weight, bias, dtype)
    x = torch.randn(5, 80, generator=generator).to(dtype)
    bound = fakes.as_bound(weight, device)
    assert_near(linear(x), fakes.expected("torch_scaled_mm_unit", bound, x, bias), x)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="needs torch 2.10")
@BIAS
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "nvfp4", "nvfp4_static"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (144, 160), (272, 544)])
def test_scaled_mm_in_tiles(scheme, rows, columns, with_bias, generator, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fakes.scaled_mm)
    monkeypatch.setattr("hal.ops.adapters.scaled_mm_blocked.quantizer", fakes.reference_quantizer)
    torch_packed.scaled_mm_blocked_function.cache_clear()
    kernel = f"torch_scaled_mm_{scheme.removesuffix('_static')}"
    weight, bias = make(rows, columns, scheme, generator), bias_of(rows, with_bias, generator)
    linear = fakes.bind("cuda:b200", kernel, weight, bias)
    for tokens in (1, 5, 130):
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        x[tokens // 2] *= 1e3
        assert_near(linear(x), fakes.expected(kernel, weight, x, bias), x)


@pytest.mark.parametrize(
    ("device", "scheme", "able", "refused"),
    [
        ("cuda:h100", "int4_w4a16", {"torch_int4pack"}, {"torch_int4pack_rocm": "platform"}),
        ("cuda:t4", "int4_w4a16", set(), {"torch_int4pack": "found sm_75, needs sm_80 or newer"}),
        ("rocm:mi300x", "int4_w4a16", {"torch_int4pack_rocm"}, {"torch_int4pack": "platform"}),
        ("cuda:h100", "mxfp8", set(), {"torch_scaled_mm_mxfp8": "family sm_10x"}),
        ("cuda:rtx-5090", "nvfp4", set(), {"torch_scaled_mm_nvfp4": "family sm_10x"}),
        ("cuda:b200", "mxfp4", {"torch_scaled_mm_mxfp4"}, {}),
        ("cuda:rtx-5090", "fp8_channel", {"torch_scaled_mm_unit"}, {"torch_scaled_mm": "sm_120"}),
        ("cuda:rtx-3090", "fp8_channel", set(), {"torch_scaled_mm_unit": "e4m3fn math absent"}),
        ("xpu:arc-b580", "int8_w8a16", {"torch_int8pack_xpu"}, {"torch_int8pack_cpu": "platform"}),
    ],
)
def test_where_they_are_candidates(device, scheme, able, refused):
    selection = fakes.select(
        device, scheme, in_features=4096, out_features=4096, dtype="bfloat16", tokens=16
    )
    for name in able:
        assert selection.candidate(name).can_run, selection
    for name, reason in refused.items():
        assert reason in "; ".join(map(str, selection.candidate(name).failures)), selection
    assert not selection.candidates[0].claimed, "hal has run something else there"
