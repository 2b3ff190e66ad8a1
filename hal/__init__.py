"""Run quantized and mixture-of-experts ops on whatever device is here, and say why.

`import hal` imports nothing else. Names resolve when they are first used, so neither torch nor
Triton nor any vendor library is loaded before something needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hal import errors, integrations, nn, ops, platforms, quant, testing, torch_compat
    from hal.arch import Arch, CpuArch, CudaArch, GfxArch, XeArch
    from hal.compiles import no_compiles
    from hal.device import DeviceSpec, Link, Software
    from hal.errors import HalError, NoKernelError
    from hal.findings import Finding, Severity
    from hal.formats import FORMATS, Format, Support
    from hal.isolation import Isolation
    from hal.needs import Needs
    from hal.ops.shapes import record_shapes
    from hal.protocol import Platform
    from hal.quant import QTensor, Scheme
    from hal.registry import Level
    from hal.runtime import current_platform, platform, refresh, use_platform
    from hal.selection import Selection, select

_HOME = {
    "Arch": "hal.arch",
    "CpuArch": "hal.arch",
    "CudaArch": "hal.arch",
    "DeviceSpec": "hal.device",
    "FORMATS": "hal.formats",
    "Finding": "hal.findings",
    "Format": "hal.formats",
    "GfxArch": "hal.arch",
    "HalError": "hal.errors",
    "Isolation": "hal.isolation",
    "Level": "hal.registry",
    "Link": "hal.device",
    "Needs": "hal.needs",
    "NoKernelError": "hal.errors",
    "Platform": "hal.protocol",
    "QTensor": "hal.quant",
    "Scheme": "hal.quant",
    "Selection": "hal.selection",
    "Severity": "hal.findings",
    "Software": "hal.device",
    "Support": "hal.formats",
    "XeArch": "hal.arch",
    "current_platform": "hal.runtime",
    "no_compiles": "hal.compiles",
    "platform": "hal.runtime",
    "record_shapes": "hal.ops.shapes",
    "refresh": "hal.runtime",
    "select": "hal.selection",
    "use_platform": "hal.runtime",
}
_MODULES = ("errors", "integrations", "nn", "ops", "platforms", "quant", "testing", "torch_compat")

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hal.{name}")
    else:
        raise AttributeError(f"module 'hal' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
