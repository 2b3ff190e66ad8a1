"""Products of other packages, against imitations that check what they are given."""

from __future__ import annotations

import adapter_fakes as fakes
import pytest
import torch
from calibrated import quantize

from hal.errors import PlatformError

BIAS = pytest.mark.parametrize("with_bias", [False, True])
ADAPTERS = ("vllm_cutlass", "deep_gemm", "flashinfer")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install imitations of every package, and quantize without Triton."""
    for name in ADAPTERS:
        monkeypatch.setattr(f"hal.ops.adapters.{name}.quantizer", fakes.reference_quantizer)
    vllm = fakes.Operators("_C")
    vllm.add(fakes.CUTLASS_SCALED_MM, fakes.cutlass_scaled_mm)
    vllm.add(fakes.CUTLASS_SCALED_FP4_MM, fakes.cutlass_scaled_fp4_mm)
    fakes.module(monkeypatch, "vllm._custom_ops")
    fakes.module(monkeypatch, "deep_gemm", fp8_gemm_nt=fakes.fp8_gemm_nt)
    fakes.module(
        monkeypatch,
        "flashinfer.gemm",
        gemm_fp8_nt_groupwise=fakes.gemm_fp8_nt_groupwise,
        mm_fp4=fakes.mm_fp4,
        mm_mxfp8=fakes.mm_mxfp8,
    )
    yield
    vllm.close()


def check(device, kernel, scheme, shape, with_bias, dtype, generator, tolerance=5e-3):
    """Bind a kernel by name and compare it with float64 for several numbers of rows."""
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.rand(rows, 1, generator=generator) + 0.1  # scales that differ between rows
    weight[rows // 2] = 0
    weight = quantize(weight.bfloat16(), scheme, amax=60.0)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    linear = fakes.bind(device, kernel, weight, bias, dtype)
    weight = fakes.as_bound(weight, device)
    for tokens in (1, 5, 132):
        x = torch.randn(tokens, 2 * columns, generator=generator)[:, ::2].to(dtype)
        x[tokens // 2] *= 30
        out, want = linear(x), fakes.expected(kernel, weight, x, bias)
        assert out.dtype is dtype
        assert out.shape == want.shape
        assert float((out.double() - want).norm() / want.norm()) < tolerance
        silent = x.clone()
        silent[0] = 0
        bottom = torch.zeros(rows).double() if bias is None else bias.double()
        torch.testing.assert_close(linear(silent)[0].double(), bottom)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@BIAS
@HALVES
@pytest.mark.parametrize(
    ("device", "kernel", "scheme"),
    [
        ("cuda:h100", "vllm_cutlass_fp8", "fp8_channel"),
        ("cuda:rtx-5090", "vllm_cutlass_fp8", "fp8_tensor"),
        ("cuda:t4", "vllm_cutlass_int8", "int8_channel"),
    ],
)
def test_scales_per_row(device, kernel, scheme, with_bias, dtype, generator):
    check(device, kernel, scheme, (48, 80), with_bias, dtype, generator)


@BIAS
@HALVES
@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        ("cuda:h100", "vllm_cutlass_block128"),
        ("cuda:b200", "vllm_cutlass_block128"),
        ("cuda:b200", "flashinfer_fp8"),
    ],
)
@pytest.mark.parametrize("shape", [(128, 128), (256, 640)])
def test_scales_per_block(device, kernel, shape, with_bias, dtype, generator):
    check(device, kernel, "fp8_block128", shape, with_bias, dtype, generator)


@BIAS
@pytest.mark.parametrize("shape", [(64, 128), (320, 640)])
def test_deep_gemm(shape, with_bias, generator):
    args = shape, with_bias, torch.bfloat16, generator
    check("cuda:h100", "deep_gemm_fp8", "fp8_block128", *args)


@BIAS
@pytest.mark.parametrize("kernel", ["vllm_cutlass_nvfp4", "flashinfer_nvfp4"])
@pytest.mark.parametrize("device", ["cuda:b200", "cuda:rtx-5090"])
@pytest.mark.parametrize("shape", [(32, 32), (160, 544)])
@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4_static"])
def test_nvfp4(device, kernel, scheme, shape, with_bias, generator):
    fakes.skip_without_dtypes("nvfp4")
    check(device, kernel, scheme, shape, with_bias, torch.bfloat16, generator)


@BIAS
@HALVES
@pytest.mark.parametrize("device", ["cuda:b200", "cuda:rtx-5090"])
@pytest.mark.parametrize("shape", [(128, 128), (160, 544)])
def test_mxfp8(device, shape, with_bias, dtype, generator):
    check(device, "flashinfer_mxfp8", "mxfp8", shape, with_bias, dtype, generator)


def test_sizes_that_flashinfer_computes_nan_for_are_declined():
    for more, told in (
        ({"in_features": 96}, "128 <= in_features"),
        ({"out_features": 96}, "128 <= out_features"),
        ({"out_features": 136}, "out_features a multiple of 32"),
    ):
        selection = fakes.select("cuda:b200", "mxfp8", **SIZES | more)
        assert told in str(selection.candidate("flashinfer_mxfp8").failures), selection


SIZES = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16", "tokens": 16}
CANDIDATES = {
    ("cuda:h100", "fp8_channel"): {"vllm_cutlass_fp8"},
    ("cuda:h100", "fp8_block128"): {"vllm_cutlass_block128", "deep_gemm_fp8"},
    ("cuda:b200", "fp8_block128"): {"vllm_cutlass_block128", "flashinfer_fp8"},
    ("cuda:b200", "nvfp4"): {"vllm_cutlass_nvfp4", "flashinfer_nvfp4"},
    ("cuda:rtx-5090", "nvfp4"): {"vllm_cutlass_nvfp4", "flashinfer_nvfp4"},
    ("cuda:b200", "mxfp8"): {"flashinfer_mxfp8"},
    ("cuda:rtx-5090", "mxfp8"): {"flashinfer_mxfp8"},
    ("cuda:h100", "mxfp8"): set(),
    ("cuda:b200", "int8_channel"): set(),
    ("cuda:rtx-3090", "int8_channel"): {"vllm_cutlass_int8"},
    ("cuda:rtx-3090", "fp8_channel"): set(),
    ("cuda:t4", "int8_channel"): {"vllm_cutlass_int8"},
    ("rocm:mi300x", "fp8_channel"): set(),
    ("xpu:arc-b580", "fp8_channel"): set(),
}
PREFIXES = ("vllm_cutlass", "deep_gemm", "flashinfer")


def able_of(selection):
    return {
        row.kernel.name
        for row in selection.candidates
        if row.can_run and row.kernel.name.startswith(PREFIXES)
    }


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates(device, scheme):
    selection = fakes.select(device, scheme, **SIZES)
    assert able_of(selection) == CANDIDATES[device, scheme], selection
    assert not selection.candidates[0].claimed, "hal has run something else there"


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_a_package_that_is_not_installed_is_a_reason(device, scheme):
    selection = fakes.select(device, scheme, packages=(), **SIZES)
    assert not able_of(selection)
    for name in CANDIDATES[device, scheme]:
        (failure,) = selection.candidate(name).failures
        assert "not installed" in str(failure)


def test_a_broken_or_old_package_is_a_reason():
    packages = (("vllm", "0.9.2"), ("deep-gemm", "2.1.0"))
    reason = "ImportError: undefined symbol: _ZN3c104cuda"
    broken = (("deep-gemm", reason),)
    selection = fakes.select("cuda:h100", "fp8_block128", packages=packages, broken=broken, **SIZES)
    assert reason in str(selection.candidate("deep_gemm_fp8").failures[0])
    failure = selection.candidate("vllm_cutlass_block128").failures[0]
    assert str(failure) == "package: found vllm 0.9.2, needs vllm >= 0.10.2"


def test_a_package_that_breaks_when_it_is_bound_says_what_to_do(generator, monkeypatch):
    weight = quantize(torch.randn(64, 128, generator=generator).bfloat16(), "fp8_block128")
    fakes.module(monkeypatch, "deep_gemm", fp8_gemm_nt=None)
    with pytest.raises(PlatformError, match=r"deep_gemm.fp8_gemm_nt in this version"):
        fakes.bind("cuda:h100", "deep_gemm_fp8", weight)
    monkeypatch.setitem(fakes.sys.modules, "deep_gemm", None)  # importing it raises now
    with pytest.raises(PlatformError, match=r"importing deep_gemm fails .*hal doctor"):
        fakes.bind("cuda:h100", "deep_gemm_fp8", weight)
