"""Put new weights where a bound op has its old ones, so that captured graphs read them.

A captured graph holds addresses. Where weights change while the model stays (reinforcement
learning, a new checkpoint of the same model), the new ones are prepared for the same kernel and
copied into the memory that it reads. All is checked, and prepared beside the old, before the first
byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hal.errors import ArgumentError, DeviceMismatchError, DTypeError, EncodingError, ShapeError
from hal.ops.binding import Tensors
from hal.quant.tensor import QTensor

if TYPE_CHECKING:
    from hal.protocol import Platform
    from hal.registry import Kernel

__all__ = ["Traits", "overwrite", "require_alike", "require_reloadable", "traits"]

Traits = Mapping[str, str]

_ERRORS: Mapping[str, type[ArgumentError]] = {
    "given": ArgumentError,
    "device": DeviceMismatchError,
    "scheme": EncodingError,
    "shape": ShapeError,
    "encoding": EncodingError,
    "dtype": DTypeError,
}
_ANEW = "bind the new weights anew, and capture graphs again"


def traits(given: QTensor | torch.Tensor | None) -> Traits:
    """Return what a weight or bias must share with another to take its place, by name."""
    if given is None:
        return {"given": "none"}
    both = {"given": "one", "device": str(given.device), "shape": str(list(given.shape))}
    if isinstance(given, QTensor):
        return {**both, "scheme": given.scheme.name, "encoding": given.encoding}
    return {**both, "dtype": str(given.dtype)}


def require_alike(where: str, found: Traits, needed: Traits, *names: str) -> None:
    """Raise if one of the named traits, or any, is another.

    Raises:
        ArgumentError: Of the kind that the trait calls for, which it names.
    """
    for name, error in _ERRORS.items():
        if (not names or name in names) and found.get(name) != needed.get(name):
            raise error(
                where,
                found=f"{name} {found.get(name)}",
                needed=f"{needed.get(name)}, as it was bound",
                cure=_ANEW,
            )


def require_reloadable(where: str, kernel: Kernel) -> None:
    """Raise if a library may keep weights where hal does not see them.

    Raises:
        ArgumentError: Naming the kernel.
    """
    if kernel.claimed and kernel.band == "specialised":
        raise ArgumentError(
            where,
            found=f"{kernel}, whose library may keep weights in objects of its own",
            needed="a kernel that hal has run",
            cure=_ANEW,
        )


def overwrite(where: str, held: Tensors, new: Tensors, platform: Platform) -> None:
    """Copy what a binder made of new weights over what it made of the old.

    Work that still reads the old on another stream must be done; what comes later on any stream
    reads the new.

    Raises:
        ArgumentError: If they do not fit; nothing was written then.
    """
    if len(held) != len(new):
        found, needed = f"{len(new)} tensors", f"{len(held)}, as they were bound"
        raise ArgumentError(where, found=found, needed=needed, cure=_ANEW)
    for number, (old, other) in enumerate(zip(held, new, strict=True)):
        require_alike(f"{where}: tensor {number}", traits(other), traits(old))
        if any(step == 0 and size > 1 for step, size in zip(old.stride(), old.shape, strict=True)):
            found = f"elements of tensor {number} that share memory"
            raise ArgumentError(where, found=found, needed="memory for each", cure=_ANEW)
    written = {old.untyped_storage().data_ptr() for old in held}
    # Inference tensors may be written in that mode alone, and others may be too.
    with platform.ordered((*held, *new)), torch.inference_mode():
        pairs = [
            # Who exchanges two weights would else read what was just written.
            (old, other.clone() if other.untyped_storage().data_ptr() in written else other)
            for old, other in zip(held, new, strict=True)
            if old.data_ptr() != other.data_ptr()
        ]
        for old, other in pairs:
            old.copy_(other)
    platform.wait(held)
