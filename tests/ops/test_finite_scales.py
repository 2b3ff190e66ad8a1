"""Binding refuses scales that are no numbers, wherever among them they stand."""

from __future__ import annotations

import pytest
import torch

from hal.errors import ValueRangeError
from hal.ops.prepare import require_finite_scales
from hal.quant import quantize

SCHEMES = ("fp8_channel", "fp8_block128", "int4_w4a16", "nvfp4_w4a16", "mxfp4_w4a16", "mxfp8")
BYTES = {"float8_e4m3fn": (0x7F, 0xFF), "uint8": (255,)}


def weight(scheme: str, device: torch.device):
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(3, 64, 256, generator=generator).to(device), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("at", [0, 1, -1])
def test_what_is_no_number_is_named(scheme, at, device):
    found = weight(scheme, device)
    require_finite_scales("here", found)
    scales = found.scales
    stored = str(scales.dtype).removeprefix("torch.")
    flat = scales.view(torch.uint8) if stored in BYTES else scales
    place = torch.arange(scales.numel()).view(scales.shape) == at % scales.numel()
    place = place.to(device)
    for value in BYTES.get(stored, (torch.nan, torch.inf, -torch.inf)):
        kept = flat.clone()
        flat[place] = value
        with pytest.raises(ValueRangeError, match=r"here: found -?(nan|inf) at") as caught:
            require_finite_scales("here", found)
        assert str(place.nonzero()[0].tolist()) in str(caught.value)
        flat.copy_(kept)
    require_finite_scales("here", found)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_largest_numbers_are_fine(scheme, device):
    found = weight(scheme, device)
    stored = str(found.scales.dtype).removeprefix("torch.")
    if stored in BYTES:
        found.scales.view(torch.uint8).fill_(min(BYTES[stored]) - 1)
    else:
        found.scales.fill_(torch.finfo(found.scales.dtype).max)
    require_finite_scales("here", found)
