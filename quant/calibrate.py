"""Fix the scale of static activations from what calibration saw of them.

The rules are those of the codecs: scale = max(amax / quantization_maximum, SCALE_FLOOR), of nvfp4
second scale = max(amax / (448 * 6), SCALE_FLOOR), and with a zero point that of
`hal.quant.asymmetric`, for the range from the least to the largest number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import ArgumentError, ShapeError, ValueRangeError
from hal.formats import number_format
from hal.quant.codec import SCALE_FLOOR
from hal.quant.scheme import Scheme, find_scheme

if TYPE_CHECKING:
    import torch

__all__ = ["fixed_arguments", "input_range", "input_scale"]


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
    if how.activation.second != "none":
        from hal.quant.nvfp4 import global_scale_of

        return global_scale_of(largest)
    # By a tensor: see `hal.quant.codec.encode`.
    return (largest / largest.new_full((), top)).clamp_min(SCALE_FLOOR)


def input_range(
    low: torch.Tensor | float, high: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale (float32) and zero point (int8) for activations from `low` to `high`.

    They are `input_scale` and `input_zero` of int8_static_asymmetric. The range is widened to 0.

    Args:
        low: Least number seen, or any shape of them, such as `[experts]`.
        high: Largest number seen, shaped alike.

    Raises:
        ValueRangeError: If either is NaN or infinite, or `low` is above `high`.
    """
    import torch

    from hal.quant.asymmetric import scale_and_zero

    least, most = (torch.as_tensor(end, dtype=torch.float32) for end in (low, high))
    if not bool((least.isfinite() & most.isfinite() & (least <= most)).all()):
        raise ValueRangeError(
            "input_range",
            found=f"{least.tolist()} to {most.tolist()}",
            needed="finite numbers, the least first",
        )
    scale, zero = scale_and_zero(least.clamp_max(0), most.clamp_min(0))
    return scale, zero.to(torch.int8)


def fixed_arguments(
    scheme: Scheme | str, low: torch.Tensor | float, high: torch.Tensor | float
) -> dict[str, torch.Tensor]:
    """Return what `quantize` takes of activations that calibration saw from `low` to `high`.

    That is nothing for a scheme that scales activations at each call.
    """
    import torch

    how = find_scheme(scheme)
    if not how.static:
        return {}
    if not how.activation.symmetric:
        return dict(zip(("input_scale", "input_zero"), input_range(low, high), strict=True))
    ends = (torch.as_tensor(end, dtype=torch.float32).abs() for end in (low, high))
    return {"input_scale": input_scale(torch.maximum(*ends), how)}


def checked_input_zero(
    scheme: Scheme, zero: torch.Tensor | int | None, scale: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the zero point that goes with a checked input scale: int8, shaped like it; 0 if None.

    Raises:
        ArgumentError: If activations of the scheme have no fixed zero point, or come without scale.
        ShapeError: If it is neither one number nor shaped like the scale.
        ValueRangeError: If it is no integer from -128 to 127.
    """
    import torch

    if not scheme.static or scheme.activation.symmetric:
        if zero is None:
            return None
        raise ArgumentError(
            f"scheme {scheme}",
            found="input_zero",
            needed="none: its activations have no fixed zero point",
            cure="use int8_static_asymmetric",
        )
    if scale is None:
        if zero is None:
            return None
        raise ArgumentError(
            f"scheme {scheme}",
            found="input_zero without input_scale",
            needed="both",
            cure="hal.quant.input_range(low, high) computes both",
        )
    found = torch.as_tensor(0 if zero is None else zero, device=scale.device)
    if found.numel() != 1 and found.shape != scale.shape:
        needed = f"[] or {list(scale.shape)}"
        raise ShapeError("input_zero", found=list(found.shape), needed=needed)
    if not bool(((found == found.round()) & (found >= -128) & (found <= 127)).all()):
        raise ValueRangeError("input_zero", found=found.tolist(), needed="integers, -128 to 127")
    found = found.to(torch.int8)
    return (found.reshape(()) if found.numel() == 1 else found).expand(scale.shape).clone()


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
