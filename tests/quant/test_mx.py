"""Microscaling formats against formulas in exact arithmetic: all bytes, all thresholds."""

from __future__ import annotations

import math
from fractions import Fraction

import golden_results as golden
import numpy as np
import pytest
import quant_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import DTypeError, EncodingError, ShapeError, UnknownNameError
from hal.formats import number_format
from hal.quant import e2m1
from hal.quant.mx import (
    DEFAULT_RULES,
    ScaleRule,
    decode_e8m0,
    decode_mx,
    encode_e8m0,
    encode_mx,
    to_fnuz_mx,
)
from hal.quant.nibbles import unpack
from hal.torch_compat import has_dtype

ALL = torch.arange(256, dtype=torch.uint8)
FORMATS = tuple(DEFAULT_RULES)
FOURS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MEANT = np.append(2.0 ** (np.arange(255) - 127.0), np.nan)
"""What each e8m0 byte means."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * (20 * torch.randn((*shape[:-1], 1), generator=generator)).clamp(-80, 80).exp()


def shared_byte(amax: float, format: str, rule: ScaleRule) -> int:
    """Return the shared exponent by its definition, in exact arithmetic."""
    if not math.isfinite(amax):
        return 255
    if amax == 0:
        return 0
    row = number_format(format)
    largest = math.frexp(row.maximum)[1] - 1
    if rule is ScaleRule.RCEIL:
        exponent = math.frexp(amax)[1] - largest - 2
        while Fraction(row.maximum) * Fraction(2) ** exponent < Fraction(amax):
            exponent += 1
    else:
        fraction, exponent = math.frexp(amax)
        if rule is ScaleRule.EVEN:  # half a unit of the element's last place goes up
            unit = Fraction(2) ** -(row.mantissa_bits + 1)
            exponent += Fraction(fraction) + unit / 2 >= 1
        exponent -= 1 + largest
    return min(max(exponent + 127, 0), 254)


def rounded(ratio: np.ndarray, format: str) -> np.ndarray:
    """Return the nearest element, ties to the even code."""
    if format == "e4m3fn":
        return reference.round_to(ratio, format)
    size = np.minimum(np.abs(ratio), 6)
    above = np.searchsorted(FOURS, size)
    below = np.maximum(above - 1, 0)
    low, high = size - FOURS[below], FOURS[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return np.copysign(np.where(up, FOURS[above], FOURS[below]), ratio)


def elements(codes: torch.Tensor, format: str, columns: int) -> np.ndarray:
    if format == "e2m1":
        return e2m1.decode(unpack(codes, columns)).double().numpy()
    return reference.byte_values(format)[codes.view(torch.uint8).numpy()]


def check(x: torch.Tensor, format: str, rule: ScaleRule | None = None) -> None:
    columns = x.shape[-1]
    codes, scales = encode_mx(x, format, rule=rule)
    assert scales.dtype is torch.uint8
    assert scales.shape == (*x.shape[:-1], math.ceil(columns / 32))
    found = elements(codes, format, columns)
    decoded = decode_mx(codes, scales, format, columns)
    assert decoded.dtype is torch.float32
    wide = x.double().numpy()
    for place in np.ndindex(*scales.shape):
        box = (*place[:-1], slice(place[-1] * 32, place[-1] * 32 + 32))
        byte = shared_byte(np.abs(wide[box]).max(), format, rule or DEFAULT_RULES[format])
        assert scales[place].item() == byte
        if byte == 255:
            assert (found[box] == 0).all()
            assert decoded[box].isnan().all()
            continue
        np.testing.assert_array_equal(found[box], rounded(wide[box] / MEANT[byte], format))
        with np.errstate(over="ignore"):
            product = (found[box] * MEANT[byte]).astype(np.float32)
        np.testing.assert_array_equal(decoded[box].numpy(), product)


def test_all_bytes_of_e8m0() -> None:
    found = decode_e8m0(ALL)
    np.testing.assert_array_equal(found.double().numpy(), MEANT)
    assert found[0].item() == 2.0**-127
    if has_dtype("e8m0"):
        theirs = ALL.view(torch.float8_e8m0fnu).float()
        torch.testing.assert_close(found, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", ScaleRule)
def test_all_exponents_and_what_is_next_to_a_threshold(rule: ScaleRule, format: str) -> None:
    fractions = [1, 1.5, 1.75, 1.9375, number_format(format).maximum]
    powers = np.array([math.ldexp(f, e) for e in range(-149, 128) for f in fractions])
    powers = np.minimum(powers, np.finfo(np.float32).max).astype(np.float32)
    near = np.concatenate(
        [powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(3.4e38))]
    )
    found = encode_e8m0(torch.from_numpy(near), format, rule).tolist()
    assert found == [shared_byte(amax, format, rule) for amax in near.tolist()]


@pytest.mark.parametrize("format", FORMATS)
def test_special_maxima(format: str) -> None:
    amax = torch.tensor([0.0, -0.0, 1e-45, float("nan"), float("inf"), -float("inf"), -1.0])
    one = encode_e8m0(torch.tensor(1.0), format).item()
    assert encode_e8m0(amax, format).tolist() == [0, 0, 0, 255, 255, 255, one]


def test_the_rule_of_vllm_for_mxfp4() -> None:
    amax = numbers(20_000).abs() + 1e-30
    bits = (amax.view(torch.int32) + 0x200000) & 0x7F800000
    expected = ((bits >> 23) - 127 - 2).clamp(-127, 127) + 127
    assert torch.equal(encode_e8m0(amax, "e2m1"), expected.to(torch.uint8))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", [None, *ScaleRule])
def test_encode_is_the_formula(rule, format: str, source: torch.dtype) -> None:
    x = numbers(2, 5, 75)
    check(x.clamp(-6e4, 6e4).to(source), format, rule)


shapes = st.lists(st.integers(0, 3), max_size=2)


@settings(max_examples=40)
@given(shapes, st.integers(0, 100), st.sampled_from(FORMATS), st.integers(0, 99))
def test_encode_is_the_formula_for_any_shape(lead, columns: int, format: str, seed: int) -> None:
    check(numbers(*lead, columns, seed=seed), format)


singles = st.floats(width=32) | st.floats(-500, 500, width=32)
singles |= st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1e38, -3.4e38])


@given(st.lists(singles, min_size=1, max_size=40), st.sampled_from(FORMATS))
def test_encode_is_the_formula_for_any_numbers(row, format: str) -> None:
    check(torch.tensor([row]), format)


@pytest.mark.parametrize("format", ["e4m3fn", "e4m3fnuz", "e2m1"])
def test_all_codes_under_all_bytes(format: str) -> None:
    scales = ALL.unsqueeze(-1).expand(256, 8).contiguous()
    codes = ALL.expand(256, 256)
    if format == "e2m1":
        found = decode_mx(codes[:, :128].contiguous(), scales, format, 256)
    else:
        codes = codes.contiguous().view(getattr(torch, f"float8_{format}"))
        found = decode_mx(codes, scales, format, 256)
    meant = elements(codes[:, :128] if format == "e2m1" else codes, format, 256)
    with np.errstate(over="ignore"):
        expected = (meant * MEANT[:, None]).astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


@given(st.integers(0, 9), st.sampled_from(FORMATS))
def test_the_error_is_within_half_a_step_of_the_largest(seed: int, format: str) -> None:
    x = numbers(4, 64, seed=seed)
    found = decode_mx(*encode_mx(x, format), format, 64)
    amax = x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True)
    error = (found - x).abs().unflatten(-1, (2, 32))
    # e4m3fn keeps 3 bits and RCEIL never clips; e2m1 is worst at 5, between 4 and 6.
    assert (error <= amax / (16 if format == "e4m3fn" else 5)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_a_bad_value_poisons_its_block_and_no_other(format: str, bad: float) -> None:
    x = numbers(3, 100)
    clean = decode_mx(*encode_mx(x, format), format, 100)
    x[1, 40] = bad
    codes, scales = encode_mx(x, format)
    found = decode_mx(codes, scales, format, 100)
    assert found[1, 32:64].isnan().all()
    found[1, 32:64] = clean[1, 32:64]
    assert torch.equal(found, clean)
    _, kept = encode_mx(x, format, torch.ones(3, 4))  # a maximum from which the NaN was lost
    assert (kept == 255).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_get_the_smallest_scale(format: str) -> None:
    codes, scales = encode_mx(torch.zeros(2, 40), format)
    assert not codes.view(torch.uint8).any()
    assert not scales.any()
    assert not decode_mx(codes, scales, format, 40).any()


@pytest.mark.parametrize("format", FORMATS)
def test_shards_with_the_maximum_of_the_whole_give_its_codes(format: str) -> None:
    x = numbers(8, 256)
    codes, scales = encode_mx(x, format)
    other = numbers(8, 256, seed=1)  # rows of one block on two devices: they share its maximum
    largest = torch.maximum(x.abs(), other.abs()).unflatten(-1, (8, 32)).amax(-1)
    together = torch.stack((x, other), -1).unflatten(-2, (8, 32))
    assert torch.equal(
        encode_mx(x, format, largest)[1], encode_e8m0(together.abs().amax((-1, -2)), format)
    )
    per = 1 if format == "e4m3fn" else 2
    for start in (0, 96):
        shard, shard_scales = encode_mx(x[:, start : start + 96], format)
        expected = codes[:, start // per : (start + 96) // per]
        assert torch.equal(shard.view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert torch.equal(shard_scales, scales[:, start // 32 : start // 32 + 3])


@pytest.mark.parametrize("format", FORMATS)
def test_a_smaller_maximum_saturates(format: str) -> None:
    codes, _ = encode_mx(torch.tensor([[1.0, 1e38, -3e38]]), format, torch.tensor([[1e-30]]))
    top = number_format(format).maximum
    assert elements(codes, format, 3).tolist() == [[top, top, -top]]


def test_all_bytes_mean_on_gfx942_what_they_meant() -> None:
    values = ALL.expand(256, 256).contiguous().view(torch.float8_e4m3fn)
    scales = ALL.unsqueeze(-1).expand(256, 8).contiguous()
    before = decode_mx(values, scales, "e4m3fn", 256)
    fnuz, doubled = to_fnuz_mx(values, scales)
    assert torch.equal(values.view(torch.uint8), ALL.expand(256, 256))
    after = decode_mx(fnuz, doubled, "e4m3fnuz", 256)
    torch.testing.assert_close(after[:254], before[:254], rtol=0, atol=0, equal_nan=True)
    assert after[255].isnan().all()
    assert doubled[254:, 0].tolist() == [254, 255]  # there is no larger one, and NaN stays NaN
    again, _ = to_fnuz_mx(values, scales, inplace=True)
    assert again.data_ptr() == values.data_ptr()
    with pytest.raises(EncodingError, match=r"to_fnuz_mx: found torch\.float8_e4m3fnuz"):
        to_fnuz_mx(again, scales)
    with pytest.raises(EncodingError, match="to_fnuz"):
        to_fnuz_mx(values, scales.float())


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 1024, generator=generator)
    spread = torch.randn(512, 1024, generator=generator)
    chi = torch.randn(3, 512, 1024, generator=generator).square().mean(0).sqrt()
    return {"normal": normal, "exp": normal * (1.5 * spread).exp(), "student": normal / chi}


@pytest.mark.parametrize("name", ["normal", "exp", "student"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_default_rule_has_the_smallest_error(format: str, name: str) -> None:
    x = distributions()[name]
    errors = {
        rule: (decode_mx(*encode_mx(x, format, rule=rule), format, 1024) - x).norm()
        for rule in ScaleRule
    }
    assert min(errors, key=lambda rule: errors[rule]) is DEFAULT_RULES[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", ScaleRule)
def test_torchao_gives_the_same_bits(rule: ScaleRule, format: str) -> None:
    codes, scales = golden.results("torchao")[f"mx {format} {rule.name}"]
    found, found_scales = encode_mx(golden.numbers(), format, rule=rule)
    assert torch.equal(found_scales, scales)
    assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_compressed_tensors_gives_the_same_scales(format: str) -> None:
    (expected,) = golden.results("compressed_tensors")[f"mx {format}"]
    _, scales = encode_mx(golden.numbers()[[0, 1, 3]], format)
    assert torch.equal(scales, expected)


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = encode_mx(numbers(2, 64), "e4m3fn")
    with pytest.raises(UnknownNameError, match="element format of mx"):
        encode_mx(numbers(2, 64), "e5m2")
    with pytest.raises(ShapeError, match="scales"):
        decode_mx(codes, scales, "e4m3fn", 65)
    with pytest.raises(ShapeError, match="decode_mx: found codes"):
        decode_mx(codes, scales, "e4m3fn", 63)
    with pytest.raises(DTypeError, match="float8_e4m3fnuz"):
        decode_mx(codes, scales, "e4m3fnuz", 64)
    with pytest.raises(DTypeError, match="scales"):
        decode_mx(codes, decode_e8m0(scales), "e4m3fn", 64)
    with pytest.raises(DTypeError, match="decode_e8m0"):
        decode_e8m0(scales.int())
    with pytest.raises(DTypeError, match="encode_e8m0"):
        encode_e8m0(numbers(3).double(), "e2m1")


@pytest.mark.parametrize("format", FORMATS)
def test_compiling_breaks_no_graph(format: str) -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, scales = encode_mx(x, format)
        return codes.view(torch.uint8), scales, decode_mx(codes, scales, format, 75)

    x = numbers(4, 75)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for found, expected in zip(compiled, both(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_the_gpu_gives_the_bits_of_the_cpu(format: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = numbers(300, 500)
    x[0], x[1], x[2, 5], x[3, 5], x[4] = 1e-40, 0, float("nan"), float("inf"), 2.0**-126
    codes, scales = encode_mx(x, format)
    there, there_scales = encode_mx(x.to(device), format)
    assert torch.equal(there_scales.cpu(), scales)
    assert torch.equal(there.cpu().view(torch.uint8), codes.view(torch.uint8))
    decoded = decode_mx(there, there_scales, format, 500).cpu()
    expected = decode_mx(codes, scales, format, 500)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        decode_e8m0(ALL.to(device)).cpu(), decode_e8m0(ALL), rtol=0, atol=0, equal_nan=True
    )
