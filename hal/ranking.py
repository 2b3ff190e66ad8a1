"""Order the kernels that can run: by measurement, level, band and name.

A kernel that a measurement on the same architecture shows to be faster than kernels of a higher
level moves up to that level; then levels decide, then measured times, then bands, then names.
Within a level, kernels for which weights must be padded come last. A claimed kernel, which hal
never ran with its real library, comes after all others but the reference until it is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any

from hal.kernel import BANDS, Kernel, Level, Measurement
from hal.need import Context, Failure
from hal.padding import Padded

__all__ = ["ON_AVERAGE", "Candidate", "rank"]

ON_AVERAGE = "x the best"
"""Unit of the geometric mean that stands for several measured times."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel, with everything it lacks, and its place among those that can run.

    Attributes:
        kernel: The declaration.
        failures: All requirements not met; empty means that it can run.
        rank: Place among those that can run, from 0; None where it cannot.
        measurement: The measured time that ordered it, if any.
        serves: Whether it is made for the scheme at all.
        padded: Sizes of weights that are padded when they are bound, because it can run so alone.
    """

    kernel: Kernel
    failures: tuple[Failure, ...]
    rank: int | None = None
    measurement: Measurement | None = None
    serves: bool = True
    padded: tuple[Padded, ...] = ()

    @property
    def can_run(self) -> bool:
        """Tell whether every requirement is met."""
        return not self.failures

    @property
    def claimed(self) -> bool:
        """Tell whether nobody ran it: a claimed kernel without a measured time."""
        return self.kernel.claimed and self.measurement is None


def rank(
    candidates: list[Candidate], measured: tuple[Measurement, ...], context: Context
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the candidates that can run, best first with ranks, and the others by name."""
    able = [candidate for candidate in candidates if candidate.can_run]
    unable = [candidate for candidate in candidates if not candidate.can_run]
    times = _nearest(measured, context, {candidate.kernel.name for candidate in able})
    able = [replace(c, measurement=times.get(c.kernel.name)) for c in able]

    def key(candidate: Candidate) -> tuple[Any, ...]:
        kernel, mine = candidate.kernel, candidate.measurement
        beaten = [
            other.kernel.level
            for other in able
            if mine and other.measurement and mine.time < other.measurement.time
        ]
        level = max([kernel.level, *beaten])
        time = mine.time if mine else math.inf
        last = 2 if level is Level.REFERENCE else int(candidate.claimed)
        padded = bool(candidate.padded)
        return (last, -level, padded, mine is None, time, -BANDS.index(kernel.band), kernel.name)

    # Not able.sort(): a list is empty while it is being sorted, and `key` looks at all of them.
    in_order = sorted(able, key=key)
    able = [replace(candidate, rank=place) for place, candidate in enumerate(in_order)]
    unable.sort(key=lambda candidate: (not candidate.serves, candidate.kernel.name))
    return able, unable


def _nearest(
    measured: tuple[Measurement, ...], context: Context, names: set[str]
) -> dict[str, Measurement]:
    """Return the measured rows of the problem most like this one, by kernel, all of one run."""
    groups: dict[tuple[Any, ...], dict[str, Measurement]] = {}
    for row in measured:
        same = row.scheme == context.scheme and row.arch == context.spec.arch.name
        if same and row.kernel in names:
            groups.setdefault((row.sizes, row.unit, row.source), {})[row.kernel] = row

    def distance(run: tuple[Any, ...]) -> tuple[Any, ...]:
        total = 0.0
        for name, size in run[0]:
            mine = context.problem.get(name)
            if mine is not None:
                total += abs(math.log2(max(mine, 1)) - math.log2(max(size, 1)))
        return total, -len(groups[run]), run

    if not groups:
        return {}
    sizes, unit, source = min(groups, key=distance)
    known = tuple(pair for pair in sizes if context.problem.get(pair[0]) is not None)
    alike = [
        found
        for run, found in groups.items()
        if run[1:] == (unit, source) and set(known) <= set(run[0])
    ]
    return alike[0] if len(alike) == 1 else _on_average(alike, known)


def _on_average(
    runs: list[dict[str, Measurement]], known: tuple[tuple[str, int], ...]
) -> dict[str, Measurement]:
    """Return how far each kernel is from the best of a run, as the geometric mean over runs.

    A size that was not given may be any of those measured; runs that lack a kernel say nothing.
    """
    most = max(map(len, runs))
    runs = [run for run in runs if len(run) == most]
    names = set.intersection(*({*run} for run in runs))
    best = geometric_mean([min(row.time for row in run.values()) for run in runs])
    return {
        name: replace(
            runs[0][name],
            sizes=known,
            time=round(geometric_mean([run[name].time for run in runs]) / best, 2),
            unit=ON_AVERAGE,
        )
        for name in sorted(names)
    }
