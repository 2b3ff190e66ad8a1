"""Try kernels in a process of their own, one problem after the other, and print what came of each.

    python -m hal.verify_worker '{"ops": [], ...}' FIRST

The first answer lists all trials, each further one is the result of one of them, from number FIRST
on. A device that has failed stays failed for its process: after an error that is none of hal's the
worker ends, and whoever started it starts another one for the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.device import DeviceSpec
from hal.errors import ForcedKernelError, HalError
from hal.needs import Code, Needs
from hal.registry import Kernel, find_op, op_names
from hal.selection import Options, choose
from hal.triton_interpreter import prepare_once_per_launch

if TYPE_CHECKING:
    from hal.ops.cases import Case

__all__ = ["MARK", "main"]

MARK = "\x1ehal "
"""Stands before every answer: libraries print what they like."""
_MOST_TEXT = 400
_INTERPRETED_FOR = ("cuda:h100", "rocm:mi355x", "cuda:b200")
"""Devices as which Triton kernels are interpreted: the first on which one can run."""


@dataclass(frozen=True)
class _Place:
    """Where kernels are tried: facts of a device, and the platform that serves it."""

    spec: DeviceSpec
    platform: Any
    torch_device: str


@dataclass(frozen=True)
class _Job:
    kernel: Kernel
    scheme: str
    case: Case
    place: _Place


def main(argv: list[str]) -> int:
    """Run the trials that are asked for."""
    wanted, first = json.loads(argv[0]), int(argv[1])
    interpreted = bool(wanted["interpreted"])
    if interpreted:
        prepare_once_per_launch()
    places = list(_interpreting() if interpreted else _here(wanted["on"]))
    jobs = list(_jobs(wanted, places, interpreted))
    _answer({"trials": [_told(job) for job in jobs], "software": _software(places)})
    for number in range(first, len(jobs)):
        result, broken = _run(jobs[number], interpreted)
        _answer({"number": number, **result})
        if broken:
            return 3
    return 0


def _run(job: _Job, interpreted: bool) -> tuple[dict[str, Any], bool]:
    """Return what came of a trial, and whether the process should end."""
    import torch

    from hal.ops.cases import Trial

    device = torch.device(job.place.torch_device)
    platform = job.place.platform if interpreted else None
    start = time.perf_counter()
    try:
        found = job.case.run(
            Trial(job.kernel.name, job.scheme, device, platform, interpreted=interpreted)
        )
    except ForcedKernelError as error:
        failures = error.selection.candidate(job.kernel.name).failures
        return {"skipped": _short("; ".join(map(str, failures)))}, False
    except Exception as error:
        fault = _short(f"{type(error).__name__}: {error}")
        return {"faults": [fault]}, not isinstance(error, HalError)
    compared = found.allowed < float("inf")
    return {
        "faults": [_short(fault) for fault in found.faults],
        "error": found.error if compared and found.error == found.error else None,
        "allowed": found.allowed if compared else None,
        "seconds": round(time.perf_counter() - start, 3),
    }, False


def _jobs(wanted: dict[str, Any], places: list[_Place], interpreted: bool) -> Iterator[_Job]:
    """Yield every kernel that can run, with every scheme and case, in order."""
    from hal.ops.cases import trials_of

    ops = [op for op in op_names() if op in wanted["ops"] or not wanted["ops"]]
    for op in ops:
        for kernel, scheme, case in trials_of(op):
            if wanted["kernels"] and kernel.name not in wanted["kernels"]:
                continue
            if wanted["schemes"] and scheme not in wanted["schemes"]:
                continue
            if interpreted and not (case.small and _interprets(kernel)):
                continue
            able = [place for place in places if _can_run(kernel, scheme, place.spec)]
            for place in able[:1] if interpreted else able:
                yield _Job(kernel, scheme, case, place)


def _interprets(kernel: Kernel) -> bool:
    """Tell whether the interpreter runs a kernel: one of Triton, and all that it is made of."""
    return Needs.feature("triton") in kernel.requires and not kernel.not_interpreted


def _can_run(kernel: Kernel, scheme: str, spec: DeviceSpec) -> bool:
    """Tell whether a kernel can run some problem there: what else it lacks are shapes."""
    types = find_op(kernel.op).choices.get("dtype", (None,))
    return any(
        all(
            failure.code is Code.SHAPE
            for failure in choose(kernel.op, scheme, spec, problem, Options(force=kernel.name))
            .candidate(kernel.name)
            .failures
        )
        for problem in ({} if dtype is None else {"dtype": dtype} for dtype in types)
    )


def _here(types: list[str]) -> Iterator[_Place]:
    """Yield one device of each kind of this machine, accelerators first, and the CPU."""
    from hal.runtime import current_platform, platform

    current = current_platform()
    kinds: dict[DeviceSpec, int] = {}
    if not current.simulated:
        for index in range(current.device_count()):
            kinds.setdefault(current.device(index).kind, index)
    for spec, index in kinds.items():
        kind = current.torch_device_type
        place = "cpu" if kind == "cpu" else f"{kind}:{index}"
        if not types or spec.platform in types:
            yield _Place(spec, current, place)
    if "cpu" not in {spec.platform for spec in kinds} and (not types or "cpu" in types):
        own = platform("cpu")
        yield _Place(own.device(0).kind, own, "cpu")


def _interpreting() -> Iterator[_Place]:
    """Yield platforms whose facts are a GPU's and whose tensors lie on the CPU."""
    from hal.platforms.base import DeviceRecord
    from hal.platforms.cpu import CpuPlatform
    from hal.platforms.ordering import HostOrdering
    from hal.platforms.tables import device_spec
    from hal.software import find_software

    for name in _INTERPRETED_FOR:
        platform, _, key = name.partition(":")
        spec = device_spec(platform, key, find_software())
        yield _Place(spec, CpuPlatform([DeviceRecord(spec, 0)], HostOrdering()), "cpu")


def _software(places: Iterable[_Place]) -> dict[str, str]:
    from hal.software import find_software

    found = find_software()
    return {"torch": found.torch or "", "triton": found.triton or ""}


def _told(job: _Job) -> list[str]:
    spec = job.place.spec
    kernel = job.kernel
    return [
        *(kernel.op, kernel.name, job.scheme, job.case.name),
        *(spec.platform, spec.arch.name, spec.name),
    ]


def _short(text: str) -> str:
    return " ".join(text.split())[:_MOST_TEXT]


def _answer(value: dict[str, Any]) -> None:
    print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
