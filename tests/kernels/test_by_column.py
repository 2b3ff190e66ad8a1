"""Scales side by side for neighbouring rows, against torch's own copy."""

from __future__ import annotations

import pytest
import torch

from hal.ops.kernels import by_column as module
from hal.ops.kernels.by_column import by_column, products_by_column

SHAPES = [(1, 1), (129, 65), (3, 7, 5), (2, 260, 130), (2, 2, 64, 8)]


@pytest.fixture
def launched(monkeypatch):
    """Take the kernel for few scales as well, and say whether it ran."""
    monkeypatch.setattr(module, "LEAST", 1)
    found = []
    launch = module.launch_by_column
    monkeypatch.setattr(
        module, "launch_by_column", lambda *a, **o: (found.append(1), launch(*a, **o))
    )
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float8_e4m3fn])
def test_as_torch_does(device, generator, launched, shape, dtype):
    scales = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    scales = scales.float() if dtype == torch.float32 else scales.view(dtype)
    found = by_column(scales)
    assert launched
    assert (found.dtype, found.shape) == (dtype, scales.shape)
    assert found.mT.is_contiguous()
    bits = (torch.uint8 if dtype != torch.float32 else torch.int32,)
    assert torch.equal(found.contiguous().view(*bits), scales.view(*bits))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", [1.0, 256.0])
def test_products(device, generator, launched, shape, unit):
    """Of every e4m3 number, NaN included, bit for bit as float32 has them."""
    scales = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    scales = scales.view(torch.float8_e4m3fn)
    factors = torch.rand(shape[:-1], generator=generator, device=device)
    found = products_by_column(scales, factors, unit)
    assert launched
    assert found.mT.is_contiguous()
    wanted = scales.float() * factors.unsqueeze(-1) * unit
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_rest_is_left_to_torch(device, launched):
    """What does not lie side by side, is elsewhere, or is none."""
    wide = torch.arange(48.0, device=device).view(4, 12)
    for scales in (wide[:, ::2], wide.mT, wide[:0], torch.ones(3, 4, device="meta"), wide.double()):
        found = by_column(scales)
        assert found.shape == scales.shape
        assert found.mT.is_contiguous()
        assert found.device.type == "meta" or torch.equal(found, scales)
    factors = torch.full((4,), 3.0, device=device)
    assert torch.equal(products_by_column(wide, factors, 2.0), wide * 6)
    assert not launched
    module.LEAST = 49
    assert torch.equal(by_column(wide), wide)
    assert not launched
