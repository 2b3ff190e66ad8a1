"""Products that read weights in an order of their own, against imitations that undo the order."""

from __future__ import annotations

from dataclasses import replace

import adapter_fakes as fakes
import adapter_fakes_mixed as mixed
import pytest
import torch
from calibrated import quantize

from hal.errors import EncodingError, PlatformError
from hal.ops.adapters.foreign import accepted
from hal.quant.uint4 import encode_uint4

BIAS = pytest.mark.parametrize("with_bias", [False, True])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
INT4 = ("int4_w4a16", "int4_w4a16_g64", "int4_w4a16_g32")
FP8 = ("fp8_tensor", "fp8_channel", "fp8_block128")
FP8_AS_GIVEN = ("fp8_w8a16_tensor", "fp8_w8a16", "fp8_w8a16_block128")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(6)


@pytest.fixture(params=list(mixed.MARLIN_SCHEMAS))
def packages(request, monkeypatch):
    """Install imitations of every package, and quantize without Triton."""
    for name in ("aiter", "vllm_mixed"):
        monkeypatch.setattr(f"hal.ops.adapters.{name}.quantizer", fakes.reference_quantizer)
    vllm, xpu = fakes.Operators("_C"), fakes.Operators("_xpu_C")
    vllm.add(mixed.MARLIN_SCHEMAS[request.param], mixed.marlin_gemm)
    vllm.add(mixed.MACHETE_MM, mixed.machete_mm)
    vllm.add(mixed.MACHETE_PREPACK, mixed.machete_prepack)
    vllm.add(mixed.W4A8_MM, mixed.w4a8_mm)
    vllm.add(mixed.W4A8_PACK, mixed.w4a8_pack)
    vllm.add(mixed.W4A8_REORDER, mixed.w4a8_reorder)
    xpu.add(mixed.XPU_FP8, mixed.xpu_fp8)
    xpu.add(mixed.XPU_INT4, mixed.xpu_int4)
    fakes.module(monkeypatch, "vllm._custom_ops")
    fakes.module(monkeypatch, "vllm.scalar_type", scalar_types=mixed.ScalarTypes)
    fakes.module(monkeypatch, "vllm_xpu_kernels._xpu_C")
    fakes.module(
        monkeypatch,
        "aiter",
        gemm_a8w8=mixed.gemm_a8w8,
        gemm_a8w8_bpreshuffle=mixed.gemm_a8w8_bpreshuffle,
        gemm_a8w8_blockscale=mixed.gemm_a8w8_blockscale,
        gemm_a4w4=mixed.gemm_a4w4,
    )
    yield
    vllm.close()
    xpu.close()


ONCE = pytest.mark.parametrize("packages", ["2026"], indirect=True)


def make(rows, columns, scheme, generator):
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= torch.rand(rows, 1, generator=generator) + 0.1
    weight *= torch.rand(columns // 32, generator=generator).repeat_interleave(32) + 0.1
    weight[rows // 2] = 0
    weight = weight.bfloat16()
    if not scheme.startswith("uint4"):
        return quantize(weight, scheme)
    group = int(scheme.removeprefix("uint4_g"))
    like = quantize(weight, f"int4_w4a16_g{group}" if group < 128 else "int4_w4a16")
    values, scales, zeros = encode_uint4(weight + 0.02, group)
    return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")


def check(device, kernel, scheme, shape, with_bias, dtype, generator):
    """Bind a kernel by name and compare it with float64 for several numbers of rows."""
    rows, columns = shape
    weight = make(rows, columns, scheme, generator)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    linear = fakes.bind(device, kernel, weight, bias, dtype)
    weight = fakes.as_bound(weight, device)
    for tokens in (1, 5, 66):
        x = torch.randn(tokens, 2 * columns, generator=generator)[:, ::2].to(dtype)
        out, want = linear(x), fakes.expected(kernel, weight, x, bias)
        assert out.dtype is dtype
        assert out.shape == want.shape
        assert float((out.double() - want).norm() / want.norm()) < 5e-3


@BIAS
@HALVES
@pytest.mark.parametrize("shape", [(64, 128), (192, 384)])
@pytest.mark.parametrize("scheme", [*INT4, "uint4_g32", "uint4_g128"])
def test_marlin_int4(packages, scheme, shape, with_bias, dtype, generator):
    check("cuda:rtx-3090", "vllm_marlin_int4", scheme, shape, with_bias, dtype, generator)


@ONCE
@BIAS
@HALVES
@pytest.mark.parametrize("shape", [(64, 128), (192, 384)])
@pytest.mark.parametrize("scheme", [*FP8, *FP8_AS_GIVEN])
def test_marlin_fp8(packages, scheme, shape, with_bias, dtype, generator):
    check("cuda:rtx-3090", "vllm_marlin_fp8", scheme, shape, with_bias, dtype, generator)


@BIAS
@pytest.mark.parametrize("shape", [(64, 128), (192, 384)])
@pytest.mark.parametrize(
    "scheme", ["nvfp4", "nvfp4_static", "nvfp4_w4a16", "mxfp4", "mxfp4_w4a8", "mxfp4_w4a16"]
)
def test_marlin_fp4(packages, scheme, shape, with_bias, generator):
    fakes.skip_without_dtypes(scheme)
    args = shape, with_bias, torch.bfloat16, generator
    check("cuda:rtx-3090", "vllm_marlin_fp4", scheme, *args)


@ONCE
def test_marlin_takes_second_scales_in_float32_since_0_25_1(packages, generator, monkeypatch):
    fakes.skip_without_dtypes("nvfp4")
    monkeypatch.setitem(mixed.SECOND_SCALES, "dtype", torch.float32)
    weight, x = make(64, 128, "nvfp4", generator), torch.randn(5, 128, generator=generator)
    around = {"packages": (("vllm", "0.25.1"),)}
    linear = fakes.bind("cuda:rtx-3090", "vllm_marlin_fp4", weight, **around)
    want = fakes.expected("vllm_marlin_fp4", weight, x.bfloat16())
    assert float((linear(x.bfloat16()).double() - want).norm() / want.norm()) < 5e-3
    with pytest.raises(AssertionError, match=r"global_scale must be torch\.float32"):
        fakes.bind("cuda:rtx-3090", "vllm_marlin_fp4", weight)(x.bfloat16())


@ONCE
@BIAS
@HALVES
@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
@pytest.mark.parametrize("scheme", ["int4_w4a16", "int4_w4a16_g64", "uint4_g128", "uint4_g64"])
def test_machete(packages, scheme, shape, with_bias, dtype, generator):
    check("cuda:h100", "vllm_machete", scheme, shape, with_bias, dtype, generator)


@ONCE
@BIAS
@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
def test_w4a8(packages, shape, with_bias, generator):
    args = shape, with_bias, torch.bfloat16, generator
    check("cuda:h100", "vllm_cutlass_w4a8", "int4_w4a8_fp8", *args)


@ONCE
@BIAS
@pytest.mark.parametrize("device", ["rocm:mi300x", "rocm:mi355x"])
@pytest.mark.parametrize(
    ("kernel", "scheme", "shape"),
    [
        ("aiter_int8", "int8_channel", (48, 96)),
        ("aiter_fp8", "fp8_channel", (48, 96)),
        ("aiter_fp8", "fp8_tensor", (16, 32)),
        ("aiter_block128", "fp8_block128", (256, 384)),
    ],
)
def test_aiter(packages, device, kernel, scheme, shape, with_bias, generator):
    check(device, kernel, scheme, shape, with_bias, torch.bfloat16, generator)


@ONCE
@BIAS
@pytest.mark.parametrize("shape", [(32, 256), (288, 768)])
def test_aiter_mxfp4(packages, shape, with_bias, generator):
    fakes.skip_without_dtypes("mxfp4")
    check("rocm:mi355x", "aiter_mxfp4", "mxfp4", shape, with_bias, torch.bfloat16, generator)


@ONCE
def test_an_aiter_that_wants_the_output_is_refused(packages, generator, monkeypatch):
    def older(A, B, A_scale, B_scale, out, bias=None, alpha=1.0, beta=0.0, bpreshuffle=True):
        raise AssertionError

    fakes.module(monkeypatch, "aiter", gemm_a4w4=older)
    weight = make(32, 256, "mxfp4", generator)
    told = r"no argument dtype and a further one out of older in this version"
    with pytest.raises(PlatformError, match=told):
        fakes.bind("rocm:mi355x", "aiter_mxfp4", weight)


@ONCE
@BIAS
@HALVES
@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        *(("vllm_xpu_fp8", scheme) for scheme in (*FP8, *FP8_AS_GIVEN)),
        *(("vllm_xpu_int4", scheme) for scheme in INT4),
    ],
)
def test_xpu(packages, kernel, scheme, shape, with_bias, dtype, generator):
    check("xpu:arc-b580", kernel, scheme, shape, with_bias, dtype, generator)


@ONCE
def test_zero_points_that_a_library_packs_in_its_own_way_are_refused(packages, generator):
    weight = make(128, 128, "uint4_g128", generator)
    with pytest.raises(EncodingError, match=r"uint4 .*needed int4"):
        fakes.bind("xpu:arc-b580", "vllm_xpu_int4", weight)


@ONCE
def test_an_argument_that_nobody_knows_is_named(packages):
    with pytest.raises(PlatformError, match="found argument 'b_zeros_or_none', needed only a"):
        accepted(torch.ops._C.marlin_gemm, a=1, c_or_none=None, b_q_weight=2, b_bias_or_none=None,
                 b_scales=3, a_scales=None, global_scale=None)  # fmt: skip


SIZES = {"in_features": 4096, "out_features": 4096, "tokens": 16}
PREFIXES = ("vllm_marlin", "vllm_machete", "vllm_cutlass_w4a8", "aiter", "vllm_xpu")
CANDIDATES = {
    ("cuda:t4", "int4_w4a16", "float16"): {"vllm_marlin_int4"},
    ("cuda:t4", "int4_w4a16", "bfloat16"): set(),
    ("cuda:rtx-3090", "int4_w4a16", "bfloat16"): {"vllm_marlin_int4"},
    ("cuda:rtx-3090", "fp8_block128", "bfloat16"): {"vllm_marlin_fp8"},
    ("cuda:rtx-3090", "nvfp4_w4a16", "bfloat16"): {"vllm_marlin_fp4"},
    ("cuda:t4", "mxfp4_w4a16", "float16"): set(),
    ("cuda:h100", "int4_w4a16", "bfloat16"): {"vllm_marlin_int4", "vllm_machete"},
    ("cuda:h100", "int4_w4a16_g32", "bfloat16"): {"vllm_marlin_int4"},
    ("cuda:h100", "int4_w4a8_fp8", "bfloat16"): {"vllm_cutlass_w4a8"},
    ("cuda:b200", "int4_w4a8_fp8", "bfloat16"): set(),
    ("cuda:b200", "int4_w4a16", "bfloat16"): {"vllm_marlin_int4"},
    ("rocm:mi300x", "fp8_channel", "bfloat16"): {"aiter_fp8"},
    ("rocm:mi355x", "fp8_block128", "bfloat16"): {"aiter_block128"},
    ("rocm:mi355x", "mxfp4", "bfloat16"): {"aiter_mxfp4"},
    ("rocm:mi300x", "mxfp4", "bfloat16"): set(),
    ("rocm:mi250x", "int8_channel", "bfloat16"): set(),
    ("rocm:mi300x", "int8_channel", "float16"): set(),
    ("rocm:mi300x", "int4_w4a16", "bfloat16"): set(),
    ("xpu:arc-b580", "fp8_w8a16", "bfloat16"): {"vllm_xpu_fp8"},
    ("xpu:arc-b580", "int4_w4a16_g32", "float16"): {"vllm_xpu_int4"},
    ("cpu:x86-amx", "int4_w4a16", "bfloat16"): set(),
}


@pytest.mark.parametrize(("device", "scheme", "dtype"), CANDIDATES)
def test_where_they_are_candidates(device, scheme, dtype):
    selection = fakes.select(device, scheme, dtype=dtype, **SIZES)
    able = {
        row.kernel.name
        for row in selection.candidates
        if row.can_run and row.kernel.name.startswith(PREFIXES)
    }
    assert able == CANDIDATES[device, scheme, dtype], selection
    assert not selection.candidates[0].claimed, "hal has run something else there"
    without = fakes.select(device, scheme, dtype=dtype, packages=(), **SIZES)
    for name in able:
        (failure,) = without.candidate(name).failures
        assert "not installed" in str(failure)
