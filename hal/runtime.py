"""Say which platform is in use: found here, asked for, or simulated.

The order is: what code asks for (`use_platform`), what the environment asks for (`HAL_PLATFORM`),
what detection found. Detection runs once, when it is first needed, and `refresh` repeats it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hal.device import DeviceSpec, Software
from hal.errors import DTypeError, PlatformError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from hal.platforms.detection import Detection
    from hal.protocol import Platform

__all__ = [
    "current_platform",
    "platform",
    "platform_for_device_type",
    "platform_of",
    "refresh",
    "resolve_platform",
    "use_platform",
]

_override: ContextVar[Platform | None] = ContextVar("hal_platform", default=None)
_lock = threading.RLock()


def current_platform() -> Platform:
    """Return the platform in use: of `use_platform`, else of `HAL_PLATFORM`, else the one found."""
    return _asked_for() or _detection().current


def platform(name: str, *, software: Software | None = None) -> Platform:
    """Return the platform that `name` describes.

    Args:
        name: `cuda`, `rocm`, `xpu` or `cpu` for what is here; `cuda:h200`, `rocm:gfx942`,
            `xpu:b580`, `cpu:avx512` for a simulated device, by product, alias or architecture.
            Case does not matter.
        software: Versions to assume around a simulated device; None assumes those found here
            (see `DeviceSpec.origin`).

    Raises:
        UnknownNameError: If there is no such platform or device; carries the nearest names.
        PlatformError: If the platform is known and not here.
    """
    if software is None:
        with _lock:
            return _named(name.strip().lower())
    head, colon, key = name.strip().lower().partition(":")
    if not colon:
        raise PlatformError(
            f"{name}: software can be assumed for a simulated device only, such as "
            + ", ".join(_examples(head)[:3])
        )
    return _simulated(head, key, software, "table; software as given")


@contextmanager
def use_platform(choice: Platform | DeviceSpec | str) -> Iterator[Platform]:
    """Use a platform inside the block, in this thread and task only.

    Args:
        choice: A platform, the facts of a device to simulate, or a name for `platform`.

    Raises:
        UnknownNameError: If the name is unknown.
        PlatformError: If the platform is not here.
    """
    chosen = resolve_platform(choice)
    token = _override.set(chosen)
    try:
        yield chosen
    finally:
        _override.reset(token)


def refresh() -> None:
    """Forget what was found; the next question looks at the machine and its software again."""
    from hal.platforms.plugins import forget_plugins
    from hal.software import forget_software

    with _lock:
        forget_software()
        forget_plugins()
        _detection_once.cache_clear()
        _named.cache_clear()


def resolve_platform(choice: Platform | DeviceSpec | str | None = None) -> Platform:
    """Return the platform that `choice` stands for; None means the current one.

    Raises:
        UnknownNameError: If a name is unknown.
        PlatformError: If the platform is not here.
        DTypeError: If `choice` is none of these.
    """
    if choice is None:
        return current_platform()
    if isinstance(choice, str):
        return platform(choice)
    if isinstance(choice, DeviceSpec):
        return _class_of(choice.platform).simulate(choice)
    if not hasattr(choice, "ordered") or not hasattr(choice, "device"):
        raise DTypeError(
            "platform", found=type(choice).__name__, needed="a Platform, a DeviceSpec or a name"
        )
    return choice


def platform_of(
    device: torch.device, choice: Platform | DeviceSpec | str | None = None
) -> Platform:
    """Return the platform that serves tensors on `device`.

    What `choice` says comes first. A platform asked for by `use_platform` or `HAL_PLATFORM` serves
    tensors of its own device type, and where it is simulated all tensors. Otherwise the type of
    the device decides: a CPU tensor on a machine with a GPU belongs to the CPU.

    Raises:
        PlatformError: If nothing serves that type of device.
    """
    if choice is not None:
        return resolve_platform(choice)
    asked = _asked_for()
    if asked is not None and (asked.simulated or device.type in ("meta", asked.torch_device_type)):
        return asked
    if device.type == "meta":
        return _detection().current
    return platform_for_device_type(device.type)


def platform_for_device_type(device_type: str) -> Platform:
    """Return the platform found here whose tensors are of torch's `device_type`.

    Raises:
        PlatformError: If there is none.
    """
    detection = _detection()
    for found in detection.present.values():
        if found.torch_device_type == device_type:
            return found
    from hal.platforms.live import find_live

    # A tensor lies there, so torch's runtime is up and may be asked, although no probe found it.
    live = find_live(device_type, detection.software)
    if live is not None:
        return live
    raise PlatformError(
        f"no platform serves tensors on {device_type!r}; here: {', '.join(detection.present)}"
        + "".join(f"; {note}" for note in detection.current.notes)
    )


def _asked_for() -> Platform | None:
    """Return the platform that code or the environment asks for, or None."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    from hal.config import setting

    name = setting("HAL_PLATFORM").strip().lower()
    if not name:
        return None
    with _lock:
        return _named(name)


def _detection() -> Detection:
    with _lock:
        return _detection_once()


@functools.cache
def _detection_once() -> Detection:
    from hal.platforms.detection import detect
    from hal.platforms.machine import Machine

    return detect(Machine.here())


@functools.lru_cache(maxsize=64)
def _named(name: str) -> Platform:
    """Return the platform called `name`, which is in lower case; called under the lock."""
    from hal.software import assumed_software, find_software

    head, colon, key = name.partition(":")
    if colon:
        software, origin = assumed_software(head, find_software())
        return _simulated(head, key, software, origin)
    found = _detection().present.get(head)
    if found is not None:
        return found
    from hal.platforms.tables import device_names, platform_names

    if head not in platform_names():
        raise UnknownNameError("platform", name, (*platform_names(), *device_names()))
    raise PlatformError(
        f"{head} cannot be used here: {_detection().absent[head]}; devices that can be simulated: "
        + ", ".join(_examples(head))
    )


def _simulated(head: str, key: str, software: Software, origin: str) -> Platform:
    from hal.platforms.tables import device_spec

    spec = device_spec(head, key, software).replace(origin=origin)
    return _class_of(head).simulate(spec)


def _class_of(name: str) -> Any:
    """Return the class that implements the platform `name`."""
    import importlib

    from hal.platforms.plugins import platform_plugins
    from hal.platforms.tables import PLATFORMS, platform_names

    if name in PLATFORMS:
        return importlib.import_module(f"hal.platforms.{name}").PLATFORM
    plugin = platform_plugins().loaded.get(name)
    if plugin is None:
        raise UnknownNameError("platform", name, platform_names())
    return plugin.platform


def _examples(head: str) -> list[str]:
    from hal.platforms.tables import device_names

    names = list(device_names())
    mine = [name for name in names if name.startswith(head + ":")]
    return mine or names
