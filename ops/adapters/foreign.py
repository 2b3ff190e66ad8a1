"""Find functions and operators of other packages, and say plainly when they are not there.

Binders call these, nothing else does: importing hal, and explaining a choice, imports no package
of kernels. What `hal doctor` found broken is a reason in the table; what breaks only now is a
`PlatformError` with the package, the version and what to do.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from hal.errors import PlatformError

__all__ = ["accepted", "attribute", "named", "operator"]


def attribute(package: str, module: str, path: str) -> Any:
    """Return an attribute of a module, such as `scalar_types.uint4b8` of `vllm.scalar_type`.

    Args:
        package: Distribution that should have it, for messages.
        module: Module to import.
        path: Attribute of the module, with dots.

    Raises:
        PlatformError: If the module cannot be imported or has no such attribute.
    """
    found: Any = _imported(package, module)
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise _missing(package, f"{module}.{path}")
    return found


def operator(package: str, module: str, namespace: str, *names: str) -> Any:
    """Return the operator `torch.ops.namespace.name` that importing `module` registers.

    Of several names, which are one operator's in several releases, the first that is there counts.

    Raises:
        PlatformError: If the module cannot be imported or registers no such operator.
    """
    import torch

    _imported(package, module)
    for name in names:
        found = getattr(getattr(torch.ops, namespace), name, None)
        if found is not None:
            return found
    raise _missing(package, f"torch.ops.{namespace}.{names[0]}")


def accepted(operator: Any, **values: Any) -> tuple[Any, ...]:
    """Return `values` in the order of an operator's arguments, without those it does not have.

    Releases differ in arguments that say nothing here, such as an order of columns for act-order.

    Raises:
        PlatformError: If the operator has an argument without default that is not among `values`.
    """
    arguments = operator.default._schema.arguments
    for argument in arguments:
        if argument.name not in values and not argument.has_default_value():
            needed = f"only {', '.join(values)}"
            raise PlatformError(f"{operator}: found argument {argument.name!r}, needed {needed}")
    return tuple(values[a.name] for a in arguments if a.name in values)


def named(package: str, function: Any, *passed: str, **fixed: Any) -> Callable[..., Any]:
    """Return a function or operator with `fixed` arguments, to be called with the rest by name.

    Args:
        package: Distribution that it is of, for messages.
        function: What to call. Some have thirty arguments, which releases reorder.
        *passed: Names of the arguments that each call gives.
        **fixed: The others that differ from their defaults, and all without one.

    Raises:
        PlatformError: If it does not take one of them, or wants another.
    """
    wanted = dict(_parameters(function))
    given = {*passed, *fixed}
    unknown = sorted(given.difference(wanted))
    missing = [name for name, optional in wanted.items() if not optional and name not in given]
    if unknown or missing:
        found = f"no argument {', '.join(unknown)}" if unknown else ""
        found += " and " * bool(unknown and missing)
        found += f"a further one {', '.join(missing)}" if missing else ""
        what = getattr(function, "__name__", function)
        raise PlatformError(
            f"{package}: found {found} of {what} in this version, needed those of the version in "
            "docs/adapters.md; force another kernel, or install that version"
        )
    return functools.partial(function, **fixed)


def _parameters(function: Any) -> Iterator[tuple[str, bool]]:
    """Yield the name of each argument, and whether it may be left out."""
    schema: Any = getattr(getattr(function, "default", None), "_schema", None)
    if schema is not None:
        for argument in schema.arguments:
            yield argument.name, argument.has_default_value()
        return
    for name, parameter in inspect.signature(function).parameters.items():
        yield name, parameter.default is not inspect.Parameter.empty


def _imported(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not load may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PlatformError(
            f"{package}: found that importing {module} fails ({reason}), needed a build for this "
            "torch; `hal doctor` remembers broken packages and keeps them from being chosen"
        ) from error


def _missing(package: str, what: str) -> PlatformError:
    return PlatformError(
        f"{package}: found no {what} in this version, needed one that has it; "
        "force another kernel, or install another version"
    )
