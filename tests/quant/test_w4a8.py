"""uint4b8 checkpoints become weights of `int4_w4a8_fp8`, in their own memory if asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import DTypeError, LayoutError, ShapeError
from hal.quant import to_layout, w4a8_weight


def checkpoint(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes in bytes, group scales) of weights `[..., N, K]`."""
    *lead, columns = shape
    generator = torch.Generator().manual_seed(seed)
    size = (*lead, (columns + 1) // 2)
    packed = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    scales = torch.rand((*lead, -(-columns // 128)), generator=generator) + 0.01
    return packed, scales


def meant(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the integers that uint4b8 codes mean, one by one."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]
    return codes.long() - 8


@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), st.integers(1, 400), st.booleans()
)
def test_numbers_are_codes_times_scales(lead, rows: int, columns: int, inplace: bool) -> None:
    packed, scales = checkpoint(*lead, rows, columns)
    codes = meant(packed, columns).double()
    weight = w4a8_weight(packed, scales, columns, platform="cpu", inplace=inplace)
    assert weight.shape == (*lead, rows, columns)
    assert (weight.values.data_ptr() == packed.data_ptr()) == inplace
    if not inplace:
        assert torch.equal(meant(packed, columns).double(), codes)
    group = weight.scales.double() * weight.global_scale.double().unsqueeze(-1)
    wide = group.repeat_interleave(128, -1)[..., :columns]
    torch.testing.assert_close(weight.dequantize().double(), codes * wide, rtol=1e-6, atol=0)
    # e4m3 keeps three bits: half a unit of the last is 1/16, and scales below 2**-6 lose some.
    bound = scales.double() / 16 + weight.global_scale.double().unsqueeze(-1) * 2**-10
    assert ((group - scales.double()).abs() <= bound * 1.0001).all()
    assert (codes.abs().amax() * weight.scales.float().amax()) <= 448


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(4, 256), (2, 3, 128)])
def test_words_of_checkpoints_are_taken_as_they_are(shape, inplace: bool) -> None:
    packed, scales = checkpoint(*shape)
    words = packed.clone().view(torch.int32)
    weight = w4a8_weight(words, scales, platform="cpu", inplace=inplace)
    same = w4a8_weight(packed, scales, platform="cpu")
    assert weight.shape == shape
    assert torch.equal(weight.values, same.values)
    assert (weight.values.data_ptr() == words.data_ptr()) == inplace


def test_shards_of_rows_hold_the_bits_of_the_whole() -> None:
    packed, scales = checkpoint(6, 512)
    whole, most = w4a8_weight(packed, scales, platform="cpu"), scales.amax(-1)
    for part in range(2):
        codes = packed[:, part * 128 : part * 128 + 128]
        shard = w4a8_weight(codes, scales[:, 2 * part : 2 * part + 2], maximum=most, platform="cpu")
        assert torch.equal(shard.global_scale, whole.global_scale)
        wide = whole.scales.float()[:, 2 * part : 2 * part + 2]
        assert torch.equal(shard.scales.float(), wide)
        assert torch.equal(shard.values, whole.values[:, part * 128 : part * 128 + 128])


def test_the_reorder_comes_next() -> None:
    packed, scales = checkpoint(32, 256)
    weight = w4a8_weight(packed.clone(), scales, platform="cpu", inplace=True)
    there = to_layout(weight, "cutlass_w4a8", "cpu")
    assert torch.equal(there.dequantize(), w4a8_weight(packed, scales).dequantize())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"packed": torch.zeros(4, 128, dtype=torch.int8)}, DTypeError, "needed uint8 or int32"),
        ({"packed": torch.zeros(512, dtype=torch.uint8)}, ShapeError, r"codes \[512\]"),
        ({"packed": torch.zeros(4, 0, dtype=torch.uint8)}, ShapeError, "0 columns"),
        ({"columns": 254}, ShapeError, "for 254 columns, needed two columns in each byte"),
        ({"columns": 257}, ShapeError, "for 257 columns"),
        ({"scales": torch.ones(4, 3)}, ShapeError, r"found \[4, 3\], needed \[4, 2\]"),
        ({"scales": torch.ones(4)}, ShapeError, r"needed \[4, 2\]"),
        ({"scales": torch.ones(4, 2, dtype=torch.int32)}, DTypeError, "a float dtype"),
        ({"scales": torch.ones(4, 2, device="meta")}, ValueError, "needed one device"),
        ({"maximum": torch.ones(3)}, ShapeError, r"maximum: found \[3\], needed \[4\]"),
        ({"maximum": torch.ones(4, 1)}, ShapeError, r"maximum: found \[4, 1\]"),
        ({"maximum": torch.ones(4, dtype=torch.int32)}, DTypeError, "maximum: found torch.int32"),
        ({"maximum": torch.ones(4, device="meta")}, ValueError, "maximum: found meta"),
        ({"packed": torch.zeros(128, 4, dtype=torch.uint8).t()}, LayoutError, "cure|inplace=False"),
    ],
)
def test_refusals_leave_the_checkpoint_alone(change, error, match: str) -> None:
    packed, scales = checkpoint(4, 256)
    given = {"packed": packed, "scales": scales, "columns": None, "maximum": None} | change
    before = given["packed"].clone()
    with pytest.raises(error, match=match):
        w4a8_weight(
            given["packed"],
            given["scales"],
            given["columns"],
            maximum=given["maximum"],
            platform="cpu",
            inplace=True,
        )
    assert torch.equal(given["packed"], before)


def test_nan_scales_stay_alone_and_zero_scales_are_zeros() -> None:
    packed, scales = checkpoint(3, 256)
    scales[0, 1], scales[2] = float("nan"), 0.0
    found = w4a8_weight(packed, scales, platform="cpu").dequantize()
    assert found[0, 128:].isnan().all()
    assert found[:, :128].isfinite().all()
    assert not found[2].any()
