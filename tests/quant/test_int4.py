"""4-bit integers against their formulas in float64, with and without zero points."""

from __future__ import annotations

import math

import golden_results as golden
import numpy as np
import pytest
import quant_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import ArgumentError, DTypeError, ShapeError, UnknownNameError
from hal.quant.codec import SCALE_FLOOR
from hal.quant.int4 import (
    decode_int4,
    decode_uint4,
    encode_int4,
    encode_uint4,
    largest_of,
    uint4b8_to_int4,
    w4a8_scale_pair,
)
from hal.quant.nibbles import pack, pack_int32, unpack, unpack_int32

GROUPS = (32, 128, None)
FLOOR = np.float32(SCALE_FLOOR)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.randn((*shape[:-1], 1), generator=generator).exp() + 0.3


def signed(packed: torch.Tensor, columns: int) -> np.ndarray:
    codes = unpack(packed, columns).numpy().astype(np.int64)
    return np.where(codes >= 8, codes - 16, codes)


def single(x: np.ndarray | float) -> np.ndarray:
    """Return float64 rounded to float32: dividing so rounds once."""
    return np.asarray(x, dtype=np.float64).astype(np.float32).astype(np.float64)


def blocks(x: torch.Tensor, group: int | None):
    """Yield (index of the scale, index of the values) of each group of [rows, columns]."""
    rows, columns = x.shape
    for row in range(rows):
        if group is None:
            yield (row,), (row, slice(None))
        else:
            for index in range(math.ceil(columns / group)):
                yield (row, index), (row, slice(index * group, (index + 1) * group))


def check_int4(x: torch.Tensor, group: int | None) -> None:
    columns = x.shape[-1]
    packed, scales = encode_int4(x, group)
    codes = signed(packed, columns)
    found = decode_int4(packed, scales, columns, group)
    wide = x.double().numpy()
    for place, box in blocks(x, group):
        part = wide[box]
        if not np.isfinite(part).all():
            assert scales[place].isnan()
            assert (codes[box] == 0).all()
            assert found[box].isnan().all()
            continue
        amax = max(part.max(), single(-part.min() * 7 / 8), 0)
        scale = max(single(amax / 7), FLOOR)
        assert scales[place].item() == scale
        expected = np.clip(np.round(single(part / np.float64(scale))), -8, 7)
        np.testing.assert_array_equal(codes[box], expected)
        with np.errstate(over="ignore"):
            product = (expected * np.float64(scale)).astype(np.float32)
        np.testing.assert_array_equal(found[box].numpy(), product)


def check_uint4(x: torch.Tensor, group: int | None) -> None:
    columns = x.shape[-1]
    packed, scales, zeros = encode_uint4(x, group)
    assert zeros.dtype is torch.uint8
    codes = unpack(packed, columns).numpy()
    found = decode_uint4(packed, scales, zeros, columns, group)
    wide = x.double().numpy()
    for place, box in blocks(x, group):
        part = wide[box]
        if not np.isfinite(part).all():
            assert scales[place].isnan()
            assert zeros[place] == 0
            assert (codes[box] == 0).all()
            assert found[box].isnan().all()
            continue
        high, low = max(part.max(), 0), min(part.min(), 0)
        # float32's rules without its range: a span beyond it is rounded in sixteenths
        scale = max(single(single(high / 16 - low / 16) / 15) * 16, FLOOR)
        assert scales[place].item() == scale
        zero = np.clip(np.round(single(-low / np.float64(scale))), 0, 15)
        assert zeros[place].item() == zero
        expected = np.clip(np.round(single(part / np.float64(scale))) + zero, 0, 15)
        np.testing.assert_array_equal(codes[box], expected)
        with np.errstate(over="ignore"):  # next to float32's maximum it can pass it
            product = ((expected - zero) * np.float64(scale)).astype(np.float32)
        np.testing.assert_array_equal(found[box].numpy(), product)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("check", [check_int4, check_uint4])
def test_encode_is_the_formula(check, group: int | None, source: torch.dtype) -> None:
    check(numbers(5, 331).to(source), group)


singles = st.floats(width=32) | st.floats(-10, 10, width=32)
singles |= st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1e38, -3.4e38, 3.4e38])


@settings(max_examples=60)
@given(st.lists(singles, min_size=1, max_size=40), st.sampled_from([32, None]))
def test_encode_is_the_formula_for_any_numbers(row, group: int | None) -> None:
    check_int4(torch.tensor([row]), group)
    check_uint4(torch.tensor([row]), group)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 200), st.sampled_from(GROUPS))
def test_shapes(lead: list[int], columns: int, group: int | None) -> None:
    x = numbers(*lead, 3, columns)
    expected = (*lead, 3) if group is None else (*lead, 3, math.ceil(columns / group))
    packed, scales = encode_int4(x, group)
    assert (packed.shape, scales.shape) == ((*lead, 3, math.ceil(columns / 2)), expected)
    assert decode_int4(packed, scales, columns, group).shape == x.shape
    packed, scales, zeros = encode_uint4(x, group)
    assert (packed.shape, scales.shape, zeros.shape) == (packed.shape, expected, expected)
    assert decode_uint4(packed, scales, zeros, columns, group).shape == x.shape


def test_every_value_of_the_grid_survives() -> None:
    grid = torch.arange(-8.0, 8)
    packed, scales = encode_int4(grid.unsqueeze(0), 32)
    assert scales.item() == 1
    assert torch.equal(decode_int4(packed, scales, 16, 32)[0], grid)
    for zero in range(16):
        row = torch.arange(16.0).unsqueeze(0) - zero
        packed, scales, zeros = encode_uint4(row, None)
        assert (scales.item(), zeros.item()) == (1, zero)
        assert torch.equal(unpack(packed, 16)[0], torch.arange(16, dtype=torch.uint8))
        assert torch.equal(decode_uint4(packed, scales, zeros, 16, None), row)


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, -7.5]])
    packed, scales = encode_int4(x, None)
    assert scales.item() == 1
    assert signed(packed, 8).tolist() == [[7, 0, 2, 2, 0, -2, -6, -8]]


@given(st.integers(0, 99), st.sampled_from(GROUPS))
def test_the_error_is_half_a_step(seed: int, group: int | None) -> None:
    x = numbers(3, 256, seed=seed)
    packed, scales = encode_int4(x, group)
    error = (decode_int4(packed, scales, 256, group) - x).abs()
    wide = scales.reshape(3, -1).repeat_interleave(group or 256, -1)
    assert (error <= wide * 0.50001).all()
    packed, fine, zeros = encode_uint4(x, group)
    error = (decode_uint4(packed, fine, zeros, 256, group) - x).abs()
    wide = fine.reshape(3, -1).repeat_interleave(group or 256, -1)
    assert (error <= wide * 1.00001).all()  # the zero point is rounded too


@pytest.mark.parametrize("group", GROUPS)
def test_zeros_get_the_floor(group: int | None) -> None:
    packed, scales = encode_int4(torch.zeros(2, 130), group)
    assert scales.unique().tolist() == [FLOOR]
    assert not packed.any()
    packed, scales, zeros = encode_uint4(torch.zeros(2, 130), group)
    assert scales.unique().tolist() == [FLOOR]
    assert not packed.any()
    assert not zeros.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_poisons_its_group_even_under_a_given_maximum(bad: float) -> None:
    x = numbers(2, 96)
    clean = decode_int4(*encode_int4(x, 32), 96, 32)
    x[1, 40] = bad
    for given_maximum in (None, torch.ones(2, 3)):
        _, scales = encode_int4(x, 32, given_maximum)
        assert scales.isnan().nonzero().tolist() == [[1, 1]]
        _, scales, _ = encode_uint4(
            x, 32, given_maximum, None if given_maximum is None else -given_maximum
        )
        assert scales.isnan().nonzero().tolist() == [[1, 1]]
    found = decode_int4(*encode_int4(x, 32), 96, 32)
    found[1, 32:64] = clean[1, 32:64]
    assert torch.equal(found, clean)


def test_shards_with_the_maximum_of_the_whole_give_its_bits() -> None:
    x = numbers(4, 256)
    packed, scales = encode_int4(x, None)
    parts = x.split(64, -1)
    largest = torch.stack([largest_of(part, None) for part in parts]).amax(0)
    assert torch.equal(largest, largest_of(x, None))
    code, fine, zeros = encode_uint4(x, None)
    high, low = x.amax(-1), x.amin(-1)
    for index, part in enumerate(parts):
        box = slice(index * 32, index * 32 + 32)
        shard, same = encode_int4(part, None, largest)
        assert torch.equal(shard, packed[:, box])
        assert torch.equal(same, scales)
        shard, same, zero = encode_uint4(part, None, high, low)
        assert torch.equal(shard, code[:, box])
        assert torch.equal(same, fine)
        assert torch.equal(zero, zeros)
    shard, same = encode_int4(parts[1], 32, largest_of(x, 32)[:, 2:4])
    assert torch.equal(shard, encode_int4(x, 32)[0][:, 32:64])
    with pytest.raises(ArgumentError, match="maximum and minimum"):
        encode_uint4(x, None, maximum=high)


def test_a_smaller_maximum_clamps() -> None:
    packed, _ = encode_int4(torch.tensor([[100.0, -100.0, 1.0]]), None, torch.tensor([7.0]))
    assert signed(packed, 3).tolist() == [[7, -8, 1]]


def test_the_rule_has_the_smallest_error_of_those_that_do_not_clip() -> None:
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    for group, most in ((32, 0.093), (64, 0.1035), (128, 0.113)):
        error = (decode_int4(*encode_int4(x, group), 1024, group) - x).norm() / x.norm()
        wide = x.unflatten(-1, (-1, group))
        step = wide.abs().amax(-1, keepdim=True) / 7
        other = ((wide / step).round() * step - wide).norm() / x.norm()
        assert error < most
        assert error < other
        packed, scales, zeros = encode_uint4(x, group)
        assert (decode_uint4(packed, scales, zeros, 1024, group) - x).norm() / x.norm() < error


def test_every_nibble_recodes() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    found = uint4b8_to_int4(stored)
    assert torch.equal(stored, torch.arange(256, dtype=torch.uint8))
    values = unpack(stored.unsqueeze(-1), 2).long() - 8
    assert signed(found.unsqueeze(-1), 2).tolist() == values.tolist()
    assert torch.equal(uint4b8_to_int4(found), stored)  # twice is not at all: tags decide
    again = uint4b8_to_int4(stored, inplace=True)
    assert again.data_ptr() == stored.data_ptr()
    assert torch.equal(stored, found)


@pytest.mark.parametrize("order", ["ascending", "awq"])
def test_words_recode_like_bytes(order: str) -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    words = pack_int32(codes, order)
    found = unpack_int32(uint4b8_to_int4(words), 64, order)
    assert torch.equal(pack(found), uint4b8_to_int4(pack(codes)))
    assert uint4b8_to_int4(words, inplace=True) is words
    assert torch.equal(unpack_int32(words, 64, order), found)
    with pytest.raises(DTypeError, match="needed uint8 or int32"):
        uint4b8_to_int4(codes.view(torch.int8))


def scales_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 1.5).exp() * 1e-3


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 5, 1), (5, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_scales_are_what_the_groups_were(shape, dtype: torch.dtype) -> None:
    scales = scales_of(*shape).to(dtype)
    groups, channels = w4a8_scale_pair(scales)
    assert (groups.dtype, channels.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (groups.shape, channels.shape) == (scales.shape, scales.shape[:-1])
    found = groups.float() * channels.unsqueeze(-1)
    bound = scales.float() / 16 + channels.unsqueeze(-1) * 2**-10
    assert ((found - scales.float()).abs() <= bound * 1.0001).all()
    assert (groups.float() * 8 <= 448).all()
    if scales.numel():
        assert (groups.float().amax(-1) == 56).all()


def test_pairs_are_the_formula_bit_for_bit() -> None:
    scales = scales_of(40, 30)
    groups, channels = w4a8_scale_pair(scales)
    wide = scales.double().numpy()
    expected = single(wide.max(-1) / 56)
    np.testing.assert_array_equal(channels.numpy(), expected)
    ratio = single(wide / expected[:, None])
    meant = reference.byte_values("e4m3fn")[groups.view(torch.uint8).numpy()]
    np.testing.assert_array_equal(meant, reference.round_to(ratio, "e4m3fn"))


def test_pairs_of_special_scales() -> None:
    nan = float("nan")
    scales = torch.tensor([[0.0, 0.0], [1.0, nan], [float("inf"), 2.0], [nan, nan], [-3.0, 1.0]])
    groups, channels = w4a8_scale_pair(scales)
    found = groups.float() * channels.unsqueeze(-1)
    assert found[0].tolist() == [0, 0]
    assert channels[0].item() == FLOOR
    assert found.isnan().nonzero().tolist() == [[1, 1], [2, 0], [3, 0], [3, 1]]
    assert (groups.view(torch.uint8)[found.isnan()] == 0x7F).all()
    assert channels.isfinite().all()
    assert groups[4, 0].float() == -56
    capped, _ = w4a8_scale_pair(torch.tensor([[100.0]]), torch.tensor([1.0]))
    assert capped.float().item() == 56


def test_pairs_of_shards_and_of_gfx942() -> None:
    scales = scales_of(6, 8)
    groups, channels = w4a8_scale_pair(scales)
    for part, expected in zip(scales.split(4, -1), groups.split(4, -1), strict=True):
        shard, same = w4a8_scale_pair(part, scales.amax(-1))
        assert torch.equal(same, channels)
        assert torch.equal(shard.view(torch.uint8), expected.contiguous().view(torch.uint8))
    fnuz, doubled = w4a8_scale_pair(scales, encoding="e4m3fnuz")
    assert fnuz.dtype is torch.float8_e4m3fnuz
    assert torch.equal(doubled, channels * 2)
    assert torch.equal(
        fnuz.float() * doubled.unsqueeze(-1), groups.float() * channels.unsqueeze(-1)
    )
    assert (fnuz.float() * 8 <= 240).all()
    with pytest.raises(UnknownNameError, match="fp8 encoding"):
        w4a8_scale_pair(scales, encoding="e5m2")


def test_compressed_tensors_gives_the_same_bits_with_zero_points() -> None:
    codes, scales, zeros = golden.results("compressed_tensors")["uint4"]
    packed, found, points = encode_uint4(golden.numbers(), 32)
    used = found > SCALE_FLOOR  # of a group of zeros it makes another scale
    assert torch.equal(found[used], scales[used])
    assert torch.equal(points[used], zeros[used])
    wide = used.repeat_interleave(32, -1)
    assert torch.equal(unpack(packed, 64)[wide], codes[wide])
    assert used.sum() == 7


@pytest.mark.parametrize("call", [encode_int4, encode_uint4, largest_of])
def test_a_group_of_nothing_is_refused(call) -> None:
    with pytest.raises(ArgumentError, match="group=0"):
        call(numbers(2, 64), 0)


def test_what_does_not_fit_is_refused() -> None:
    packed, scales, zeros = encode_uint4(numbers(2, 64), 32)
    with pytest.raises(ShapeError, match="scales"):
        decode_int4(packed, scales[:, :1], 64, 32)
    with pytest.raises(ShapeError, match="unpack"):
        decode_int4(packed, scales, 66, 32)
    with pytest.raises(ShapeError, match="zeros"):
        decode_uint4(packed, scales, zeros[:, :1], 64, 32)
    with pytest.raises(DTypeError, match="zeros"):
        decode_uint4(packed, scales, zeros.int(), 64, 32)
    with pytest.raises(DTypeError, match="unpack"):
        decode_int4(packed.int(), scales, 64, 32)


@pytest.mark.parametrize("group", GROUPS)
def test_compiling_breaks_no_graph(group: int | None) -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, scales = encode_int4(x, group)
        code, fine, zeros = encode_uint4(x, group)
        pair, channel = w4a8_scale_pair(x)
        return (
            packed, scales, decode_int4(packed, scales, 75, group), uint4b8_to_int4(packed),
            code, fine, zeros, decode_uint4(code, fine, zeros, 75, group),
            pair.view(torch.uint8), channel, unpack_int32(pack_int32(code), 38),
        )  # fmt: skip

    x = numbers(4, 75)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for found, expected in zip(compiled, both(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_the_gpu_gives_the_bits_of_the_cpu(group: int | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = numbers(300, 500)
    x[0], x[1], x[2, 5], x[3, 5] = 1e-40, 0, float("nan"), float("inf")
    here = (*encode_int4(x, group), *encode_uint4(x, group), *w4a8_scale_pair(x))
    moved = x.to(device)
    there = (*encode_int4(moved, group), *encode_uint4(moved, group), *w4a8_scale_pair(moved))
    for one, other in zip(here, there, strict=True):
        one, other = (
            t.view(torch.uint8) if t.element_size() == 1 else t for t in (one, other.cpu())
        )
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
