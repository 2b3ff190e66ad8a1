"""Static activations: the scale that calibration fixes, and the saturating cast under it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_reference import TOP, round_to

import hal
from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.quant import (
    SCALE_FLOOR,
    QTensor,
    bind_encoding,
    input_range,
    input_scale,
    quantize,
    to_layout,
)
from hal.quant.asymmetric import decode_asymmetric, encode_asymmetric_static, widest
from hal.quant.codec import encode_static
from hal.quant.scheme import SCHEMES

FLOOR = float(np.float32(SCALE_FLOOR))
STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("scheme", STATIC)
@given(amax=st.floats(0, float(np.float32(3e38)), width=32))
def test_the_scale_follows_the_one_rule(scheme: str, amax: float) -> None:
    top = {"e4m3fn": 448, "int8": 127, "e2m1": 448 * 6}[SCHEMES[scheme].activation.format]
    wanted = max(np.float32(np.float64(np.float32(amax)) / top), np.float32(SCALE_FLOOR))
    found = input_scale(amax, scheme)
    assert found.dtype is torch.float32
    assert found.item() == wanted


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(0, 2.0**100, width=32))
def test_the_range_is_covered(low: float, width: float) -> None:
    high = float(np.float32(low) + np.float32(width))
    scale, zero = input_range(low, high)
    assert (scale.dtype, zero.dtype) == (torch.float32, torch.int8)
    ends = torch.tensor([[low, high, 0.0]])
    codes, scales, zeros = encode_asymmetric_static(ends, scale, zero.float())
    seen = decode_asymmetric(codes, scales, zeros)
    # Half a step of the number, and half a step by which the zero point was rounded.
    assert ((seen - ends).abs() <= scale * 1.001).all()
    assert seen[0, 2] == 0


def test_ranges_that_are_none() -> None:
    for low, high in ((1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueRangeError, match="the least first"):
            input_range(low, high)


def test_zero_points_belong_to_one_scheme() -> None:
    dense = weight(8, 32)
    scale, zero = input_range(-1.0, 3.0)
    made = quantize(dense, "int8_static_asymmetric", input_scale=scale, input_zero=zero)
    assert made.input_zero is not None
    assert made.input_zero.item() == zero.item() == -64
    back = QTensor.from_state_dict(made.state_dict(), made.metadata)
    assert torch.equal(back.input_zero, made.input_zero)
    assert quantize(dense, made.scheme, input_scale=scale).input_zero.item() == 0
    with pytest.raises(ArgumentError, match=r"found input_zero.*int8_static_asymmetric"):
        quantize(dense, "int8_static", input_scale=scale, input_zero=zero)
    with pytest.raises(ArgumentError, match=r"input_zero without input_scale.*input_range"):
        quantize(dense, "int8_static_asymmetric", input_zero=zero)
    for wrong in (200, 0.5, float("nan")):
        with pytest.raises(ValueRangeError, match="integers, -128 to 127"):
            quantize(dense, made.scheme, input_scale=scale, input_zero=torch.tensor(wrong))
    with pytest.raises(ShapeError, match="input_zero"):
        quantize(dense, made.scheme, input_scale=scale, input_zero=torch.zeros(3))


def test_the_widest_range_serves_all() -> None:
    scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([7, -100], dtype=torch.int8)
    assert [part.item() for part in widest(scales, zeros)] == [0.5, 7.0]  # holds the other
    apart = torch.tensor([0.5, 0.5]), torch.tensor([-128, 127], dtype=torch.int8)
    scale, zero = widest(*apart)
    assert (scale.item(), abs(zero.item()) <= 1) == (1.0, True)


def test_the_scale_of_each_expert() -> None:
    assert input_scale(torch.tensor([448.0, 0.0, 1.0])).tolist() == pytest.approx(
        [1.0, SCALE_FLOOR, 1 / 448]
    )


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf"), [1.0, float("nan")]])
def test_magnitudes_that_are_none(amax) -> None:
    with pytest.raises(ValueRangeError, match="finite magnitudes"):
        input_scale(torch.tensor(amax))


@pytest.mark.parametrize("encoding", ["e4m3fn", "e4m3fnuz", "int8"])
@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    scale=st.floats(FLOOR, 2.0**100, width=32),
)
def test_against_float64(encoding: str, rows: list, scale: float) -> None:
    x = np.array(rows, dtype=np.float32)
    codes, scales = encode_static(torch.from_numpy(x), encoding, torch.tensor(scale))
    whole = np.isfinite(x).all(-1)
    assert np.array_equal(np.isnan(scales.numpy()), ~whole)
    assert (scales.numpy()[whole] == np.float32(scale)).all()
    with np.errstate(over="ignore"):
        ratio = (x[whole].astype(np.float64) / np.float64(np.float32(scale))).astype(np.float32)
    found = codes.float().numpy()
    assert np.array_equal(found[whole], round_to(ratio.astype(np.float64), encoding))
    assert (np.abs(found[whole]) <= TOP[encoding]).all()  # saturates
    broken = found[~whole]
    assert np.isnan(broken).all() if encoding != "int8" else not broken.any()


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_static_channel"])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_e4m3fnuz_doubles_the_scale_and_represents_the_same(scheme: str, lead: tuple) -> None:
    fixed = input_scale(3.0)
    plain = quantize(weight(*lead, 32, 48), scheme, platform="cpu", input_scale=fixed)
    other = quantize(weight(*lead, 32, 48), scheme, platform="rocm:mi300x", input_scale=fixed)
    converted = bind_encoding(plain, "e4m3fnuz", where="test")
    for made in (other, converted):
        assert made.encoding == "e4m3fnuz"
        assert torch.equal(made.input_scale, plain.input_scale * 2)
        assert made.input_scale.shape == lead
    assert torch.equal(other.values.view(torch.uint8), converted.values.view(torch.uint8))
    # Every bf16 number, those that saturate too, is represented by the same value.
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].unsqueeze(0)
    codes, scales = encode_static(x, "e4m3fn", fixed)
    halves, doubled = encode_static(x, "e4m3fnuz", fixed * 2)
    assert torch.equal(codes.float() * scales[0], halves.float() * doubled[0])


@pytest.mark.parametrize("scheme", STATIC)
def test_the_scale_travels(scheme: str) -> None:
    made = quantize(weight(2, 16, 32), scheme, platform="cpu", input_scale=torch.tensor([0.5, 2]))
    assert made.input_scale.tolist() == [0.5, 2.0]
    assert made.matrix(1).input_scale.item() == 2.0
    back = QTensor.from_state_dict(made.state_dict(), made.metadata)
    for other in (back, made.to("cpu"), to_layout(made, "interleaved", "cpu")):
        assert torch.equal(other.input_scale, made.input_scale)
        assert torch.equal(other.dequantize(), made.dequantize())


@pytest.mark.parametrize(
    ("scheme", "scale", "error", "match"),
    [
        ("fp8_channel", 1.0, ArgumentError, "found input_scale, needed none.*fp8_static"),
        ("fp8_static", 0.0, ValueRangeError, "at least 1e-12"),
        ("fp8_static", float("nan"), ValueRangeError, "at least 1e-12"),
        ("int8_static", float("inf"), ValueRangeError, "at least 1e-12"),
        ("int8_static", torch.ones(3), ShapeError, r"\[3\], needed \[\] or \[2\]"),
    ],
)
def test_wrong_scales(scheme: str, scale, error, match: str) -> None:
    with pytest.raises(error, match=match):
        quantize(weight(2, 16, 32), scheme, input_scale=scale)


def test_wrong_scales_of_a_qtensor() -> None:
    from dataclasses import replace

    made = quantize(weight(16, 32), "fp8_static", input_scale=1.0)
    with pytest.raises(ShapeError, match="input_scale"):
        replace(made, input_scale=torch.ones(1))
    with pytest.raises(DTypeError, match="input_scale"):
        replace(made, input_scale=torch.ones((), dtype=torch.float64))
    dynamic = quantize(weight(16, 32), "fp8_tensor")
    with pytest.raises(hal.HalError, match="found input_scale, needed none for fp8_tensor"):
        replace(dynamic, input_scale=torch.ones(()))
