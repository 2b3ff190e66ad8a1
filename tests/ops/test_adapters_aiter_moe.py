"""AITER's experts, against an imitation that checks what it is given."""

from __future__ import annotations

import enum

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import pytest
import torch
from adapter_fakes import repeated, row_major
from adapter_fakes_experts import gated, in_float64, per_token

SIZES = {"hidden": 128, "intermediate": 256, "experts": 3}


class ActivationType(enum.Enum):
    """Stand in for AITER's enum."""

    Silu, Gelu = 0, 1


class QuantType(enum.Enum):
    """Stand in for AITER's enum."""

    No, per_Tensor, per_Token, per_1x32, per_1x128, per_128x128 = range(6)


def untiled(weight):
    """Return `[E, N, K]` of tiles: 16 rows, and in 32 columns of a byte or 2 two or four parts."""
    count, rows, columns = weight.shape
    part = 16 // weight.element_size()
    raw = weight.view(torch.uint8 if weight.element_size() == 1 else torch.int16)
    flat = raw.reshape(count, -1)
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = n // 16 * 16 * columns + k // 32 * 512 + k // part % (32 // part) * 16 * part
    return flat[:, offset + n % 16 * part + k % part].view(weight.dtype)


def fused_moe(
    hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, activation=ActivationType.Silu,
    quant_type=QuantType.No, doweight_stage1=False, w1_scale=None, w2_scale=None, a1_scale=None,
    a2_scale=None, block_size_M=None, num_local_tokens=None, moe_sorting_dispatch_policy=0,
    dtype=None, hidden_pad=0, intermediate_pad=0, bias1=None, bias2=None, splitk=0,
):  # fmt: skip
    """Imitate `aiter.fused_moe.fused_moe`."""
    nothing = (a1_scale, a2_scale, block_size_M, num_local_tokens, dtype, bias1, bias2)
    assert nothing == (None,) * 7
    assert not doweight_stage1
    assert w1.is_shuffled
    assert w2.is_shuffled
    assert row_major(hidden_states)
    assert activation is ActivationType.Silu
    count, columns, hidden = w1.shape
    assert w2.shape == (count, hidden, columns // 2)
    assert topk_ids.dtype is torch.int32
    assert topk_weight.dtype is torch.float32
    assert expert_mask.dtype is torch.int32
    assert expert_mask.shape == (count + 1,)
    assert int(expert_mask.sum()) == count
    assert int(topk_ids.min()) >= 0
    assert int(topk_ids.max()) <= count
    local = torch.where(expert_mask.bool(), expert_mask.cumsum(0) - 1, -1)[topk_ids.long()]
    dense = []
    for weight, scale in ((w1, w1_scale), (w2, w2_scale)):
        wide = untiled(weight).double()
        if quant_type is QuantType.No:
            assert scale is None
        elif quant_type is QuantType.per_Token:
            assert scale.dtype is torch.float32
            assert scale.shape == (*weight.shape[:2], 1)
            wide = wide * scale.double()
        else:
            assert quant_type is QuantType.per_128x128
            assert scale.dtype is torch.float32
            wide = wide * torch.stack([repeated(s, wide.shape[1:], (128, 128)) for s in scale])
        dense.append(wide)

    def seen(rows, which):
        if quant_type is QuantType.No:
            assert rows.dtype is w1.dtype
            return rows.double()
        if w1.dtype is torch.int8:
            scales = rows.float().abs().amax(-1, keepdim=True) / 127
            return (rows.float() / scales.clamp_min(1e-12)).round().double() * scales.double()
        top = 224.0 if w1.dtype is torch.float8_e4m3fnuz else 448.0
        if quant_type is QuantType.per_Token:
            return per_token(rows, top)
        return per_token(rows.unflatten(-1, (-1, 128)), top).flatten(-2)

    # Some releases leave memory as it was where no expert adds.
    out = in_float64(hidden_states, *dense, local, topk_weight, gated("silu"), seen)
    return torch.where((local >= 0).any(1, keepdim=True), out, torch.nan)


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install an imitation of AITER."""
    fakes.module(monkeypatch, "aiter", ActivationType=ActivationType, QuantType=QuantType)
    fakes.module(monkeypatch, "aiter.fused_moe", fused_moe=fused_moe)


@pytest.mark.parametrize(("case", "dtype"), experts.WRAPPED)
@pytest.mark.parametrize(
    ("device", "kernel", "scheme"),
    [
        ("rocm:mi300x", "aiter_moe", "bf16"),
        ("rocm:mi300x", "aiter_moe_fp8", "fp8_channel"),
        ("rocm:mi355x", "aiter_moe_fp8", "fp8_tensor"),
        ("rocm:mi300x", "aiter_moe_int8", "int8_channel"),
        ("rocm:mi300x", "aiter_moe_block128", "fp8_block128"),
        ("rocm:mi355x", "aiter_moe_block128", "fp8_block128"),
    ],
)
def test_whole_layers(device, kernel, scheme, case, dtype):
    dtype = dtype if kernel == "aiter_moe" else torch.bfloat16
    experts.check(device, kernel, scheme, case, dtype, **SIZES)


PROBLEM = {
    "experts": 64, "hidden": 2048, "intermediate": 768, "dtype": "bfloat16", "activation": "silu",
    "tokens": 16,
}  # fmt: skip
CANDIDATES = {
    ("rocm:mi300x", "bf16"): {"aiter_moe"},
    ("rocm:mi300x", "fp8_channel"): {"aiter_moe_fp8"},
    ("rocm:mi355x", "fp8_block128"): {"aiter_moe_block128"},
    ("rocm:mi300x", "int8_channel"): {"aiter_moe_int8"},
    ("rocm:mi355x", "int8_channel"): set(),
    ("rocm:mi355x", "mxfp4"): set(),
    ("rocm:mi250x", "bf16"): set(),
    ("cuda:h100", "bf16"): set(),
}


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates(device, scheme):
    experts.check_candidates(
        CANDIDATES[device, scheme], "aiter", device, scheme,
        without=(("amd-aiter", "0.1.7"),),
        told="package: found amd-aiter 0.1.7, needs amd-aiter >= 0.1.13", **PROBLEM,
    )  # fmt: skip


def test_atomics_are_told():
    for name in ("aiter_moe", "aiter_moe_fp8", "aiter_moe_int8", "aiter_moe_block128"):
        assert not experts.FUSED_MOE.find(name).deterministic
