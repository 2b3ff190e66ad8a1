"""Call the parts of torch that differ between its releases; nothing else in hal touches them.

Importing this imports no torch. Everything looks at the torch that is installed and not at its
version, since vendors' builds are not what their versions say; `hal.quirks` lists what differs.
Where torch is too old, `PlatformError` says which release has what was asked for.

Getters (`..._function`) return what to call, so that a bound op pays nothing for the choice. The
products come from `hal.torch_matmul` and `hal.torch_packed`. The rest is also for code that stands
beside hal, such as an engine: `view`, `pad`, `schema_of`, `register_fake`, `accelerator_type`,
`device_memory` and `graph_type`.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hal.errors import PlatformError, UnknownNameError
from hal.formats import FORMATS
from hal.torch_lookup import find, require, too_old
from hal.torch_matmul import (
    block128_activation_scales,
    block128_weight_scales,
    dense_function,
    grouped_mm_function,
    int_mm_function,
    mm_function,
    scaled_grouped_mm_function,
    scaled_mm_block128_function,
    scaled_mm_rowwise_function,
    scaled_mm_tensorwise_function,
)
from hal.torch_packed import (
    int4pack_functions,
    int8pack_function,
    scaled_mm_blocked_function,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "accelerator_type",
    "block128_activation_scales",
    "block128_weight_scales",
    "dense_function",
    "device_memory",
    "dtype",
    "graph_type",
    "grouped_mm_function",
    "has_dtype",
    "int4pack_functions",
    "int8pack_function",
    "int_mm_function",
    "is_capturing",
    "is_compiling_function",
    "mm_function",
    "pad",
    "register_fake",
    "scaled_grouped_mm_function",
    "scaled_mm_block128_function",
    "scaled_mm_blocked_function",
    "scaled_mm_rowwise_function",
    "scaled_mm_tensorwise_function",
    "schema_of",
    "view",
]

# Dtypes that are no number format of hal's table and are asked for by name all the same.
_PLAIN = ("uint8", "int16", "bool", "float64")


@functools.cache
def dtype(name: str) -> torch.dtype:
    """Return torch's dtype for the number format `name`, such as `e4m3fn` or `bfloat16`.

    Raises:
        UnknownNameError: If there is no such format.
        PlatformError: If torch has no dtype for it, or only a newer torch has.
    """
    row = FORMATS.get(name)
    if row is None and name not in _PLAIN:
        raise UnknownNameError("number format", name, (*FORMATS, *_PLAIN))
    attribute = name if row is None else row.torch_name
    if attribute is None:
        raise PlatformError(f"torch has no dtype for {name}; hold its codes packed, as uint8")
    found: torch.dtype | None = find(attribute)
    if found is None:
        since = row.since_torch if row else None
        raise too_old(f"torch.{attribute} (format {name})", since or "2.0")
    return found


def has_dtype(name: str) -> bool:
    """Tell whether the installed torch has a dtype for the number format `name`."""
    try:
        dtype(name)
    except PlatformError:
        return False
    return True


def view(x: torch.Tensor, *sizes: int | Sequence[int]) -> torch.Tensor:
    """Return `x.view` of sizes that mix numbers and tuples, as in `view(x, x.shape[:-1], 4, -1)`.

    `Tensor.view` itself raises there, and before torch 2.10 it drops what follows a tuple.
    """
    flat: list[int] = []
    for size in sizes:
        if isinstance(size, list | tuple):
            flat.extend(size)
        else:
            flat.append(typing.cast(int, size))  # a symbolic size is no int
    return x.view(flat)


def pad(x: torch.Tensor, amounts: Sequence[int]) -> torch.Tensor:
    """Return `x` padded with zeros, as `torch.nn.functional.pad` does.

    Before torch 2.10 that refuses a tensor without elements if a size of 0 is to stay as it is.

    Args:
        x: Any tensor.
        amounts: Zeros before and after the last dimension, then those of the one before it.
    """
    from torch.nn.functional import pad

    if x.numel():
        return pad(x, amounts)
    shape = list(x.shape)
    for place, amount in enumerate(amounts):
        shape[-1 - place // 2] += amount
    return x.new_zeros(shape)


def is_compiling_function() -> Callable[[], bool]:
    """Return the function that tells whether `torch.compile` is tracing the code that calls it."""
    call: Callable[[], bool] | None = find("compiler.is_compiling")
    return call or importlib.import_module("torch._dynamo").is_compiling


def register_fake(name: str, *, lib: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator for the shape function of operator `name`, such as `hal::linear`.

    Args:
        name: Operator with its namespace.
        lib: The `torch.library.Library` that keeps the registration alive; None for torch.
    """
    register = require("library.register_fake", "library.impl_abstract", since="2.2")
    decorator: Callable[[Callable[..., Any]], Any] = register(name, lib=lib)
    return decorator


def schema_of(function: Callable[..., Any], mutates: Sequence[str] = ()) -> str:
    """Return the operator schema of a function with annotations, such as `(Tensor x) -> Tensor`.

    Unlike `torch.library.infer_schema` before 2.7 it takes `list[int]` and `list[int] | None`.
    Operators of hal state their schemas as text instead.

    Args:
        function: Takes and returns tensors, numbers and lists of them.
        mutates: Names of the arguments that it writes to.

    Raises:
        ValueError: By torch, for an annotation that no schema can express.
    """
    infer = require("library.infer_schema", since="2.5")
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_spelled_out(hints[name]))
        for name, parameter in signature.parameters.items()
    ]
    returned = _spelled_out(hints["return"])

    def stand_in() -> None:
        """Carry the signature, which is all that torch looks at."""

    plain = signature.replace(
        parameters=parameters,
        return_annotation=None if returned is types.NoneType else returned,
    )
    stand_in.__signature__ = plain  # type: ignore[attr-defined]
    schema: str = infer(stand_in, mutates_args=tuple(mutates))
    return schema


_SPELLINGS: dict[Any, Any] = {
    list: typing.List,  # noqa: UP006
    tuple: typing.Tuple,  # noqa: UP006
    collections.abc.Sequence: typing.Sequence,
    types.UnionType: typing.Union,
    typing.Union: typing.Union,
}


def _spelled_out(annotation: Any) -> Any:
    """Return an annotation in terms of `typing`, which every torch knows."""
    generic = _SPELLINGS.get(typing.get_origin(annotation))
    if generic is None:
        return annotation
    return generic[tuple(_spelled_out(part) for part in typing.get_args(annotation))]


def accelerator_type() -> str | None:
    """Return the type of device that torch was built for, such as `cuda`; None for CPU builds.

    Whether a device is there is not looked at, so no device runtime starts: for that ask
    `hal.current_platform()`. ROCm builds say `cuda`.
    """
    ask = find("accelerator.current_accelerator")
    if ask is not None:
        try:
            device = ask()
        except RuntimeError:  # torch 2.6 raises where later releases return None
            return None
        return None if device is None else str(device.type)
    if find("version.cuda", "version.hip"):
        return "cuda"
    return "xpu" if find("version.xpu") else None


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total bytes of a device's memory; starts its runtime.

    Raises:
        PlatformError: For the CPU, or where torch does not tell.
    """
    ask = find(f"{device.type}.mem_get_info")
    if ask is None and device.type == accelerator_type():
        ask = find("accelerator.get_memory_info")
    if ask is None:
        raise PlatformError(f"torch does not tell the memory of {device}; ask hal's platform")
    free, total = ask(device)
    return int(free), int(total)


def is_capturing(device: torch.device) -> bool:
    """Tell whether the current stream of a type of device records a graph now."""
    import torch

    asked = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return bool(asked is not None and asked())


def graph_type(device_type: str) -> Any:
    """Return the class of captured graphs on `cuda` (ROCm too) or `xpu`.

    Raises:
        PlatformError: If torch is too old, or has no graphs on such devices.
    """
    if device_type == "xpu":
        return require("xpu.XPUGraph", since="2.11")
    if device_type == "cuda":
        return require("cuda.CUDAGraph", since="2.0")
    raise PlatformError(f"torch has no graphs on devices of type {device_type}")
