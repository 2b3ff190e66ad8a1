"""Experts that are unpacked at each call have the bits of those that are kept expanded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import quantize

from hal.errors import ValueRangeError
from hal.ops import FusedMoE, Routing, unpacked
from hal.quant.uint4 import encode_uint4
from hal.registry import find_op

KERNEL = "torch_experts_unpack"
EXPERTS, TOP_K, TOKENS = 5, 2, 11


def weights(scheme, hidden, intermediate, *, shifted=False):
    """Return w13 and w2, if `shifted` int4 codes with zero points."""
    generator = torch.Generator().manual_seed(hidden)
    found = []
    for shape in ((2 * intermediate, hidden), (hidden, intermediate)):
        wide = torch.randn(EXPERTS, *shape, generator=generator).mul_(0.2).bfloat16()
        wide[1] = 0
        weight = quantize(wide, scheme)
        if shifted:
            values, scales, zeros = encode_uint4(wide + 0.1, 32)
            weight = replace(weight, values=values, scales=scales, zeros=zeros, encoding="uint4")
        found.append(weight)
    return found


def require_same(w13, w2, hidden, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    ids[ids == 3] = 0  # an expert without tokens
    ids[0], ids[1, 0] = -1, EXPERTS
    routing = Routing(ids=ids, weights=torch.rand(TOKENS, TOP_K, generator=generator))
    mine, kept = (
        FusedMoE(w13, w2, dtype=dtype, force=name) for name in (KERNEL, "torch_experts_dequant")
    )
    found = mine(x, routing)
    assert not found[0].any()
    assert found.isfinite().all()
    assert torch.equal(found, kept(x, routing))
    # What is bound is the caller's memory: nothing is kept beside it.
    own = {tensor.data_ptr() for tensor in (*w13.tensors, *w2.tensors)}
    assert {tensor.data_ptr() for tensor in mine.tensors if tensor.numel()} <= own


@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 64), (136, 72), (33, 17)])
@pytest.mark.parametrize("scheme", find_op("fused_moe").find(KERNEL).schemes)
def test_the_bits_are_those_of_expanded_weights(monkeypatch, scheme, hidden, intermediate):
    monkeypatch.setattr(unpacked, "PIECE_ELEMENTS", 2400)  # pieces, the last of them shorter
    require_same(*weights(scheme, hidden, intermediate), hidden)


def test_zero_points_of_groups():
    require_same(*weights("int4_w4a16_g32", 136, 72, shifted=True), 136)


def test_float16():
    require_same(*weights("mxfp4_w4a16", 128, 64), 128, torch.float16)


def test_nan_codes_are_refused():
    w13, w2 = weights("mxfp8", 64, 32)
    bad = w13.values.view(torch.uint8).clone()
    bad[2, 0, 0] = 0x7F
    with pytest.raises(ValueRangeError, match="a NaN code"):
        FusedMoE(replace(w13, values=bad.view(torch.float8_e4m3fn)), w2, force=KERNEL)
