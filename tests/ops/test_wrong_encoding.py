"""fp8 bytes of one device given to ops on another: refused by name, or converted exactly, once."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.errors import EncodingError, LayoutError
from hal.ops import FusedMoE, Linear
from hal.quant import LAYOUTS, SCHEMES, QTensor, input_scale, quantize, to_layout

FP8 = [name for name, scheme in SCHEMES.items() if scheme.weight.format == "e4m3fn"]


def weight(scheme: str, platform: str, *shape: int) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    options = {"input_scale": input_scale(torch.tensor(4.0), scheme)} if is_static(scheme) else {}
    return quantize(torch.randn(shape, generator=generator), scheme, platform=platform, **options)


def is_static(scheme: str) -> bool:
    return SCHEMES[scheme].static


@pytest.mark.parametrize("scheme", FP8)
def test_no_op_reads_fnuz_bytes_as_fn(scheme: str) -> None:
    bad = weight(scheme, "rocm:gfx942", 64, 128)
    assert bad.encoding == "e4m3fnuz"
    before = [tensor.clone() for tensor in bad.tensors]
    with pytest.raises(EncodingError, match="e4m3fnuz bytes, needed e4m3fn"):
        Linear(bad, platform="cpu")
    experts = [weight(scheme, "rocm:gfx942", 2, *shape) for shape in ((128, 128), (128, 64))]
    with pytest.raises(EncodingError, match="e4m3fnuz bytes, needed e4m3fn"):
        FusedMoE(*experts, platform="cpu")
    for old, new in zip(before, bad.tensors, strict=True):
        assert torch.equal(old.flatten().view(torch.uint8), new.flatten().view(torch.uint8))


@pytest.mark.parametrize("scheme", FP8)
def test_fn_bytes_are_converted_once_for_a_device_of_fnuz(scheme: str) -> None:
    good = weight(scheme, "cuda:h100", 64, 128)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with hal.use_platform("rocm:gfx942"):
        bound = Linear(good, force="reference")
        again = Linear(weight(scheme, "rocm:gfx942", 64, 128), force="reference")
    assert torch.equal(bound(x), again(x))
    assert good.encoding == "e4m3fn"


@pytest.mark.parametrize("scheme", FP8)
def test_two_encodings_are_not_mixed_in_one_call(scheme: str) -> None:
    w13 = weight(scheme, "cuda:h100", 2, 128, 128)
    w2 = weight(scheme, "rocm:gfx942", 2, 128, 64)
    with pytest.raises(EncodingError, match="one scheme and encoding"):
        FusedMoE(w13, w2, platform="cpu")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "canonical"])
def test_ops_bring_a_weight_back_from_any_layout(layout: str) -> None:
    """An op goes to the layout that its kernel reads, wherever the weight comes from."""
    tried = 0
    for scheme in ("fp8_channel", "fp8_block128", "int4_w4a16", "int4_w4a8_fp8", "mxfp4", "nvfp4"):
        plain = weight(scheme, "cpu", 256, 256)
        if layout == "deep_gemm_ue8m0" and scheme == "fp8_block128":
            plain.scales.copy_(torch.exp2(plain.scales.log2().round()))
        if not LAYOUTS[layout].admits(plain.scheme, plain.encoding, plain.shape):
            continue
        tried += 1
        there = to_layout(plain, layout, "cpu")
        x = torch.randn(3, 256, dtype=torch.bfloat16)
        assert torch.equal(Linear(there, platform="cpu")(x), Linear(plain, platform="cpu")(x))
        with pytest.raises(LayoutError, match="call hal"):
            there.require("a kernel", layout="canonical", encodings=(there.encoding,))
    assert tried
