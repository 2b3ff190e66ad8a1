"""DeepGEMM's grouped products, against imitations that check what they are given."""

from __future__ import annotations

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import expert_cases
import pytest
import torch
from adapter_fakes import repeated, row_major

import hal
from hal.ops.binding import Binding
from hal.ops.prepare import prepare

SIZES = {"hidden": 128, "intermediate": 256, "experts": 3}
ALIGNMENT = 128


def factors(scales, rows: int, columns: int):
    """Return float64 factors `[rows, columns]` of scales of rows, as DeepGEMM reads them."""
    assert scales.shape == (rows, columns // 128)
    assert scales.stride() == (1, -(-rows // 4) * 4)
    if scales.dtype is torch.float32:
        return scales.double().repeat_interleave(128, 1)
    assert scales.dtype is torch.int32
    exponents = torch.stack([scales >> 8 * place & 0xFF for place in range(4)], -1).flatten(-2)
    return torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)


def contiguous(a, b, d, m_indices, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
               disable_ue8m0_cast=False, use_psum_layout=False,
               expected_m_for_psum_layout=None):  # fmt: skip
    """Imitate `deep_gemm.m_grouped_fp8_gemm_nt_contiguous` of 2.5.0, a block of rows at a time."""
    (left, left_scales), (right, right_scales) = a, b
    assert left.dtype is right.dtype is torch.float8_e4m3fn
    rows, width = left.shape
    experts, columns, inner = right.shape
    assert row_major(left)
    assert right.is_contiguous()
    assert d.dtype is torch.bfloat16
    assert row_major(d)
    assert d.shape == (rows, columns)
    assert inner == width
    assert rows % ALIGNMENT == columns % 64 == width % 128 == 0
    assert m_indices.dtype is torch.int32
    assert m_indices.shape == (rows,)
    assert not use_psum_layout
    wide = left.double() * factors(left_scales, rows, width)
    if right_scales.dtype is torch.float32:
        assert recipe is recipe_a is recipe_b is None
        assert right_scales.shape == (experts, columns // 128, width // 128)
        assert right_scales.is_contiguous()
        weights = [
            codes.double() * repeated(part, codes.shape, (128, 128))
            for codes, part in zip(right, right_scales, strict=True)
        ]
    else:
        assert recipe_a == recipe_b == (1, 32)
        weights = [
            codes.double() * factors(part, columns, width)
            for codes, part in zip(right, right_scales, strict=True)
        ]
    d.fill_(torch.nan)
    for start in range(0, rows, ALIGNMENT):
        block = slice(start, start + ALIGNMENT)
        expert = int(m_indices[start])
        assert set(m_indices[block].tolist()) <= {expert, -1}
        if expert >= 0:
            d[block] = (wide[block] @ weights[expert].T).bfloat16()


def masked(a, b, d, masked_m, expected_m, recipe=None, recipe_a=None, recipe_b=None,
           compiled_dims="nk", disable_ue8m0_cast=False):  # fmt: skip
    """Imitate `deep_gemm.m_grouped_fp8_gemm_nt_masked` of 2.5.0; rows beyond counts stay."""
    (left, left_scales), (right, right_scales) = a, b
    assert recipe is recipe_a is recipe_b is None
    experts, capacity, width = left.shape
    columns = right.shape[1]
    assert left.is_contiguous()
    assert right.shape == (experts, columns, width)
    assert d.shape == (experts, capacity, columns)
    assert d.is_contiguous()
    assert d.dtype is torch.bfloat16
    assert masked_m.dtype is torch.int32
    assert masked_m.shape == (experts,)
    assert isinstance(expected_m, int)
    assert expected_m > 0
    assert right_scales.shape == (experts, columns // 128, width // 128)
    step = -(-capacity // 4) * 4
    assert left_scales.stride() == (width // 128 * step, 1, step)
    d.fill_(torch.nan)
    for expert, count in enumerate(masked_m.tolist()):
        wide = left[expert].double() * factors(left_scales[expert], capacity, width)
        weight = right[expert].double()
        weight = weight * repeated(right_scales[expert], weight.shape, (128, 128))
        d[expert, :count] = (wide[:count] @ weight.T).bfloat16()


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install an imitation of DeepGEMM, and quantize without Triton."""
    monkeypatch.setattr("hal.ops.adapters.groups.quantizer", fakes.reference_quantizer)
    fakes.module(
        monkeypatch,
        "deep_gemm",
        m_grouped_fp8_gemm_nt_contiguous=contiguous,
        m_grouped_fp8_gemm_nt_masked=masked,
        get_mk_alignment_for_contiguous_layout=lambda: ALIGNMENT,
    )


@pytest.mark.parametrize(("case", "tokens"), experts.PRODUCTS)
@pytest.mark.parametrize(
    ("device", "kernel", "scheme"),
    [
        ("cuda:h100", "deep_gemm_moe_fp8", "fp8_block128"),
        ("cuda:b200", "deep_gemm_moe_mxfp8", "mxfp8"),
    ],
)
def test_contiguous(device, kernel, scheme, tokens, case):
    experts.check(device, kernel, scheme, case, tokens=tokens, **SIZES)


@pytest.mark.parametrize(("kernel", "device"), [("fp8", "cuda:h100"), ("mxfp8", "cuda:b200")])
def test_more_rows_than_a_tile(kernel, device):
    scheme = "mxfp8" if kernel == "mxfp8" else "fp8_block128"
    sizes = {"tokens": 140, "hidden": 128, "intermediate": 128, "experts": 2}
    experts.check(device, f"deep_gemm_moe_{kernel}", scheme, experts.PLAIN, **sizes)


@pytest.mark.parametrize("name", ["plain", "biases", "gpt-oss", "nemotron", "padded"])
def test_batches(name):
    case = experts.BY_NAME.get(name, experts.PLAIN)
    layer = experts.make(case, "fp8_block128", "cuda:h100", **SIZES)
    asked, problem = experts.described(layer, format="batched")
    device = "cuda:h100"
    selection = experts.select(device, "fp8_block128", "deep_gemm_moe_masked", **problem)
    assert selection.kernel is not None, selection
    binding = Binding(selection, hal.platform(device), layer.w13.scheme, torch.device("cpu"))
    w13, w2 = prepare(binding, layer.w13, "w13"), prepare(binding, layer.w2, "w2")
    launch, tensors = selection.kernel.load()(binding, w13, w2, asked)
    x, counts = expert_cases.batches(layer, 9, [3, 0, 9])
    out = launch(x, counts.long(), (*tensors, *layer.biases.values()))
    assert out.shape == x.shape
    assert out.dtype is x.dtype
    found = expert_cases.within(out, counts).double()
    wanted = expert_cases.expected_batches(layer, x, counts, True, rounded=True)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


PROBLEM = {"experts": 64, "hidden": 2048, "intermediate": 768, "dtype": "bfloat16", "tokens": 16}
CANDIDATES = {
    ("cuda:h100", "fp8_block128", "standard"): {"deep_gemm_moe_fp8"},
    ("cuda:h100", "fp8_block128", "batched"): {"deep_gemm_moe_masked"},
    ("cuda:b200", "fp8_block128", "standard"): set(),
    ("cuda:b200", "mxfp8", "standard"): {"deep_gemm_moe_mxfp8"},
    ("cuda:h100", "mxfp8", "standard"): set(),
    ("cuda:rtx-5090", "mxfp8", "standard"): set(),
    ("cuda:rtx-4090", "fp8_block128", "standard"): set(),
    ("rocm:mi300x", "fp8_block128", "standard"): set(),
}


@pytest.mark.parametrize(("device", "scheme", "format"), CANDIDATES)
def test_where_they_are_candidates(device, scheme, format):
    experts.check_candidates(
        CANDIDATES[device, scheme, format], "deep_gemm", device, scheme, format=format,
        without=(("deep-gemm", "2.1.0"),),
        told="package: found deep-gemm 2.1.0, needs deep-gemm >= 2.5", **PROBLEM,
    )  # fmt: skip
