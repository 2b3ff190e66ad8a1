"""Keep bindings for the functional forms `linear(x, weight)` and `fused_moe(x, w13, w2, ...)`.

A binding belongs to a weight object: it goes when the weight goes, and is made anew when the
weight was written in place since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import ref

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hal.ops.bound import FusedMoE, Linear
from hal.ops.prepare import Weight
from hal.quant.tensor import QTensor

__all__ = ["bound_fused_moe", "bound_linear"]

B = TypeVar("B")

# The cache must not keep a weight alive, so what is bound is always another Python object than the
# key: a detached alias of a tensor, a copy of a QTensor's fields.
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def bound_linear(
    weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype, **options: Any
) -> Linear:
    """Return the binding of a weight, made on first use and again after the weight was written."""

    def bind() -> Linear:
        return Linear(_alias(weight), bias, dtype=dtype, **options)

    return _cached(weight, bias, ("linear", dtype, *sorted(options.items())), bind)


def bound_fused_moe(w13: Weight, w2: Weight, dtype: torch.dtype, **options: Any) -> FusedMoE:
    """Return the binding of two weights, made on first use and again after one was written."""

    def bind() -> FusedMoE:
        return FusedMoE(_alias(w13), _alias(w2), dtype=dtype, **options)

    return _cached(w13, w2, ("fused_moe", dtype, *sorted(options.items())), bind)


def _cached(first: Weight, second: Weight | None, key: Any, bind: Callable[[], B]) -> B:
    bindings: Any = _cache.setdefault(first, {})
    versions = _versions(first), _versions(second)
    found = bindings.get(key)
    if found is not None and found[0] == versions and found[1]() is second:
        kept: B = found[2]
        return kept
    made = bind()
    bindings[key] = (versions, (lambda: None) if second is None else ref(second), made)
    return made


def _versions(weight: Weight | None) -> tuple[int, ...]:
    """Return counts of in-place writes; those to inference tensors are not counted by torch."""
    if weight is None:
        return ()
    tensors = weight.tensors if isinstance(weight, QTensor) else (weight,)
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def _alias(weight: Weight) -> Weight:
    return replace(weight) if isinstance(weight, QTensor) else weight.detach()
