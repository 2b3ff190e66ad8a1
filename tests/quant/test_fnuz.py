"""e4m3fn to e4m3fnuz, for all 256 bytes."""

from __future__ import annotations

import numpy as np
import pytest
import quant_reference as reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import EncodingError, UnknownNameError, ValueRangeError
from hal.quant import bind_encoding, quantize, to_layout
from hal.quant.fp8 import doubled_e8m0, saturate, to_fn, to_fnuz

ALL = torch.arange(256, dtype=torch.uint8)
ONE = torch.tensor([1.0])


def all_bytes() -> torch.Tensor:
    return ALL.clone().view(torch.float8_e4m3fn)


def test_torch_reads_the_bytes_as_the_specifications_say() -> None:
    for encoding, name in (("e4m3fn", torch.float8_e4m3fn), ("e4m3fnuz", torch.float8_e4m3fnuz)):
        found = ALL.view(name).double().numpy()
        np.testing.assert_array_equal(found, reference.byte_values(encoding))


def test_all_bytes_mean_what_they_meant() -> None:
    values, scales = to_fnuz(all_bytes(), ONE)
    assert values.dtype is torch.float8_e4m3fnuz
    codes = values.view(torch.uint8).numpy()
    meant = reference.byte_values("e4m3fn")
    means = reference.byte_values("e4m3fnuz")[codes] * scales.item()
    np.testing.assert_array_equal(means, meant)
    assert codes[0x80] == 0x00  # -0 would be NaN
    assert codes[0x7F] == codes[0xFF] == 0x80  # NaN would be +-240
    kept = [byte for byte in range(256) if byte not in (0x80, 0x7F, 0xFF)]
    np.testing.assert_array_equal(codes[kept], np.array(kept))


def test_scales_double_and_stay_the_callers() -> None:
    scales = torch.tensor([0.5, 3.0, float("nan"), 1e-12])
    _, doubled = to_fnuz(all_bytes(), scales)
    torch.testing.assert_close(doubled, scales * 2, rtol=0, atol=0, equal_nan=True)
    assert scales[0].item() == 0.5


def test_a_copy_leaves_the_source_alone_and_in_place_does_not() -> None:
    source = all_bytes()
    values, _ = to_fnuz(source, ONE)
    assert torch.equal(source.view(torch.uint8), ALL)
    assert values.data_ptr() != source.data_ptr()
    again, _ = to_fnuz(source, ONE, inplace=True)
    assert again.data_ptr() == source.data_ptr()
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))


def test_converting_twice_is_refused() -> None:
    values, scales = to_fnuz(all_bytes(), ONE)
    before = values.view(torch.uint8).clone()
    with pytest.raises(EncodingError, match="float8_e4m3fnuz, needed float8_e4m3fn; convert exact"):
        to_fnuz(values, scales, inplace=True)
    assert torch.equal(values.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32, torch.float8_e5m2])
def test_other_values_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(EncodingError, match="to_fnuz: found torch"):
        to_fnuz(torch.zeros(4, dtype=dtype), ONE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_other_scales_are_refused_before_anything_is_written(dtype: torch.dtype) -> None:
    source = all_bytes()
    with pytest.raises(EncodingError, match="scales"):
        to_fnuz(source, torch.ones(1, dtype=dtype), inplace=True)
    assert torch.equal(source.view(torch.uint8), ALL)


def test_strided_values_convert_like_contiguous_ones() -> None:
    source = all_bytes().reshape(16, 16).t()
    values, _ = to_fnuz(source, ONE)
    expected, _ = to_fnuz(all_bytes(), ONE)
    assert torch.equal(values.t().reshape(-1).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("layout", ["canonical", "k_major"])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128", "mxfp8"])
def test_binding_to_gfx942_converts_exactly_and_once(scheme: str, layout: str) -> None:
    weight = quantize(torch.randn(130, 140), scheme, platform="cuda:h100")
    weight = to_layout(weight, layout, "cpu")
    bound = bind_encoding(weight, "e4m3fnuz", where="test")
    assert (bound.encoding, bound.layout) == ("e4m3fnuz", layout)
    assert torch.equal(bound.dequantize(), weight.dequantize())
    assert bind_encoding(bound, "e4m3fnuz", where="test") is bound
    with pytest.raises(EncodingError, match="test: found e4m3fnuz bytes, needed e4m3fn"):
        bind_encoding(bound, "e4m3fn", where="test")


@pytest.mark.parametrize("scheme", ["bf16", "int8_channel", "fp8_channel"])
def test_binding_leaves_alone_what_needs_no_conversion(scheme: str) -> None:
    weight = quantize(torch.randn(4, 4), scheme, platform="cpu")
    assert bind_encoding(weight, "e4m3fn", where="test") is weight
    assert bind_encoding(weight, None, where="test") is weight
    if scheme != "fp8_channel":
        assert bind_encoding(weight, "e4m3fnuz", where="test") is weight


@pytest.mark.parametrize("byte", [0x80, 0x7F, 0xFF])
@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block128", "mxfp8"])
def test_binding_handles_negative_zero_and_nan(scheme: str, byte: int) -> None:
    weight = quantize(torch.randn(4, 64), scheme, platform="cpu")
    weight.values.view(torch.uint8)[1, 3] = byte
    bound = bind_encoding(weight, "e4m3fnuz", where="test")
    found, meant = bound.dequantize(), weight.dequantize()
    torch.testing.assert_close(found, meant, rtol=0, atol=0, equal_nan=True)
    assert found[1, 3].isnan() == (byte != 0x80)
    assert weight.values.view(torch.uint8)[1, 3] == byte


def test_a_scale_of_e8m0_that_cannot_double_is_refused() -> None:
    weight = quantize(torch.randn(4, 64), "mxfp8", platform="cpu")
    for byte, fits in ((0, True), (253, True), (255, True), (254, False)):
        weight.scales[2, 1] = byte
        before = [tensor.clone() for tensor in weight.tensors]
        if fits:
            bound = bind_encoding(weight, "e4m3fnuz", where="test")
            assert bound.scales[2, 1] == min(byte + 1, 255)
        else:
            with pytest.raises(ValueRangeError, match=r"test: scales: found 254 at \[2, 1\]"):
                bind_encoding(weight, "e4m3fnuz", where="test")
        for old, new in zip(before, weight.tensors, strict=True):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    assert bind_encoding(weight.to("meta"), "e4m3fnuz", where="test").encoding == "e4m3fnuz"


@pytest.mark.parametrize(("source", "target"), [("e4m3fn", "e4m3fnuz"), ("e4m3fnuz", "e4m3fn")])
def test_casts_from_one_encoding_to_the_other_saturate(source: str, target: str) -> None:
    """By value, without scales: all 256 bytes against the definitions of both encodings."""
    found = saturate(ALL.clone().view(getattr(torch, f"float8_{source}")), target)
    meant = reference.byte_values(source)
    grid = reference.byte_values(target)
    grid = grid[np.isfinite(grid)]
    means = reference.byte_values(target)[found.view(torch.uint8).numpy()]
    np.testing.assert_array_equal(np.isnan(means), np.isnan(meant))
    for value, near in zip(meant, means, strict=True):
        if not np.isnan(value):
            assert abs(near - value) == np.abs(grid - value).min()
    top = {"e4m3fn": 448, "e4m3fnuz": 240}
    assert np.nanmax(means) == min(top.values())


# Where the largest value sets the scale, and not the floor (1e-12 against 2e-12), both roads end
# at the same bytes: 224 is half of 448, and fnuz reads a byte as half.
rows = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8)


@given(rows)
def test_quantizing_to_fnuz_is_quantizing_and_converting(row: list[float]) -> None:
    x = torch.tensor([[1.0, *row]])
    straight = quantize(x, "fp8_channel", platform="rocm:gfx942")
    around = bind_encoding(quantize(x, "fp8_channel", platform="cuda:h100"), "e4m3fnuz", where="t")
    assert straight.encoding == around.encoding == "e4m3fnuz"
    assert torch.equal(straight.scales, around.scales)
    assert torch.equal(straight.values.view(torch.uint8), around.values.view(torch.uint8))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("encoding", "top"), [("e4m3fn", 448), ("e4m3fnuz", 240)])
def test_casts_saturate(encoding: str, top: float, source: torch.dtype) -> None:
    far = [float("inf"), 6e4, top * 1.01, top, 0.0, -top, -top * 1.2, -6e4, -float("inf")]
    found = saturate(torch.tensor(far).to(source), encoding)
    assert found.dtype is getattr(torch, f"float8_{encoding}")
    assert found.float().tolist() == [top] * 4 + [0] + [-top] * 4
    nan = saturate(torch.tensor([float("nan"), -float("nan")], dtype=source), encoding)
    assert nan.view(torch.uint8).tolist() == [0x7F if encoding == "e4m3fn" else 0x80] * 2


@pytest.mark.parametrize("encoding", ["e4m3fn", "e4m3fnuz"])
def test_casts_are_nearest_even_for_all_codes_and_all_midpoints(encoding: str) -> None:
    grid = reference.byte_values(encoding)[: 0x7F if encoding == "e4m3fn" else 0x80]
    middle = (grid[1:] + grid[:-1]) / 2
    even = np.array([code + code % 2 for code in range(len(middle))])
    for sign in (1, -1):
        bit = np.where(np.arange(len(grid)) > 0, 0x80, 0 if "uz" in encoding else 0x80)
        bit = bit if sign < 0 else bit * 0
        found = saturate(torch.from_numpy(grid * sign).float(), encoding).view(torch.uint8)
        np.testing.assert_array_equal(found.numpy(), np.arange(len(grid)) | bit)
        found = saturate(torch.from_numpy(middle * sign).float(), encoding).view(torch.uint8)
        np.testing.assert_array_equal(found.numpy(), even | bit[even])
        for toward, code in ((0, np.arange(len(middle))), (500, np.arange(len(middle)) + 1)):
            near = np.nextafter(middle.astype(np.float32), np.float32(toward)) * sign
            found = saturate(torch.from_numpy(near), encoding).view(torch.uint8)
            np.testing.assert_array_equal(found.numpy(), code | bit[code])


def test_all_bytes_of_fnuz_mean_in_fn_what_they_meant() -> None:
    source = ALL.clone().view(torch.float8_e4m3fnuz)
    values, scales = to_fn(source, torch.tensor([3.0]))
    assert values.dtype is torch.float8_e4m3fn
    assert scales.item() == 1.5
    codes = values.view(torch.uint8).numpy()
    means = reference.byte_values("e4m3fn")[codes] * 1.5
    meant = reference.byte_values("e4m3fnuz") * 3
    meant[[0x7F, 0xFF]] = np.nan  # +-240: e4m3fn has no such byte
    np.testing.assert_array_equal(means, meant)
    assert torch.equal(source.view(torch.uint8), ALL)
    again, _ = to_fn(source, ONE, inplace=True)
    assert again.data_ptr() == source.data_ptr()
    with pytest.raises(EncodingError, match="float8_e4m3fn, needed float8_e4m3fnuz; convert exact"):
        to_fn(again, ONE)
    with pytest.raises(EncodingError, match="to_fn: scales"):
        to_fn(ALL.view(torch.float8_e4m3fnuz), ONE.bfloat16())


def test_there_and_back_is_where_it_began_but_for_zero_and_nan() -> None:
    values, scales = to_fn(*to_fnuz(all_bytes(), ONE))
    assert scales.item() == 1
    found = values.view(torch.uint8)
    kept = [byte for byte in range(256) if byte not in (0x80, 0xFF)]
    assert torch.equal(found[kept], ALL[kept])
    assert found[[0x80, 0xFF]].tolist() == [0x00, 0x7F]


def test_bytes_of_e8m0_double_and_nan_stays_nan() -> None:
    found = doubled_e8m0(ALL)
    assert found.dtype is torch.uint8
    assert found.tolist() == [*range(1, 255), 254, 255]


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="fp8 encoding"):
        saturate(ONE, "e5m2fnuz")


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["e4m3fn", "e4m3fnuz", "e5m2"])
def test_the_gpu_saturates_to_the_bits_of_the_cpu(encoding: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 200
    x[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    here, there = saturate(x, encoding), saturate(x.to(device), encoding)
    assert torch.equal(there.cpu().view(torch.uint8), here.view(torch.uint8))
