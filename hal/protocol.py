"""State what a platform must answer and do; `hal.platforms` holds the implementations.

A platform is small on purpose. Ops and quantization never ask it who it is: they declare needs,
and the registry compares them with `device(i)`. The identity members serve reports and plugins.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from hal.arch import Arch
    from hal.device import DeviceSpec
    from hal.formats import Support
    from hal.isolation import Isolation
    from hal.probe import Probe
    from hal.quirks import Quirk

__all__ = ["Platform"]


@runtime_checkable
class Platform(Protocol):
    """Answer capability questions about the devices of one kind, and order work on them.

    Device arguments are visible indices, the ones torch uses. None stands for whichever device,
    and is an `AmbiguousDeviceError` where the answer differs between the visible ones: nothing is
    ever answered for device 0 because no other was named. No answer initialises a device
    runtime; only the members under "actions" may.
    """

    # Identity
    @property
    def name(self) -> str:
        """Return cuda, rocm, xpu, cpu, or a plugin's name."""

    @property
    def torch_device_type(self) -> str:
        """Return the type of torch device that tensors of this platform live on."""

    @property
    def simulated(self) -> bool:
        """Tell whether the devices are rows of facts that nothing can run on."""

    @property
    def is_cuda(self) -> bool:
        """Tell whether this is NVIDIA CUDA (not ROCm, although torch calls both cuda)."""

    @property
    def is_rocm(self) -> bool:
        """Tell whether this is AMD ROCm."""

    @property
    def is_xpu(self) -> bool:
        """Tell whether this is Intel XPU."""

    @property
    def is_cpu(self) -> bool:
        """Tell whether this is the CPU."""

    # Devices
    def device_count(self) -> int:
        """Return how many devices are visible."""

    def device(self, index: int | None = None) -> DeviceSpec:
        """Return the facts about device `index`; None leaves out its place in the machine."""

    def physical_index(self, index: int | None = None) -> int:
        """Return the driver's own number of visible device `index`."""

    def isolated(self, index: int) -> Isolation:
        """Return the environment and index with which a child sees device `index` alone."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Return what was asked of the machine, how it answered and how long it took."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return plain sentences about what was found and what could not be used."""

    # Capability
    def arch(self, index: int | None = None) -> Arch:
        """Return the architecture of device `index`."""

    def compute_capability(self, index: int | None = None) -> tuple[int, int] | None:
        """Return (major, minor) on CUDA and None on every other platform."""

    def support(self, format: str, index: int | None = None, *, use: str = "math") -> Support:
        """Return the support of a number format for `use`, `storage` or `math`."""

    def supports_fp8(self, index: int | None = None) -> bool:
        """Tell whether the device multiplies 8-bit float matrices in hardware."""

    def fp8_dtype(self, index: int | None = None) -> torch.dtype:
        """Return the dtype that fp8 weights take on the device: e4m3fn or e4m3fnuz."""

    def has(self, feature: str, index: int | None = None) -> bool:
        """Tell whether the device has a feature, such as `wgmma` or `avx512`."""

    # Actions
    def synchronize(self, index: int | None = None) -> None:
        """Wait on the host for all work of a device."""

    def current_stream(self, index: int | None = None) -> Any:
        """Return the stream that work is being submitted to; None on the CPU."""

    def event(self) -> Any:
        """Return a new event; on the CPU one that is always complete."""

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Run the body after every ordered writer of `tensors` and before what reads them next.

        `stream` runs the body on another stream. On leaving, the stream that was current on
        entry waits for the body by an event, and any later `ordered` on the same device, from
        whatever stream, waits for it too: what the body wrote or allocated is safe to read
        there. No host synchronisation.
        """

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Block the host until every ordered body on the devices of `tensors` is done."""

    # Memory, versions, the rest of torch
    def memory(self, index: int | None = None) -> tuple[int | None, int | None]:
        """Return (free, total) bytes; None where nothing can tell without a runtime."""

    @property
    def pinned_memory(self) -> bool:
        """Tell whether page-locked host memory speeds up copies to the device."""

    @property
    def torch_version(self) -> str | None:
        """Return the version of the installed torch, or None."""

    @property
    def quirks(self) -> tuple[Quirk, ...]:
        """Return the peculiarities of the installed torch that matter here."""

    @property
    def dist_backend(self) -> str:
        """Return the torch.distributed backend for this platform's tensors."""

    @property
    def graph_capture(self) -> bool:
        """Tell whether work can be captured into a graph and replayed."""
