"""Quantize to nvfp4 under second scales that are given, of all kinds, bit for bit as the codec."""

from __future__ import annotations

import pytest
import torch

from hal.ops.kernels import quantize_fours as fours_module
from hal.ops.kernels.reciprocals import reciprocal_table
from hal.ops.quantize import quantize_reference, quantize_triton
from hal.quant import SCHEMES
from hal.quant.codec import SCALE_FLOOR

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def of_numbers() -> list[torch.Tensor]:
    """Return scales that numbers of bf16 have, for which there are factors.

    Six of them have the most ties, of both kinds under all fractions; two of these are powers of 2.
    """
    generator = torch.Generator().manual_seed(11)
    tops = torch.randint(128, 256, (8,), generator=generator).tolist()
    scales = [torch.tensor(float(top)) / 2688 * 2.0**-7 for top in (*tops, 147, 168, 210, 252)]
    return [*scales, torch.tensor(1.0), torch.tensor(255.0) / 2688 * 2.0**-24]


def others() -> list[torch.Tensor]:
    """Return scales that have none: beside these, anywhere, of 24 ones, and where bounds lie."""
    generator = torch.Generator().manual_seed(13)
    beside = [scale.nextafter(torch.tensor(to)) for scale in of_numbers()[::3] for to in (0.0, 9.0)]
    anywhere = torch.rand(8, generator=generator).add(1).mul(2.0**-9)
    edges = torch.tensor([2 - 2.0**-23, 2.0**89, 1.3 * 2.0**90, SCALE_FLOOR])
    return [*beside, *anywhere, *edges]


def assert_same(x: torch.Tensor, fixed: torch.Tensor) -> None:
    how = SCHEMES["nvfp4_static"].activation
    found = quantize_triton(x, "e2m1", how, fixed)
    for one, other in zip(found, quantize_reference(x, "e2m1", how, fixed), strict=True):
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def next_to_ties(fixed: torch.Tensor) -> torch.Tensor:
    """Return blocks under all eight fractions: the numbers of bf16 on either side of every tie."""
    step = torch.arange(8.0, 16.0, device=fixed.device)[:, None] * fixed
    near = step * torch.tensor(TIES, device=fixed.device)
    near = torch.cat((near, near * 2.0**-3), 1).bfloat16().view(torch.int16)
    rows = []
    for offset in (-1, 0, 1):
        beside = (near + offset).view(torch.bfloat16)
        beside[:, 1::3] *= -1
        block = torch.cat((beside, (step * 6.0).bfloat16(), (step * 0.5).bfloat16()), 1)
        # As it is, under scales eight times as small, and where it saturates.
        rows.append(torch.cat((block, block / 8, block * 2.0**14)).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("fixed", [*of_numbers(), *others()], ids=lambda one: f"{one.item():.9g}")
def test_numbers_next_to_ties(device, fixed):
    assert_same(next_to_ties(fixed.to(device)), fixed.to(device))


@pytest.mark.parametrize("scale", [4 / 2688, 3e-3, 0.75])
def test_blocks_of_all_kinds(device, generator, scale):
    """Far beyond the scale, below its least step, broken, zeros of both signs, and subnormal."""
    x = torch.randn(10, 48, generator=generator, device=device) * scale * 448
    x[1] *= torch.logspace(-6, 4, 48, device=device)
    x[2, ::2], x[3, 5], x[4, 20], x[5, 40] = 0.0, torch.nan, torch.inf, -torch.inf
    x[6], x[6, 1::2], x[7], x[8, 16:] = 0.0, -0.0, x[7] * 1e-41, x[8, 16:] * 1e-9
    # The least scale, and ratios up to 7.5 under it.
    x[9] = torch.linspace(-5.9, 7.5, 48, device=device) * scale * 2.0**-9
    x[9, 16:32] *= 1e4
    assert_same(x.bfloat16(), torch.tensor(scale, device=device))


def test_which_scales_have_factors(device, monkeypatch):
    """By factors twice as large: they give other codes, divisions do not."""
    table = reciprocal_table(torch.device(device)).clone()
    table[:1024] *= 2
    monkeypatch.setattr(fours_module, "reciprocal_table", lambda _: table)
    for fixed in others():
        assert_same(next_to_ties(fixed.to(device)), fixed.to(device))
    for fixed in of_numbers():
        with pytest.raises(AssertionError):
            assert_same(next_to_ties(fixed.to(device)), fixed.to(device))
