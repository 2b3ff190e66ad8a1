"""Make weights of scheme `int4_w4a8_fp8` from uint4b8 checkpoints, in their own memory if asked.

    int4 code = uint4b8 code - 8
    channel   = max(max(group scales of the row) / 56, SCALE_FLOOR)
    scale     = e4m3(group scale / channel), at most 56 = 448 / 8, so that code * scale is e4m3

The step in place and whatever comes next, such as `to_layout(weight, "cutlass_w4a8")`, are ordered
by streams and events: both run inside `platform.ordered`, and no device is synchronised. Another
process that reads the same memory is told when to: record an event that processes can share
(`torch.cuda.Event(interprocess=True)`) on the stream that called, which goes on after the step, or
call `platform.wait(weight.tensors)` and then set a flag. It never sees half of a step then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import DeviceMismatchError, DTypeError, LayoutError, ShapeError
from hal.quant.int4 import uint4b8_to_int4, w4a8_scale_pair
from hal.quant.scheme import SCHEMES, code_shape, scale_shape
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    import torch

__all__ = ["w4a8_weight"]

_SCHEME = SCHEMES["int4_w4a8_fp8"]
_WHERE = "w4a8_weight"


def w4a8_weight(
    packed: torch.Tensor,
    group_scales: torch.Tensor,
    columns: int | None = None,
    *,
    maximum: torch.Tensor | None = None,
    platform: Any = None,
    inplace: bool = False,
    stream: Any = None,
) -> QTensor:
    """Return a weight of codes stored as value + 8 and of one scale per 128 columns.

    Args:
        packed: uint8 `[..., N, ceil(K / 2)]`, the even column in the low half, or the same bytes
            as int32 words `[..., N, K / 8]`, as GPTQ and compressed-tensors pack them.
        group_scales: `[..., N, ceil(K / 128)]` of any float dtype.
        columns: K; None means that no half of a byte is left over.
        maximum: Largest group scales of whole rows, `[..., N]`, where `packed` is a shard of them.
        platform: Platform whose ordering primitives to use; None means that of `packed`.
        inplace: Rewrite the memory of `packed`, which must not be read as uint4b8 again.
        stream: Stream to work on; what the caller's stream does next waits for it.

    Raises:
        DTypeError: If codes are neither uint8 nor int32, or scales no floats. Nothing has changed
            then, nor for the errors below.
        ShapeError: If the scales do not fit the codes, or the codes `columns`, or `maximum` them.
        DeviceMismatchError: If codes and scales, or `maximum`, are on two devices.
        LayoutError: If `inplace` is asked of codes that are not contiguous.
    """
    from hal.runtime import platform_of

    shape = _checked(packed, group_scales, columns, inplace)
    _check_maximum(maximum, shape[:-1], packed.device)
    where = platform_of(packed.device, platform)
    with where.ordered((packed, group_scales), stream=stream):
        codes = uint4b8_to_int4(packed if inplace else packed.contiguous(), inplace=inplace)
        scales, channel = w4a8_scale_pair(group_scales, maximum)
        weight = QTensor(
            _as_bytes(codes), scales, _SCHEME, "int4", logical_shape=shape, global_scale=channel
        )
    # New memory belongs to the body's stream; from here on it is the caller's, and ordered.
    with where.ordered(weight.tensors):
        return weight


def _as_bytes(codes: torch.Tensor) -> torch.Tensor:
    import torch

    return codes.view(torch.uint8)


def _checked(
    packed: torch.Tensor, group_scales: torch.Tensor, columns: int | None, inplace: bool
) -> tuple[int, ...]:
    """Return `[..., N, K]`, or raise."""
    import torch

    if packed.dtype not in (torch.uint8, torch.int32):
        raise DTypeError(_WHERE, found=packed.dtype, needed="uint8 or int32")
    if not group_scales.is_floating_point():
        raise DTypeError(f"{_WHERE}: scales", found=group_scales.dtype, needed="a float dtype")
    if packed.ndim < 2:
        raise ShapeError(_WHERE, found=f"codes {list(packed.shape)}", needed="[..., N, K / 2]")
    held = packed.shape[-1] * packed.element_size()
    shape = (*packed.shape[:-1], 2 * held if columns is None else columns)
    if shape[-1] < 1 or code_shape(_SCHEME.weight, shape)[-1] != held:
        found = f"codes {list(packed.shape)} of {packed.dtype} for {shape[-1]} columns"
        raise ShapeError(_WHERE, found=found, needed="two columns in each byte, and no byte more")
    wanted = scale_shape(_SCHEME.weight.granularity, shape)
    if tuple(group_scales.shape) != wanted:
        raise ShapeError(
            f"{_WHERE}: scales", found=list(group_scales.shape), needed=f"{list(wanted)}"
        )
    if group_scales.device != packed.device:
        found = f"codes on {packed.device} and scales on {group_scales.device}"
        raise DeviceMismatchError(_WHERE, found=found, needed="one device")
    if inplace and not packed.is_contiguous():
        raise LayoutError(
            _WHERE,
            found=f"inplace=True and strides {list(packed.stride())}",
            needed="contiguous codes",
            cure="inplace=False",
        )
    return shape


def _check_maximum(
    maximum: torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    where = f"{_WHERE}: maximum"
    if maximum is None:
        return
    if not maximum.is_floating_point():
        raise DTypeError(where, found=maximum.dtype, needed="a float dtype")
    if tuple(maximum.shape) != shape:
        raise ShapeError(where, found=list(maximum.shape), needed=list(shape))
    if maximum.device != device:
        raise DeviceMismatchError(where, found=maximum.device, needed=f"{device}, of the codes")
