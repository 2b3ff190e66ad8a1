"""Make random packed weights with their exact values, and compare products."""

from __future__ import annotations

import torch

from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.kinds import ALL_KINDS, FP8_UNITS
from hal.quant.repack import CODE_LAYOUTS

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
BF16 = torch.bfloat16


FP8_KINDS = {
    "e4m3fn": "fp8_channel_decode",
    "e4m3fnuz": "fp8_channel_decode",
    "e5m2": "fp8_e5m2_decode",
}


def fp8(codes, encoding="e4m3fn"):
    """Return the float64 values of bytes of an 8-bit float."""
    dtype = getattr(torch, f"float8_{encoding}")
    return codes.cpu().view(dtype).to(torch.float32).double().to(codes.device)


def e8m0(codes):
    """Return the float64 values of exponent bytes."""
    values = torch.exp2(codes.double() - 127)
    return values.masked_fill(codes == 255, float("nan"))


def pack(nibbles):
    """Return 4-bit codes [..., k] as bytes, the low nibble first, the last high nibble 0."""
    padded = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return padded[..., ::2] | (padded[..., 1::2] << 4)


def weight(kind, shape, generator, device, *, group=None):
    """Return (b, scale arguments, exact float64 value [..., n, k]) of a random weight."""
    spec = ALL_KINDS[kind]
    *lead, n, k = shape

    def codes(top, size=shape):
        return torch.randint(top, size, generator=generator, device=device, dtype=torch.uint8)

    if spec.decode == "e4m3":
        b = codes(255)
        b[(b & 0x7F) == 0x7F] = 1
        value = fp8(b)
    elif spec.decode == "e5m2":
        b = codes(256)
        b[(b & 0x7C) >= 0x40] -= 0x40  # numbers below 2: sums in float32 then stay exact enough
        value = fp8(b, "e5m2")
    elif spec.decode == "int8":
        b = codes(256).view(torch.int8)
        value = b.double()
    else:
        nibbles = codes(16)
        b, wide = pack(nibbles), nibbles.double()
        table = E2M1.to(device)
        value = table[nibbles.long()] if spec.decode == "e2m1" else wide
        value = torch.where(wide > 7, wide - 16, wide) if spec.decode == "int4" else value
    if spec.scales == "tensor":
        scales = torch.rand(lead, generator=generator, device=device) / 50 + 1e-3
        return b, {"b_scales": scales}, value * scales.double()[..., None, None]
    if spec.scales == "channel":
        scales = torch.rand((*lead, n), generator=generator, device=device) / 50 + 1e-3
        return b, {"b_scales": scales}, value * scales.double()[..., None]
    group = group or spec.groups[0]
    grouped = (*lead, -(-n // spec.scale_rows), -(-k // group))

    def widen(per_group):
        wide = per_group.repeat_interleave(group, -1)[..., :k]
        return wide.repeat_interleave(spec.scale_rows, -2)[..., :n, :]

    options = {}
    if spec.decode == "uint4":
        options["b_zeros"] = codes(16, grouped)
        value = value - widen(options["b_zeros"].double())
    if spec.scale_format == "float32":
        scales = torch.rand(grouped, generator=generator, device=device) / 50 + 1e-3
        exact = scales.double()
    elif spec.scale_format == "e8m0":
        scales = codes(12, grouped) + 112
        exact = e8m0(scales)
    else:
        scales = codes(0x78, grouped)
        exact = fp8(scales)
    if spec.second:
        second = torch.rand(lead, generator=generator, device=device) / 500 + 1e-4
        options["b_second"] = second
        value = value * second.double()[..., None, None]
    return b, {"b_scales": scales, **options}, value * widen(exact)


def activations(shape, dtype, generator, device):
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def assert_product(out, expected):
    """Compare with a float64 product: the rounding of out, and of sums in float32."""
    eps = {BF16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[out.dtype]
    if INTERPRETED.value and out.dtype is BF16:
        eps = 2**-7  # the interpreter truncates
    size = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=max(size, 1e-30) * 2e-6)


def rows(kind, shape, generator, device):
    """Return (rows as a kind takes them, their scales or None, exact float64 value)."""
    x = torch.randn(shape, generator=generator, device=device)
    if not ALL_KINDS[kind].a_scaled:
        return x.bfloat16(), None, x.bfloat16().double()
    codes = (x * 40).to(torch.float8_e4m3fn)
    scales = torch.rand(shape[0], generator=generator, device=device) + 0.1
    return codes, scales, codes.float().double() * scales.double()[:, None]


def held_weight(kind, shape, generator, device, group=None):
    """Return (codes, scale arguments as layers hold them, exact float64 value)."""
    b, scales, value = weight(kind, shape, generator, device, group=group)
    if ALL_KINDS[kind].planes:
        b = CODE_LAYOUTS["int4_planes"].forward(b)
        scales["b_scales"] = scales["b_scales"] * FP8_UNITS["e4m3fn"]
    if ALL_KINDS[kind].scales == "group":
        scales["b_scales"] = scales["b_scales"].mT.contiguous().mT
    return b, scales, value
