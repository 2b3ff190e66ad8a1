"""Check a kernel: what it declares, without any device, and what it computes, where it can run.

    hal.testing.check_kernel("linear/acme_int8_blocks")                  # the declaration
    hal.testing.check_kernel("linear/acme_int8_blocks", device="cpu")    # and its numbers

    @pytest.mark.parametrize("check", hal.testing.KERNEL_CHECKS, ids=lambda check: check.__name__)
    def test_declaration(check):
        check(hal.testing.find_kernel("linear/acme_int8_blocks"))

Numbers are compared with the op's reference on the problems of `hal.ops.cases`, which `hal verify`
tries as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hal.device import DeviceSpec, Software
from hal.errors import ForcedKernelError, HalError, UnknownNameError
from hal.formats import Support
from hal.need import Code, Context, Failure
from hal.need_rules import Package
from hal.quant.scheme import SCHEMES
from hal.registry import Kernel, Level, find_op, op_names
from hal.sources import source_hash

if TYPE_CHECKING:
    import torch

__all__ = ["KERNEL_CHECKS", "ConformanceError", "check_kernel", "compare_kernel", "find_kernel"]

_NEWEST = "9999"
"""A version that every need for a release or newer accepts."""


class ConformanceError(HalError, AssertionError):
    """Report what a platform or a kernel does that hal does not allow."""


def find_kernel(name: str) -> Kernel:
    """Return the kernel called `op/name`.

    Raises:
        UnknownNameError: If there is none.
    """
    op, _, own = name.partition("/")
    if not own:
        known = [str(kernel) for op in op_names(collective=True) for kernel in find_op(op).kernels]
        raise UnknownNameError("kernel", name, known)
    return find_op(op).find(own)


def check_kernel(name: str, device: torch.device | str | None = None) -> None:
    """Run every check on a kernel, and with a device compare its numbers under every scheme.

    Args:
        name: `op/name`, as hal reports it.
        device: Where tensors lie for the comparison; None to check the declaration alone.

    Raises:
        ConformanceError: For the first check that fails.
        UnknownNameError: If there is no such kernel.
    """
    kernel = find_kernel(name)
    for check in KERNEL_CHECKS:
        check(kernel)
    if device is not None:
        for scheme in kernel.schemes:
            compare_kernel(kernel, scheme, device)


def compare_kernel(
    kernel: Kernel, scheme: str, device: torch.device | str, platform: Any = None
) -> int:
    """Force a kernel on every problem of its op; return how many of them it can run.

    Args:
        kernel: The kernel.
        scheme: Name of a scheme that it serves.
        device: Where tensors lie.
        platform: Platform to bind for; None means that of the device.

    Raises:
        ConformanceError: If a result is wrong, or the kernel can run none of the problems there.
    """
    import torch

    from hal.ops.cases import Trial, cases_of

    trial = Trial(kernel.name, scheme, torch.device(device), platform)
    faults, reasons, compared = [], {}, 0
    for case in cases_of(kernel.op):
        try:
            found = case.run(trial)
        except ForcedKernelError as error:
            lacks = error.selection.candidate(kernel.name).failures
            reasons[case.name] = "; ".join(map(str, lacks))
            continue
        compared += 1
        faults += [f"{case.name}: {fault}" for fault in found.faults]
    _demand(not faults, f"{kernel} under {scheme}: {'; '.join(faults)}")
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    _demand(compared > 0, f"{kernel} under {scheme} can run no problem on {device}: {told}")
    return compared


# ------------------------------------------------------------------------------------- checks
def binds_what_the_op_gives(kernel: Kernel) -> None:
    """Check that the binder can be imported without its library, and takes the op's arguments."""
    try:
        binder = kernel.load()
    except Exception as error:
        raise ConformanceError(
            f"{kernel}: {kernel.entry} cannot be imported ({type(error).__name__}: {error}); "
            "import libraries inside the binder"
        ) from error
    _demand(callable(binder), f"{kernel}: {kernel.entry} is no function")
    if "reference" not in find_op(kernel.op):
        return
    found = inspect.signature(find_op(kernel.op).find("reference").load()).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in found):
        return
    # What is given by name alone is what static schemes fix.
    static = any(name in SCHEMES and SCHEMES[name].static for name in kernel.schemes)
    given = [parameter for parameter in found if parameter.kind is not parameter.KEYWORD_ONLY]
    named = {p.name: p for p in found if static and p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(binder).bind(*given, **named)
    except TypeError as error:
        names = ", ".join([*(parameter.name for parameter in given), *(f"{n}=" for n in named)])
        raise ConformanceError(f"{kernel}: the binder must take ({names}): {error}") from None


def has_a_source(kernel: Kernel) -> None:
    """Check that the binder's source is found: evidence is about its hash."""
    _demand(bool(source_hash(kernel.entry)), f"{kernel}: found no source of {kernel.entry}")


def serves_schemes_of_its_op(kernel: Kernel) -> None:
    """Check that the op's reference serves every scheme, so that there is something to compare."""
    op = find_op(kernel.op)
    if "reference" in op:
        unknown = set(kernel.schemes).difference(op.find("reference").schemes)
        _demand(not unknown, f"{kernel}: the reference of {kernel.op} has no {sorted(unknown)}")


def can_run_somewhere(kernel: Kernel) -> None:
    """Check that for every scheme some device of the tables meets all needs but those of shapes.

    All packages are assumed to be there, in a later release than any.
    """
    for scheme in kernel.schemes:
        nearest = min((_lacks(kernel, scheme, spec) for spec in _devices(kernel)), key=len)
        _demand(
            not nearest,
            f"{kernel} under {scheme} can run on no device of the tables; the nearest lacks "
            + "; ".join(map(str, nearest)),
        )


def says_why_not(kernel: Kernel) -> None:
    """Check that every need that is not met says in one line what is needed and what was found."""
    for spec in _devices(kernel):
        bare = spec.replace(software=Software())
        for failure in (*_lacks(kernel, kernel.schemes[0], spec), *_lacks(kernel, "none", bare)):
            where = f"{kernel} on {spec.key}: {failure.code}"
            _demand(bool(failure.needed and failure.found), f"{where}: says too little")
            _demand("\n" not in str(failure), f"{where}: takes more than one line")


def is_native_where_it_says_so(kernel: Kernel) -> None:
    """Check that devices which run a `native` product multiply one of its formats themselves."""
    if kernel.level is not Level.NATIVE:
        return
    for scheme, operands in kernel.signatures.items():
        if len(operands) < 2:  # nothing is multiplied
            continue
        formats = {name for operand in operands for name in operand.formats}
        for spec in _devices(kernel):
            if not _lacks(kernel, scheme, spec):
                _demand(
                    any(spec.formats.of("math", name) is Support.NATIVE for name in formats),
                    f"{kernel} under {scheme} is native, and {spec.arch} multiplies none of "
                    + ", ".join(sorted(formats)),
                )


KERNEL_CHECKS: tuple[Callable[[Kernel], None], ...] = (
    binds_what_the_op_gives,
    has_a_source,
    serves_schemes_of_its_op,
    can_run_somewhere,
    says_why_not,
    is_native_where_it_says_so,
)
"""Every check of a kernel's declaration, by what a kernel does that passes it."""


def _devices(kernel: Kernel) -> Iterator[DeviceSpec]:
    """Yield every product of the tables with all that a kernel may need around it."""
    from hal.platforms.tables import device_names, device_spec

    named = {need.name for need in kernel.requires if isinstance(need, Package)}
    packages = tuple((name, _NEWEST) for name in named)
    software = Software(torch=_NEWEST, triton=_NEWEST, packages=packages)
    for name in device_names():
        platform, _, key = name.partition(":")
        yield device_spec(platform, key, software)


def _lacks(kernel: Kernel, scheme: str, spec: DeviceSpec) -> list[Failure]:
    """Return the needs that a device does not meet for a kernel which is asked for by name."""
    context = Context(spec, scheme, {"forced": True})
    found = (need.check(context) for need in kernel.requires)
    return [failure for failure in found if failure and failure.code is not Code.SHAPE]


def _demand(holds: bool, fault: str) -> None:
    if not holds:
        raise ConformanceError(fault)
