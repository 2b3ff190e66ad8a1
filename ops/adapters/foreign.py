"""Find functions and operators of other packages, and say plainly when they are not there.

Binders call these, nothing else does: importing hal, and explaining a choice, imports no package
of kernels. What `hal doctor` found broken is a reason in the table; what breaks only now is a
`PlatformError` with the package, the version and what to do.
"""

from __future__ import annotations

import importlib
from typing import Any

from hal.errors import PlatformError

__all__ = ["accepted", "attribute", "operator"]


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
