"""Quantize weights for a platform, and give them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import DTypeError, ShapeError, ValueRangeError
from hal.quant.codec import amax, encode
from hal.quant.scheme import BLOCK, Scheme, find_scheme, scale_shape
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

__all__ = ["bind_encoding", "quantize"]

SLICE_ELEMENTS = 1 << 24
"""Values that are quantized at a time: 64 MiB in float32."""


def quantize(
    weight: torch.Tensor, scheme: Scheme | str, *, platform: Any = None, device: int | None = None
) -> QTensor:
    """Return `weight` quantized under `scheme`, in the encoding of the platform's device.

    The result depends on the weight and the encoding only. Rows are processed in slices, so the
    float32 copies that rounding needs stay small.

    Args:
        weight: `[..., N, K]` in bf16, fp16 or float32, on any device.
        scheme: A scheme or its name.
        platform: Platform that will read the weight; None means that of the weight's device.
        device: Visible index on that platform; None means the device of the weight if it lives
            on that platform, else the first.

    Raises:
        DTypeError: If the weight is not a float tensor.
        ShapeError: If it has fewer than two dimensions or an empty one.
        ValueRangeError: If it holds a NaN or an infinity.
        UnknownNameError: If the scheme is unknown.
    """
    import torch

    from hal.runtime import platform_of

    how = find_scheme(scheme)
    floats = (torch.bfloat16, torch.float16, torch.float32)
    if weight.dtype not in floats:
        raise DTypeError("quantize", found=weight.dtype, needed="bfloat16, float16 or float32")
    if weight.ndim < 2 or 0 in weight.shape:
        raise ShapeError(
            "quantize", found=f"weight {list(weight.shape)}", needed="[..., N, K], none of them 0"
        )
    where = platform_of(weight.device, platform)
    weight = weight.detach()
    if how.weight.format is None:
        weight = weight if weight.dtype is not torch.float32 else weight.bfloat16()
        _require_finite(amax(weight, "tensor"))
        return QTensor(weight.contiguous(), None, how, _format_of(weight))
    if device is None:
        lives_there = weight.device.type == where.torch_device_type and not where.simulated
        device = (weight.device.index or 0) if lives_there else 0
    encoding = encoding_for(how, where.device(device).formats.fp8_encoding)
    with where.ordered((weight,)):
        values, scales = _encode_slices(weight, encoding, how.weight.granularity)
        _require_finite(scales.amax())
    return QTensor(values, scales, how, encoding)


def encoding_for(scheme: Scheme, fp8_encoding: str | None) -> str:
    """Return the number format that the scheme's codes take on a device.

    Args:
        scheme: A quantizing scheme.
        fp8_encoding: The device's 8-bit float encoding, None where it has none.
    """
    name = scheme.weight.format or "bfloat16"
    return fp8_encoding if name == "e4m3fn" and fp8_encoding is not None else name


def bind_encoding(weight: QTensor, fp8_encoding: str | None, *, where: str) -> QTensor:
    """Return `weight` in the encoding that a device reads, converted if that is exact.

    Raises:
        EncodingError: If e4m3fnuz bytes meet a device that reads e4m3fn.
    """
    from dataclasses import replace

    from hal.quant.fp8 import to_fnuz

    needed = encoding_for(weight.scheme, fp8_encoding)
    if weight.scheme.weight.format is None or weight.encoding == needed:
        return weight
    if weight.encoding == "e4m3fn" and needed == "e4m3fnuz" and weight.scales is not None:
        values, scales = to_fnuz(weight.values, weight.scales)
        return replace(weight, values=values, scales=scales, encoding=needed)
    weight.require(where, layout=weight.layout, encodings=(needed,))
    return weight


def _encode_slices(
    weight: torch.Tensor, encoding: str, granularity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `encode` returns, from slices of whole blocks that share no scale."""
    import torch

    from hal.torch_compat import dtype

    if granularity == "tensor":
        return encode(weight, encoding, granularity)
    shape = tuple(weight.shape)
    values = torch.empty(shape, dtype=dtype(encoding), device=weight.device)
    needed = scale_shape(granularity, shape)
    scales = torch.empty(needed, dtype=torch.float32, device=weight.device)
    rows, columns = shape[-2:]
    step = max(SLICE_ELEMENTS // columns // BLOCK, 1) * BLOCK
    scale_step = step if granularity == "channel" else step // BLOCK
    places = zip(
        weight.reshape(-1, rows, columns),
        values.view(-1, rows, columns),
        scales.view(-1, *needed[len(shape) - 2 :]),
        strict=True,
    )
    for matrix, codes_out, scales_out in places:
        parts = zip(
            matrix.split(step), codes_out.split(step), scales_out.split(scale_step), strict=True
        )
        for part, codes_part, scales_part in parts:
            codes, found = encode(part, encoding, granularity)
            codes_part.copy_(codes)
            scales_part.copy_(found)
    return values, scales


def _require_finite(scales: torch.Tensor) -> None:
    if scales.device.type != "meta" and not bool(scales.isfinite()):
        raise ValueRangeError(
            "quantize", found="NaN or infinity in the weight", needed="finite values"
        )


def _format_of(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
