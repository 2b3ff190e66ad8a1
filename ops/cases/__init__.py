"""Problems on which every kernel of every op is forced by name and compared with its reference.

One definition for the tests and for `hal verify`. A kernel gets its cases by being registered.
"""

from __future__ import annotations

from collections.abc import Iterator

from hal.ops.cases.experts import MOE_CASES
from hal.ops.cases.linear import LINEAR_CASES
from hal.ops.cases.quantizing import QUANTIZING_CASES
from hal.ops.cases.routing import ROUTING_CASES
from hal.ops.cases.trial import Case, Findings, Trial
from hal.registry import Kernel, find_op

__all__ = ["CASES", "Case", "Findings", "Trial", "cases_of", "trials_of"]

CASES: tuple[Case, ...] = (*LINEAR_CASES, *MOE_CASES, *QUANTIZING_CASES, *ROUTING_CASES)
"""Every case of every op."""


def cases_of(op: str) -> tuple[Case, ...]:
    """Return the cases of an op; none for an op of a plugin."""
    return tuple(case for case in CASES if case.op == op)


def trials_of(op: str) -> Iterator[tuple[Kernel, str, Case]]:
    """Yield every kernel of an op, with every scheme that it serves and every case."""
    for kernel in find_op(op).kernels:
        for scheme in kernel.schemes:
            for case in cases_of(op):
                yield kernel, scheme, case
