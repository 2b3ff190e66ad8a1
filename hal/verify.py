"""Run every kernel that can run on this machine against its reference, and keep what came of it.

Trials run in a child process (`hal.verify_worker`), so that a kernel that ends the process, hangs
or leaves a device broken costs its own trial: the next child goes on after it. Nothing here imports
torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hal.errors import HalError, UnknownNameError
from hal.evidence import INTERPRETER, Row
from hal.progress import Progress
from hal.registry import find_op, op_names
from hal.sources import source_hash
from hal.verify_child import Worker

__all__ = ["Question", "Trials", "VerifyError", "rows_of", "run_trials"]

START_SECONDS = 300.0
"""Longest time until a child has imported torch and listed the trials."""
_MOST_FAULTS = 400


class VerifyError(HalError, RuntimeError):
    """Report that no kernel could be tried at all."""


@dataclass(frozen=True)
class Question:
    """What to try; an empty tuple stands for all.

    Attributes:
        ops: Names of ops.
        schemes: Names of schemes.
        kernels: Names of kernels.
        on: Platforms of this machine, such as `cpu`.
        interpreted: Whether to run Triton kernels in the interpreter instead, on small problems.
        seconds: Longest time of one trial.
    """

    ops: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    interpreted: bool = False
    seconds: float = 120.0

    def to_dict(self) -> dict[str, Any]:
        """Return what a worker is told, as plain data."""
        return {
            "ops": self.ops,
            "schemes": self.schemes,
            "kernels": self.kernels,
            "on": self.on,
            "interpreted": self.interpreted,
        }

    def check(self) -> None:
        """Raise unless every name is known.

        Raises:
            UnknownNameError: For the first that is not.
        """
        kernels = [kernel for op in op_names() for kernel in find_op(op).kernels]
        known = {
            "op": op_names(),
            "scheme": sorted({scheme for kernel in kernels for scheme in kernel.schemes}),
            "kernel": sorted({kernel.name for kernel in kernels}),
        }
        given = {"op": self.ops, "scheme": self.schemes, "kernel": self.kernels}
        for kind, names in given.items():
            for name in names:
                if name not in known[kind]:
                    raise UnknownNameError(kind, name, known[kind])


@dataclass(frozen=True, slots=True)
class Trial:
    """One kernel under one scheme on one problem of one device."""

    op: str
    kernel: str
    scheme: str
    case: str
    platform: str
    arch: str
    device: str


@dataclass
class Trials:
    """What was tried, and what came of it.

    Attributes:
        software: Versions of torch and Triton.
        trials: Every trial, in order.
        results: What came of each, in the same order.
        interpreted: Whether Triton interpreted.
        seconds: How long all took.
    """

    software: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    interpreted: bool = False
    seconds: float = 0.0

    def __iter__(self) -> Iterator[tuple[Trial, dict[str, Any]]]:
        return iter(zip(self.trials, self.results, strict=True))

    @property
    def failed(self) -> list[tuple[Trial, dict[str, Any]]]:
        """Return the trials that found a fault."""
        return [(trial, result) for trial, result in self if result.get("faults")]


def run_trials(question: Question, progress: Progress | None = None) -> Trials:
    """Try what is asked for; return what came of it.

    Raises:
        UnknownNameError: For an unknown op, scheme or kernel.
        VerifyError: If no child comes as far as to list the trials, or there are none.
    """
    question.check()
    start = time.perf_counter()
    trials = Trials(interpreted=question.interpreted)
    while not trials.trials or len(trials.results) < len(trials.trials):
        with Worker(question.to_dict(), len(trials.results)) as child:
            _follow(child, trials, question, progress)
        if not trials.trials:
            raise VerifyError("verify: no kernel of those asked for can run here")
    if progress is not None:
        progress(len(trials.results), len(trials.trials), "")
    trials.seconds = time.perf_counter() - start
    return trials


def _follow(child: Worker, trials: Trials, question: Question, progress: Progress | None) -> None:
    """Take a child's answers until it ends or takes too long; note what ended it."""
    listed = child.answer(START_SECONDS)
    if listed is None:
        raise VerifyError(f"verify: no trial can be started: {child.end(START_SECONDS)}")
    if not trials.trials:
        trials.software = listed["software"]
        trials.trials = [Trial(*told) for told in listed["trials"]]
    while len(trials.results) < len(trials.trials):
        trial = trials.trials[len(trials.results)]
        if progress is not None:
            name = f"{trial.op}/{trial.kernel} {trial.scheme}"
            progress(len(trials.results), len(trials.trials), name)
        result = child.answer(question.seconds)
        if result is None:
            if child.status() in (0, 3):  # it said that it would end
                return
            trials.results.append({"faults": [child.end(question.seconds)]})
            return
        trials.results.append(result)


def rows_of(trials: Trials, date: str) -> list[Row]:
    """Return the evidence that trials give: a row for each kernel, scheme and device.

    Trials of problems that a kernel does not take say nothing; a kernel that took none has no row.
    """
    groups: dict[tuple[str, ...], list[tuple[Trial, dict[str, Any]]]] = {}
    for trial, result in trials:
        if "skipped" not in result:
            key = (trial.op, trial.kernel, trial.scheme, trial.platform, trial.arch, trial.device)
            groups.setdefault(key, []).append((trial, result))
    return [_row(key, found, trials, date) for key, found in groups.items()]


def _row(
    key: tuple[str, ...],
    found: Iterable[tuple[Trial, Mapping[str, Any]]],
    trials: Trials,
    date: str,
) -> Row:
    op, kernel, scheme, platform, arch, device = key
    found = list(found)
    faults = [f"{trial.case}: {fault}" for trial, r in found for fault in r.get("faults", ())]
    compared = [r for _, r in found if r.get("error") is not None and r.get("allowed")]
    worst = max(compared, key=lambda r: r["error"] / r["allowed"], default=None)
    at = (INTERPRETER, INTERPRETER, "") if trials.interpreted else (platform, arch, device)
    return Row(
        op=op,
        kernel=kernel,
        scheme=scheme,
        platform=at[0],
        arch=at[1],
        device=at[2].replace("\n", " "),
        level="interpreted" if trials.interpreted else "ran",
        source=source_hash(find_op(op).find(kernel).entry),
        torch=trials.software["torch"],
        triton=trials.software["triton"] if kernel.startswith("triton") else "",
        passed=not faults,
        fault="; ".join(faults)[:_MOST_FAULTS],
        cases=len(found),
        error=None if worst is None else float(f"{worst['error']:.2g}"),
        allowed=None if worst is None else worst["allowed"],
        date=date,
    )
