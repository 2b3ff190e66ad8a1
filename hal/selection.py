"""Choose a kernel for a problem on a device, and account for every kernel that was not chosen.

`choose` is a pure function of facts: the op's declarations, a `DeviceSpec`, a scheme, a problem
and the caller's options. It never touches a device, so the answer for a machine that is not here
is computed by the code that runs in production.
The order is that of `hal.ranking`, the text that of `hal.selection_text`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hal.as_given import left_as_given
from hal.device import DeviceSpec
from hal.errors import (
    ArgumentError,
    ForcedKernelError,
    NoKernelError,
    UnknownNameError,
)
from hal.needs import Code, Context, Failure, Need, Needs
from hal.padding import Padded, padded_or_not
from hal.ranking import ON_AVERAGE, Candidate, rank
from hal.reach import higher_levels
from hal.registry import Kernel, Level, Measurement, Op, find_op, op_names
from hal.selection_text import table

__all__ = ["OPTION_NAMES", "Candidate", "Options", "Selection", "choose", "rank"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller insists on.

    Attributes:
        minimum: Lowest acceptable level.
        force: Kernel to use, or nothing else.
        fallback: `refuse`, or `allow` another kernel where the forced one cannot run.
        batch_invariant: Accept only kernels whose results do not depend on the batch.
        deterministic: Accept only kernels that give equal bits for equal input.
        force_origin: Where `force` came from, for messages.
    """

    minimum: Level = Level.REFERENCE
    force: str | None = None
    fallback: str = "refuse"
    batch_invariant: bool = False
    deterministic: bool = False
    force_origin: str = "code"

    def __post_init__(self) -> None:
        if self.fallback not in ("refuse", "allow"):
            raise ArgumentError(
                "select: fallback", found=repr(self.fallback), needed="'refuse' or 'allow'"
            )


@dataclass(frozen=True)
class Selection:
    """The kernel chosen for a problem, and why not the others.

    Attributes:
        op: Name of the op.
        scheme: Name of the scheme.
        spec: Facts of the device.
        problem: Sizes and options as given.
        kernel: The choice, or None where no kernel can run.
        candidates: Every kernel of the op: the choice first, then by rank, then the rejected.
        options: What the caller insisted on.
        unchecked: Sizes and options not given, so requirements on them were not checked.
        note: Something the caller should know, such as a fallback that was taken.
        refused: Why weights of these sizes are refused when they are bound, whatever the kernel.
    """

    op: str
    scheme: str
    spec: DeviceSpec
    problem: Mapping[str, Any]
    kernel: Kernel | None
    candidates: tuple[Candidate, ...]
    options: Options = Options()
    unchecked: tuple[str, ...] = ()
    note: str = ""
    refused: str = ""

    @property
    def level(self) -> Level | None:
        """Return the level of the choice."""
        return self.kernel.level if self.kernel else None

    @property
    def reason(self) -> str:
        """Return in one line why this kernel was chosen."""
        if self.kernel is None:
            if any(candidate.can_run for candidate in self.candidates):
                return f"{self.options.force}, forced by {self.options.force_origin}, cannot run"
            return "no kernel meets its requirements here"
        if self.options.force == self.kernel.name:
            return f"forced by {self.options.force_origin}"
        chosen = self.candidates[0]
        able = [candidate for candidate in self.candidates if candidate.can_run]
        if len(able) == 1:
            return "the only kernel that can run"
        other = able[1]
        if chosen.measurement and other.measurement:
            ratio = other.measurement.time / chosen.measurement.time
            if ratio > 1 and chosen.measurement.unit == ON_AVERAGE:
                return (
                    f"measured {chosen.measurement.time:.2f}x the best time on average, "
                    f"{other.kernel.name} {other.measurement.time:.2f}x"
                )
            if ratio > 1:
                return f"measured {ratio:.2f}x as fast as {other.kernel.name}"
        if other.claimed and not chosen.claimed:
            return f"hal has not run {other.kernel.name}, which is claimed"
        if self.kernel.level > other.kernel.level:
            return f"{self.kernel.level} comes before {other.kernel.level} ({other.kernel.name})"
        if other.padded and not chosen.padded:
            return f"takes the weights as they are, {other.kernel.name} would have them padded"
        if chosen.measurement and not other.measurement:
            return f"measured here, {other.kernel.name} is not"
        if self.kernel.band != other.kernel.band:
            return f"{self.kernel.band} comes before {other.kernel.band} ({other.kernel.name})"
        return f"by name, before {other.kernel.name} of the same level and band"

    @property
    def padded(self) -> tuple[Padded, ...]:
        """Return the sizes of weights that are padded when they are bound; mostly none."""
        for candidate in self.candidates:
            if candidate.kernel is self.kernel:
                return candidate.padded
        return ()

    @property
    def as_given(self) -> str:
        """Return in one line what the choice does not quantize, though the scheme does."""
        return left_as_given(self.kernel, (c.kernel for c in self.candidates), self.scheme)

    @property
    def above(self) -> str:
        """Return in one sentence what would have to change for a higher level, if there is one."""
        if self.options.force is not None:
            return ""
        return higher_levels(self.kernel, self.candidates, str(self.spec.arch))

    def candidate(self, name: str) -> Candidate:
        """Return the candidate called `name`."""
        for candidate in self.candidates:
            if candidate.kernel.name == name:
                return candidate
        known = [candidate.kernel.name for candidate in self.candidates]
        raise UnknownNameError(f"kernel of {self.op}", name, known)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "op": self.op,
            "scheme": self.scheme,
            "device": self.spec.key,
            "arch": self.spec.arch.name,
            "problem": dict(self.problem),
            "kernel": self.kernel.name if self.kernel else None,
            "level": str(self.level) if self.kernel else None,
            "reason": self.reason,
            "note": self.note,
            "refused": self.refused,
            "as_given": self.as_given,
            "above": self.above,
            "unchecked": list(self.unchecked),
            "candidates": [
                {
                    "kernel": candidate.kernel.name,
                    "level": str(candidate.kernel.level),
                    "band": candidate.kernel.band,
                    "claimed": candidate.claimed,
                    "rank": candidate.rank,
                    "serves": candidate.serves,
                    "measured": _measured(candidate.measurement),
                    "padded": {row.size: row.to for row in candidate.padded},
                    "failures": [
                        {
                            "code": str(failure.code),
                            "needed": failure.needed,
                            "found": failure.found,
                            "hint": failure.hint,
                        }
                        for failure in candidate.failures
                    ],
                }
                for candidate in self.candidates
            ],
        }

    def __str__(self) -> str:
        return "\n".join(table(self))


def choose(
    op: Op | str,
    scheme: str,
    spec: DeviceSpec,
    problem: Mapping[str, Any],
    options: Options = Options(),
) -> Selection:
    """Return the selection for one problem on one device; raise nothing if no kernel fits.

    Args:
        op: An op or its name.
        scheme: Name of a scheme.
        spec: Facts of the device.
        problem: Sizes and options, by the names in `op.sizes`; None or missing means unknown.
        options: What the caller insists on.

    Raises:
        UnknownNameError: For an unknown op, scheme, forced kernel, size or value of an option.
        ValueRangeError: For a size that is no whole number, is below 0, or exceeds another.
    """
    op = find_op(op) if isinstance(op, str) else op
    op.check(problem)
    schemes = sorted({name for kernel in op.kernels for name in kernel.schemes})
    if scheme not in schemes:
        raise UnknownNameError(f"scheme of {op.name}", scheme, schemes)
    if options.force is not None and options.force not in op:
        known = [kernel.name for kernel in op.kernels]
        origin = f"asked for by {options.force_origin}"
        raise UnknownNameError(f"kernel of {op.name}", options.force, known, origin)
    given = {name: value for name, value in problem.items() if value is not None}
    context = Context(spec, scheme, given)
    candidates = [_examine(op, kernel, context, options) for kernel in op.kernels]
    unchecked = {
        name
        for kernel in op.kernels
        if scheme in kernel.signatures
        for need in kernel.requires
        for name in need.unchecked(context)
    }
    able, unable = rank(candidates, _measured_so(op, options), context)
    note, chosen = "", able[0].kernel if able else None
    if options.force is not None:
        forced = next(c for c in candidates if c.kernel.name == options.force)
        if forced.can_run:
            chosen = forced.kernel
            able.sort(key=lambda candidate: candidate.kernel is not chosen)
        elif options.fallback == "allow" and chosen is not None:
            note = f"{options.force} cannot run here, {chosen.name} was taken instead"
        else:
            chosen = None
    return Selection(
        op.name,
        scheme,
        spec,
        given,
        chosen,
        (*able, *unable),
        options,
        tuple(sorted(unchecked)),
        note,
        op.refused(scheme, given) if op.refused is not None else "",
    )


def require(selection: Selection) -> Selection:
    """Return `selection` if it has a kernel; warn once about a fallback.

    Raises:
        ForcedKernelError: If the forced kernel cannot run.
        NoKernelError: If no kernel can run. Both carry the whole table.
    """
    where = f"{selection.op} with {selection.scheme} on {selection.spec.key}"
    if selection.note:
        warnings.warn(f"{where}: {selection.note}", stacklevel=3)
    if selection.kernel is not None:
        return selection
    force = selection.options.force
    if force is not None:
        failures = "; ".join(map(str, selection.candidate(force).failures))
        origin = selection.options.force_origin
        raise ForcedKernelError(
            f"{where}: kernel {force!r}, asked for by {origin}, cannot run: {failures}", selection
        )
    raise NoKernelError(f"{where}: no kernel can run; all candidates:", selection)


def _measured_so(op: Op, options: Options) -> tuple[Measurement, ...]:
    """Return the times of an op that were measured as these options have its kernels run."""
    if not options.batch_invariant:
        return op.measured()
    otherwise = {kernel.name for kernel in op.kernels if kernel.invariance}
    return tuple(row for row in op.measured() if row.kernel not in otherwise)


def _examine(op: Op, kernel: Kernel, context: Context, options: Options) -> Candidate:
    failures = []
    serves = context.scheme in kernel.signatures
    if not serves:
        failures.append(Failure(Code.FORMAT, " or ".join(kernel.schemes), context.scheme))
    problem = dict(context.problem)
    if options.force == kernel.name:
        problem["forced"] = True
    context = replace(context, problem=problem)
    padded, unmet = padded_or_not(op, (*kernel.requires, *_dtype_needs(kernel, context)), context)
    failures += unmet
    if kernel.level < options.minimum:
        failures.append(Failure(Code.ENV, f"level {options.minimum} or above", str(kernel.level)))
    if options.batch_invariant and not kernel.batch_invariant:
        failures.append(Failure(Code.ENV, "batch_invariant", "results depend on the batch"))
    if options.deterministic and not kernel.deterministic:
        failures.append(Failure(Code.ENV, "deterministic", "order of sums can change"))
    return Candidate(kernel, tuple(failures), serves=serves, padded=() if failures else padded)


def _dtype_needs(kernel: Kernel, context: Context) -> tuple[Need, ...]:
    """Return what torch must have to hold the operands of the scheme, as one need or none."""
    encoding = context.spec.formats.fp8_encoding
    operands = kernel.signatures.get(context.scheme, ())
    groups = [group for operand in operands for group in operand.dtype_groups(encoding)]
    return (Needs.dtypes(*groups),) if groups else ()


def _measured(row: Measurement | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {"time": row.time, "unit": row.unit, "sizes": dict(row.sizes), "source": row.source}


OPTION_NAMES = ("minimum", "force", "fallback", "batch_invariant", "deterministic")
"""What `options_from` takes."""


def options_from(
    op: str,
    *,
    minimum: Level | str | None = None,
    force: str | None = None,
    fallback: str = "refuse",
    batch_invariant: bool = False,
    deterministic: bool = False,
) -> Options:
    """Return the options that code and environment ask for together; code beats environment.

    Raises:
        ArgumentError: If `fallback` is neither `refuse` nor `allow`.
        SettingError: If `HAL_KERNEL` cannot be read.
        UnknownNameError: If `minimum` is no level.
    """
    from hal.config import forced_kernels

    origin = "code"
    if force is None:
        forced = forced_kernels()
        force = forced.get(op)
        origin = "HAL_KERNEL"
        for name in forced:
            known = op_names(collective=True)
            if name != op and name not in known:
                error = UnknownNameError("op", name, known, "in HAL_KERNEL")
                warnings.warn(f"ignored: {error}", stacklevel=3)
    level = Level.parse(minimum) if isinstance(minimum, str) else minimum
    return Options(
        Level.REFERENCE if level is None else level,
        force,
        fallback,
        batch_invariant,
        deterministic,
        origin if force is not None else "code",
    )


def select(
    op: str,
    *,
    scheme: str,
    platform: Any = None,
    device: int | None = None,
    minimum: Level | str | None = None,
    force: str | None = None,
    fallback: str = "refuse",
    batch_invariant: bool = False,
    deterministic: bool = False,
    **problem: Any,
) -> Selection:
    """Return which kernel runs `op` under `scheme`, with every candidate and its reasons.

    Args:
        op: Name of an op, such as `fused_moe`.
        scheme: Name of a scheme, such as `fp8_channel`.
        platform: A platform, a `DeviceSpec`, or a text such as `rocm:gfx942`; None means the
            current platform.
        device: Visible index of the device on that platform; None where all of them are alike.
        minimum: Lowest acceptable level, such as `weight_only`.
        force: Name of the kernel to use, or nothing.
        fallback: `allow` to take another kernel, with a warning, where the forced one cannot run.
        batch_invariant: Accept only batch-invariant kernels.
        deterministic: Accept only deterministic kernels.
        **problem: Sizes and options of the op, such as `hidden=4096`.

    Raises:
        AmbiguousDeviceError: If no device is named and the visible ones are unlike.
        NoKernelError: If no kernel can run; carries the table of all candidates.
        ForcedKernelError: If the forced kernel cannot run.
        UnknownNameError: For an unknown op, scheme, kernel, size or platform.
        ArgumentError: For a size that cannot be, or a wrong `fallback`.
    """
    from hal.runtime import resolve_platform

    spec = resolve_platform(platform).device(device)
    options = options_from(
        op,
        minimum=minimum,
        force=force,
        fallback=fallback,
        batch_invariant=batch_invariant,
        deterministic=deterministic,
    )
    return require(choose(op, scheme, spec, problem, options))
