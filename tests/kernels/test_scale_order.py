"""Compare scales that a kernel stores in an order with those that are rearranged after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from hal.ops.activations import Activation
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels.scale_order import scale_of_group, scale_of_row
from hal.ops.quantize import launch_triton
from hal.ops.quantize_fused import rms_norm_triton
from hal.ops.scale_layouts import STORED_LAYOUTS, new_scales
from hal.quant import SCHEMES
from hal.quant.swizzle import SCALE_LAYOUTS

STORED = [
    ("mxfp8", "e4m3fn", "blocked_128x4"),
    ("mxfp8", "e4m3fnuz", "mn_major_ue8m0"),
    ("mxfp4", "e2m1", "blocked_128x4"),
    ("mxfp4", "e2m1", "e8m0_shuffle"),
    ("mxfp4", "e2m1", "mn_major_ue8m0"),
    ("nvfp4", "e2m1", "blocked_128x4"),
    ("fp8_block128", "e4m3fn", "mn_major"),
]
ways = pytest.mark.parametrize(("scheme", "encoding", "layout"), STORED)


def check(found, plain, layout):
    """Compare all bits, those of padding too."""
    wanted = (plain[0], SCALE_LAYOUTS[layout].forward(plain[1]), *plain[2:])
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@triton.jit
def _places_kernel(
    places_ptr, n_rows, stride_row, stride_group, ORDER: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row, group = tl.arange(0, ROWS)[:, None], tl.arange(0, GROUPS)[None, :]
    place = scale_of_row(row, stride_row, ORDER) + scale_of_group(group, stride_group, ORDER)
    tl.store(places_ptr + row * GROUPS + group, place, mask=row < n_rows)


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("layout", STORED_LAYOUTS)
def test_places_of_all_rows_and_groups(device, layout, rows):
    groups = 32
    how = SCHEMES["fp8_block128" if layout == "mn_major" else "mxfp8"].activation
    columns = groups * (128 if layout == "mn_major" else 32)
    dtype = torch.float32 if layout == "mn_major" else torch.uint8
    stored, order = new_scales(how, (rows, columns), dtype, torch.device(device), layout)
    places = torch.full((rows, groups), -1, dtype=torch.int32, device=device)
    _places_kernel[(1,)](places, rows, order.row, order.group, order.name, 512, groups)
    # Each of the 8-bit values is met twice or more: compare them in two parts, low and high.
    numbers = torch.arange(1, rows * groups + 1, device=device).reshape(rows, groups)
    for part in (numbers % 251 + 1, numbers // 251 + 1):
        found = stored.zero_().flatten()
        found[places.long().flatten()] = part.flatten().to(dtype)
        assert torch.equal(found.view(stored.shape), SCALE_LAYOUTS[layout].forward(part.to(dtype)))


@ways
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 128), torch.bfloat16),
        ((1, 1), torch.float32),
        ((6, 72), torch.bfloat16),
        ((3, 1056), torch.float32),
    ],
    ids=str,
)
def test_scales_in_order(device, generator, shape, dtype, scheme, encoding, layout):
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    x *= torch.rand(shape[0], 1, generator=generator, device=device).to(dtype) * 30
    if shape[0] > 2:
        x[0], x[2, shape[1] // 2] = 0, float("nan")
    how = SCHEMES[scheme].activation
    plain = launch_triton(x, encoding, how, shape[1])
    check(launch_triton(x, encoding, how, shape[1], layout), plain, layout)


@ways
def test_scales_in_order_after_a_norm_and_a_gate(
    device, generator, scheme, encoding, layout, monkeypatch
):
    how = SCHEMES[scheme].activation
    x = torch.randn(3, 640, generator=generator, device=device).bfloat16()
    weight = torch.rand(640, generator=generator, device=device).bfloat16()
    for pairs in (True, False):
        if not pairs:
            monkeypatch.setattr(quantize_module, "in_pairs", lambda *_: None)
        plain = rms_norm_triton(x, weight, 1e-6, x, encoding, how)
        check(rms_norm_triton(x, weight, 1e-6, x, encoding, how, layout), plain, layout)
        for gate in (Activation(), replace(Activation(), interleaved=not pairs)):
            plain = launch_triton(x, encoding, how, 320, gate=gate)
            check(launch_triton(x, encoding, how, 320, layout, gate=gate), plain, layout)
