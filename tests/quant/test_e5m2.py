"""e5m2: what every byte means, how every half rounds, and weights that are stored so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant_reference import byte_values, quantize, round_to

import hal
from hal.ops import Linear
from hal.ops.adapters.decode import decode_e5m2
from hal.quant import bind_encoding
from hal.quant import quantize as quantize_weight
from hal.quant.codec import encode
from hal.quant.fp8 import saturate

SCHEME = "fp8_e5m2_w8a16"


def halves() -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)


def test_every_byte_means_what_the_specification_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    wanted = torch.from_numpy(byte_values("e5m2"))
    for found in (codes.double(), decode_e5m2(codes).double()):
        assert torch.equal(found.isnan(), wanted.isnan())
        numbers = ~wanted.isnan()
        assert torch.equal(found[numbers], wanted[numbers])
        assert torch.equal(found[numbers].signbit(), wanted[numbers].signbit())


def test_every_half_rounds_to_the_nearest_and_saturates() -> None:
    x = halves()
    found = saturate(x, "e5m2")
    assert torch.equal(found.float().isnan(), x.isnan())
    assert (found.view(torch.uint8)[x.isnan()] == 0x7F).all()
    x, found = x[~x.isnan()], found.double()[~x.isnan()]
    wide = x.double().clamp(-65504, 65504).numpy()  # infinities saturate as the largest does
    assert np.array_equal(found.numpy(), round_to(wide, "e5m2"))
    assert found.abs().max() == 57344
    assert torch.equal(found.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 130)])
def test_the_codec_against_float64(dtype, shape) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    spread = torch.rand((*shape[:-1], 1), generator=generator).mul(10).exp2()
    x = (torch.randn(shape, generator=generator) * spread).to(dtype)
    x.view(-1)[::7] = 0
    codes, scales = encode(x, "e5m2", "channel")
    wanted, factors = quantize(x.float().numpy(), "e5m2", "channel")
    assert np.array_equal(scales.numpy(), factors)
    assert np.array_equal(codes.double().numpy(), wanted)


def test_broken_rows_are_nan_and_rows_of_zeros_are_zero() -> None:
    x = torch.ones(4, 8)
    x[0, 1], x[1, 2], x[2] = torch.nan, torch.inf, 0
    codes, scales = encode(x, "e5m2", "token")
    assert scales[:2].isnan().all()
    assert not codes[2].float().any()
    assert codes[3].float().unique().tolist() == [57344.0]


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        ("cpu:x86-amx", "torch_decode"),
        ("cuda:t4", "torch_decode"),
        ("cuda:h100", "triton_decode"),
        ("rocm:gfx942", "triton_decode"),
        ("xpu:b580", "triton_decode"),
    ],
)
def test_the_bytes_are_the_same_on_every_device(device: str, kernel: str) -> None:
    """gfx942 multiplies e5m2fnuz; hal only decodes e5m2, so there is nothing to convert."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    made = quantize_weight(weight, SCHEME, platform=device)
    assert made.encoding == "e5m2"
    assert torch.equal(made.values, quantize_weight(weight, SCHEME, platform="cpu").values)
    assert bind_encoding(made, "e4m3fnuz", where="test") is made
    sizes = {"in_features": 4096, "out_features": 4096, "dtype": "bfloat16"}
    selection = hal.select("linear", scheme=SCHEME, platform=device, **sizes)
    assert selection.kernel.name == kernel


@pytest.mark.parametrize("kernel", ["reference", "torch_dequant", "torch_decode"])
def test_linear(kernel: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = quantize_weight(torch.randn(40, 96, generator=generator), SCHEME)
    x = torch.randn(5, 96, generator=generator).bfloat16()
    wanted = x.double() @ weight.dequantize().double().T
    found = Linear(weight, force=kernel)(x).double()
    assert (found - wanted).norm() < 0.005 * wanted.norm()
