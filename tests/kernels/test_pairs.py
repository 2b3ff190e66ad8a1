"""Compare what works on two bf16 numbers at once with torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hal.ops.activations import Activation
from hal.ops.kernels import quantize as quantize_module
from hal.ops.kernels import quantize_fours as fours_module
from hal.ops.kernels.common import INTERPRETED, has_pairs, launch
from hal.ops.kernels.pairs import (
    choose_bits,
    choose_bytes,
    fma_pair,
    four_words,
    high_number,
    largest_pair,
    largest_signed_pair,
    limited_halves,
    look_up,
    low_number,
    multiply_pair,
    quick_power,
    quick_reciprocal,
    round_pair,
    smallest_pair,
    truncated_products,
    truncated_quotients,
    unpack_again,
    word_of_halves,
)
from hal.ops.kernels.quantize import Norm
from hal.ops.quantize import launch_triton, quantize_reference, quantize_triton
from hal.quant import SCHEMES


@pytest.fixture(autouse=True)
def _needs_pairs(device):
    if not has_pairs():
        pytest.skip("this device has no instructions for pairs")


@triton.jit
def _pairs_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    tl.store(out_ptr + at, fma_pair(x, y, z))
    tl.store(out_ptr + SIZE + at, multiply_pair(x, y))
    tl.store(out_ptr + 2 * SIZE + at, largest_pair(x & 0x7FFF7FFF, y & 0x7FFF7FFF))
    tl.store(out_ptr + 3 * SIZE + at, smallest_pair(x & 0x7FFF7FFF, y & 0x7FFF7FFF))
    third = low_number(x) / 3.0
    tl.store(out_ptr + 4 * SIZE + at, round_pair(third, high_number(x) * 1.00390625))
    tl.store(out_ptr + 5 * SIZE + at, choose_bytes(x, y, 0xFBD9))
    tl.store(out_ptr + 6 * SIZE + at, choose_bytes(x, y, 0x6240))
    tl.store(out_ptr + 7 * SIZE + at, choose_bits(x, y, 0x0F0F0F0F))


@triton.jit
def _quick_kernel(x_ptr, y_ptr, table_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    low, high = unpack_again(x)
    tl.store(out_ptr + at, round_pair(low, high))
    tl.store(out_ptr + SIZE + at, largest_signed_pair(x, y) & 0x7FFF7FFF)
    tl.store(out_ptr + 2 * SIZE + at, look_up(table_ptr, at * 7 % 64))
    tl.store(out_ptr + 3 * SIZE + at, quick_reciprocal(low).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * SIZE + at, quick_power(low).to(tl.int32, bitcast=True))


@triton.jit
def _halves_kernel(x_ptr, factors_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    low, high = tl.load(x_ptr + at), tl.load(x_ptr + SIZE + at)
    halves = truncated_products(low, high, first, second)
    tl.store(out_ptr + at, halves)
    tl.store(out_ptr + SIZE + at, limited_halves(halves, 0x0EFF0EFF, True))
    tl.store(out_ptr + 2 * SIZE + at, limited_halves(halves, 0x0EFF0EFF, False))
    tl.store(out_ptr + 3 * SIZE + at, truncated_quotients(low, high))


@triton.jit
def _codes_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second = tl.load(x_ptr + at), tl.load(x_ptr + SIZE + at)
    third, fourth = tl.load(x_ptr + 2 * SIZE + at), tl.load(x_ptr + 3 * SIZE + at)
    tl.store(out_ptr + at, word_of_halves(first, second, third, fourth))


@triton.jit
def _fours_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    part, at = tl.arange(0, 4)[None, None, :], tl.arange(0, SIZE)[:, None, None]
    side = tl.arange(0, 2)[None, :, None]
    w0, w1, w2, w3 = four_words(tl.load(x_ptr + at * 8 + side * 4 + part))
    place = tl.arange(0, SIZE)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(out_ptr + place, w0)
    tl.store(out_ptr + 2 * SIZE + place, w1)
    tl.store(out_ptr + 4 * SIZE + place, w2)
    tl.store(out_ptr + 6 * SIZE + place, w3)


def bytes_of(words):
    return words.view(torch.uint8).reshape(-1, 4)


def test_operations(device, generator):
    """Numbers of 16 binades, so that sums lie far from ties and are rounded once in float32 too."""
    x, y, z = (
        torch.randn(2048, generator=generator, device=device)
        * torch.exp2(torch.randint(-8, 8, (2048,), generator=generator, device=device))
        for _ in range(3)
    )
    x, y, z = (part.bfloat16() for part in (x, y, z))
    out = torch.empty(8, 1024, dtype=torch.int32, device=device)
    a, b, c = (part.view(torch.int32) for part in (x, y, z))
    launch(_pairs_kernel, (1,), a, b, c, out, SIZE=1024)
    numbers = out.view(torch.bfloat16)
    exact = x.double() * y.double() + z.double()
    away = (exact.float().view(torch.int32) & 0xFFFF).sub(0x8000).abs() > 4
    assert away.double().mean() > 0.99
    assert torch.equal(numbers[0][away], exact.float().bfloat16()[away])
    assert torch.equal(numbers[1], (x.float() * y.float()).bfloat16())
    assert torch.equal(numbers[2], torch.maximum(x.abs(), y.abs()))
    assert torch.equal(numbers[3], torch.minimum(x.abs(), y.abs()))
    assert torch.equal(numbers[4][1::2], (x.float() * 1.00390625).bfloat16()[1::2])
    third = (x.double() / 3).float().bfloat16()
    assert torch.equal(numbers[4][::2], third[::2])
    left, right = bytes_of(a), bytes_of(b)
    negative = torch.stack((left[:, 1], right[:, 1], left[:, 3], right[:, 3]), -1) >= 128
    assert torch.equal(bytes_of(out[5]), negative.to(torch.uint8) * 255)
    chosen = torch.stack((left[:, 0], right[:, 0], left[:, 2], right[:, 2]), -1)
    assert torch.equal(bytes_of(out[6]), chosen)
    assert torch.equal(out[7], (a & 0x0F0F0F0F) | (b & ~0x0F0F0F0F))


def test_what_is_quick(device, generator):
    """Approximations, and what one instruction does."""
    x, y = (torch.randn(2048, generator=generator, device=device).bfloat16() for _ in range(2))
    x[:4] = torch.tensor([-0.0, 2.0**-20, -torch.inf, 7e-8])
    table = torch.arange(64, dtype=torch.int32, device=device) ** 3
    out = torch.empty(5, 1024, dtype=torch.int32, device=device)
    a, b = x.view(torch.int32), y.view(torch.int32)
    launch(_quick_kernel, (1,), a, b, table, out, SIZE=1024)
    assert torch.equal(out[0], a)
    assert torch.equal(out.view(torch.bfloat16)[1], torch.maximum(x.abs(), y.abs()))
    assert torch.equal(out[2], table[torch.arange(1024, device=device) * 7 % 64])
    low = x[::2].float()
    finite = (low != 0) & low.isfinite()
    found = out.view(torch.float32)
    torch.testing.assert_close(found[3][finite], 1 / low[finite], rtol=2**-22, atol=0)
    torch.testing.assert_close(found[4], torch.exp2(low), rtol=2**-21, atol=0)


def truncated(x):
    """Return x (f64) as the float16 numbers next to zero."""
    half = x.clamp(-65504, 65504).half()
    beyond = half.double().abs() > x.abs()
    return torch.where(beyond, (half.view(torch.int16) - 1).view(torch.float16), half)


def test_truncated_halves(device, generator):
    """Rounded and truncated as said, with signs, from below the least number to infinity."""
    x = torch.randn(2048, generator=generator, device=device)
    x *= torch.exp2(torch.randint(-20, 20, (2048,), generator=generator, device=device))
    x[:5] = torch.tensor([0.0, -0.0, 3e38, -torch.inf, torch.inf])
    factors = torch.tensor([0.7, 1.3 * 2.0**-14], device=device)
    out = torch.empty(4, 1024, dtype=torch.int32, device=device)
    launch(_halves_kernel, (1,), x, factors, out, SIZE=1024)
    # The first numbers of all words, then the second ones.
    found = [part.view(1024, 2).T.flatten() for part in out.view(torch.float16)]
    wanted = truncated((x * factors[0]).double() * factors[1].double())
    within = wanted.abs() < 65504
    assert torch.equal(found[0][within], wanted[within])
    assert torch.equal(found[0].signbit(), x.signbit())
    limited = wanted.clamp(-0.00042700767517, 0.00042700767517)
    for part in found[1:3]:
        assert torch.equal(part.view(torch.int16), limited.view(torch.int16))
    # As quotients, all but ties are what they were, and what rounded to the last place.
    same = found[3] == truncated(x.double() * 2.0**-14)
    assert same[within].double().mean() > 0.999


def test_ties_of_quotients(device):
    """Ties come out below or not, as their code does; what is beside them stays where it is."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    x = torch.stack([(ties.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)])
    x = torch.cat((x, -x)).flatten()
    x = torch.cat((x, x.new_zeros(2 * 32 - x.numel())))
    out = torch.empty(4, 32, dtype=torch.int32, device=device)
    launch(_halves_kernel, (1,), x, torch.ones(2, device=device), out, SIZE=32)
    halves = out[3].view(torch.float16).view(32, 2).T.flatten()[:42].double().view(2, 3, 7)
    assert torch.equal(halves[0], -halves[1])
    below, at, above = halves[0] * 2.0**14 >= ties.double()
    assert not below.any()
    assert at.tolist() == [False, True, False, True, False, True, False]
    assert above.all()


def test_codes_of_halves(device, generator):
    """All float16 numbers below 7 * 2^-14, with both signs, in each place of a word."""
    half = torch.arange(0x0F00, dtype=torch.int32, device=device).to(torch.int16)
    half = torch.cat((half, half | -0x8000)).view(torch.float16)
    half = torch.cat((half, half[: 8 * 1024 - half.numel()]))
    half = half[torch.randperm(8 * 1024, generator=generator, device=device)].view(4, 1024, 2)
    out = torch.empty(1024, dtype=torch.int32, device=device)
    launch(_codes_kernel, (1,), half.view(torch.int32).flatten(), out, SIZE=1024)
    ratio = half.double() * 2.0**14
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device).double()
    codes = (ratio.abs()[..., None] >= ties).sum(-1) + 8 * half.signbit()
    # First numbers of two words, second ones of these, and the same of the next two.
    order = torch.stack([codes[i, :, j] for j in (0, 1) for i in (0, 1)], -1)
    later = torch.stack([codes[i, :, j] for j in (0, 1) for i in (2, 3)], -1)
    wanted = torch.cat((order, later), -1) << (4 * torch.arange(8, device=device))
    assert torch.equal(out, wanted.sum(-1).to(torch.int32))


def same_bits(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


# Second scales that numbers of bf16 have: 1 and 147 / 21504, with many ties, and one that most
# blocks exceed. 0: the row's own.
CASES = [
    *((columns, 0) for columns in (24, 48, 2880)),
    *((48, outer) for outer in (1.0, 147 / 21504, 129 / 2688 * 2.0**-20)),
    (2880, 1.0),
]


@pytest.mark.parametrize("before", ["plain", "norm", "gate"])
@pytest.mark.parametrize(("columns", "outer"), CASES, ids=str)
def test_divided_rows_have_the_same_codes(device, generator, before, columns, outer, monkeypatch):
    """Whether by factors or by divisions; blocks far below their row's largest too."""
    how, rows = SCHEMES["nvfp4_static" if outer else "nvfp4"].activation, 12
    wide = columns * (2 if before == "gate" else 1)
    x = torch.randn(rows, wide, generator=generator, device=device)
    x *= torch.exp2(torch.randint(-20, 1, (rows, wide), generator=generator, device=device))
    x[:, 0], x[3], x[4, 1] = 160.0, 0.0, torch.nan
    x[:5, -1] = 3e38 if before == "plain" else 1.0
    x[5, 1::2] = -0.0
    x = x.bfloat16()
    weight = torch.randn(columns, generator=generator, device=device).bfloat16()
    given = {"gate": {"gate": Activation()}, "norm": {"norm": Norm(weight, 1e-6)}}.get(before, {})
    fixed = torch.tensor(outer, device=device) if outer else None
    if outer:
        given["fixed"] = fixed
    results = []
    for table in (fours_module.reciprocal_table, lambda device: None):
        monkeypatch.setattr(fours_module, "reciprocal_table", table)
        results.append(launch_triton(x, "e2m1", how, columns, **given))
    same_bits(*results)
    if before == "plain":
        same_bits(results[0], quantize_reference(x, "e2m1", how, fixed))


def test_ratios_above_nine(device):
    """A block whose scale is the least one: its largest number has ratio 9, and code 7."""
    how = SCHEMES["nvfp4"].activation
    largest = torch.arange(128, 256, dtype=torch.float32, device=device)
    x = torch.zeros(128, 32, device=device)
    x[:, 0] = largest
    # Just below one and a half times the least scale, 2^-9, which rounds down to it.
    x[:, 16:] = (largest / 2688 * 6 * 1.4999 * 2.0**-9)[:, None]
    x = x.bfloat16()
    same_bits(launch_triton(x, "e2m1", how, 32), quantize_reference(x, "e2m1", how))


def test_ties_zeros_and_nan(device):
    """Sums halfway between two numbers, zeros with signs, and what is no number."""
    nan, inf = float("nan"), float("inf")
    cases = [
        (1.0, 0.25, 96.0, 96.0), (1.0, 0.75, 96.0, 97.0), (1.0, 0.254, 96.0, 96.5),
        (1.0, 0.2490234375, 96.0, 96.0), (0.0, 1.0, -0.0, 0.0), (-0.0, 1.0, -0.0, -0.0),
        (nan, 1.0, 0.0, nan), (inf, 1.0, 1.0, inf), (2.0**-120, 2.0**-10, 0.0, 2.0**-130),
    ]  # fmt: skip
    cases += [(1.0, 0.0, 0.0, 0.0)] * (32 - len(cases))
    x, y, z, wanted = torch.tensor(cases, device=device).T.contiguous().bfloat16()
    out = torch.empty(8, 16, dtype=torch.int32, device=device)
    launch(
        _pairs_kernel, (1,), *(part.contiguous().view(torch.int32) for part in (x, y, z)), out,
        SIZE=16,
    )  # fmt: skip
    found = out[0].view(torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[4:6].cpu(), torch.tensor([False, True]))
    assert out[2].view(torch.bfloat16)[6].isnan()
    assert out[2].view(torch.bfloat16)[7] == inf


def test_four_words(device):
    x = torch.arange(128, dtype=torch.int32, device=device)
    out = torch.empty(4, 16, 2, dtype=torch.int32, device=device)
    launch(_fours_kernel, (1,), x, out, SIZE=16)
    assert torch.equal(out, x.reshape(16, 2, 4).permute(2, 0, 1))


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_numbers_next_to_ties(device, generator, scheme):
    """Divisors of all kinds, and the numbers of bf16 on either side of every tie of theirs."""
    how = SCHEMES[scheme].activation
    rows, blocks = 16 if INTERPRETED.value else 64, 16
    x = torch.rand(rows, blocks, 16, generator=generator, device=device) + 1
    x *= torch.exp2(torch.randint(-12, 1, (rows, blocks, 1), generator=generator, device=device))
    x = x.flatten(1).bfloat16().float()
    x[:, 0] = 2688 * (1 + torch.rand(rows, generator=generator, device=device))
    x = x.bfloat16().float()
    _, scales, *second = quantize_reference(x, "e2m1", how)
    if second:
        steps = (scales.float() * second[0][:, None]).repeat_interleave(16, 1)
    else:
        steps = torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    near = steps * ties.repeat(37)[: x.shape[1]]
    bits = near.bfloat16().view(torch.int16)
    for offset in (-1, 0, 1):
        beside = (bits + offset).view(torch.bfloat16)
        # Two numbers of each block stay, the largest among them.
        largest = x.reshape(rows, -1, 16).amax(-1, keepdim=True) == x.reshape(rows, -1, 16)
        kept = torch.where(largest.flatten(1), x.bfloat16(), beside)
        kept[:, 5::7] *= -1
        same_bits(quantize_triton(kept, "e2m1", how), quantize_reference(kept, "e2m1", how))


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_what_is_taken_in_pairs(device, generator, scheme, monkeypatch):
    """Rows of bf16 in whole words are; all else goes the other way, with the same codes."""
    how = SCHEMES[scheme].activation
    taken = []
    for name in ("quantize_fours", "quantize_pairs"):
        original = getattr(quantize_module, name)
        monkeypatch.setattr(
            quantize_module, name,
            lambda *a, name=name, original=original, **k: (taken.append(name), original(*a, **k)),
        )  # fmt: skip
    wide = torch.randn(6, 528, generator=generator, device=device).bfloat16()
    weight = torch.ones(256, dtype=torch.bfloat16, device=device)
    gate = wide[:, :512].contiguous()
    inside = [
        (wide[:, :256], {}),
        (wide[:, 2:258], {}),
        (wide[:, :256], {"norm": Norm(weight, 1e-6)}),
        (gate, {"gate": Activation()}),
        (gate[:, :256], {"gate": Activation("relu2", gated=False)}),
    ]
    outside = [
        (wide[:, 1:257], {}),
        (wide[:, :252], {}),
        (wide[:, :256].half(), {}),
        (wide[:, :256].float(), {}),
        (gate, {"gate": Activation(interleaved=True)}),
    ]
    for expected, cases in ((1, inside), (0, outside)):
        for x, before in cases:
            taken.clear()
            features = 256 if before else x.shape[1]
            found = launch_triton(x, "e2m1", how, features, **before)
            gated = "gate" in before and scheme == "mxfp4"
            wanted = ["quantize_pairs" if gated else "quantize_fours"] * expected
            assert taken == wanted, (x.shape, x.dtype, before)
            if not before:
                same_bits(found, quantize_reference(x, "e2m1", how))
