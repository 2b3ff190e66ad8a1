"""Try packages in child processes, and remember what came of it.

A kernel package can be installed and useless: built for another torch, missing a symbol, or ending
the program that imports it. Versions tell some of that and an import tells the rest, so it is done
where it can hurt nobody, when `hal doctor` or `hal info --deep` asks. What failed is kept in a
file, so that every later process knows it without importing anything, for as long as the package,
torch and Python are the ones that were tried.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["HEALTH_FILE", "REMEMBERED", "Health", "known_health", "try_packages"]

HEALTH_FILE = "health.json"
"""Name of the file in the cache folder."""

REMEMBERED = "(seen by hal doctor; run it again after mending)"
"""How the reason ends of a package that failed in an earlier process."""

_FORM = 1
_AT_ONCE = 2
_IMPORT = """
import importlib
from importlib.util import find_spec

names = arguments[0].split("|")
importlib.import_module(next(filter(find_spec, names), names[0]))
"""


@dataclass(frozen=True, slots=True)
class Health:
    """What came of importing a package.

    Attributes:
        package: Distribution name.
        version: Version that was tried.
        failure: Last line of the error, the signal or the time limit; empty where it works.
        seconds: How long it took.
    """

    package: str
    version: str
    failure: str
    seconds: float


def try_packages(
    packages: Mapping[str, tuple[str, str]],
    torch: str | None,
    *,
    seconds: float,
    done: Callable[[Health], None] = lambda health: None,
) -> tuple[Health, ...]:
    """Import packages in children, two at a time, and keep what came of it.

    Args:
        packages: (version, name to import) by distribution name. Of several names with a `|`
            between the first is imported that is there.
        torch: Version of the installed torch.
        seconds: Time limit of each.
        done: Called after each, for a progress display.
    """
    from hal.children import run_in_child

    def ask(package: str) -> Health:
        version, module = packages[package]
        result = run_in_child(_IMPORT, module, seconds=seconds)
        health = Health(package, version, result.failure, round(result.seconds, 2))
        done(health)
        return health

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tried = tuple(pool.map(ask, sorted(packages)))
    _keep(tried, torch)
    return tried


def known_health(packages: Mapping[str, str], torch: str | None) -> dict[str, str]:
    """Return why packages that were tried before cannot be used, by name.

    Only what was tried in the same version, with the same torch and Python, counts. A file that
    cannot be read or makes no sense counts as none.
    """
    return {
        health.package: f"{health.failure} {REMEMBERED}"
        for health in _read(torch)
        if health.failure and packages.get(health.package) == health.version
    }


def _stamp(torch: str | None) -> dict[str, Any]:
    return {"form": _FORM, "python": sys.version, "prefix": sys.prefix, "torch": torch}


def _read(torch: str | None) -> tuple[Health, ...]:
    from hal.config import cache_folder

    try:
        with (cache_folder() / HEALTH_FILE).open(encoding="utf-8") as file:
            kept = json.load(file)
        if kept["stamp"] != _stamp(torch):
            return ()
        rows = [Health(**row) for row in kept["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    texts = [(row.package, row.version, row.failure) for row in rows]
    return tuple(rows) if all(isinstance(t, str) for row in texts for t in row) else ()


def _keep(tried: Iterable[Health], torch: str | None) -> None:
    """Write the file whole or not at all; where it cannot be written, nothing is remembered."""
    from hal.config import cache_folder

    rows = {row.package: row for row in (*_read(torch), *tried)}
    data = {"stamp": _stamp(torch), "rows": [asdict(row) for row in rows.values()]}
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=HEALTH_FILE, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file)
            os.replace(temporary, folder / HEALTH_FILE)
        except OSError:
            os.unlink(temporary)
