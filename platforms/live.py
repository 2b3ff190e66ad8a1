"""Describe the devices of a runtime that is already up, by asking torch.

This is the last resort, for machines where no probe finds the device that a tensor lies on: WSL,
older Jetsons, containers without a management library. It asks only what torch has initialised
before, so it changes nothing about the process.
"""

from __future__ import annotations

import sys
from typing import Any

from hal.arch import Arch, CudaArch, GfxArch, XeArch
from hal.device import DeviceSpec, Software
from hal.findings import Finding
from hal.platforms.base import DeviceRecord, FactsPlatform
from hal.platforms.drm import generation
from hal.platforms.products import match_name
from hal.platforms.streams import stream_ordering
from hal.platforms.tables import arch_facts, make_spec

__all__ = ["find_live"]


def find_live(device_type: str, software: Software) -> FactsPlatform | None:
    """Return the platform of torch's devices of that type; None unless torch runs them already."""
    torch = sys.modules.get("torch")
    module = getattr(torch, device_type, None) if device_type in ("cuda", "xpu") else None
    if module is None or not module.is_initialized():
        return None
    hip = getattr(torch.version, "hip", None) if torch else None
    name = "xpu" if device_type == "xpu" else "rocm" if hip else "cuda"
    records = [
        DeviceRecord(live_spec(name, module.get_device_properties(index), software), index)
        for index in range(module.device_count())
    ]
    import importlib

    kind = importlib.import_module(f"hal.platforms.{name}").PLATFORM
    sentence = f"no probe found the {name} devices; torch, which was using them, described them"
    notes = [Finding("live", sentence)]
    found: FactsPlatform = kind(records, stream_ordering(device_type), notes=notes)
    return found


def live_spec(platform: str, properties: Any, software: Software) -> DeviceSpec:
    """Return the facts in what `torch.cuda` or `torch.xpu` calls device properties."""
    memory = int(properties.total_memory)
    arch: Arch
    if platform == "cuda":
        arch = CudaArch(properties.major, properties.minor)
        units = properties.multi_processor_count
    elif platform == "rocm":
        arch = GfxArch(properties.gcnArchName.partition(":")[0])
        # HIP counts work-group processors on RDNA, two compute units each.
        pairs = arch.family in ("gfx10", "gfx11", "gfx12")
        units = properties.multi_processor_count * (2 if pairs else 1)
    else:
        arch = XeArch(generation(getattr(properties, "device_id", 0)) or "unknown")
        units = properties.max_compute_units
    row = match_name(platform, properties.name, memory_bytes=memory)
    if row is not None and row.arch != arch:
        row = None
    return make_spec(
        arch_facts(arch),
        row,
        software=software,
        name=row.name if row else properties.name,
        memory_bytes=memory,
        compute_units=units,
        origin="torch",
    )
