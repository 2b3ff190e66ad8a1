"""Quantize rows under a fixed scale, or with zero points, with torch in few passes on a CPU.

The codecs ask every number whether it is finite and make a fresh tensor at each step. Here the rows
are asked once, by a sum that no NaN or infinity passes unseen, and one wide copy is worked on in
place; rows that hold one, or whose sum overflows, go to the codec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.represent import represent

if TYPE_CHECKING:
    import torch

    from hal.quant.represent import Fixed
    from hal.quant.scheme import Quantization

__all__ = ["quantize_given"]


def quantize_given(
    x: torch.Tensor, format: str, how: Quantization, fixed: Fixed | None
) -> tuple[torch.Tensor, ...]:
    """Return codes, float32 scales, and zero points if any, bit for bit as `represent` does.

    Args:
        x: `[tokens, features]` of any float dtype, on a CPU.
        format: Number format of the codes.
        how: How they are stored: under a fixed scale, or with zero points, or both.
        fixed: What is fixed of a static scheme, as `represent` takes it.
    """
    import torch

    from hal.formats import number_format
    from hal.torch_compat import dtype

    wide = x.to(torch.float32, copy=True)
    if not x.numel() or not (x.is_meta or torch.isfinite(wide.sum())):
        return tuple(part for part in represent(x, how, format, fixed=fixed) if part is not None)
    if not how.symmetric:
        return _shifted(wide, fixed)
    assert fixed is not None
    assert not isinstance(fixed, tuple)
    target = number_format(format)
    top = target.quantization_maximum
    wide.div_(fixed)
    if target.is_integer:
        wide.round_()
    return wide.clamp_(-top, top).to(dtype(format)), fixed.repeat(x.shape[0])


def _shifted(wide: torch.Tensor, fixed: Fixed | None) -> tuple[torch.Tensor, ...]:
    """Return int8 codes, scales and int8 zero points of finite numbers, which are overwritten."""
    import torch

    from hal.quant.asymmetric import LEAST, MOST, scale_and_zero

    if fixed is None:
        low, high = wide.amin(-1).clamp_max_(0), wide.amax(-1).clamp_min_(0)
        scales, zeros = scale_and_zero(low, high)
    else:
        scales, zeros = fixed[0].repeat(wide.shape[0]), fixed[1].repeat(wide.shape[0])
    wide.div_(scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(LEAST, MOST)
    return wide.to(torch.int8), scales, zeros.to(torch.int8)
