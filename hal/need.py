"""Say what a need is: it is compared with facts, and answers with what was needed and found."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hal.device import DeviceSpec

__all__ = ["Code", "Context", "Failure", "Need"]


class Code(str, enum.Enum):
    """The closed set of kinds of requirement."""

    PLATFORM = "platform"
    ARCH = "arch"
    FORMAT = "format"
    PACKAGE = "package"
    TORCH_VERSION = "torch_version"
    SHAPE = "shape"
    LAYOUT = "layout"
    MEMORY = "memory"
    ENV = "env"
    RANK = "rank"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Failure:
    """One requirement that is not met."""

    code: Code
    needed: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        tail = f" ({self.hint})" if self.hint else ""
        return f"{self.code}: found {self.found}, needs {self.needed}{tail}"


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that a decision may depend on."""

    spec: DeviceSpec
    scheme: str
    problem: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """Base of all requirements; make them through `Needs`."""

    def check(self, context: Context) -> Failure | None:
        """Return why `context` does not meet this, or None."""
        raise NotImplementedError

    def unchecked(self, context: Context) -> tuple[str, ...]:
        """Return the names of sizes and options that were not given and so not checked."""
        return ()

    def block(self) -> tuple[str, int] | None:
        """Return the size that must be a multiple, and of what; None for needs of another kind."""
        return None
