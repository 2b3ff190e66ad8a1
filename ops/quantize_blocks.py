"""Quantize to MX and NVFP4 with torch in few passes, bit for bit as `hal.quant` defines them.

The codecs ask every number whether it is finite and make a fresh tensor at each step. Here whole
blocks are asked, once, and one wide copy is worked on in place; the rare rows that need more go to
the codec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.represent import represent
from hal.quant.scheme import group_of

if TYPE_CHECKING:
    import torch

    from hal.quant.represent import Fixed
    from hal.quant.scheme import Quantization

__all__ = ["quantize_blocks"]

ROUNDER = 1.5 * 2**23
"""Added to a small number, this leaves no fraction bits: the add itself rounds half to even."""


def quantize_blocks(
    x: torch.Tensor, format: str, how: Quantization, fixed: Fixed | None = None
) -> tuple[torch.Tensor, ...]:
    """Return codes and scales of `x` `[tokens, features]` on a CPU, second scales if any.

    fixed: float32 `[]`, the second scale of all rows where calibration fixed it.
    """
    import torch

    group = group_of(how.granularity)
    assert group is not None
    if x.numel() and x.shape[1] % group == 0:
        wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        wide = wide.view(x.shape[0], -1, group)
        largest = wide.abs().amax(-1)
        if x.is_meta or torch.isfinite(largest).all():
            if how.scale_format == "e8m0":
                return _mx(wide, largest, format)
            return _nvfp4(wide, largest, fixed)
    return tuple(part for part in represent(x, how, format, fixed=fixed) if part is not None)


def _mx(wide: torch.Tensor, largest: torch.Tensor, format: str) -> tuple[torch.Tensor, ...]:
    import torch

    from hal.quant.mx import encode_e8m0, to_fnuz_mx

    packed = format == "e2m1"
    scales = encode_e8m0(largest, "e2m1" if packed else "e4m3fn")
    # 2^(127 - byte) is a normal number, since no rule gives a byte above 253.
    powers = ((254 - scales.to(torch.int32)) << 23).view(torch.float32)
    wide.mul_(powers.unsqueeze(-1))
    if packed:
        return _e2m1(wide), scales
    # No clamp: the default rule raises the exponent where anything would exceed the maximum.
    codes = wide.flatten(1).to(torch.float8_e4m3fn)
    return to_fnuz_mx(codes, scales, inplace=True) if format == "e4m3fnuz" else (codes, scales)


def _nvfp4(
    wide: torch.Tensor, largest: torch.Tensor, fixed: Fixed | None
) -> tuple[torch.Tensor, ...]:
    from hal.quant.nvfp4 import block_scales, global_scale_of

    if fixed is None:
        second = global_scale_of(largest.amax(-1))
    else:
        assert not isinstance(fixed, tuple)
        second = fixed.new_ones(wide.shape[0]).mul_(fixed)
    scales = block_scales(largest, second.unsqueeze(-1))
    wide.div_((scales.float() * second.unsqueeze(-1)).unsqueeze(-1))
    return _e2m1(wide), scales, second


def _e2m1(wide: torch.Tensor) -> torch.Tensor:
    """Return packed e2m1 codes `[tokens, features / 2]` of finite numbers, which are overwritten.

    A code is the least of three rounded lines (see `hal.quant.e2m1`), in the low bits of a sum.
    """
    import torch

    size = wide.abs()
    line = (size * 2).add_(ROUNDER)
    torch.minimum(line, size + (ROUNDER + 2), out=line)
    torch.minimum(line, size.mul_(0.5).add_(ROUNDER + 4), out=line)
    line.clamp_max_(ROUNDER + 7)
    signs = wide.view(torch.int32)
    signs.bitwise_right_shift_(28).bitwise_and_(8)
    codes = signs.bitwise_or_(line.view(torch.int32)).view(wide.shape[0], -1, 2)
    return codes[..., 1].bitwise_left_shift(4).bitwise_or_(codes[..., 0]).to(torch.uint8)
