"""Read every environment variable that hal looks at, here and nowhere else.

Code beats the environment. A variable that begins with `HAL_` and is not in the table warns with
the nearest name, and the report shows each setting with its origin.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
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
    Setting("HAL_PROBE_SECONDS", "5", "time limit of each hardware probe, in seconds"),
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
    if row.choices and value not in row.choices:
        raise SettingError(
            name, found=repr(value), needed="one of " + ", ".join(map(repr, row.choices))
        )
    return value


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
    text = setting("HAL_PROBE_SECONDS")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise SettingError("HAL_PROBE_SECONDS", found=repr(text), needed="seconds, 0 < n <= 3600")
    return seconds


def forced_kernels() -> dict[str, str]:
    """Return the kernels that the environment insists on, by op.

    Raises:
        SettingError: If an entry is not `op=kernel`, or an op has two.
    """
    forced: dict[str, str] = {}
    for entry in filter(None, setting("HAL_KERNEL").split(",")):
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


def uses_color(is_terminal: bool) -> bool:
    """Tell whether to color output: on a terminal, unless NO_COLOR or TERM=dumb says no."""
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _warn_unknown() -> None:
    for name in os.environ:
        if name.startswith("HAL_") and name not in SETTINGS and name not in _warned:
            _warned.add(name)
            nearest = nearest_names(name, SETTINGS, most=1)
            advice = f"did you mean {nearest[0]}?" if nearest else "known: " + ", ".join(SETTINGS)
            warnings.warn(f"unknown variable {name} is ignored; {advice}", stacklevel=3)
