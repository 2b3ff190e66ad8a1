"""Scales that quantizing ops store as other kernels read them."""

from __future__ import annotations

import pytest
import torch

import hal.ops
from hal.errors import ArgumentError, UnknownNameError
from hal.ops.quantize import DYNAMIC
from hal.ops.scale_layouts import STORED_AS, STORED_LAYOUTS
from hal.quant import SCHEMES
from hal.quant.scheme import group_of
from hal.quant.swizzle import SCALE_LAYOUTS

GROUPED = [name for name in DYNAMIC if group_of(SCHEMES[name].activation.granularity)]


def stored_dtype(scheme: str) -> str:
    form = SCHEMES[scheme].activation.scale_format
    return STORED_AS.get(form, form)


PAIRS = [
    (scheme, layout)
    for scheme in GROUPED
    for layout in STORED_LAYOUTS
    if stored_dtype(scheme) in SCALE_LAYOUTS[layout].dtypes
]


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def in_order(parts, layout):
    return parts[0], SCALE_LAYOUTS[layout].forward(parts[1]), *parts[2:]


def test_every_layout_has_a_scheme():
    assert {layout for _, layout in PAIRS} == set(STORED_LAYOUTS)
    assert {scheme for scheme, _ in PAIRS} == set(GROUPED)


@pytest.mark.parametrize("shape", [(0, 128), (1, 1), (130, 290), (5, 2048), (300, 1024)], ids=str)
@pytest.mark.parametrize(("scheme", "layout"), PAIRS)
def test_ops_on_a_cpu(scheme, layout, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    for kernel in ("reference", "torch_cached"):
        plain = hal.ops.quantize(x, scheme, force=kernel)
        found = hal.ops.quantize(x, scheme, scale_layout=layout, force=kernel)
        same(found, in_order(plain, layout))
        weight = torch.ones(shape[1]).bfloat16()
        plain = hal.ops.quantize_rms_norm(x, weight, scheme, residual=x, force=kernel)
        found = hal.ops.quantize_rms_norm(
            x, weight, scheme, residual=x, scale_layout=layout, force=kernel
        )
        same(found, in_order(plain, layout))
        both = torch.cat((x, x), 1)
        plain = hal.ops.quantize_swiglu(both, scheme, force=kernel)
        found = hal.ops.quantize_swiglu(both, scheme, scale_layout=layout, force=kernel)
        same(found, in_order(plain, layout))


def test_layouts_that_do_not_fit_are_refused():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    weight = torch.ones(64, dtype=torch.bfloat16)
    calls = (
        lambda scheme, layout: hal.ops.quantize(x, scheme, scale_layout=layout),
        lambda scheme, layout: hal.ops.quantize_rms_norm(x, weight, scheme, scale_layout=layout),
        lambda scheme, layout: hal.ops.quantize_swiglu(x, scheme, scale_layout=layout),
    )
    for call in calls:
        with pytest.raises(UnknownNameError, match="blocked_128x8"):
            call("mxfp8", "blocked_128x8")
        with pytest.raises(UnknownNameError, match="marlin_zeros"):
            call("mxfp8", "marlin_zeros")
        for scheme, layout, told in (
            ("fp8_channel", "mn_major", "float32 per token"),
            ("fp8_block128", "blocked_128x4", "float32 per group128"),
            ("nvfp4", "e8m0_shuffle", "e4m3fn per group16"),
            ("mxfp8", "mn_major", "e8m0 per group32"),
        ):
            with pytest.raises(ArgumentError, match=told):
                call(scheme, layout)
