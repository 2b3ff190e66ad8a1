"""Grouped products of vllm-xpu-kernels, against an imitation that checks what it is given."""

from __future__ import annotations

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import pytest
import torch
from adapter_fakes import columns_of_bytes, repeated, row_major

from hal.errors import EncodingError
from hal.quant import quantize
from hal.quant.uint4 import encode_uint4

GROUPED = (
    "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, "
    "Tensor? ptr_B_scale, Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, "
    "int num_experts) -> Tensor"
)
SIZES = {"hidden": 128, "intermediate": 256, "experts": 3}


def decoded(b, scales, dtype, n: int, k: int):
    """Return float64 numbers `[K, N]` of one expert, by the library's rule for its dtypes."""
    if b.dtype is torch.int8:
        codes = columns_of_bytes(b)
        codes = (codes - (codes > 7) * 16).double()
        assert codes.shape == (n, k)
        assert scales.dtype is dtype
        group = k // scales.shape[1]
        assert group in (32, 64, 128, 256)
        assert scales.shape == (n, k // group)
        return (codes * scales.double().repeat_interleave(group, 1)).T
    assert b.shape == (k, n)
    if scales is None:
        assert b.dtype is dtype
        return b.double()
    assert b.dtype is torch.float8_e4m3fn
    if scales.dtype is torch.uint8:
        assert scales.shape == (k // 32, n)
        return b.double() * torch.exp2(scales.double() - 127).repeat_interleave(32, 0)
    assert scales.dtype is torch.float32
    if scales.ndim == 0:
        return b.double() * scales.double()
    assert scales.shape == (k // 128, n // 128)
    return b.double() * repeated(scales, b.shape, (128, 128))


def grouped(a, a_scale, b, b_scale, bias, d, rows_per_expert, n, k, num_experts):
    """Imitate `cutlass_grouped_gemm_interface`; rows of no expert stay as they are."""
    assert a_scale is bias is None
    assert row_major(a)
    assert row_major(d)
    assert a.dtype is d.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert a.shape == (d.shape[0], k)
    assert d.shape[1] == n
    assert n % 8 == 0
    assert b.is_contiguous()
    assert b.shape[0] == num_experts
    assert b_scale is None or b_scale.is_contiguous()
    assert rows_per_expert.dtype is torch.int32
    assert rows_per_expert.shape == (num_experts,)
    d.fill_(torch.nan)
    start = 0
    for expert, count in enumerate(rows_per_expert.tolist()):
        own = slice(start, start + count)
        start += count
        scales = None if b_scale is None else b_scale[expert]
        d[own] = (a[own].double() @ decoded(b[expert], scales, a.dtype, n, k)).to(d.dtype)
    assert start <= a.shape[0]
    return d.clone()


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install an imitation of vllm-xpu-kernels."""
    xpu = fakes.Operators("_xpu_C")
    xpu.add(GROUPED, grouped)
    fakes.module(monkeypatch, "vllm_xpu_kernels._xpu_C")
    yield
    xpu.close()


@pytest.mark.parametrize(("case", "tokens"), experts.PRODUCTS)
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        ("vllm_xpu_moe", "bf16"),
        ("vllm_xpu_moe_fp8", "fp8_tensor"),
        ("vllm_xpu_moe_block128", "fp8_block128"),
        ("vllm_xpu_moe_mxfp8", "mxfp8"),
        ("vllm_xpu_moe_int4", "int4_w4a16"),
        ("vllm_xpu_moe_int4", "int4_w4a16_g32"),
    ],
)
def test_grouped(kernel, scheme, tokens, case):
    experts.check("xpu:arc-b580", kernel, scheme, case, tokens=tokens, **SIZES)


@pytest.mark.parametrize("kernel", ["vllm_xpu_moe", "vllm_xpu_moe_fp8", "vllm_xpu_moe_int4"])
def test_fp16(kernel):
    scheme = {"vllm_xpu_moe": "bf16", "vllm_xpu_moe_fp8": "fp8_w8a16_tensor"}.get(
        kernel, "int4_w4a16_g64"
    )
    experts.check("xpu:arc-b580", kernel, scheme, experts.PLAIN, torch.float16, **SIZES)


def test_zero_points_are_refused():
    def with_zeros(weight):
        like = quantize(weight, "int4_w4a16")
        values, scales, zeros = encode_uint4(weight, 128)
        return experts.replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")

    layer = experts.expert_cases.make(experts.PLAIN, with_zeros, **SIZES)
    with pytest.raises(EncodingError, match=r"uint4 .*needed int4"):
        experts.bind("xpu:arc-b580", "vllm_xpu_moe_int4", layer)


PROBLEM = {"experts": 64, "hidden": 2048, "intermediate": 768, "dtype": "bfloat16", "tokens": 16}
CANDIDATES = {
    ("xpu:arc-b580", "bf16"): {"vllm_xpu_moe"},
    ("xpu:arc-b580", "fp8_tensor"): {"vllm_xpu_moe_fp8"},
    ("xpu:arc-b580", "fp8_channel"): set(),
    ("xpu:arc-b580", "fp8_block128"): {"vllm_xpu_moe_block128"},
    ("xpu:arc-b580", "mxfp8"): {"vllm_xpu_moe_mxfp8"},
    ("xpu:arc-b580", "int4_w4a16_g64"): {"vllm_xpu_moe_int4"},
    ("xpu:arc-a770", "bf16"): set(),
    ("cuda:h100", "bf16"): set(),
}


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates(device, scheme):
    experts.check_candidates(CANDIDATES[device, scheme], "vllm_xpu", device, scheme, **PROBLEM)
