"""Keep bindings for the functional forms `linear(x, weight)` and `fused_moe(x, w13, w2, ...)`.

A binding belongs to a weight object: it goes when the weight goes, and is made anew when the
weight was written in place since. Two biases, two platforms or two settings have two bindings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import ref

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hal.config import setting
from hal.errors import ArgumentError
from hal.ops.bound_experts import FusedMoE
from hal.ops.bound_linear import Linear
from hal.ops.checks import stamp
from hal.ops.prepare import Weight
from hal.quant.tensor import QTensor
from hal.runtime import platform_of

__all__ = ["bound_fused_moe", "bound_linear"]

B = TypeVar("B")

# The cache must not keep a weight alive, so what is bound is always another Python object than the
# key: a detached alias of a tensor, a copy of a QTensor's fields.
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def bound_linear(
    weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype, /, **options: Any
) -> Linear:
    """Return the binding of a weight, made on first use and again after the weight was written."""

    def bind() -> Linear:
        return Linear(_alias(weight), bias, dtype=dtype, **options)

    return _cached("linear", weight, (bias,), dtype, options, bind)


def bound_fused_moe(
    w13: Weight,
    w2: Weight,
    dtype: torch.dtype,
    /,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    **options: Any,
) -> FusedMoE:
    """Return the binding of weights and biases, made on first use and again after a write."""

    def bind() -> FusedMoE:
        return FusedMoE(
            _alias(w13), _alias(w2), w13_bias=w13_bias, w2_bias=w2_bias, dtype=dtype, **options
        )

    return _cached("fused_moe", w13, (w2, w13_bias, w2_bias), dtype, options, bind)


def _cached(
    op: str,
    first: Weight,
    others: tuple[Weight | None, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    bind: Callable[[], B],
) -> B:
    if "dtype" in options:
        raise ArgumentError(
            op, found="dtype among the options", needed="none", cure="the dtype of x decides"
        )
    where = platform_of(first.device, options.get("platform"))
    spec = where.device(first.device.index or 0)
    key = (
        op,
        dtype,
        id(spec),  # of the facts, which the binding keeps alive
        tuple(map(id, others)),
        setting("HAL_KERNEL"),
        setting("HAL_CHECK"),
        *sorted((name, value) for name, value in options.items() if name != "platform"),
    )
    bindings: Any = _cache.setdefault(first, {})
    stamps = _stamps(first), *map(_stamps, others)
    found = bindings.get(key)
    if found is not None and found[0] == stamps and _alive(found[1], others):
        kept: B = found[2]
        return kept
    made = bind()
    for old in [old for old, entry in bindings.items() if any(r() is None for r in entry[1])]:
        del bindings[old]
    bindings[key] = (stamps, [ref(other) for other in others if other is not None], made)
    return made


def _alive(refs: list[Any], others: tuple[Weight | None, ...]) -> bool:
    """Tell whether references lead to these very objects: an address may be used again."""
    given = [other for other in others if other is not None]
    return all(found() is other for found, other in zip(refs, given, strict=True))


def _stamps(weight: Weight | None) -> tuple[object, ...]:
    if weight is None:
        return ()
    return tuple(map(stamp, weight.tensors if isinstance(weight, QTensor) else (weight,)))


def _alias(weight: Weight) -> Weight:
    return replace(weight) if isinstance(weight, QTensor) else weight.detach()
