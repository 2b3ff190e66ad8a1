"""Show that nvfp4's quotients, of two operations each, give the codes that true divisions give."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch

from hal.quant import e2m1
from hal.quant.codec import SCALE_FLOOR

TIES = (1, 3, 5, 7)


def rounded(number: Fraction) -> Fraction:
    """Round to 24 bits, ties to even: a float32 without bounds on its exponent."""
    if not number:
        return number
    exponent = abs(number.numerator).bit_length() - number.denominator.bit_length()
    if abs(number) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    return round(number / step) * step


def quotient(x: int, divisor: int, steps: int, bias: Fraction) -> Fraction:
    """Divide as `quotient` in `nvfp4_pairs` does, by a reciprocal that is some steps off."""
    first = rounded(Fraction(1, divisor))
    first += steps * (rounded(first * (1 + Fraction(1, 2**23))) - first)
    first = rounded(first * (1 - Fraction(1, 2**21)))
    left = rounded(1 - first * divisor)
    assert left > 0
    second = rounded(left * first + rounded(first * bias))
    return rounded(x * first + rounded(x * second))


def near_ties() -> list[tuple[int, int]]:
    """Return (x of 8 bits shifted, divisor of 24 bits) with quotients next to ties."""
    found = []
    for tie in TIES:
        for bits in range(128, 256):
            for shift in range(14, 22):
                for distance in range(-6, 7):
                    divisor, left = divmod((bits << shift) - distance, tie)
                    if not left and 2**23 <= divisor < 2**24:
                        found.append((bits << shift, divisor))
    return found


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_quotients_next_to_ties(steps: int) -> None:
    """All pairs whose quotient is within 6 units of a divisor's last place of a tie's multiple."""
    cases = near_ties()
    assert len(cases) > 2000
    assert (2**24, 2**24 - 1) in cases
    found, exact = [], []
    for x, divisor in cases:
        found.append(quotient(x, divisor, steps, Fraction(1, 2**40)))
        exact.append(rounded(Fraction(x, divisor)))
    for scale in (Fraction(1, 4), Fraction(1, 2), Fraction(1)):
        numbers = [
            torch.tensor(numpy.array([float(q * scale) for q in group], dtype=numpy.float32))
            for group in (found, exact)
        ]
        assert torch.equal(*map(e2m1.encode, numbers))


def test_the_bias_is_needed() -> None:
    """Without it, a divisor of 24 ones makes a tie of what lies above one."""
    x, divisor = 2**24, 2**24 - 1
    assert rounded(Fraction(x, divisor)) > 1
    assert quotient(x, divisor, 0, Fraction(0)) == 1
    assert quotient(x, divisor, 0, Fraction(1, 2**40)) > 1


@pytest.mark.parametrize("top", [448, 127])
def test_scales_and_reciprocals_of_all_sizes_of_bf16(top):
    """As `scales_of_pairs` and `reciprocals` have them, whatever unit rcp.approx is off by."""
    inverse = Fraction(float(numpy.float32(1.0 / top)))
    scales = []
    for size in range(128, 256):
        scale = rounded(size * inverse)
        scale = rounded(rounded(size - scale * top) * inverse + scale)
        assert scale == rounded(Fraction(size, top))
        scales.append(scale)
    for scale in (*scales, Fraction(float(numpy.float32(SCALE_FLOOR)))):
        exact = rounded(1 / scale)
        for steps in (-1, 0, 1):
            first = exact + steps * (rounded(exact * (1 + Fraction(1, 2**23))) - exact)
            left = rounded(first * scale - 1)
            assert rounded(left * -first + first) == exact
