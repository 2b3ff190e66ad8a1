"""Name one device for another process, whatever masks this one was started with.

A child inherits masks that were made for its parent. So every variable that selects or renumbers
is set or unset, and devices are named by what does not depend on the others: by UUID where the
driver has one, else by a number that no mask changes.

Source: as in `hal.platforms.visible` and `hal.platforms.affinity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hal.errors import PlatformError

if TYPE_CHECKING:
    from hal.platforms.base import DeviceRecord

__all__ = ["Changes", "cuda_changes", "rocm_changes", "rocm_selector", "xpu_changes"]

Changes = Mapping[str, str | None]
"""Variables to set, by name; None is one to unset."""

_ZE_NUMBERING = ("ZE_FLAT_DEVICE_HIERARCHY", "ZE_ENABLE_PCI_ID_DEVICE_ORDER")


def cuda_changes(record: DeviceRecord) -> Changes:
    """Return what shows a child one NVIDIA device or MIG instance."""
    if record.uuid:
        return {"CUDA_VISIBLE_DEVICES": record.uuid}
    # The driver's numbers follow addresses; CUDA's own default order does not.
    return {
        "CUDA_VISIBLE_DEVICES": str(record.physical_index),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def rocm_selector(place: int, uuids: Sequence[str | None]) -> str:
    """Return what ROCR_VISIBLE_DEVICES calls a device: its UUID if no other has it, else a number.

    Partitions of one device may share its UUID, and many consumer devices have none.
    """
    uuid = uuids[place]
    return uuid if uuid and uuids.count(uuid) == 1 else str(place)


def rocm_changes(record: DeviceRecord) -> Changes:
    """Return what shows a child one AMD device.

    ROCr filters first, from all devices, so it alone can name one whatever was inherited; what
    comes after it then has one device to choose from. HIP_ and CUDA_ hold the same, for programs
    that read either.
    """
    return {
        "ROCR_VISIBLE_DEVICES": _needed(record),
        "HIP_VISIBLE_DEVICES": "0",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def xpu_changes(record: DeviceRecord, environment: Mapping[str, str]) -> Changes:
    """Return what shows a child one Intel GPU or tile, in the numbering in force here.

    A selector counts what the mask leaves, so an inherited one would select nothing.
    """
    numbering = {name: environment.get(name) for name in _ZE_NUMBERING}
    return {
        "ZE_AFFINITY_MASK": _needed(record),
        **numbering,
        "ONEAPI_DEVICE_SELECTOR": None,
    }


def _needed(record: DeviceRecord) -> str:
    if record.selector is None:
        raise PlatformError(
            f"isolated: found no name of {record.spec.name} for the vendor's variable, needed one; "
            "detect devices anew (hal.refresh)"
        )
    return record.selector
