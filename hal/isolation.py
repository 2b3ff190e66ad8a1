"""Give a child process one device: its environment and the index it must use, from one answer.

The two belong together. A launcher that sets the variables and a child that still counts as its
parent does ask for a device that is not there, or for another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Isolation"]


@dataclass(frozen=True)
class Isolation:
    """What a child process needs in order to see one device and nothing else.

    Attributes:
        environment: Variables to set, by name; None is one to unset. Runtimes read them when they
            start, so they must be there before the child is.
        index: Torch's index of the device in the child.
        device: The device in the child as torch names it, such as `cuda:0`.
    """

    environment: Mapping[str, str | None] = field(hash=False)
    index: int
    device: str

    def apply(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return a whole environment for `subprocess`: `environ` with the changes made."""
        changed = {name: value for name, value in self.environment.items() if value is not None}
        kept = {name: value for name, value in environ.items() if name not in self.environment}
        return {**kept, **changed}
