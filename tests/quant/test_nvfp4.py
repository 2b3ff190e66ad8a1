"""nvfp4 against its formula in float64, and against what the libraries make of the same numbers."""

from __future__ import annotations

import math

import golden_results as golden
import numpy as np
import pytest
import quant_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.quant import e2m1
from hal.quant.codec import SCALE_FLOOR
from hal.quant.nibbles import unpack
from hal.quant.nvfp4 import (
    compressed_tensors_global_from_decode,
    decode_global_from_compressed_tensors,
    decode_global_from_modelopt,
    decode_nvfp4,
    encode_nvfp4,
    global_scale_of,
    largest_of,
)

BYTES = torch.from_numpy(reference.byte_values("e4m3fn"))
PER = ("matrix", "row")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * (3 * torch.randn(shape, generator=generator)).exp()


def bits(scales: torch.Tensor) -> torch.Tensor:
    assert scales.dtype is torch.float8_e4m3fn
    return scales.view(torch.uint8)


def divided(x: np.ndarray, by: object) -> np.ndarray:
    """Return a float32 quotient, rounded once: float64 keeps twice the bits."""
    return (x.astype(np.float64) / np.float64(by)).astype(np.float32)


def check(x: torch.Tensor, per: str) -> None:
    """Compare with the formula, block after block."""
    rows, columns = x.shape
    packed, scales, outer = encode_nvfp4(x, per=per)
    codes = e2m1.decode(unpack(packed, columns)).numpy()
    found = decode_nvfp4(packed, scales, outer, columns, per)
    assert scales.shape == (rows, math.ceil(columns / 16))
    wide = x.float().numpy()
    for row in range(rows):
        counted = wide if per == "matrix" else wide[row]
        finite = np.abs(counted[np.isfinite(counted)])
        amax = finite.max() if finite.size else np.float32(0)
        scale = np.maximum(divided(amax, 448 * 6), np.float32(SCALE_FLOOR))
        assert (outer if per == "matrix" else outer[row]).item() == scale
        for block in range(scales.shape[1]):
            box = slice(block * 16, block * 16 + 16)
            part = wide[row, box]
            if not np.isfinite(part).all():
                assert bits(scales)[row, block] == 0x7F
                assert (codes[row, box] == 0).all()
                assert found[row, box].isnan().all()
                continue
            wanted = divided(divided(np.abs(part).max(), 6), scale)
            fine = reference.round_to(np.clip(wanted, 2**-9, 448).astype(np.float64), "e4m3fn")
            assert BYTES[bits(scales)[row, block].item()] == fine
            step = (fine * np.float64(scale)).astype(np.float32)
            expected = e2m1.decode(e2m1.encode(torch.from_numpy(divided(part, step)))).numpy()
            np.testing.assert_array_equal(codes[row, box], expected)
            product = (expected.astype(np.float64) * fine * np.float64(scale)).astype(np.float32)
            np.testing.assert_array_equal(found[row, box].numpy(), product)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", PER)
def test_encode_is_the_formula(per: str, source: torch.dtype) -> None:
    check(numbers(5, 75).clamp(-6e4, 6e4).to(source), per)


singles = st.floats(width=32) | st.floats(-10, 10, width=32)
singles |= st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1e38, -3.4e38])


@settings(max_examples=60)
@given(st.lists(singles, min_size=1, max_size=40), st.sampled_from(PER))
def test_encode_is_the_formula_for_any_numbers(row, per: str) -> None:
    check(torch.tensor([row, [1.0] * len(row)]), per)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 4), st.integers(0, 60))
def test_shapes(lead: list[int], rows: int, columns: int) -> None:
    x = numbers(*lead, rows, columns)
    for per in PER:
        packed, scales, outer = encode_nvfp4(x, per=per)
        assert packed.shape == (*lead, rows, math.ceil(columns / 2))
        assert scales.shape == (*lead, rows, math.ceil(columns / 16))
        assert list(outer.shape) == (lead if per == "matrix" else [*lead, rows])
        assert decode_nvfp4(packed, scales, outer, columns, per).shape == x.shape


@pytest.mark.parametrize("per", PER)
def test_experts_are_encoded_one_by_one(per: str) -> None:
    x = numbers(3, 4, 48)
    whole = encode_nvfp4(x, per=per)
    for index in range(3):
        packed, scales, outer = encode_nvfp4(x[index], per=per)
        assert torch.equal(whole[0][index], packed)
        assert torch.equal(bits(whole[1])[index], bits(scales))
        assert torch.equal(whole[2][index], outer)


def test_every_scale_can_occur_and_decodes() -> None:
    """All 127 finite scales under all 16 codes."""
    scales = torch.arange(127, dtype=torch.uint8).unsqueeze(-1).view(torch.float8_e4m3fn)
    packed = torch.arange(16, dtype=torch.uint8).reshape(8, 2)
    packed = (packed[:, 0] | packed[:, 1] << 4).expand(127, 8).contiguous()
    found = decode_nvfp4(packed, scales, torch.tensor(0.37), 16)
    exact = BYTES[:127, None] * e2m1.decode(torch.arange(16, dtype=torch.uint8)).double()
    assert torch.equal(found, (exact * torch.tensor(0.37).double()).float())
    # Encoded: each scale is wanted beside a block whose scale is 448.
    x = torch.zeros(126, 32)
    x[:, 0], x[:, 16] = 448 * 6, (BYTES[1:127] * 6).float()
    _, scales, outer = encode_nvfp4(x, per="row")
    assert (outer == 1).all()
    assert torch.equal(bits(scales)[:, 1], torch.arange(1, 127, dtype=torch.uint8))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_poisons_its_block_and_no_other(bad: float, per: str) -> None:
    x = numbers(3, 60)
    x[1, 40] = 0  # the largest magnitude is elsewhere
    clean = decode_nvfp4(*encode_nvfp4(x, per=per), 60, per)
    x[1, 40] = bad
    packed, scales, outer = encode_nvfp4(x, per=per)
    found = decode_nvfp4(packed, scales, outer, 60, per)
    assert found[1, 32:48].isnan().all()
    found[1, 32:48] = clean[1, 32:48]
    assert torch.equal(found, clean)


def test_a_maximum_that_is_not_finite_poisons_everything() -> None:
    packed, scales, outer = encode_nvfp4(numbers(2, 32), torch.tensor(float("inf")))
    assert outer.isnan()
    assert (bits(scales) == 0x7F).all()
    assert not packed.any()


@pytest.mark.parametrize("per", PER)
def test_zeros_get_the_smallest_scales(per: str) -> None:
    packed, scales, outer = encode_nvfp4(torch.zeros(2, 40), per=per)
    assert outer.unique().tolist() == [np.float32(SCALE_FLOOR)]
    assert (bits(scales) == 1).all()
    assert not packed.any()
    assert not decode_nvfp4(packed, scales, outer, 40, per).any()


def test_zero_scales_of_a_checkpoint_decode_to_zero() -> None:
    packed = torch.full((1, 8), 0x77, dtype=torch.uint8)
    scales = torch.zeros(1, 1).to(torch.float8_e4m3fn)
    assert not decode_nvfp4(packed, scales, torch.tensor(2.0), 16).any()


def test_no_code_is_lost_beside_a_much_larger_block() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 2.0**-9 * 2  # a third of what a scale of 2**-9 reaches
    found = decode_nvfp4(*encode_nvfp4(x), 32)
    assert found[0, 16] == x[0, 16]


@pytest.mark.parametrize("per", PER)
def test_shards_with_the_maximum_of_the_whole_give_its_bits(per: str) -> None:
    x = numbers(6, 96)
    packed, scales, outer = encode_nvfp4(x, per=per)
    parts = x.split(48, -1)
    largest = torch.stack([largest_of(part, per) for part in parts]).amax(0)
    assert torch.equal(largest, largest_of(x, per))
    for index, part in enumerate(parts):
        shard, fine, same = encode_nvfp4(part, largest, per)
        assert torch.equal(shard, packed[:, index * 24 : index * 24 + 24])
        assert torch.equal(bits(fine), bits(scales)[:, index * 3 : index * 3 + 3])
        assert torch.equal(same, outer)


@given(st.integers(0, 99))
def test_the_error_is_within_the_bound(seed: int) -> None:
    x = numbers(4, 64, seed=seed)
    found = decode_nvfp4(*encode_nvfp4(x, per="row"), 64, "row")
    amax = x.unflatten(-1, (4, 16)).abs().amax(-1, keepdim=True)
    smallest = largest_of(x, "row")[:, None, None] / 448 / 6 * 2**-9
    error = (found - x).abs().unflatten(-1, (4, 16))
    # Between 4 and 6 a code is off by 1, and the scale that it counts by a 16th; subnormal scales
    # are off by half of the smallest, 6 times.
    assert (error <= (amax / 6 * (1 + 1 / 16) + 4 * smallest)).all()


def test_the_global_scale_decodes() -> None:
    amax = torch.tensor([2688.0, 0.0, 1e-30, float("nan"), float("inf"), 3.4e38])
    found = global_scale_of(amax)
    assert found[0] == 1
    assert found[1:3].unique().tolist() == [np.float32(SCALE_FLOOR)]
    assert found[3:5].isnan().all()
    assert found[5].item() == np.float32(np.float32(3.4e38).astype(np.float64) / 2688)
    assert largest_of(torch.tensor([[float("nan"), -3.0], [float("inf"), 2.0]])).item() == 3
    with pytest.raises(ArgumentError, match="per='token'"):
        encode_nvfp4(numbers(2, 16), per="token")
    with pytest.raises(ArgumentError, match="per='token'"):
        encode_nvfp4(numbers(2, 16), torch.ones(2), per="token")


def test_the_conventions_of_checkpoints() -> None:
    amax = torch.tensor([0.5, 3.0])
    hal = global_scale_of(amax)
    torch.testing.assert_close(decode_global_from_compressed_tensors(448 * 6 / amax), hal)
    torch.testing.assert_close(compressed_tensors_global_from_decode(hal), 448 * 6 / amax)
    assert torch.equal(decode_global_from_modelopt(amax / (448 * 6)), hal)


def test_torchao_gives_the_same_bits_of_scales_that_it_does_not_lift() -> None:
    codes, scales, outer = golden.results("torchao")["nvfp4"]
    packed, fine, found = encode_nvfp4(golden.numbers())
    assert torch.equal(found, outer)
    kept = fine.float() >= 2.0**-6
    assert torch.equal(bits(fine)[kept], bits(scales)[kept])
    assert (scales.float()[~kept] == 2.0**-6).all()
    same = kept.repeat_interleave(8, -1)
    assert torch.equal(packed[same], codes[same])
    assert kept.sum() >= 8


def test_compressed_tensors_gives_the_same_bits_of_scales_that_are_not_zero() -> None:
    codes, scales, outer = golden.results("compressed_tensors")["nvfp4"]
    packed, fine, found = encode_nvfp4(golden.numbers())
    torch.testing.assert_close(decode_global_from_compressed_tensors(outer)[0], found)
    kept = fine.float() > 2.0**-9
    assert torch.equal(bits(fine)[kept], bits(scales)[kept])
    same = kept.repeat_interleave(8, -1)
    assert torch.equal(packed[same], codes[same])
    # It decodes what hal has encoded, and hal what it has.
    theirs = decode_nvfp4(codes, scales, decode_global_from_compressed_tensors(outer)[0], 64)
    ours = decode_nvfp4(packed, fine, found, 64)
    wide = kept.repeat_interleave(16, -1)
    torch.testing.assert_close(theirs[wide], ours[wide], rtol=1e-6, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    packed, scales, outer = encode_nvfp4(numbers(2, 64))
    with pytest.raises(ShapeError, match="scales"):
        decode_nvfp4(packed, scales, outer, 65)
    with pytest.raises(ShapeError, match="unpack"):
        decode_nvfp4(packed, scales, outer, 62)
    with pytest.raises(DTypeError, match="scales"):
        decode_nvfp4(packed, bits(scales), outer, 64)


@pytest.mark.parametrize("per", PER)
def test_compiling_breaks_no_graph(per: str) -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, scales, outer = encode_nvfp4(x, per=per)
        return packed, bits(scales), outer, decode_nvfp4(packed, scales, outer, 75, per)

    x = numbers(4, 75)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for found, expected in zip(compiled, both(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("per", PER)
def test_the_gpu_gives_the_bits_of_the_cpu(per: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    x = numbers(300, 500)
    x[0], x[1], x[2, 5], x[3, 5] = 1e-40, 0, float("nan"), float("inf")
    here, there = encode_nvfp4(x, per=per), encode_nvfp4(x.to(device), per=per)
    assert torch.equal(there[0].cpu(), here[0])
    assert torch.equal(bits(there[1]).cpu(), bits(here[1]))
    assert torch.equal(there[2].cpu(), here[2])
    found = decode_nvfp4(*there, 500, per).cpu()
    torch.testing.assert_close(found, decode_nvfp4(*here, 500, per), rtol=0, atol=0, equal_nan=True)
