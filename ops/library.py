"""Show bound ops to torch.compile as `hal::` operators.

One operator a kind of op; its weights are real arguments, so that functionalization and the
planners of graph memory see what it reads, and an integer names the bound object. Outputs are
always fresh. This is a plain `torch.library.Library`: `custom_op` costs 10 to 20 us a call.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

from hal.errors import ArgumentError
from hal.torch_compat import register_fake

__all__ = ["all_bound", "enroll"]

_bound: WeakValueDictionary[int, Any] = WeakValueDictionary()
_keys = itertools.count()

_library = torch.library.Library("hal", "FRAGMENT")
_library.define("linear(Tensor x, Tensor[] tensors, int key) -> Tensor")
_library.define(
    "fused_moe(Tensor x, Tensor ids, Tensor weights, Tensor[] tensors, int key, "
    "Tensor? shared=None) -> Tensor"
)
_library.define("fused_moe_batched(Tensor x, Tensor counts, Tensor[] tensors, int key) -> Tensor")


def enroll(bound: Any) -> int:
    """Return a number by which operators find `bound` for as long as it lives."""
    key = next(_keys)
    _bound[key] = bound
    return key


def all_bound() -> list[Any]:
    """Return every bound op that lives."""
    return list(_bound.values())


def _run_linear(x: torch.Tensor, tensors: list[torch.Tensor], key: int) -> torch.Tensor:
    return _fresh(_find(key).run(x), x)


def _run_fused_moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tensors: list[torch.Tensor],
    key: int,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    return _fresh(_find(key).run(x, ids, weights, shared), x)


def _run_fused_moe_batched(
    x: torch.Tensor, counts: torch.Tensor, tensors: list[torch.Tensor], key: int
) -> torch.Tensor:
    return _fresh(_find(key).run_batched(x, counts), x)


def _find(key: int) -> Any:
    try:
        return _bound[key]
    except KeyError:
        raise ArgumentError(
            "hal operator", found=f"key {key}", needed="a live bound op", cure="keep it referenced"
        ) from None


def _fresh(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return out.clone() if out is x else out


_library.impl("linear", _run_linear, "CompositeExplicitAutograd")
_library.impl("fused_moe", _run_fused_moe, "CompositeExplicitAutograd")
_library.impl("fused_moe_batched", _run_fused_moe_batched, "CompositeExplicitAutograd")


@register_fake("hal::linear", lib=_library)
def _fake_linear(x: torch.Tensor, tensors: list[torch.Tensor], key: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], _find(key).rows_out)


@register_fake("hal::fused_moe", lib=_library)
def _fake_fused_moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tensors: list[torch.Tensor],
    key: int,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape)


@register_fake("hal::fused_moe_batched", lib=_library)
def _fake_fused_moe_batched(
    x: torch.Tensor, counts: torch.Tensor, tensors: list[torch.Tensor], key: int
) -> torch.Tensor:
    return x.new_empty(x.shape)
