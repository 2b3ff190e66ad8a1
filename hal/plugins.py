"""Load what other packages add to hal, and keep their faults away from everything else.

A package adds kernels by an entry point of the group `hal.kernels`, a function that is called with
a `KernelRegistrar`, and a platform by one of the group `hal.platforms` (see
`hal.platforms.plugins`). A plugin counts as a whole: where it raises, clashes with a name that is
taken or declares a kernel that needs nothing, nothing of it is kept, and reports say why.

Source: Python Packaging User Guide, "Entry points specification" (file format, first come first
served on `sys.path`).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hal.errors import HalError, RegistrationError
from hal.needs import Need
from hal.registry import Level, Operand, find_op, restore, snapshot
from hal.software import metadata_folders

__all__ = [
    "KERNELS",
    "PLATFORMS",
    "EntryPoint",
    "KernelRegistrar",
    "Plugin",
    "find_entry_points",
    "forget_entry_points",
    "load_kernels",
    "load_object",
    "run_plugin",
]

KERNELS, PLATFORMS = "hal.kernels", "hal.platforms"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One line of a package's metadata: what it adds, and the object that stands for it."""

    group: str
    name: str
    value: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.name} = {self.value})"


@dataclass(frozen=True, slots=True)
class Plugin:
    """What became of an entry point.

    Attributes:
        entry: The entry point.
        state: `loaded`; `broken`, it raised; `refused`, hal does not take what it declares;
            `disabled`, by `HAL_PLUGINS`.
        detail: Why it was not loaded, or what it added.
    """

    entry: EntryPoint
    state: str
    detail: str


def find_entry_points(group: str, search: Iterable[str] | None = None) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, by package and name; imports nothing.

    Args:
        group: `KERNELS` or `PLATFORMS`.
        search: Folders that hold packages' metadata; None means `sys.path`.
    """
    rows = _all_entry_points(tuple(sys.path if search is None else search))
    return tuple(row for row in rows if row.group == group)


def forget_entry_points() -> None:
    """Forget what was found, so that the next question reads the metadata again."""
    _all_entry_points.cache_clear()


@functools.lru_cache(maxsize=4)
def _all_entry_points(search: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    rows: dict[str, list[EntryPoint]] = {}
    for folder, package, version in metadata_folders(search):
        if package not in rows:
            rows[package] = list(_entry_points(folder, package, version))
    return tuple(row for package in sorted(rows) for row in rows[package])


def _entry_points(folder: Path, package: str, version: str) -> Iterable[EntryPoint]:
    try:
        text = (folder / "entry_points.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if not any(f"[{group}]" in text for group in (KERNELS, PLATFORMS)):
        return  # of nearly every package: the parser below is not worth importing for them
    import configparser

    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read_string(text)
    except configparser.Error:
        return
    for group in (KERNELS, PLATFORMS):
        for name, value in sorted(parser.items(group)) if parser.has_section(group) else ():
            yield EntryPoint(group, name, value.partition("[")[0].strip(), package, version)


def load_object(entry: EntryPoint) -> Any:
    """Import and return the object that an entry point names.

    Raises:
        RegistrationError: If its value is not `module:object`.
        Exception: Whatever the import raises.
    """
    module, sign, path = entry.value.partition(":")
    if not (module and sign and path):
        raise RegistrationError(f"{entry}: found {entry.value!r}, needed 'module:object'")
    found: Any = importlib.import_module(module.strip())
    for part in path.strip().split("."):
        found = getattr(found, part)
    return found


def run_plugin(entry: EntryPoint, load: Callable[[], str]) -> Plugin:
    """Return what becomes of a plugin when `load`, which returns what it added, is run.

    A plugin can end the program that imports it (`sys.exit`); that too is only its own fault.
    """
    from hal.config import plugin_is_enabled

    if not plugin_is_enabled(entry.package, entry.name):
        return Plugin(entry, "disabled", "HAL_PLUGINS leaves it out")
    try:
        return Plugin(entry, "loaded", load())
    except HalError as error:
        return Plugin(entry, "refused", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Plugin(entry, "broken", f"{type(error).__name__}: {error}")


def load_kernels(search: Iterable[str] | None = None) -> tuple[Plugin, ...]:
    """Attach the kernels of every plugin; return what became of each.

    `hal.registry` calls this once, before an op is first looked up.
    """
    return tuple(_attach(entry) for entry in find_entry_points(KERNELS, search))


def _attach(entry: EntryPoint) -> Plugin:
    before = snapshot()

    def load() -> str:
        registrar = KernelRegistrar(entry)
        load_object(entry)(registrar)
        if not registrar.added:
            raise RegistrationError(f"{entry}: declares no kernel")
        return "kernels " + ", ".join(registrar.added)

    plugin = run_plugin(entry, load)
    if plugin.state != "loaded":
        restore(before)
    return plugin


class KernelRegistrar:
    """Attach kernels of one plugin to hal's ops.

    A plugin's kernels are of band `plugin`, the highest within a level. They serve schemes that
    the op has already, since hal must know how to quantize them.
    """

    def __init__(self, entry: EntryPoint) -> None:
        self.entry = entry
        self.added: list[str] = []

    def kernel(
        self,
        op: str,
        name: str,
        *,
        level: Level,
        signatures: Mapping[str, tuple[Operand, ...]],
        requires: tuple[Need, ...],
        **more: Any,
    ) -> Callable[[F], F]:
        """Attach the decorated binder to an op as a kernel; see `hal.registry.Op.declare`.

        Raises:
            RegistrationError: If the name is taken, no need is declared, or a scheme is unknown
                to the op.
            UnknownNameError: If there is no such op.
        """
        target = find_op(op)
        known = {scheme for kernel in target.kernels for scheme in kernel.schemes}
        if unknown := sorted(set(signatures) - known):
            raise RegistrationError(
                f"{op}/{name}: schemes {unknown}, needed some of {', '.join(sorted(known))}"
            )
        if settled := sorted({"band", "origin"} & set(more)):
            raise RegistrationError(f"{op}/{name}: {' and '.join(settled)} of a plugin are settled")
        declaration: dict[str, Any] = {"level": level, "signatures": signatures, **more}
        declaration |= {"requires": requires, "band": "plugin", "origin": self.entry.package}

        def attach(binder: F) -> F:
            target.kernel(name, **declaration)(binder)
            self.added.append(f"{op}/{name}")
            return binder

        return attach
