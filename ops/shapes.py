"""Record the problems of real calls, for `hal bench --from` and `hal tune --from`.

    with hal.record_shapes("shapes.json"):
        engine.generate(prompts)

While nothing is recorded, calls pay nothing: what counts is put around the launcher of each bound
op when recording begins, and taken away when it ends. A replay of a CUDA graph runs no Python and
is not counted; record while graphs are captured, or without them.

A file is JSON: `{"format": 1, "software": {...}, "problems": [...]}`. A problem has `op`, `scheme`,
`device`, `arch`, `kernel`, `problem` (sizes and options by name, without tokens) and `calls`:
how often it was called with how many tokens, `{"1": 4608, "32": 96}`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from hal.errors import ArgumentError, HalError
from hal.files import write_text
from hal.registry import find_op, op_names

if TYPE_CHECKING:
    from hal.ops.bound import Bound
    from hal.selection import Selection

__all__ = ["FORMAT", "Recorded", "Recorder", "read_shapes", "record_shapes"]

FORMAT = 1
BOUND_OPS = ("linear", "fused_moe")
"""Ops that hold weights: their selections are no calls."""
CURE = "record it again with hal.record_shapes"

Key = tuple[Any, ...]


@dataclass
class Recorded:
    """One problem, and how often it was called with how many tokens.

    Attributes:
        op: Name of the op.
        scheme: Name of the scheme.
        device: Key of the device, such as `cuda:h200`.
        arch: Its architecture, such as `sm_90`.
        kernel: Kernel that ran.
        problem: Sizes and options of the problem, without tokens.
        calls: Number of calls by number of tokens.
    """

    op: str
    scheme: str
    device: str
    arch: str
    kernel: str
    problem: dict[str, Any]
    calls: dict[int, int] = field(default_factory=dict)


class Recorder:
    """What `record_shapes` yields: the problems so far."""

    def __init__(self) -> None:
        self._problems: dict[Key, Recorded] = {}
        self._wrapped: list[tuple[ReferenceType[Bound], Callable[..., Any], Callable[..., Any]]]
        self._wrapped, self._lock = [], threading.Lock()

    @property
    def problems(self) -> list[Recorded]:
        """Return what was called so far, most called first."""
        found = [each for each in self._problems.values() if each.calls]
        return sorted(found, key=lambda each: -sum(each.calls.values()))

    def count(self, selection: Selection, tokens: int, **sizes: int) -> None:
        """Count one call."""
        given = {**selection.problem, **sizes}
        problem = {k: v for k, v in given.items() if v is not None and k != "tokens"}
        spec, kernel = selection.spec, selection.kernel
        name = kernel.name if kernel else ""
        key = selection.op, selection.scheme, spec.key, name, *sorted(problem.items())
        with self._lock:
            found = self._problems.get(key)
            if found is None:
                made = Recorded(
                    selection.op, selection.scheme, spec.key, spec.arch.name, name, problem
                )
                found = self._problems.setdefault(key, made)
            found.calls[tokens] = found.calls.get(tokens, 0) + 1

    def wrap(self, bound: Bound) -> None:
        """Count the calls of a bound op from now on."""
        from hal.ops.bound import WARMING

        inner, selection, batched = bound._launch, bound.selection, _is_batched(bound)

        def counted(x: Any, *rest: Any) -> Any:
            if WARMING.get():
                return inner(x, *rest)
            sizes = {}
            if selection.op == "fused_moe" and not batched:
                sizes["top_k"] = rest[0].shape[1]
            self.count(selection, x.shape[1 if batched else 0], **sizes)
            return inner(x, *rest)

        bound._launch = counted
        self._wrapped.append((ref(bound), counted, inner))

    def unwrap(self) -> None:
        """Take what counts away from every op."""
        for where, counted, inner in reversed(self._wrapped):
            bound = where()
            if bound is not None and bound._launch is counted:
                bound._launch = inner
        self._wrapped.clear()

    def text(self) -> str:
        """Return the file's text."""
        from hal.software import find_software

        software = find_software()
        told = {"torch": software.torch, "triton": software.triton}
        problems = [asdict(each) for each in self.problems]
        return json.dumps({"format": FORMAT, "software": told, "problems": problems}, indent=1)


def _is_batched(bound: Bound) -> bool:
    return bound.selection.problem.get("format") == "batched"


@contextmanager
def record_shapes(path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Record the problems of all calls of hal's ops inside, in all threads, and write them.

    The file is written when the context is left, also by an error, whole or not at all; one that
    is there already is replaced.

    Args:
        path: File to write, in a folder that is there.

    Raises:
        ArgumentError: If the folder is not there or cannot be written to; nothing was recorded.
        EvidenceError: If the file cannot be written when the context is left.
    """
    target = Path(path)
    folder = target.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or target.is_dir():
        raise ArgumentError(
            "record_shapes", found=str(target), needed="a file in a folder that can be written to"
        )
    recorder = Recorder()
    with _recording(recorder):
        try:
            yield recorder
        finally:
            write_text(target, recorder.text() + "\n")


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    from hal.ops import binding
    from hal.ops.bound import BIND_HOOKS
    from hal.ops.library import all_bound

    chosen = binding._chosen

    def recorded(op: str, scheme: str, spec: Any, problem: dict[str, Any], options: Any) -> Any:
        selection = chosen(op, scheme, spec, problem, options)
        if op not in BOUND_OPS and "tokens" in problem:
            recorder.count(selection, problem["tokens"])
        return selection

    for bound in all_bound():
        if hasattr(bound, "_launch"):  # not where binding failed, and something holds what is left
            recorder.wrap(bound)
    BIND_HOOKS.append(recorder.wrap)
    binding._chosen = recorded
    try:
        yield
    finally:
        if binding._chosen is recorded:
            binding._chosen = chosen
        BIND_HOOKS.remove(recorder.wrap)
        recorder.unwrap()


def read_shapes(path: str | os.PathLike[str]) -> list[Recorded]:
    """Return the problems of a file that `record_shapes` wrote.

    Raises:
        ArgumentError: If it cannot be read, is of another format, or a problem in it cannot be.
    """
    where = f"shapes of {os.fspath(path)}"
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(where, found=error, needed="a file of JSON", cure=CURE) from None
    if not isinstance(told, Mapping) or told.get("format") != FORMAT:
        found = told.get("format") if isinstance(told, Mapping) else type(told).__name__
        raise ArgumentError(where, found=f"format {found}", needed=f"format {FORMAT}", cure=CURE)
    found = []
    for place, row in enumerate(told.get("problems", ())):
        try:
            one = Recorded(**row)
            one.calls = {int(tokens): int(calls) for tokens, calls in one.calls.items()}
            find_op(one.op).check(one.problem)
            if one.op not in op_names() or min(one.calls, default=0) < 0:
                raise ValueError(f"op {one.op} with {sorted(one.calls)} tokens")
        except (HalError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"{where}, problem {place}", found=error, needed="a recorded problem", cure=CURE
            ) from None
        found.append(one)
    return found
