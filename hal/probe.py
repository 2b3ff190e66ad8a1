"""Ask a machine about itself without being hurt by the answer.

Every probe returns `Found`, `Absent` or `Broken`, never raises, and never takes longer than its
time limit: a library that hangs costs a few seconds and one line of the report.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Absent", "Broken", "Found", "Probe", "ProbeResult", "run_probe"]

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a probe found."""

    value: T


@dataclass(frozen=True)
class Absent:
    """Nothing is there, for an ordinary reason.

    Attributes:
        reason: Why, in words that follow a comma.
        cure: What brings it back, where something does.
    """

    reason: str
    cure: str = ""


@dataclass(frozen=True)
class Broken:
    """Something is there and does not work."""

    reason: str


ProbeResult = Found[T] | Absent | Broken


@dataclass(frozen=True)
class Probe:
    """One finished probe, for the report.

    Attributes:
        name: What was asked, such as `nvml`.
        outcome: found, absent or broken.
        detail: What was found, or why not.
        milliseconds: How long it took.
    """

    name: str
    outcome: str
    detail: str
    milliseconds: float


def run_probe(
    name: str, ask: Callable[[], ProbeResult[T]], *, seconds: float, log: list[Probe]
) -> ProbeResult[T]:
    """Run `ask` within `seconds`, append what happened to `log`, and return the result.

    The call runs on a daemon thread, so a library that never returns cannot hold up the program
    or its exit.
    """
    results: list[tuple[ProbeResult[T], Probe]] = []
    start = time.perf_counter()

    def finish(result: ProbeResult[T]) -> tuple[ProbeResult[T], Probe]:
        outcome = type(result).__name__.lower()
        detail = _summary(result.value) if isinstance(result, Found) else result.reason
        return result, Probe(name, outcome, detail, (time.perf_counter() - start) * 1e3)

    def target() -> None:
        try:
            results.append(finish(ask()))
        except BaseException as error:  # some libraries end a program that they dislike
            results.append(finish(Broken(f"{type(error).__name__}: {error}")))

    thread = threading.Thread(target=target, name=f"hal-probe-{name}", daemon=True)
    try:
        thread.start()
        thread.join(seconds)
        result, entry = results[0] if results else finish(Broken(f"no answer within {seconds:g} s"))
    except RuntimeError as error:  # no thread can be started
        result, entry = finish(Broken(str(error)))
    log.append(entry)
    return result


def _summary(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{len(value)} device{'' if len(value) == 1 else 's'}"
    return str(value)
