"""The codec against formulas in float64, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import quant_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import ArgumentError, UnknownNameError
from hal.formats import FORMATS
from hal.quant.codec import SCALE_FLOOR, amax, decode, encode, expand_scales
from hal.quant.scheme import scale_shape
from hal.torch_compat import dtype

ENCODINGS = ("e4m3fn", "e4m3fnuz", "int8")
GRANULARITIES = ("channel", "token", "group128", "block128")


def represented(codes: torch.Tensor) -> np.ndarray:
    """Return what codes mean, by the definition of their bits."""
    if codes.dtype is torch.int8:
        return codes.double().numpy()
    encoding = "e4m3fnuz" if codes.dtype is torch.float8_e4m3fnuz else "e4m3fn"
    return reference.byte_values(encoding)[codes.view(torch.uint8).numpy()]


def check(x: torch.Tensor, encoding: str, granularity: str) -> None:
    codes, scales = encode(x, encoding, granularity)
    assert codes.dtype is dtype(encoding)
    assert scales.dtype is torch.float32
    assert tuple(scales.shape) == scale_shape(granularity, tuple(x.shape))
    expected, expected_scales = reference.quantize(x.float().numpy(), encoding, granularity)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    found = represented(codes)
    if encoding == "int8":  # an integer has no NaN: the NaN is in the scale
        expected = np.nan_to_num(expected, nan=0.0)
    np.testing.assert_array_equal(found, expected)
    scale_of = expand_scales(scales, granularity, tuple(x.shape)).numpy().astype(np.float64)
    with np.errstate(over="ignore"):  # next to float32's maximum code * scale can pass it
        product = (found * scale_of).astype(np.float32)
    np.testing.assert_array_equal(decode(codes, scales, granularity).numpy(), product)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.randn(shape, generator=generator).exp()).to(dtype)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encode_is_the_formula(encoding: str, granularity: str, source: torch.dtype) -> None:
    check(values(2, 130, 300, dtype=source), encoding, granularity)
    check(values(1, 1, dtype=source), encoding, granularity)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 270))


@settings(max_examples=40)
@given(shapes, st.sampled_from(ENCODINGS), st.sampled_from(GRANULARITIES), st.integers(0, 99))
def test_encode_is_the_formula_for_any_shape(shape, encoding, granularity, seed) -> None:
    check(values(*shape, seed=seed), encoding, granularity)


numbers = st.floats(width=32) | st.floats(-500, 500, width=32) | st.sampled_from([0.0, -0.0, 1e-45])


@given(st.lists(numbers, min_size=1, max_size=9), st.sampled_from(ENCODINGS))
def test_encode_is_the_formula_for_any_numbers(numbers, encoding) -> None:
    check(torch.tensor([numbers]), encoding, "token")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_representable_value_survives(encoding: str) -> None:
    top = FORMATS[encoding].quantization_maximum
    if encoding == "int8":
        grid = torch.arange(-127.0, 128)
    else:
        grid = torch.from_numpy(reference.byte_values(encoding)).float()
        grid = grid[grid.abs() <= top]
    assert grid.abs().max() == top
    codes, scales = encode(grid.unsqueeze(0), encoding, "token")
    assert scales.tolist() == [1.0]
    torch.testing.assert_close(decode(codes, scales, "token")[0], grid, rtol=0, atol=0)


@pytest.mark.parametrize("encoding", ["e4m3fn", "e4m3fnuz"])
def test_every_midpoint_goes_to_the_even_code(encoding: str) -> None:
    top = FORMATS[encoding].quantization_maximum
    grid = reference.byte_values(encoding)[:127]
    grid = grid[grid <= top]
    middle = (grid[1:] + grid[:-1]) / 2  # exact in float32
    x = torch.from_numpy(np.concatenate([middle, -middle, [top]])).float().unsqueeze(0)
    codes, scales = encode(x, encoding, "token")
    assert scales.item() == 1
    even = np.array([code + code % 2 for code in range(len(middle))])
    found = codes.view(torch.uint8)[0].numpy()
    np.testing.assert_array_equal(found[: len(even)], even)
    # Rounding to -0 gives 0 in fnuz, where the code of -0 is NaN.
    negative = np.where((even == 0) & (encoding == "e4m3fnuz"), 0, even + 128)
    np.testing.assert_array_equal(found[len(even) : -1], negative)


def test_the_maxima_come_from_the_formats() -> None:
    for encoding in ENCODINGS:
        assert FORMATS[encoding].quantization_maximum == reference.TOP[encoding]
        codes, scales = encode(torch.tensor([[3.0, -3.0]]), encoding, "token")
        top = FORMATS[encoding].quantization_maximum
        assert codes.float().tolist() == [[top, -top]]
        assert scales.item() == np.float32(3.0 / top)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_get_the_floor(encoding: str, granularity: str) -> None:
    codes, scales = encode(torch.zeros(130, 130), encoding, granularity)
    assert scales.unique().tolist() == [np.float32(SCALE_FLOOR)]
    assert (codes.view(torch.uint8) == 0).all()
    assert (decode(codes, scales, granularity) == 0).all()


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-30, 1e-14, 1e-10])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tiny_values_become_tiny_or_zero_and_never_nan(encoding: str, tiny: float) -> None:
    x = torch.tensor([[tiny, -tiny, tiny / 2, 0.0]])
    codes, scales = encode(x, encoding, "token")
    again = decode(codes, scales, "token")
    assert again.isfinite().all()
    assert (again.abs() <= 2 * tiny).all()
    check(x, encoding, "token")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_bad_value_poisons_its_block_and_no_other(encoding, granularity, bad: float) -> None:
    x = values(260, 260)
    clean_codes, clean_scales = encode(x, encoding, granularity)
    x[130, 7] = bad
    codes, scales = encode(x, encoding, granularity)
    assert scales.isnan().sum() == 1
    hurt = expand_scales(scales, granularity, (260, 260)).isnan().expand(260, 260)
    assert hurt[130, 7]
    assert decode(codes, scales, granularity)[hurt].isnan().all()
    same = codes.view(torch.uint8) == clean_codes.view(torch.uint8)
    assert same[~hurt].all()
    assert torch.equal(scales[~scales.isnan()], clean_scales[~scales.isnan()])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_given_maximum_clamps(encoding: str) -> None:
    top = FORMATS[encoding].quantization_maximum
    x = torch.tensor([[1.0, 100.0, -100.0]])
    codes, scales = encode(x, encoding, "token", torch.tensor([1.0]))
    assert scales.item() == np.float32(1 / top)
    assert codes.float().tolist() == [[top, top, -top]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shards_with_the_maximum_of_the_whole_give_its_codes(encoding: str) -> None:
    x = values(8, 512)
    codes, scales = encode(x, encoding, "channel")
    largest = amax(x, "channel")
    for part, expected in zip(x.split(200, -1), codes.split(200, -1), strict=True):
        shard, shard_scales = encode(part, encoding, "channel", largest)
        assert torch.equal(shard.view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert torch.equal(shard_scales, scales)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0), (2, 0, 130)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_becomes_nothing(granularity: str, shape: tuple[int, ...]) -> None:
    codes, scales = encode(torch.zeros(shape), "e4m3fn", granularity)
    assert tuple(codes.shape) == shape
    assert tuple(scales.shape) == scale_shape(granularity, shape)
    assert decode(codes, scales, granularity).shape == codes.shape


def test_one_scale_for_a_matrix() -> None:
    x = values(2, 5, 7)
    codes, scales = encode(x, "e4m3fn", "tensor")
    assert scales.shape == (2,)
    for index in range(2):
        assert scales[index].item() == np.float32(x[index].abs().max().double().item() / 448)
    expected = reference.round_to((x / scales[:, None, None]).double().numpy(), "e4m3fn")
    np.testing.assert_array_equal(represented(codes), expected)
    assert encode(x[0], "e4m3fn", "tensor")[1].shape == ()


def test_decode_without_scales_widens() -> None:
    x = values(3, 3, dtype=torch.bfloat16)
    assert torch.equal(decode(x, None, "none"), x.float())


@pytest.mark.parametrize("granularity", ["none", "blocks", "row"])
def test_a_granularity_without_a_rule_is_refused(granularity: str) -> None:
    with pytest.raises(ArgumentError, match=granularity):
        encode(values(2, 2), "e4m3fn", granularity)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="fp8"):
        encode(values(2, 2), "fp8", "token")


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("encoding", ["e4m3fn", "int8"])
def test_the_gpu_gives_the_bits_of_the_cpu(encoding: str, granularity: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = values(300, 500)
    here, there = encode(x, encoding, granularity), encode(x.to(device), encoding, granularity)
    assert torch.equal(here[1], there[1].cpu())
    assert torch.equal(here[0].view(torch.uint8), there[0].cpu().view(torch.uint8))
