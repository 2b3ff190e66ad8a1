"""Read every environment variable that hal looks at, here and nowhere else.

Code beats the environment. A variable that begins with `HAL_` and is not in the table warns with
the nearest name, and the report shows each setting with its origin.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hal.errors import SettingError, nearest_names

__all__ = [
    "SETTINGS",
    "Setting",
    "SettingValue",
    "environment",
    "setting",
    "settings",
    "uses_color",
]

logger = logging.getLogger("hal")


@dataclass(frozen=True, slots=True)
class Setting:
    """One variable: its name, default and meaning."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SettingValue:
    """The value of a setting and where it came from, `default` or `environment`.

    Of a value that cannot be used the origin says so: reports show it, and ops refuse it.
    """

    setting: Setting
    value: str
    origin: str


_ROWS = (
    Setting("HAL_PLATFORM", "", "platform to use instead of the detected one, such as rocm:gfx942"),
    Setting("HAL_KERNEL", "", "kernels to insist on, such as linear=torch_scaled_mm,fused_moe=..."),
    Setting("HAL_CHECK", "0", "check ids and scales on every call, which synchronises", ("0", "1")),
    Setting("HAL_PLUGINS", "all", "plugins to load: all, none, or packages such as acme-hal"),
    Setting("HAL_PROBE_SECONDS", "5", "time limit of each hardware probe, in seconds"),
    Setting("HAL_IMPORT_SECONDS", "60", "time limit of each import that hal doctor tries"),
    Setting("HAL_CACHE", "", "folder for what hal remembers; empty means the user's cache folder"),
    Setting("HAL_LOG", "", "level of the logger hal", ("", "debug", "info", "warning", "error")),
)

SETTINGS: Mapping[str, Setting] = MappingProxyType({row.name: row for row in _ROWS})
"""Every setting by variable name."""

_warned: set[str] = set()


def environment() -> Mapping[str, str]:
    """Return a snapshot of the environment, for probes that follow vendors' variables.

    Taken whenever devices are looked for, so this is where unknown variables are warned about:
    single settings are asked for at every selection.
    """
    _warn_unknown()
    return MappingProxyType(dict(os.environ))


def setting(name: str) -> str:
    """Return the value of one setting.

    Raises:
        SettingError: If the value is not one of the setting's choices.
    """
    row = SETTINGS[name]
    value = os.environ.get(name, row.default)
    _check_choice(row, value)
    return value


def _check_choice(row: Setting, value: str) -> None:
    if row.choices and value not in row.choices:
        raise SettingError(
            row.name, found=repr(value), needed="one of " + ", ".join(map(repr, row.choices))
        )


def settings() -> tuple[SettingValue, ...]:
    """Return every setting with its value and origin, in the order of the table."""
    _warn_unknown()
    return tuple(
        SettingValue(
            row,
            os.environ.get(row.name, row.default),
            _origin(row),
        )
        for row in SETTINGS.values()
    )


def _origin(row: Setting) -> str:
    value = os.environ.get(row.name)
    if value is None:
        return "default"
    if row.choices and value not in row.choices:
        return "environment; refused, needed " + " or ".join(map(repr, row.choices))
    return "environment"


def probe_seconds() -> float:
    """Return the time limit of a probe.

    Raises:
        SettingError: If the variable is not a positive number.
    """
    return _seconds("HAL_PROBE_SECONDS")


def import_seconds() -> float:
    """Return the time limit of an import that is tried in a child process.

    Raises:
        SettingError: If the variable is not a positive number.
    """
    return _seconds("HAL_IMPORT_SECONDS")


def _seconds(name: str, text: str | None = None) -> float:
    text = setting(name) if text is None else text
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise SettingError(name, found=repr(text), needed="seconds, 0 < n <= 3600")
    return seconds


def cache_folder() -> Path:
    """Return the folder for what hal remembers; it need not exist.

    Source: XDG Base Directory Specification (XDG_CACHE_HOME).
    """
    if chosen := setting("HAL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "hal"


def child_environment(search: Iterable[str]) -> dict[str, str]:
    """Return this process's environment for a child that shall find the same packages.

    The child does not look into the folder that it is started in (PYTHONSAFEPATH, Python 3.11).
    """
    path = os.pathsep.join(os.path.abspath(folder) for folder in search if folder)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def plugin_is_enabled(package: str, name: str) -> bool:
    """Tell whether to load the plugin `name` of `package`."""
    wanted = plugin_names(setting("HAL_PLUGINS"))
    return "all" in wanted or not wanted.isdisjoint(plugin_names(f"{package},{name}"))


def plugin_names(text: str) -> frozenset[str]:
    """Return the names in a list such as HAL_PLUGINS, in the form in which they are compared."""
    return frozenset(map(_plain, filter(None, text.split(","))))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def forced_kernels() -> dict[str, str]:
    """Return the kernels that the environment insists on, by op.

    Raises:
        SettingError: If an entry is not `op=kernel`, or an op has two.
    """
    return _kernels(setting("HAL_KERNEL"))


def _kernels(text: str) -> dict[str, str]:
    forced: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        op, sign, kernel = (part.strip() for part in entry.partition("="))
        if not (op and sign and kernel):
            raise SettingError(
                "HAL_KERNEL", found=repr(entry), needed="op=kernel", cure="separate by commas"
            )
        if forced.setdefault(op, kernel) != kernel:
            raise SettingError(
                "HAL_KERNEL", found=f"{forced[op]!r} and {kernel!r} for {op}", needed="one kernel"
            )
    return forced


def settings_problems(environment: Mapping[str, str]) -> Iterator[SettingError]:
    """Yield why values of known settings cannot be used, one error a setting.

    `HAL_PLATFORM` is left to whoever knows the platforms.
    """
    for row in SETTINGS.values():
        value = environment.get(row.name)
        if value is None:
            continue
        try:
            if row.name == "HAL_KERNEL":
                _kernels(value)
            elif row.name.endswith("_SECONDS"):
                _seconds(row.name, value)
            else:
                _check_choice(row, value)
        except SettingError as error:
            yield error


def unknown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield every `HAL_*` variable that is no setting, with the nearest one that is."""
    for name in sorted(environment):
        if name.startswith("HAL_") and name not in SETTINGS:
            yield name, next(iter(nearest_names(name, SETTINGS, most=1)), None)


def uses_color(is_terminal: bool) -> bool:
    """Tell whether to color output: on a terminal, unless NO_COLOR or TERM=dumb says no."""
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _warn_unknown() -> None:
    for name, nearest in unknown_variables(os.environ):
        if name not in _warned:
            _warned.add(name)
            advice = f"did you mean {nearest}?" if nearest else "known: " + ", ".join(SETTINGS)
            warnings.warn(f"unknown variable {name} is ignored; {advice}", stacklevel=3)
