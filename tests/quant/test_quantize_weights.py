"""`quantize`: what it refuses, and that slices and platforms change only what they should."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hal
from hal.errors import ArgumentError, DTypeError, ShapeError, UnknownNameError, ValueRangeError
from hal.quant import SCHEMES, QTensor, quantize
from hal.quant.represent import represent

# `hal.quant.quantize` is the function; the module of that name is behind it.
module = importlib.import_module("hal.quant.quantize")
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.weight.format]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def equal(one: QTensor, other: QTensor) -> bool:
    return one.metadata == other.metadata and all(
        torch.equal(raw(mine), raw(theirs))
        for mine, theirs in zip(one.tensors, other.tensors, strict=True)
    )


def weight_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_operators_that_refuse_8_bit_floats_are_not_asked(scheme, monkeypatch) -> None:
    # IPEX replaces `cat` and `stack` for CPUs by such.
    weight = weight_of(2, 300, 128)
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 1)
    wanted = quantize(weight, scheme, platform="cpu")
    for name in ("cat", "stack"):
        own = getattr(torch, name)

        def refusing(tensors, *rest, own=own):
            assert not any(t.is_floating_point() and t.element_size() == 1 for t in tensors)
            return own(tensors, *rest)

        monkeypatch.setattr(torch, name, refusing)
    assert equal(quantize(weight, scheme, platform="cpu"), wanted)


@settings(max_examples=30)
@given(
    st.sampled_from(QUANTIZED),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 400),
    st.integers(1, 150),
)
def test_slices_give_what_the_whole_gives(scheme, lead, rows, columns) -> None:
    weight = weight_of(*lead, rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE_ELEMENTS", 1)  # 128 rows at a time
        sliced = quantize(weight, scheme, platform="cpu")
    whole = represent(weight, SCHEMES[scheme].weight, sliced.encoding)
    found = [tensor for tensor in whole if tensor is not None]
    for mine, theirs in zip(sliced.tensors, found, strict=True):
        assert torch.equal(raw(mine), raw(theirs))
    assert sliced.shape == tuple(weight.shape)
    assert equal(sliced, quantize(weight, scheme, platform="cpu"))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_experts_are_quantized_one_by_one(scheme: str) -> None:
    weight = weight_of(3, 140, 200)
    whole = quantize(weight, scheme, platform="cpu")
    for index in range(3):
        assert equal(whole.matrix(index), quantize(weight[index], scheme, platform="cpu"))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_error_is_within_half_a_step(scheme: str) -> None:
    weight = weight_of(256, 256, dtype=torch.float32)
    found = quantize(weight, scheme, platform="cpu").dequantize()
    largest = weight.abs().max()
    bounds = {
        # 3 bits after the first: at most 1/16 of a value
        "e4m3fn": weight.abs() / 16 + largest * 2**-9 / 448,
        # 2 bits after the first, subnormals of 2^-16
        "e5m2": weight.abs() / 8 + largest * 2**-17 / 57344,
        "int8": largest / 254,
        # half a step of 7, and what rounding the scale to e4m3 adds to up to 8 steps
        "int4": largest / 14 + largest / 14 * (scheme == "int4_w4a8_fp8"),
        # half the step from 4 to 6, under a scale of up to one and a half
        "e2m1": largest / 4,
    }
    bound = bounds[str(SCHEMES[scheme].weight.format)]
    assert ((found - weight).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_dtypes_of_the_same_numbers_give_the_same_codes(scheme: str) -> None:
    weight = weight_of(130, 40).clamp(-4, 4).mul(64).round().div(64)  # exact in all three
    results = [
        quantize(weight.to(dtype), scheme, platform="cpu")
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_strided_weight_gives_the_same_codes(scheme: str) -> None:
    weight = weight_of(150, 140)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    result = quantize(strided, scheme, platform="cpu")
    assert equal(result, quantize(weight, scheme, platform="cpu"))
    assert result.values.is_contiguous()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_scales_are_float32_under_another_default_dtype(scheme: str) -> None:
    weight, before = weight_of(4, 4), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = quantize(weight, scheme, platform="cpu")
    finally:
        torch.set_default_dtype(before)
    assert equal(result, quantize(weight, scheme, platform="cpu"))


@pytest.mark.parametrize(
    ("platform", "encoding"),
    [
        ("cpu", "e4m3fn"), ("cuda:h100", "e4m3fn"), ("cuda:rtx-3090", "e4m3fn"),
        ("rocm:gfx942", "e4m3fnuz"), ("rocm:gfx950", "e4m3fn"), ("rocm:gfx90a", "e4m3fn"),
        ("rocm:gfx1201", "e4m3fn"), ("xpu:b580", "e4m3fn"),
    ],
)  # fmt: skip
def test_the_platform_decides_the_encoding_and_nothing_else(platform: str, encoding: str) -> None:
    weight = weight_of(130, 140)
    result = quantize(weight, "fp8_channel", platform=platform)
    assert result.encoding == encoding
    here = quantize(weight, "fp8_channel", platform="cpu")
    assert torch.equal(result.dequantize(), here.dequantize())
    with hal.use_platform(platform):
        assert equal(quantize(weight, "fp8_channel"), result)
    assert quantize(weight, "int8_channel", platform=platform).encoding == "int8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bf16_keeps_half_precision_and_rounds_float32(dtype: torch.dtype) -> None:
    weight = weight_of(5, 7, dtype=dtype)
    result = quantize(weight, "bf16", platform="cpu")
    kept = torch.bfloat16 if dtype is torch.float32 else dtype
    assert result.values.dtype is kept
    assert result.scales is None
    assert torch.equal(result.dequantize(kept), weight.to(kept))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda w: w.double(), DTypeError, "found torch.float64, needed bfloat16"),
        (lambda w: w.to(torch.int8), DTypeError, "found torch.int8"),
        (lambda w: w.to(torch.float8_e4m3fn), DTypeError, "found torch.float8_e4m3fn"),
        (lambda w: w[0], ShapeError, r"found weight [6], needed [..., N, K]"),
        (lambda w: w[:0], ShapeError, r"found weight [0, 6]"),
        (lambda w: w[:, :0], ShapeError, r"found weight [4, 0]"),
        (lambda w: w.index_fill(0, torch.tensor([2]), float("nan")), ValueRangeError, "NaN or inf"),
        (lambda w: w.index_fill(1, torch.tensor([5]), float("inf")), ValueRangeError, "NaN or inf"),
    ],
)
def test_refusals_leave_the_weight_alone(scheme: str, make, error, match: str) -> None:
    weight = make(weight_of(4, 6))
    before = weight.clone()
    with pytest.raises(error, match=re.escape(match)):
        quantize(weight, scheme, platform="cpu")
    assert torch.equal(raw(weight.view(torch.uint8)), raw(before.view(torch.uint8)))


def test_a_float32_that_bf16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueRangeError):
        quantize(torch.tensor([[3.4e38, 0.0]]), "bf16", platform="cpu")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="scheme 'fp8'"):
        quantize(weight_of(4, 6), "fp8", platform="cpu")
    with pytest.raises(UnknownNameError, match="gfx94"):
        quantize(weight_of(4, 6), "fp8_channel", platform="rocm:gfx94")
    with pytest.raises(ArgumentError, match="device"):
        quantize(weight_of(4, 6), "fp8_channel", platform="rocm:gfx942", device=3)


def test_a_parameter_is_quantized_without_a_graph() -> None:
    weight = torch.nn.Parameter(weight_of(4, 6, dtype=torch.float32))
    for scheme in SCHEMES:
        result = quantize(weight, scheme, platform="cpu")
        assert not any(tensor.requires_grad for tensor in result.tensors)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_meta_weight_gives_shapes(scheme: str) -> None:
    real = quantize(weight_of(130, 140), scheme, platform="cpu")
    meta = quantize(weight_of(130, 140).to("meta"), scheme, platform="cpu")
    assert meta.device.type == "meta"
    assert meta.metadata == real.metadata
    assert meta.nbytes == real.nbytes


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("axis", [-1, -2])
def test_shards_that_share_their_maxima_hold_the_bits_of_the_whole(scheme: str, axis: int) -> None:
    weight = weight_of(2, 256, 512)
    weight[:, :, :256] *= 3  # so that the shards alone would choose other scales
    shards = weight.chunk(2, axis)
    found: list[list[torch.Tensor]] = [[], []]
    for index, shard in enumerate(shards):
        # The calls come in the same order for both, as on two ranks.
        quantize(shard, scheme, platform="cpu", reduce=lambda x, i=index: found[i].append(x) or x)
    assert len(found[0]) == len(found[1])
    rows = axis == -2 and SCHEMES[scheme].weight.granularity not in ("tensor",)
    rows = rows and SCHEMES[scheme].weight.second != "tensor"
    agreed = [torch.maximum(*pair) for pair in zip(*found, strict=True)]
    parts = []
    for shard in shards:
        answers = iter(agreed)
        # Shards of rows have rows of their own: nothing is shared between them.
        parts.append(
            quantize(
                shard, scheme, platform="cpu", reduce=None if rows else lambda x, a=answers: next(a)
            )
        )
    whole = quantize(weight, scheme, platform="cpu")
    wide = torch.cat([part.dequantize() for part in parts], axis)
    assert torch.equal(wide, whole.dequantize())


@pytest.mark.parametrize(
    ("reduce", "error", "match"),
    [
        (lambda found: None, ArgumentError, r"NoneType returned.*return the tensor after it"),
        (lambda found: found[..., None], ArgumentError, "reduce: found torch.float32"),
        (lambda found: found.bfloat16(), ArgumentError, "reduce: found torch.bfloat16"),
        (lambda found: found.to("meta"), ArgumentError, "on meta returned, needed .* on cpu"),
        (lambda found: found * float("nan"), ValueRangeError, "NaN or infinity"),
        (lambda found: found + float("inf"), ValueRangeError, "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor", "nvfp4", "int8_weight_zeros"])
def test_a_reduction_that_gives_nothing_to_share_is_refused(scheme, reduce, error, match) -> None:
    """Else each shard would keep its own scale, without a word."""
    with pytest.raises(error, match=match):
        quantize(weight_of(130, 140), scheme, platform="cpu", reduce=reduce)


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(DTypeError, match=r"found a QTensor.*start from the weight as it was"):
        quantize(quantize(weight_of(4, 6), "fp8_channel"), "int8_channel")
    with pytest.raises(DTypeError, match="found a list, needed a tensor"):
        quantize([[1.0]], "int8_channel")
