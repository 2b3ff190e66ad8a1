"""Take platforms that other packages bring, and hold them to what hal's own ones must do.

The entry point of group `hal.platforms` names a `PlatformPlugin`; its name is the platform's. Its
tables have the form of `archs.toml` and `devices/*.toml` and check themselves in the same way, so
that `hal info --platform NAME:DEVICE` answers for devices that are not here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hal.errors import RegistrationError
from hal.platforms.base import FactsPlatform
from hal.platforms.machine import Machine
from hal.platforms.tables import PLATFORMS, Tables, read_tables
from hal.plugins import PLATFORMS as GROUP
from hal.plugins import (
    EntryPoint,
    Plugin,
    find_entry_points,
    forget_entry_points,
    load_object,
    run_plugin,
)
from hal.probe import ProbeResult

__all__ = ["PlatformPlugin", "PlatformPlugins", "forget_plugins", "platform_plugins"]

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "meta")


@dataclass(frozen=True)
class PlatformPlugin:
    """What a package says about the platform that it brings.

    Attributes:
        name: Name of the platform, such as `acme`: lower-case letters, digits and `_`.
        vendor: Who makes the devices, for sentences.
        platform: Class that implements it; `platform_name` and `device_type` are its own.
        detect: Returns the platform of the devices here, or why there is none. Looks only at the
            machine that it is given, and starts no device runtime.
        archs: Table of architectures, a TOML file.
        devices: Table of products, a TOML file.
        features: Names that the tables may use in `features` besides `hal`'s own.
    """

    name: str
    vendor: str
    platform: type[FactsPlatform]
    detect: Callable[[Machine], ProbeResult[FactsPlatform]]
    archs: Path
    devices: Path
    features: frozenset[str] = frozenset()

    def check(self) -> Tables:
        """Return the tables, after every rule that can be checked without a device.

        Raises:
            RegistrationError: If a name is not allowed, taken or not the platform's own.
            ValueError: If a table is at fault.
            OSError: If a table cannot be read.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]{1,31}", self.name):
            raise RegistrationError(
                f"platform {self.name!r}: needed lower-case letters, digits and '_', 2 to 32"
            )
        if self.name in PLATFORMS:
            raise RegistrationError(f"platform {self.name!r}: hal has one of that name")
        kind = self.platform
        if kind.platform_name != self.name:
            raise RegistrationError(
                f"platform {self.name!r}: its class is of platform {kind.platform_name!r}"
            )
        if kind.device_type in _DEVICE_TYPES:
            raise RegistrationError(
                f"platform {self.name!r}: torch device type {kind.device_type!r} belongs to hal's "
                "own platforms; needed the type that the vendor's torch backend registers"
            )
        return read_tables(self.name, self.archs, self.devices, self.features)


@dataclass(frozen=True)
class PlatformPlugins:
    """The platforms of other packages that are in use, and what became of every entry point."""

    loaded: Mapping[str, PlatformPlugin]
    tables: Mapping[str, Tables]
    states: tuple[Plugin, ...]


@functools.cache
def platform_plugins() -> PlatformPlugins:
    """Return the platforms that installed packages bring; never raises for one at fault."""
    loaded: dict[str, PlatformPlugin] = {}
    tables: dict[str, Tables] = {}
    states = []
    for entry in find_entry_points(GROUP):

        def load(entry: EntryPoint = entry) -> str:
            plugin = load_object(entry)
            if not isinstance(plugin, PlatformPlugin):
                raise RegistrationError(
                    f"{entry}: found {type(plugin).__name__}, needed a PlatformPlugin"
                )
            if plugin.name != entry.name:
                raise RegistrationError(f"{entry}: its platform is called {plugin.name!r}")
            if plugin.name in loaded:
                raise RegistrationError(f"{entry}: another package brings {plugin.name!r}")
            found = plugin.check()
            loaded[plugin.name], tables[plugin.name] = plugin, found
            return f"platform {plugin.name}, {len(found.devices)} devices"

        states.append(run_plugin(entry, load))
    return PlatformPlugins(MappingProxyType(loaded), MappingProxyType(tables), tuple(states))


def forget_plugins() -> None:
    """Forget the platforms of other packages, so that the next question looks again."""
    forget_entry_points()
    platform_plugins.cache_clear()
