"""Quantize in blocks of 128 under powers of two, and compare with the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from calibrated import quantize

from hal.ops.quantize import fake_quantize
from hal.quant.exponents import decode_exponents, encode_exponents
from hal.quant.scheme import SCHEMES, scale_shape

SHAPES = [(1, 1), (3, 128), (130, 257), (256, 384)]
GRANULARITIES = ["block128", "group128"]


def blocks(x, granularity):
    """Yield (place of the scale, block) of a matrix."""
    rows = 128 if granularity == "block128" else 1
    for row in range(0, x.shape[0], rows):
        for column in range(0, x.shape[1], 128):
            yield (row // rows, column // 128), x[row : row + rows, column : column + 128]


@pytest.mark.parametrize("encoding", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_scale_is_the_least_power_of_two_that_holds_its_block(shape, granularity, encoding):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x *= torch.logspace(-4, 4, shape[1])
    values, scales = encode_exponents(x, encoding, granularity)
    assert scales.dtype is torch.uint8
    assert tuple(scales.shape) == scale_shape(granularity, shape)
    back = decode_exponents(values, scales, granularity)
    shift = 1 if encoding == "e4m3fnuz" else 0
    for place, block in blocks(x, granularity):
        top = float(block.abs().max())
        power = int(scales[place]) - 127 - shift
        assert top <= 448 * 2.0**power
        assert top > 448 * 2.0 ** (power - 1)
    # e4m3 rounds by at most 2^-4 of a number, and by half of its least step.
    for (_, found), (place, block) in zip(
        blocks(back, granularity), blocks(x, granularity), strict=True
    ):
        step = 2.0 ** (int(scales[place]) - 127 - shift - 10)
        assert ((found - block).abs() <= (block.abs() / 16).clamp_min(step)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("top", "power"), [(448.0, 0), (449.0, 1), (896.0, 1), (2.0**-20, -28)])
def test_what_just_fits_does_not_raise_the_exponent(granularity, top, power):
    x = torch.zeros(1, 130)
    x[0, 3] = -top
    values, scales = encode_exponents(x, "e4m3fn", granularity)
    assert scales.tolist() == [[127 + power, 0]]
    assert float(decode_exponents(values, scales, granularity)[0, 3]) == pytest.approx(-top, 0.04)
    assert math.log2(448 * 2.0**power / top) < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_blocks_with_what_is_no_number_become_nan(granularity, bad):
    x = torch.ones(200, 256)
    x[130, 200] = bad
    values, scales = encode_exponents(x, "e4m3fn", granularity)
    back = decode_exponents(values, scales, granularity)
    for place, block in blocks(back, granularity):
        broken = place == ((1, 1) if granularity == "block128" else (130, 1))
        assert block.isnan().all() if broken else torch.equal(block, torch.ones_like(block))
        assert (int(scales[place]) == 255) == broken


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_both_encodings_hold_the_same_numbers(granularity):
    x = torch.randn(140, 300, generator=torch.Generator().manual_seed(1))
    x[:, 140:] = 0
    plain = decode_exponents(*encode_exponents(x, "e4m3fn", granularity), granularity)
    other = decode_exponents(*encode_exponents(x, "e4m3fnuz", granularity), granularity)
    assert torch.equal(plain, other)


def test_the_scheme_rounds_both_operands_under_powers_of_two():
    scheme = SCHEMES["fp8_block128_ue8m0"]
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    weight = quantize(x.repeat(40, 1), scheme.name)
    assert weight.scales.dtype is torch.uint8
    assert tuple(weight.scales.shape) == (2, 3)
    seen = fake_quantize(x, scheme, "e4m3fn")
    wanted = decode_exponents(*encode_exponents(x, "e4m3fn", "group128"), "group128")
    assert torch.equal(seen, wanted)
    # Not what float32 scales give.
    assert not torch.equal(seen, fake_quantize(x, SCHEMES["fp8_block128"], "e4m3fn"))
