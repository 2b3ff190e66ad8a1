"""Rewrite codes and scales without loss where a kernel reads another encoding of them.

| code | of | is |
|---|---|---|
| UINT4B8 | int4, two in a byte | value + 8 |
| UINT8B128 | int8 | value + 128 |
| UNIFIED_INT4 | int4, two in a byte | the sign as in int4, and the same low bits for v and -v |
| NIBBLES | zero points, one in a byte | two in a byte, the first in the low half |
| S0E5M3 | e4m3 scales, not negative | the scale times 128 as 5 exponent bits and 3 of mantissa |
| E8M0 | float32 scales, powers of two | exponents, as bytes |
| PRODUCTS | e4m3 scales | eight e4m3 numbers: the scale times -8 to -1 |

Source: vllm-project/vllm vllm/scalar_type.py (uint4b8, uint8b128), marlin_utils_fp4.py
(nvfp4_marlin_process_scales), csrc/quantization/cutlass_w4a8 (unified_encode_int4b,
pack_scale_fp8); NVIDIA/cutlass examples/55_hopper_mixed_dtype_gemm/mixed_dtype_utils.hpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.int4 import uint4b8_to_int4
from hal.quant.parts import Code

if TYPE_CHECKING:
    import torch

__all__ = ["E8M0", "NIBBLES", "PRODUCTS", "S0E5M3", "UINT4B8", "UINT8B128", "UNIFIED_INT4"]


def _flip_sign(codes: torch.Tensor) -> torch.Tensor:
    import torch

    return (codes.view(torch.uint8) ^ 0x80).view(codes.dtype)


def _unify(packed: torch.Tensor) -> torch.Tensor:
    """Negate the low three bits of codes 1 to 7; its own inverse."""
    import torch

    halves = torch.stack((packed & 15, packed >> 4), -1)
    positive = (halves > 0) & (halves < 8)
    halves = torch.where(positive, 8 - halves, halves)
    return halves[..., 0] | (halves[..., 1] << 4)


def _pack(zeros: torch.Tensor) -> torch.Tensor:
    from hal.quant.nibbles import pack

    return pack(zeros)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    from hal.quant.nibbles import unpack

    return unpack(packed, packed.shape[-1] * 2)


def _to_s0e5m3(scales: torch.Tensor) -> torch.Tensor:
    import torch

    half = (scales.float() * 128).half().view(torch.int16)
    return ((half >> 7) & 0xFF).to(torch.uint8).view(scales.dtype)


def _from_s0e5m3(stored: torch.Tensor) -> torch.Tensor:
    import torch

    half = (stored.view(torch.uint8).to(torch.int16) << 7).view(torch.float16)
    return (half.float() / 128).to(stored.dtype)


def _not_positive(scales: torch.Tensor) -> torch.Tensor:
    import torch

    return scales.view(torch.uint8) > 0x7E  # a sign, or NaN


def _to_exponents(scales: torch.Tensor) -> torch.Tensor:
    import torch

    return (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _from_exponents(exponents: torch.Tensor) -> torch.Tensor:
    import torch

    return (exponents.to(torch.int32) << 23).view(torch.float32)


def _no_power(scales: torch.Tensor) -> torch.Tensor:
    import torch

    bits = scales.contiguous().view(torch.int32)
    # Of e8m0, 0 is no normal float32 and 255 is NaN.
    return (bits & 0x7FFFFF != 0) | (bits < 1 << 23) | (bits >> 23 > 254)


def _to_products(scales: torch.Tensor) -> torch.Tensor:
    import torch

    from hal.quant.fp8 import saturate

    factors = torch.arange(-8, -1, device=scales.device, dtype=torch.float32)
    products = saturate(scales.float().unsqueeze(-1) * factors, "e4m3fn").view(torch.uint8)
    last = _flip_sign(scales).view(torch.uint8).unsqueeze(-1)
    return torch.cat((products, last), -1).flatten(-2).view(scales.dtype)


def _from_products(products: torch.Tensor) -> torch.Tensor:
    return _flip_sign(products.unflatten(-1, (products.shape[-1] // 8, 8))[..., 7])


UINT4B8 = Code("uint4b8", uint4b8_to_int4, uint4b8_to_int4)
UINT8B128 = Code("uint8b128", _flip_sign, _flip_sign)
UNIFIED_INT4 = Code("unified int4", _unify, _unify)
NIBBLES = Code("two in a byte", _pack, _unpack, widen=(1, 2))
S0E5M3 = Code("s0e5m3", _to_s0e5m3, _from_s0e5m3, bad=_not_positive, needed="scales of 0 or more")
E8M0 = Code(
    "e8m0",
    _to_exponents,
    _from_exponents,
    first=True,
    dtype="uint8",
    bad=_no_power,
    needed="powers of two as scales",
)
PRODUCTS = Code("e4m3 products", _to_products, _from_products, widen=(8, 1))
