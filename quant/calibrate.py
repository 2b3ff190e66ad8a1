"""Fix the scale of static activations from magnitudes that calibration saw.

The rule is that of `hal.quant.codec`: scale = max(amax / quantization_maximum, SCALE_FLOOR).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError, ShapeError, ValueRangeError
from hal.formats import number_format
from hal.quant.codec import SCALE_FLOOR
from hal.quant.scheme import Scheme, find_scheme

if TYPE_CHECKING:
    import torch

__all__ = ["input_scale"]


def input_scale(amax: torch.Tensor | float, scheme: Scheme | str = "fp8_static") -> torch.Tensor:
    """Return the scale under which activations up to `amax` do not saturate, float32.

    Args:
        amax: Largest magnitude seen, a number or any shape, such as `[experts]`. Of tensor-parallel
            shards of the activations, the largest of all of them.
        scheme: A scheme with static activations; 8-bit floats count as e4m3fn here.

    Raises:
        ArgumentError: If activations of the scheme have no fixed scale.
        ValueRangeError: If `amax` is negative, NaN or infinite.
    """
    import torch

    how = find_scheme(scheme)
    _require_static(how, "an input scale")
    assert how.activation.format is not None
    top = number_format(how.activation.format).quantization_maximum
    largest = torch.as_tensor(amax, dtype=torch.float32)
    if not bool(((largest >= 0) & largest.isfinite()).all()):
        raise ValueRangeError(
            "input_scale", found=f"amax {largest.tolist()}", needed="finite magnitudes"
        )
    # By a tensor: see `hal.quant.codec.encode`.
    return (largest / largest.new_full((), top)).clamp_min(SCALE_FLOOR)


def checked_input_scale(
    scheme: Scheme,
    scale: torch.Tensor | float | None,
    lead: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor | None:
    """Return an input scale as a weight `[*lead, N, K]` keeps it: float32, shaped `lead`.

    Raises:
        ArgumentError: If activations of the scheme have no fixed scale.
        ShapeError: If it is neither one number nor one a matrix.
        ValueRangeError: If it is not finite, or below SCALE_FLOOR.
    """
    import torch

    if scale is None:
        return None
    _require_static(scheme, "input_scale")
    found = torch.as_tensor(scale, dtype=torch.float32, device=device)
    if found.numel() != 1 and tuple(found.shape) != lead:
        raise ShapeError("input_scale", found=list(found.shape), needed=f"[] or {list(lead)}")
    require_scale("input_scale", found)
    return (found.reshape(()) if found.numel() == 1 else found).expand(lead).clone()


def require_scale(where: str, scale: torch.Tensor) -> None:
    """Raise ValueRangeError unless scales are finite and at least SCALE_FLOOR."""
    if scale.device.type == "meta":
        return
    # As float32 holds the floor, or the floor itself would be refused.
    floor = scale.new_full((), SCALE_FLOOR)
    if not bool(((scale >= floor) & scale.isfinite()).all()):
        raise ValueRangeError(
            where, found=scale.tolist(), needed=f"finite scales of at least {SCALE_FLOOR}"
        )


def _require_static(scheme: Scheme, found: str) -> None:
    if not scheme.static:
        raise ArgumentError(
            f"scheme {scheme}",
            found=found,
            needed="none: it takes the scales of activations from the data at each call",
            cure="use a static scheme, such as fp8_static or int8_static",
        )
