"""Show that factors give the codes of true divisions, for all numbers under all divisors."""

from __future__ import annotations

import numpy
import pytest
import torch

from hal.ops.kernels import reciprocals
from hal.quant import e2m1


def numbers() -> torch.Tensor:
    """Return the numbers of bf16 from 2^-10 to 2^5: quotients of every code."""
    bits = torch.arange(117 << 7, 132 << 7, dtype=torch.int32)
    return bits.to(torch.int16).view(torch.bfloat16).float()


def truncated(x: torch.Tensor) -> torch.Tensor:
    """Return x (f64, not negative) as the bits of the float16 number next to zero."""
    size = x.clamp_max(65504.0)
    normal = (size.view(torch.int64) >> 42) - ((1023 - 15) << 10)
    return torch.where(size < 2.0**-14, (size * 2.0**24).long(), normal)


def codes_of(ratio: torch.Tensor) -> torch.Tensor:
    """Return the codes of ratios times 2^-14 (f64), as `word_of_halves` does."""
    return (truncated(ratio).clamp_max(0x0EFF) + 0x100) >> 9


def test_float16_is_truncated() -> None:
    halves = torch.arange(0x7BFF, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    above = torch.from_numpy(numpy.nextafter(halves.numpy(), 0))
    assert torch.equal(truncated(halves), torch.arange(0x7BFF))
    assert torch.equal(truncated(above)[1:], torch.arange(0x7BFF - 1))


def test_codes_of_all_numbers() -> None:
    """The products have the codes of the quotient, whatever the scales, without an exception."""
    first, second = reciprocals.factors()
    x = numbers()
    assert x.numel() == 15 * 128
    quotient = x / reciprocals.divisors()[..., None]
    product = (x * first[..., None]).double() * second.double()[:, None, None]
    found, wanted = codes_of(product), e2m1.encode(quotient)
    assert torch.equal(found, wanted.long())
    assert wanted.unique().tolist() == list(range(8))
    # No code changes between these numbers, whatever the exponents: factors are far from 2^-126.
    assert ((first > 0.1) & (first <= 1)).all()
    assert ((second >= 2.0**-14) & (second < 2.0**-13)).all()


def test_one_factor_is_not_enough() -> None:
    """A tenth of the divisors have ties of both kinds, and four rows in ten have such a divisor."""
    divisor, x = reciprocals.divisors()[..., None], numbers()
    wanted = e2m1.encode(x / divisor).long()
    bits = (1 / divisor).view(torch.int32)
    found = torch.zeros(128, 8, dtype=torch.bool)
    for offset in range(-16, 17):
        ratio = (x * (bits + offset).view(torch.float32)).double() * 2.0**-14
        found |= (codes_of(ratio) == wanted).all(-1)
    assert (~found).sum() == 96
    assert (~found.all(1)).sum() == 51


@pytest.mark.parametrize("row", [0, 1, 4])
def test_seconds_are_the_first_that_will_do(row) -> None:
    """How the table was found; rows 168 and 210 took thousands of trials."""
    known = reciprocals.SECONDS.get(128 + row, 0)
    for trial in range(known + 1):
        first = reciprocals.first_factors(torch.full((128,), 1.0 + trial * 2.0**-14))
        assert (first[row] != reciprocals.MISSING).all() == (trial == known)


def test_the_table_has_both_factors() -> None:
    table = reciprocals.reciprocal_table(torch.device("cpu"))
    first, second = reciprocals.factors()
    assert table.shape == (128 * 9,)
    assert torch.equal(table[:1024].view(128, 8), first)
    assert torch.equal(table[1024:], second)
    assert reciprocals.reciprocal_table(torch.device("cpu")) is table


def test_divisors_are_those_of_rows() -> None:
    """Whatever the exponent of a row's largest number, its scales have these mantissas."""
    for exponent in (-20, 0, 13):
        largest = torch.arange(128, 256).float() * 2.0**exponent
        scale = largest / 2688.0
        block = scale[:, None] * torch.arange(8, 16).float()
        mantissas = torch.frexp(block).mantissa
        assert torch.equal(mantissas, torch.frexp(reciprocals.divisors()).mantissa)
    # The kernel divides by a row's scale with a corrected reciprocal: exact, but for 24 ones.
    assert (torch.frexp(reciprocals.divisors()[:, 0]).mantissa < 1 - 2.0**-24).all()


def test_scales_that_a_number_of_bf16_has() -> None:
    """How `largest_under` finds it: the one nearest to 2688 times the scale, in float32."""
    largest = torch.arange(128, 256).float()
    top = (largest / 2688.0 * 2688.0).view(torch.int32)
    assert torch.equal(((top + 0x8000) & -0x10000).view(torch.float32), largest)
