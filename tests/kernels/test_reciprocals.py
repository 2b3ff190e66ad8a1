"""Show that factors give the codes of true divisions, for all numbers under all divisors."""

from __future__ import annotations

import torch

from hal.ops.kernels import reciprocals
from hal.quant import e2m1


def numbers() -> torch.Tensor:
    """Return the numbers of bf16 from 2^-10 to 2^5: quotients of every code."""
    bits = torch.arange(117 << 7, 132 << 7, dtype=torch.int32)
    return bits.to(torch.int16).view(torch.bfloat16).float()


def test_codes_of_all_numbers() -> None:
    """The product, as float16, has the code of the quotient, whatever the scales."""
    factors = reciprocals.factors()
    exist = factors != reciprocals.MISSING
    assert exist.sum() == 128 * 8 - 5
    divisor, factor = reciprocals.divisors()[exist], factors[exist]
    x = numbers()
    assert x.numel() == 15 * 128
    quotient = x / divisor[:, None]
    ratio = (x * factor[:, None]).half().float()
    kept = quotient < 10
    assert kept.double().mean() > 0.7
    found, wanted = e2m1.encode(ratio), e2m1.encode(quotient)
    assert torch.equal(found[kept], wanted[kept])
    assert wanted[kept].unique().tolist() == list(range(8))


def test_a_rounded_reciprocal_is_not_enough() -> None:
    """Without the search, a sixth of the divisors would give some number another code."""
    divisor = reciprocals.divisors().flatten()
    x = numbers()
    ratio = (x * (1 / divisor)[:, None]).half().float()
    differ = e2m1.encode(ratio) != e2m1.encode(x / divisor[:, None])
    assert differ.any(1).sum() > 100


def test_the_table_marks_rows_that_must_be_divided() -> None:
    table = reciprocals.reciprocal_table(torch.device("cpu"))
    assert table.shape == (128 * 9,)
    rows, whole = table[:1024].view(128, 8), table[1024:]
    assert torch.equal(whole == 1, (rows > 0).all(1))
    assert whole.sum() == 123
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
