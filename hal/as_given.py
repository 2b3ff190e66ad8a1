"""Say where a choice leaves unquantized what the scheme quantizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hal.registry import Kernel

__all__ = ["left_as_given"]


def left_as_given(chosen: Kernel | None, kernels: Iterable[Kernel], scheme: str) -> str:
    """Return in one line which operand stays as given; empty where none does.

    Args:
        chosen: The kernel that was chosen, or None.
        kernels: All kernels of the op: what others read is what the scheme says.
        scheme: Name of the scheme.
    """
    if chosen is None or scheme not in chosen.signatures:
        return ""
    for operand in chosen.signatures[scheme]:
        if operand.scale_format is not None:
            continue
        for kernel in kernels:
            for other in kernel.signatures.get(scheme, ()):
                if other.name == operand.name and other.scale_format is not None:
                    how = str(other).partition(": ")[2]
                    return (
                        f"{operand.name} stays as given, where {scheme} has {how}; a choice of "
                        "minimum=native refuses that"
                    )
    return ""
