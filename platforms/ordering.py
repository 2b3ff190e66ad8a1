"""Order work where there are no streams: on the CPU, and on devices that are only simulated.

`hal.platforms.streams` orders the work of devices that have streams.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from hal.errors import DeviceMismatchError, SimulatedDeviceError

if TYPE_CHECKING:
    import torch

__all__ = ["HostEvent", "HostOrdering", "Ordering", "SimulatedOrdering"]

_STREAM_TYPES = ("cuda", "xpu")


class Ordering(Protocol):
    """Do what a platform promises about streams and events."""

    def synchronize(self, index: int | None = None) -> None: ...

    def current_stream(self, index: int | None = None) -> Any: ...

    def event(self) -> Any: ...

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]: ...

    def wait(self, tensors: Iterable[torch.Tensor]) -> None: ...


class HostEvent:
    """An event of a processor that runs everything in program order: always complete."""

    def record(self, stream: Any = None) -> None:
        """Do nothing: what came before is done."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing: what came before is done."""

    def synchronize(self) -> None:
        """Do nothing: what came before is done."""

    def query(self) -> bool:
        """Return True."""
        return True


class HostOrdering:
    """Order nothing, because a processor runs torch's operators one after the other."""

    def synchronize(self, index: int | None = None) -> None:
        """Do nothing: operators return when they are done."""

    def current_stream(self, index: int | None = None) -> Any:
        """Return None: there are no streams."""
        return None

    def event(self) -> Any:
        """Return an event that is complete."""
        return HostEvent()

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Run the body as it stands; refuse tensors of a device that has streams."""
        _refuse_streams(tensors, "ordered")
        return nullcontext(stream)

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do nothing: operators return when they are done."""
        _refuse_streams(tensors, "wait")


def _refuse_streams(tensors: Iterable[torch.Tensor], where: str) -> None:
    # Passing over them in silence would lose the very order that was asked for.
    for tensor in tensors:
        if tensor.device.type in _STREAM_TYPES:
            raise DeviceMismatchError(
                where,
                found=f"a tensor on {tensor.device} and the CPU platform",
                needed="the platform of the tensor's device",
                cure="pass platform=, or ask hal.runtime.platform_of(tensor.device)",
            )


class SimulatedOrdering(HostOrdering):
    """Let reference computations on the CPU through and refuse everything that needs the device."""

    def __init__(self, platform: str, device: str) -> None:
        self._platform, self._device = platform, device

    def _refusal(self, action: str) -> SimulatedDeviceError:
        return SimulatedDeviceError(self._platform, self._device, action)

    def _demand_cpu(self, tensors: Iterable[torch.Tensor], action: str) -> None:
        for tensor in tensors:
            if tensor.device.type not in ("cpu", "meta"):
                raise self._refusal(f"{action} a tensor on {tensor.device}")

    def synchronize(self, index: int | None = None) -> None:
        """Refuse."""
        raise self._refusal("synchronize")

    def current_stream(self, index: int | None = None) -> Any:
        """Refuse."""
        raise self._refusal("current_stream")

    def event(self) -> Any:
        """Refuse."""
        raise self._refusal("event")

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Run the body as it stands on CPU tensors; refuse others."""
        self._demand_cpu(tensors, "order work on")
        return nullcontext(stream)

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do nothing for CPU tensors; refuse others."""
        self._demand_cpu(tensors, "wait for")
