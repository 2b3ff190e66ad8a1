"""Answer every question about devices that facts alone can answer.

A platform adds to this what only it can do: finding its devices, ordering work on them and asking
for free memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hal.arch import Arch, CudaArch
from hal.device import DeviceSpec
from hal.errors import (
    AmbiguousDeviceError,
    PlatformError,
    SimulatedDeviceError,
    ValueRangeError,
)
from hal.formats import Support
from hal.isolation import Isolation
from hal.platforms.ordering import Ordering, SimulatedOrdering
from hal.probe import Probe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from hal.platforms.isolation import Changes
    from hal.platforms.machine import Machine
    from hal.quirks import Quirk

__all__ = ["DeviceRecord", "FactsPlatform"]


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """One visible device: its facts and the names that the driver knows it by.

    `selector` is what the vendor's variable calls it, where that is neither number nor UUID.
    """

    spec: DeviceSpec
    physical_index: int
    uuid: str | None = None
    pci_bus_id: str | None = None
    selector: str | None = None


class FactsPlatform:
    """Base of the built-in platforms; implements `hal.protocol.Platform`.

    Args:
        devices: Every visible device, in the order of torch's indices.
        ordering: What orders work on them.
        simulated: True for devices that are rows of facts.
        notes: Plain sentences about what was found.
        machine: Where to ask for free memory.
    """

    platform_name: ClassVar[str]
    device_type: ClassVar[str]
    backend: ClassVar[str]

    def __init__(
        self,
        devices: Sequence[DeviceRecord],
        ordering: Ordering,
        *,
        simulated: bool = False,
        notes: Iterable[str] = (),
        machine: Machine | None = None,
    ) -> None:
        if not devices:
            raise PlatformError(f"{self.platform_name}: a platform needs at least one device")
        self._devices = tuple(devices)
        self._kinds: tuple[DeviceSpec, ...] = tuple(
            dict.fromkeys(record.spec.kind for record in self._devices)
        )
        self._ordering = ordering
        self._simulated = simulated
        self._notes = tuple(notes)
        self._machine = machine
        self._probes: tuple[Probe, ...] = ()

    @classmethod
    def simulate(cls, spec: DeviceSpec) -> Self:
        """Return this platform over one device that exists only as facts."""
        if spec.platform != cls.platform_name:
            raise PlatformError(f"{spec.name} belongs to {spec.platform}, not {cls.platform_name}")
        ordering = SimulatedOrdering(cls.platform_name, spec.name)
        return cls([DeviceRecord(spec, 0)], ordering, simulated=True)

    def with_report(self, probes: Iterable[Probe], notes: Iterable[str]) -> Self:
        """Return a copy that carries what detection found besides; ordering stays shared."""
        other = copy.copy(self)
        other._probes = tuple(probes)
        other._notes = tuple(dict.fromkeys((*self._notes, *notes)))
        return other

    def __repr__(self) -> str:
        kind = "simulated " if self._simulated else ""
        names = ", ".join(record.spec.name for record in self._devices)
        return f"<{kind}{self.name} platform: {names}>"

    # Identity
    @property
    def name(self) -> str:
        """Return cuda, rocm, xpu or cpu."""
        return self.platform_name

    @property
    def torch_device_type(self) -> str:
        """Return the type of torch device that tensors of this platform live on."""
        return self.device_type

    @property
    def simulated(self) -> bool:
        """Tell whether the devices are rows of facts that nothing can run on."""
        return self._simulated

    @property
    def is_cuda(self) -> bool:
        """Tell whether this is NVIDIA CUDA."""
        return self.platform_name == "cuda"

    @property
    def is_rocm(self) -> bool:
        """Tell whether this is AMD ROCm."""
        return self.platform_name == "rocm"

    @property
    def is_xpu(self) -> bool:
        """Tell whether this is Intel XPU."""
        return self.platform_name == "xpu"

    @property
    def is_cpu(self) -> bool:
        """Tell whether this is the CPU."""
        return self.platform_name == "cpu"

    # Devices
    def record(self, index: int | None = None) -> DeviceRecord:
        """Return visible device `index` with its UUID and PCI address.

        Raises:
            AmbiguousDeviceError: If `index` is None and several devices are visible.
            ValueRangeError: If no such device is visible.
        """
        if index is None:
            if len(self._devices) > 1:
                raise self._ambiguous("record")
            index = 0
        if not 0 <= index < len(self._devices):
            raise ValueRangeError(
                f"{self.name}.device", found=index, needed=f"0 to {len(self._devices) - 1}"
            )
        return self._devices[index]

    def _ambiguous(self, member: str) -> AmbiguousDeviceError:
        names = (record.spec.name for record in self._devices)
        return AmbiguousDeviceError(f"{self.name}.{member}", names)

    def device_count(self) -> int:
        """Return how many devices are visible."""
        return len(self._devices)

    def device(self, index: int | None = None) -> DeviceSpec:
        """Return the facts about device `index`; None leaves out its place in the machine.

        Raises:
            AmbiguousDeviceError: If `index` is None and the visible devices are unlike.
            ValueRangeError: If no such device is visible.
        """
        if index is None and len(self._devices) > 1:
            shared, *others = self._kinds
            if others:
                raise self._ambiguous("device")
            return shared
        return self.record(index).spec

    def physical_index(self, index: int | None = None) -> int:
        """Return the driver's own number of visible device `index`."""
        return self.record(index).physical_index

    def isolated(self, index: int) -> Isolation:
        """Return the environment and index with which a child sees device `index` alone.

        Raises:
            ValueRangeError: If no such device is visible.
            SimulatedDeviceError: If the device is a row of facts.
            PlatformError: If nothing names the device for another process.
        """
        record = self.record(index)
        if self._simulated:
            raise SimulatedDeviceError(self.name, record.spec.name, f"{self.name}.isolated")
        if self._machine is None:
            raise PlatformError(
                f"{self.name}.isolated: found {record.spec.name} by asking torch only, needed the "
                "driver's name of it; set the vendor's variable for the child by hand, and use "
                "index 0 there"
            )
        changes = self._child_environment(record, self._machine)
        return Isolation(changes, 0, self.device_type if self.is_cpu else f"{self.device_type}:0")

    def _child_environment(self, record: DeviceRecord, machine: Machine) -> Changes:
        """Return the variables to set and, where None, to unset for a child with one device."""
        raise PlatformError(
            f"{self.name}.isolated: found no variable that hides devices, needed one; "
            "implement _child_environment"
        )

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Return what was asked of the machine, how it answered and how long it took."""
        return self._probes

    @property
    def notes(self) -> tuple[str, ...]:
        """Return plain sentences about what was found and what could not be used."""
        return self._notes

    # Capability
    def arch(self, index: int | None = None) -> Arch:
        """Return the architecture of device `index`."""
        return self.device(index).arch

    def compute_capability(self, index: int | None = None) -> tuple[int, int] | None:
        """Return (major, minor) on CUDA and None on every other platform."""
        arch = self.arch(index)
        return arch.capability if isinstance(arch, CudaArch) else None

    def support(self, format: str, index: int | None = None, *, use: str = "math") -> Support:
        """Return the support of a number format for `use`, `storage` or `math`."""
        return self.device(index).formats.of(use, format)

    def supports_fp8(self, index: int | None = None) -> bool:
        """Tell whether the device multiplies 8-bit float matrices in hardware."""
        formats = self.device(index).formats
        encoding = formats.fp8_encoding
        return encoding is not None and formats.of("math", encoding) is Support.NATIVE

    def fp8_dtype(self, index: int | None = None) -> torch.dtype:
        """Return the dtype that fp8 weights take on the device.

        Raises:
            PlatformError: If the device has no 8-bit float at all.
        """
        from hal.torch_compat import dtype

        spec = self.device(index)
        if spec.formats.fp8_encoding is None:
            raise PlatformError(f"{spec.name} ({spec.arch}) has no 8-bit float, native or emulated")
        return dtype(spec.formats.fp8_encoding)

    def has(self, feature: str, index: int | None = None) -> bool:
        """Tell whether the device has a feature, such as `wgmma` or `avx512`."""
        return feature in self.device(index).features

    # Actions
    def synchronize(self, index: int | None = None) -> None:
        """Wait on the host for all work of a device."""
        self._ordering.synchronize(index)

    def current_stream(self, index: int | None = None) -> Any:
        """Return the stream that work is being submitted to; None on the CPU."""
        return self._ordering.current_stream(index)

    def event(self) -> Any:
        """Return a new event; on the CPU one that is always complete."""
        return self._ordering.event()

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Run the body after every earlier ordered body and before what comes next."""
        return self._ordering.ordered(tensors, stream=stream)

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Block the host until every ordered body on the devices of `tensors` is done."""
        self._ordering.wait(tensors)

    # Memory, versions, the rest of torch
    def memory(self, index: int | None = None) -> tuple[int | None, int | None]:
        """Return (free, total) bytes; None where nothing can tell without a runtime."""
        record = self.record(index)
        if self._simulated:
            return None, record.spec.memory_bytes
        free, total = self._ask_memory(record)
        return free, total if total is not None else record.spec.memory_bytes

    def _ask_memory(self, record: DeviceRecord) -> tuple[int | None, int | None]:
        """Return (free, total) bytes as the driver tells them now."""
        return None, None

    @property
    def pinned_memory(self) -> bool:
        """Tell whether page-locked host memory speeds up copies to the device."""
        return not self.is_cpu

    @property
    def torch_version(self) -> str | None:
        """Return the version of the installed torch, or None."""
        return self.device(0).software.torch

    @property
    def quirks(self) -> tuple[Quirk, ...]:
        """Return the quirks of the installed torch that matter here."""
        from hal.quirks import quirks_for

        return quirks_for(self.torch_version, self.name)

    @property
    def dist_backend(self) -> str:
        """Return the torch.distributed backend for this platform's tensors."""
        return self.backend

    @property
    def graph_capture(self) -> bool:
        """Tell whether work can be captured into a graph and replayed."""
        return not self.is_cpu
