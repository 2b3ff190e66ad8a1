"""Ways in pure PyTorch to decode 8-bit floats and to quantize rows, which CPU candidates use."""

import torch
from cpu_race import BF16, F8, F8_MAX, I8_MAX, SCALE_FLOOR


def f8_shift(codes: torch.Tensor) -> torch.Tensor:
    """Decode e4m3fn to bf16 exactly with integer shifts (NaN codes become +-480)."""
    bits = codes.view(torch.int8).to(torch.int16)  # sign-extends
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # 0x87F0: sign, 4 exponent, 3 mantissa bits
    return bits.view(BF16).mul_(2.0**120)


def f8_shift_chunks(codes: torch.Tensor, chunk: int = 1 << 18) -> torch.Tensor:
    """Decode like `f8_shift`, a cache-sized piece at a time."""
    out = torch.empty(codes.shape, dtype=torch.int16)
    source = codes.view(torch.int8).view(-1)
    for target, piece in zip(out.view(-1).split(chunk), source.split(chunk), strict=True):
        target.copy_(piece)
        target.bitwise_left_shift_(4).bitwise_and_(-0x7810)
        target.view(BF16).mul_(2.0**120)
    return out.view(BF16)


def f8_half(codes: torch.Tensor) -> torch.Tensor:
    """Decode e4m3fn to bf16 through the bits of float16 (exponent offset 8)."""
    bits = codes.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
    return bits.view(torch.float16).to(BF16).mul_(256.0)


F8_TABLE = torch.arange(256, dtype=torch.uint8).view(F8).to(BF16)
F8_PAIRS = (
    torch.arange(-32768, 32768, dtype=torch.int32)
    .to(torch.int16)
    .view(F8)
    .to(BF16)
    .view(torch.int32)
)


def f8_lookup(codes: torch.Tensor) -> torch.Tensor:
    """Decode with a table of 256 entries."""
    index = codes.view(torch.uint8).view(-1).to(torch.int32)
    return F8_TABLE.index_select(0, index).view(codes.shape)


def f8_lookup_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Decode two codes at a time with a table of 65536 pairs."""
    index = codes.view(torch.int16).view(-1).to(torch.int32).add_(32768)
    return F8_PAIRS.index_select(0, index).view(BF16).view(codes.shape)


def f8_round(values: torch.Tensor) -> torch.Tensor:
    """Round float32 |values| <= 448 to the e4m3fn grid, nearest even, without the fp8 cast.

    Adding and subtracting 1.5 * 2**(e + 20), e the exponent of the value (at least -6), leaves
    exactly three mantissa bits in float32.
    """
    magic = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    magic.clamp_min_(2.0**-6).mul_(1.5 * 2.0**20)
    return (values + magic).sub_(magic)


def amax_scale(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Return float32 amax / limit over the last dimension, floored, with the dimension kept."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return torch.maximum(high, -low).float().div_(limit).clamp_min_(SCALE_FLOOR)


def token_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to int8 by division, rounding to nearest even."""
    scale = amax_scale(x, I8_MAX)
    return x.div(scale).round_().to(torch.int8), scale


def token_uint8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row like `token_int8`, shifted by the zero point 128."""
    scale = amax_scale(x, I8_MAX)
    return x.div(scale).round_().add_(128.0).to(torch.uint8), scale


def token_f8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to e4m3fn with the cast."""
    scale = amax_scale(x, F8_MAX)
    return x.div(scale).clamp_(-F8_MAX, F8_MAX).to(F8), scale


def token_f8_grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row to the e4m3fn grid, held exactly in bf16 (no fp8 tensor is made)."""
    scale = amax_scale(x, F8_MAX)
    return f8_round(x.div(scale).clamp_(-F8_MAX, F8_MAX)).to(BF16), scale


def group_f8_qdq(x: torch.Tensor) -> torch.Tensor:
    """Quantize 1x128 groups to the e4m3fn grid and back, in bf16."""
    groups = x.unflatten(-1, (-1, 128))
    scale = amax_scale(groups, F8_MAX)
    return f8_round(groups.div(scale).clamp_(-F8_MAX, F8_MAX)).mul_(scale).to(BF16).flatten(-2)


def channel_quantize(w: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [..., N, K] per output channel; returns codes and float32 scales [..., N]."""
    scale = w.float().abs().amax(-1).div(limit).clamp_min(SCALE_FLOOR)
    scaled = w.float() / scale.unsqueeze(-1)
    return (scaled.to(F8) if limit == F8_MAX else scaled.round().to(torch.int8)), scale
