"""Find factors that take the place of divisions by nvfp4's scales, ties and all.

A number of bf16 has eight bits, its block's scale is one of eight e4m3 fractions, and the row's
scale is the row's largest number over 2688. So only 128 x 8 different divisors occur, times powers
of two. For each there are two float32 factors such that

    ratio = x * first, rounded to the nearest, * second, rounded to zero

is at a threshold between two e2m1 codes, or above it, exactly where the float32 quotient x /
divisor has the code above it, for every x. A row's eight divisors share their second factor.

One factor would do for all x that lie beside a threshold, the nearest ones 2^-15 from it. But a
tenth of the divisors have multiples by 0.25, 1.25, 2.5 or 5 that are numbers of bf16, whose code is
the one below, and others by 0.75, 1.75 or 3.5, whose code is the one above. All of a divisor's are
off by the same share after one factor, apart from what rounding does to each: and that is different
under each second factor. `SECONDS` was found by trying 1 + n / 2^14 for n = 0, 1, ... until there
were factors to go with it; `tests/kernels/test_reciprocals.py` compares the codes of all x.
"""

from __future__ import annotations

from functools import cache

import torch

from hal.ops.kernels.common import capturing

__all__ = ["factors", "reciprocal_table"]

THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where e2m1 codes change. A quotient equal to the first, third, ... belongs to the code below,
which is even; one equal to the second, fourth, ... to the code above."""
MISSING = 0.0
"""What stands in the place of a factor that does not exist."""
SECONDS = {
    129: 13, 132: 6, 133: 6, 135: 9, 138: 26, 140: 502, 141: 9, 144: 6, 147: 232, 150: 26, 153: 6,
    154: 6, 156: 6, 159: 10, 161: 26, 162: 82, 168: 3583, 174: 19, 175: 87, 177: 6, 180: 6,
    182: 343, 183: 7, 189: 1012, 192: 6, 195: 9, 196: 232, 198: 6, 201: 9, 203: 19, 204: 9,
    207: 6, 210: 7249, 213: 6, 216: 100, 217: 19, 219: 9, 222: 19, 224: 336, 225: 8, 228: 6,
    231: 6, 234: 8, 237: 6, 238: 94, 240: 17, 243: 6, 245: 19, 246: 6, 252: 1894, 255: 85,
}  # fmt: skip
"""The second factors of rows whose largest number is so much times 2^k: (n / 2^14 + 1) * 2^-14. Of
all others n is 0."""
STEPS = (0, 1, -1, 2, -2, 3, -3)
"""How many units of its last place a first factor is from the number that it would be unrounded."""

_tables: dict[torch.device, torch.Tensor] = {}


def divisors() -> torch.Tensor:
    """Return the divisors [128, 8] float32: (1 + e / 8) times row scales brought to [1, 2).

    Row m is that of a row of activations whose largest number is (128 + m) * 2^k.
    """
    scales = torch.arange(128, 256, dtype=torch.float32) / 2688.0
    scales = torch.frexp(scales).mantissa * 2
    return scales[:, None] * (torch.arange(8, 16, dtype=torch.float32) / 8)


def first_factors(second: torch.Tensor) -> torch.Tensor:
    """Return first factors [128, 8] float32 that go with a second [128] of each row, or MISSING.

    second: Times 2^14, float32 in [1, 2).
    """
    divisor = divisors()[..., None]
    threshold = torch.tensor(THRESHOLDS)
    # The numbers of bf16 around the product of each threshold, [128, 8, 7, 6].
    product = divisor.double() * threshold.double()
    step = torch.exp2(torch.frexp(product).exponent.double() - 8)
    near = torch.floor(product / step)[..., None] + torch.arange(-2.0, 4.0, dtype=torch.float64)
    near = (near * step[..., None]).bfloat16().float()
    quotient = near / divisor[..., None]
    even = (torch.arange(7) % 2 == 0)[:, None]
    over = (quotient > threshold[:, None]) | ((quotient == threshold[:, None]) & ~even)
    second = second.double()[:, None]
    bits = (1 / (divisor[..., 0].double() * second)).float().view(torch.int32)
    found = torch.full(bits.shape, MISSING)
    for offset in reversed(STEPS):
        first = (bits + offset).view(torch.float32)
        ratio = (near * first[..., None, None]).double() * second[..., None, None]
        exact = ((ratio >= threshold.double()[:, None]) == over).all(-1).all(-1)
        found = torch.where(exact, first, found)
    return found


@cache
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first factors [128, 8] in place of `divisors`, and the second [128]: float32.

    Products with both are ratios times 2^-14, as `nvfp4_pairs` wants them.
    """
    second = torch.tensor([1.0 + SECONDS.get(number, 0) * 2.0**-14 for number in range(128, 256)])
    first = first_factors(second)
    assert (first != MISSING).all(), "SECONDS are those of other divisors"
    return first, second * 2.0**-14


def reciprocal_table(device: torch.device) -> torch.Tensor | None:
    """Return the factors on a device, float32 [1152]: 128 x 8, then the second of each row.

    None where they are not there yet and a graph is being recorded, which no copy can be part of.
    """
    found = _tables.get(device)
    if found is None:
        if capturing():
            return None
        first, second = factors()
        found = _tables[device] = torch.cat((first.flatten(), second)).to(device)
    return found
