"""Find factors that take the place of divisions by nvfp4's scales.

A number of bf16 has eight bits, its block's scale is one of eight e4m3 fractions, and the row's
scale is the row's largest number over 2688. So only 128 x 8 different divisors occur, times powers
of two, and for nearly all there is a float32 factor such that

    ratio = float16(x * factor)

rounds to the same e2m1 code as the float32 quotient x / divisor does, for every x: in float16 two
ratios are rounded by one instruction. What makes this possible is that x has few bits: between two
neighbouring numbers of bf16 there is room for a threshold to move, by more than a float16 is off.

`factors` finds them. For the few rows for which there is none (five of 128 mantissas), the kernel
divides. `tests/kernels/test_reciprocals.py` compares the codes of all x under all divisors.
"""

from __future__ import annotations

from functools import cache

import torch

from hal.ops.kernels.common import capturing

__all__ = ["MISSING", "factors", "reciprocal_table"]

THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where e2m1 codes change. A quotient equal to the first, third, ... belongs to the code below,
which is even; one equal to the second, fourth, ... to the code above."""
MISSING = 0.0
"""What stands in the place of a factor that does not exist."""
ROOM = 3 * 2.0**-25
"""Share of a factor that products may be off by, being rounded to float32."""

_tables: dict[torch.device, torch.Tensor] = {}


def divisors() -> torch.Tensor:
    """Return the divisors [128, 8] float32: (1 + e / 8) times row scales brought to [1, 2).

    Row m is that of a row of activations whose largest number is (128 + m) * 2^k.
    """
    scales = torch.arange(128, 256, dtype=torch.float32) / 2688.0
    scales = torch.frexp(scales).mantissa * 2
    return scales[:, None] * (torch.arange(8, 16, dtype=torch.float32) / 8)


@cache
def factors() -> torch.Tensor:
    """Return the factors [128, 8] float32 in place of `divisors`, or MISSING."""
    divisor = divisors()[..., None]
    threshold = torch.tensor(THRESHOLDS)
    # The numbers of bf16 around the product of each threshold, [128, 8, 7, 6].
    product = divisor.double() * threshold.double()
    step = torch.exp2(torch.frexp(product).exponent.double() - 8)
    near = torch.floor(product / step)[..., None] + torch.arange(-2.0, 4.0, dtype=torch.float64)
    near = (near * step[..., None]).bfloat16().double()
    quotient = near.float() / divisor[..., None]
    even = (torch.arange(7) % 2 == 0)[:, None]
    over = (quotient > threshold[:, None]) | ((quotient == threshold[:, None]) & ~even)
    above = torch.where(over, near, torch.inf).amin(-1)
    below = torch.where(over, 0.0, near).amax(-1)
    # What float16 rounds to a threshold, and so to an even code, lies half a step on either side.
    half = torch.exp2(torch.frexp(threshold).exponent.double() - 12)
    under = torch.where(torch.frexp(threshold).mantissa == 0.5, half / 2, half)
    edge = torch.where(even[:, 0], threshold + half, threshold - under)
    least = (edge / above).amax(-1) * (1 + ROOM)
    most = (edge / below).amin(-1) * (1 - ROOM)
    middle = ((least + most) / 2).float()
    fits = (least < middle) & (middle < most)
    return torch.where(fits, middle, MISSING)


def reciprocal_table(device: torch.device) -> torch.Tensor | None:
    """Return the factors on a device, float32 [1152]: 128 x 8, then 1 for each row that has all.

    None where they are not there yet and a graph is being recorded, which no copy can be part of.
    """
    found = _tables.get(device)
    if found is None:
        if capturing():
            return None
        rows = factors()
        whole = (rows != MISSING).all(1).float()
        found = _tables[device] = torch.cat((rows.flatten(), whole)).to(device)
    return found
