"""Say what keeps kernels of a higher level from being the choice, and what would cure it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hal.need import Code

if TYPE_CHECKING:
    from hal.registry import Kernel
    from hal.selection import Candidate

__all__ = ["higher_levels"]

CURABLE = (Code.PACKAGE, Code.TORCH_VERSION, Code.SHAPE)
"""What can be met on the same device: something is installed, or another problem is asked."""
OF_DEVICES = (Code.PLATFORM, Code.ARCH, Code.FORMAT, Code.MEMORY)


def higher_levels(chosen: Kernel | None, candidates: Iterable[Candidate], arch: str) -> str:
    """Return in one sentence what would have to change for a higher level; empty where none is.

    Args:
        chosen: The kernel that was chosen, or None.
        candidates: All of the op.
        arch: Name of the device's architecture.
    """
    if chosen is None:
        return ""
    above = [c for c in candidates if c.serves and c.kernel.level > chosen.level]
    parts: list[str] = []
    others: list[str] = []
    for candidate in above:
        name, codes = candidate.kernel.name, {failure.code for failure in candidate.failures}
        if candidate.can_run:
            why = "is claimed" if candidate.claimed else "was measured to be slower"
            parts.append(f"{name} can run but {why} (force={name})")
        elif codes.issubset(CURABLE):
            needed = " and ".join(failure.needed for failure in candidate.failures)
            claimed = ", claimed" if candidate.claimed else ""
            parts.append(f"{name}{claimed}, needs {needed}")
        elif codes.intersection(OF_DEVICES):
            others.append(name)
    if others and not parts:
        return f"no kernel above {chosen.level} is for {arch}"
    return f"above {chosen.level}: {'; '.join(parts)}" if parts else ""
