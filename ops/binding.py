"""Bind an op to weights and a device: select once, prepare once, call many times.

A binder takes a `Binding` and the op's weights and returns `(launch, tensors)`: a function of the
call's inputs and of exactly those tensors. The tensors are passed at every call, not hidden in the
function, so that compilers and graph planners can see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.errors import SimulatedDeviceError, UnknownNameError
from hal.needs import Needs
from hal.registry import Measurement, find_op
from hal.selection import OPTION_NAMES, Options, Selection, choose, options_from, require

if TYPE_CHECKING:
    import torch

    from hal.device import DeviceSpec
    from hal.protocol import Platform
    from hal.quant.scheme import Scheme

__all__ = ["TRITON_HERE", "Binding", "Launch", "measurements", "select_for"]

TRITON_HERE = Needs.feature(
    "triton", "of GPUs, sm_80, gfx90a, xe-hpc and xe2 or newer have it; torch's kernels run here"
)

Launch = Callable[..., "torch.Tensor"]
Tensors = Sequence["torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Binding:
    """What a binder may know: the selection that led to it, and where it will run."""

    selection: Selection
    platform: Platform
    scheme: Scheme
    device: torch.device

    @property
    def spec(self) -> DeviceSpec:
        """Return the facts of the device."""
        return self.selection.spec

    def problem(self, name: str, default: Any = None) -> Any:
        """Return a size or option of the problem."""
        return self.selection.problem.get(name, default)


def select_for(
    op: str,
    scheme: str,
    device: torch.device,
    problem: dict[str, Any],
    *,
    platform: Any = None,
    **options: Any,
) -> tuple[Selection, Platform]:
    """Return the selection for tensors on `device`, and the platform that serves them.

    Facts belong to the device of the tensors: a CPU tensor on a machine with a GPU is served by
    the CPU platform, and `cuda:1` by the facts of device 1.

    Raises:
        NoKernelError: If no kernel can run.
        UnknownNameError: If an option is unknown.
        SimulatedDeviceError: If the platform is simulated and the choice is not the reference.
    """
    from hal.runtime import platform_of

    for name in options:
        if name not in OPTION_NAMES:
            raise UnknownNameError(f"option of {op}", name, (*OPTION_NAMES, "platform"))
    where = platform_of(device, platform)
    spec = where.device(device.index)
    selection = require(_chosen(op, scheme, spec, problem, options_from(op, **options)))
    kernel = selection.kernel
    if where.simulated and kernel is not None and kernel.band != "reference":
        raise SimulatedDeviceError(where.name, spec.name, f"binding {kernel}")
    return selection, where


# Ops without weights select at each call. The same question has the same answer, and a decode
# step asks it again and again.
_MOST_SELECTIONS = 4096
_selections: dict[Any, Selection] = {}


def _chosen(
    op: str, scheme: str, spec: DeviceSpec, problem: dict[str, Any], options: Options
) -> Selection:
    # By identity: to hash the facts takes longer than all the rest. The selection holds the spec,
    # so its address is not used again while the entry stands.
    key = (op, find_op(op).revision, scheme, id(spec), *problem.items(), options)
    found = _selections.get(key)
    if found is None:
        if len(_selections) >= _MOST_SELECTIONS:
            _selections.clear()
        found = _selections[key] = choose(op, scheme, spec, problem, options)
    return found


@cache
def _all_measurements() -> tuple[tuple[str, Measurement], ...]:
    import json

    path = Path(__file__).with_name("configs") / "measured.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for run in table["runs"]:
        for op, scheme, sizes, times in run["rows"]:
            for kernel, time in times.items():
                measurement = Measurement(
                    kernel,
                    scheme,
                    run["arch"],
                    tuple(sorted(sizes.items())),
                    float(time),
                    run["unit"],
                    run["source"],
                )
                rows.append((op, measurement))
    return tuple(rows)


def measurements(op: str) -> Callable[[], tuple[Measurement, ...]]:
    """Return a function that reads the shipped measurements of `op`."""
    return lambda: tuple(row for name, row in _all_measurements() if name == op)
