"""Check the arguments of ops, with messages that say what was found, needed and how to cure it.

Everything here reads attributes only: no device synchronisation, no values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.errors import DeviceMismatchError, DTypeError, GradientError, ShapeError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ACTIVATION_DTYPES",
    "check_activations",
    "check_gradient",
    "check_same_device",
    "stamp",
]

ACTIVATION_DTYPES = ("bfloat16", "float16")
"""Dtypes of activations that every quantized op takes."""


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the dtype of `tensor` without the `torch.` in front."""
    return str(tensor.dtype).removeprefix("torch.")


def check_activations(
    where: str,
    x: torch.Tensor,
    columns: int,
    device: torch.device,
    dtypes: tuple[str, ...] = ACTIVATION_DTYPES,
) -> None:
    """Raise unless `x` is `[..., columns]` of an accepted dtype on `device`.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
    """
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ShapeError(where, found=f"input {list(x.shape)}", needed=f"[..., {columns}]")
    name = dtype_name(x)
    if name not in dtypes:
        raise DTypeError(
            where, found=f"input of {name}", needed=" or ".join(dtypes), cure=f"x.to({dtypes[0]})"
        )
    check_same_device(where, device, input=x)
    check_gradient(where, x)


def check_same_device(where: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors are on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise DeviceMismatchError(
                where,
                found=f"{name} on {tensor.device}",
                needed=str(device),
                cure="move it there, or bind weights on the device of the input",
            )


def check_gradient(where: str, *tensors: torch.Tensor) -> None:
    """Raise if a gradient would have to flow through the op: it would silently get none."""
    import torch

    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise GradientError(
            where,
            found="an input that requires a gradient",
            needed="inference",
            cure="wrap the call in torch.no_grad() or torch.inference_mode()",
        )


def stamp(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what changes when a tensor is written in place or gets other memory.

    torch counts no writes to inference tensors and none through `tensor.data`: those are not seen.
    """
    writes = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes, tensor.dtype, tensor.device, tensor.shape
