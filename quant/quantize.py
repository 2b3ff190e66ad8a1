"""Quantize weights for a platform, and give them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, DTypeError, ShapeError, ValueRangeError
from hal.quant.codec import amax
from hal.quant.represent import Coded, encoding_of, largest, represent
from hal.quant.scheme import BLOCK, Quantization, Scheme, code_shape, find_scheme
from hal.quant.tensor import QTensor
from hal.torch_compat import dtype

if TYPE_CHECKING:
    import torch

__all__ = ["bind_encoding", "quantize"]

SLICE_ELEMENTS = 1 << 24
"""Values that are quantized at a time: 64 MiB in float32."""


Reduce = Callable[["torch.Tensor"], "torch.Tensor"]
"""Takes largest magnitudes of one shard and returns those of the whole, as all-reduce does."""


def quantize(
    weight: torch.Tensor,
    scheme: Scheme | str,
    *,
    platform: Any = None,
    device: int | None = None,
    reduce: Reduce | None = None,
    input_scale: torch.Tensor | float | None = None,
    input_zero: torch.Tensor | int | None = None,
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
        reduce: For a shard of a matrix: takes the largest magnitudes found in it, float32, and
            returns those of the whole matrix, so that all shards together hold the bits of the
            whole. torch's `all_reduce(found, MAX)` works in place and returns None: return
            `found` after it. It is called equally often, with equal shapes, for shards of equal
            shape. Scales per group and block ask for nothing: a shard must hold whole groups and
            blocks.
        input_scale: Scale of the activations of a static scheme, one number or `[...]`, as
            `hal.quant.input_scale` computes it for e4m3fn; doubled for devices that read
            e4m3fnuz. Without one the weight cannot be bound.
        input_zero: Code that means zero of those activations, where a scheme has one
            (`hal.quant.input_range`); None is 0.

    Raises:
        ArgumentError: If an input scale or zero point is given to a scheme that has none, or
            `reduce` returns no tensor like the one it was given.
        DTypeError: If the weight is not a float tensor.
        ShapeError: If it has fewer than two dimensions or an empty one.
        ValueRangeError: If it, or what `reduce` returns, holds a NaN or an infinity, or the input
            scale is below SCALE_FLOOR.
        UnknownNameError: If the scheme is unknown.
    """
    import torch

    from hal.quant.calibrate import checked_input_scale, checked_input_zero
    from hal.runtime import platform_of

    how = find_scheme(scheme)
    floats = (torch.bfloat16, torch.float16, torch.float32)
    if not isinstance(weight, torch.Tensor):
        raise DTypeError(
            "quantize",
            found=f"a {type(weight).__name__}",
            needed="a tensor of bfloat16, float16 or float32",
            cure="rounding twice loses more than once: start from the weight as it was"
            if isinstance(weight, QTensor)
            else "",
        )
    if weight.dtype not in floats:
        raise DTypeError("quantize", found=weight.dtype, needed="bfloat16, float16 or float32")
    if weight.ndim < 2 or 0 in weight.shape:
        raise ShapeError(
            "quantize", found=f"weight {list(weight.shape)}", needed="[..., N, K], none of them 0"
        )
    where = platform_of(weight.device, platform)
    weight = weight.detach()
    fixed = checked_input_scale(how, input_scale, tuple(weight.shape[:-2]), weight.device)
    zero = checked_input_zero(how, input_zero, fixed)
    if how.weight.format is None:
        weight = weight if weight.dtype is not torch.float32 else weight.bfloat16()
        _require_finite(amax(weight, "tensor").amax())
        return QTensor(weight.contiguous(), None, how, _format_of(weight))
    if device is None:
        lives_there = weight.device.type == where.torch_device_type and not where.simulated
        device = (weight.device.index or 0) if lives_there else 0
    encoding = encoding_for(how, where.device(device).formats.fp8_encoding)
    shape = tuple(weight.shape)
    with where.ordered((weight,)):
        top, coded = _encode_slices(weight, how.weight, encoding, reduce)
        _require_finite(top)
    tensors = coded.values, coded.scales
    if fixed is not None and encoding == "e4m3fnuz":
        fixed = fixed * 2
    return QTensor(
        *tensors,
        how,
        encoding,
        logical_shape=shape,
        global_scale=coded.second,
        zeros=coded.zeros,
        input_scale=fixed,
        input_zero=zero,
    )


def encoding_for(scheme: Scheme, fp8_encoding: str | None) -> str:
    """Return the number format that the scheme's codes take on a device.

    Args:
        scheme: A quantizing scheme.
        fp8_encoding: The device's 8-bit float encoding, None where it has none.
    """
    return encoding_of(scheme.weight.format, fp8_encoding)


def bind_encoding(weight: QTensor, fp8_encoding: str | None, *, where: str) -> QTensor:
    """Return `weight` in the encoding that a device reads, converted if that is exact.

    Raises:
        EncodingError: If e4m3fnuz bytes meet a device that reads e4m3fn.
        ValueRangeError: If an e8m0 scale cannot grow as e4m3fnuz needs it to.
    """
    from dataclasses import replace

    from hal.quant.fp8 import to_fnuz
    from hal.quant.mx import to_fnuz_mx

    needed = encoding_for(weight.scheme, fp8_encoding)
    how = weight.scheme.weight
    if how.format != "e4m3fn" or weight.encoding == needed or weight.scales is None:
        return weight
    if weight.encoding == "e4m3fn" and needed == "e4m3fnuz":
        convert = to_fnuz_mx if how.scale_format == "e8m0" else to_fnuz
        if convert is to_fnuz_mx:
            _require_doubling(where, weight.scales)
        values, scales = convert(weight.values, weight.scales)
        # Activations are cast to the same encoding, whose codes mean half as much.
        fixed = None if weight.input_scale is None else weight.input_scale * 2
        return replace(weight, values=values, scales=scales, encoding=needed, input_scale=fixed)
    weight.require(where, layout=weight.layout, encodings=(needed,))
    return weight


def _require_doubling(where: str, scales: torch.Tensor) -> None:
    """Raise if an e8m0 scale is the largest: it cannot double, and values would halve."""
    largest = scales == 254
    if scales.device.type != "meta" and bool(largest.any()):
        raise ValueRangeError(
            f"{where}: scales",
            found=f"254 at {largest.nonzero()[0].tolist()}",
            needed="e8m0 bytes below 254, or 255 for NaN",
            cure="scales of 2**127 are no weights",
        )


def _encode_slices(
    weight: torch.Tensor, how: Quantization, encoding: str, reduce: Reduce | None
) -> tuple[torch.Tensor, Coded]:
    """Return the largest magnitude, and what `represent` returns, from slices of whole blocks."""
    import torch

    shape = tuple(weight.shape)
    rows, columns = shape[-2:]
    step = max(SLICE_ELEMENTS // columns // BLOCK, 1) * BLOCK
    kind = dtype("uint8" if how.packed else encoding)
    values = torch.empty(code_shape(how, shape), dtype=kind, device=weight.device)
    top = weight.new_zeros((), dtype=torch.float32)
    factors: list[Coded] = []
    codes_out = values.view(-1, rows, values.shape[-1])
    for matrix, codes in zip(weight.reshape(-1, rows, columns), codes_out, strict=True):
        parts = matrix.split(step)
        # Not by Python's max: a NaN must stay one.
        top = torch.maximum(top, torch.cat([amax(part, "channel") for part in parts]).amax())
        found = []
        for part, target, maximum in zip(
            parts, codes.split(step), _maxima(parts, how, reduce), strict=True
        ):
            if maximum is not None:
                top = torch.maximum(top, maximum.amax())  # a NaN of another shard is one here
            coded = represent(part, how, encoding, maximum)
            target.copy_(coded.values)
            found.append(coded._replace(values=target))
        factors.append(_joined(found, how))
    names = ("scales", "second", "zeros")
    joined = {name: _stacked([getattr(f, name) for f in factors], shape[:-2]) for name in names}
    return top, Coded(values, **joined)


def _maxima(
    parts: Sequence[torch.Tensor], how: Quantization, reduce: Reduce | None
) -> list[torch.Tensor | None]:
    """Return what each slice takes as its largest magnitudes, where it cannot know them itself."""
    import torch

    whole = "tensor" in (how.granularity, how.second)
    if not whole and reduce is None:
        return [None] * len(parts)
    tops = [largest(part, how) for part in parts]
    if whole:
        top = torch.stack([top for top in tops if top is not None]).amax(0)
        return [top if reduce is None else _reduced(top, reduce)] * len(parts)
    return [None if top is None or reduce is None else _reduced(top, reduce) for top in tops]


def _reduced(found: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Return what `reduce` makes of largest magnitudes: a slip would leave each shard its own."""
    import torch

    like = found.shape, found.dtype, found.device
    whole = reduce(found)
    if not isinstance(whole, torch.Tensor):
        raise ArgumentError(
            "quantize: reduce",
            found=f"{type(whole).__name__} returned",
            needed="the largest magnitudes of the whole matrix",
            cure="torch.distributed.all_reduce works in place: return the tensor after it",
        )
    if (whole.shape, whole.dtype, whole.device) != like:
        raise ArgumentError(
            "quantize: reduce",
            found=f"{whole.dtype} {list(whole.shape)} on {whole.device} returned",
            needed=f"{like[1]} {list(like[0])} on {like[2]}, as it was given",
        )
    return whole


def _joined(parts: list[Coded], how: Quantization) -> Coded:
    """Return the scales of the slices of one matrix as those of the matrix."""
    import torch

    def join(name: str, granularity: str) -> torch.Tensor | None:
        column = [getattr(part, name) for part in parts]
        whole = len(parts) == 1 or column[0] is None or granularity == "tensor"
        return column[0] if whole else _combined(torch.cat, column)

    return Coded(
        parts[0].values,
        join("scales", how.granularity),
        join("second", how.second),
        join("zeros", how.granularity),
    )


def _stacked(column: list[torch.Tensor | None], lead: tuple[int, ...]) -> torch.Tensor | None:
    """Return one tensor of those of each matrix."""
    import torch

    found = [tensor for tensor in column if tensor is not None]
    if not found:
        return None
    return _combined(torch.stack, found).view((*lead, *found[0].shape))


def _combined(
    combine: Callable[[list[torch.Tensor]], torch.Tensor], found: list[torch.Tensor]
) -> torch.Tensor:
    """Return `combine(found)`, of 8-bit floats by their bytes: IPEX's own operators refuse them."""
    import torch

    kind = found[0].dtype
    if kind.itemsize > 1:
        return combine(found)
    return combine([tensor.view(torch.uint8) for tensor in found]).view(kind)


def _require_finite(top: torch.Tensor) -> None:
    if top.device.type != "meta" and not bool(top.isfinite()):
        raise ValueRangeError(
            "quantize", found="NaN or infinity in the weight", needed="finite values"
        )


def _format_of(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
