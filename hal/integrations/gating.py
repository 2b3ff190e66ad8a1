"""Find out which activation the experts of a module apply, by running its own function on numbers.

What a module calls `alpha` and `limit` is tried, and counts only if the numbers agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from hal.errors import UnsupportedModelError
from hal.ops.activations import ACTIVATIONS, Activation, activate, activation_of

__all__ = ["activation_alone", "gating_of"]


def _ladder() -> torch.Tensor:
    """Return numbers that reach far enough to show limits (gpt-oss clamps at 7).

    float64 keeps unlike spellings of one function alike where they cancel.
    """
    magnitudes = torch.logspace(-3, 5, 64, dtype=torch.float64)
    return torch.cat((-magnitudes, torch.zeros(1, dtype=torch.float64), magnitudes))


def _run(function: Any, columns: torch.Tensor, where: str) -> torch.Tensor:
    """Return what a module's own function gives, in float64."""
    try:
        with torch.no_grad():
            found: torch.Tensor = function(columns.clone()).double()
    except Exception as error:
        raise UnsupportedModelError(
            where, found=f"a gating that fails on the CPU: {error}", needed="a pure function"
        ) from error
    return found


def _matches(found: torch.Tensor, rows: torch.Tensor, how: Activation) -> bool:
    expected = activate(rows, how)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5)


def activation_alone(module: Any, where: str) -> Activation:
    """Return the activation of experts without a gate, found by running it.

    Raises:
        UnsupportedModelError: If it is none that hal knows.
    """
    rows = _ladder().unsqueeze(0)
    found = _run(module.act_fn, rows, where)
    for how in (Activation(name, gated=False) for name in ACTIVATIONS if name != "swiglu_oai"):
        if _matches(found, rows, how):
            return how
    raise UnsupportedModelError(
        where,
        found=f"the unknown activation {module.act_fn!r}",
        needed=" or ".join(name for name in ACTIVATIONS if name != "swiglu_oai"),
    )


def _candidates(module: Any, where: str) -> Iterator[Activation]:
    """Yield activations, with the usual numbers and with those that the module calls its own."""
    own = {name: getattr(module, name, None) for name in ("alpha", "limit")}
    alpha, limit = (
        value if isinstance(value, float | int) and 0 < value < float("inf") else None
        for value in own.values()
    )
    for name in ACTIVATIONS:
        yield activation_of(where, name)
        if limit is not None or (alpha is not None and name == "swiglu_oai"):
            yield activation_of(
                where, name, alpha=alpha if name == "swiglu_oai" else None, limit=limit
            )


def gating_of(module: Any, where: str) -> Activation:
    """Return the activation with its numbers and the order of columns, found by running it.

    Raises:
        UnsupportedModelError: If it is none that hal knows, or fails on the CPU.
    """
    ladder = _ladder()
    generator = torch.Generator().manual_seed(0)
    shuffled = ladder[torch.randperm(ladder.numel(), generator=generator)]
    halves = torch.cat((ladder, shuffled)).unsqueeze(0)
    pairs = torch.stack((ladder, shuffled), -1).flatten().unsqueeze(0)
    for interleaved, columns in ((False, halves), (True, pairs)):
        found = _run(module._apply_gate, columns, where)
        for how in _candidates(module, where):
            if _matches(found, halves, how):
                return replace(how, interleaved=interleaved)
    gate = f"{type(module).__name__}._apply_gate with {getattr(module, 'act_fn', None)!r}"
    raise UnsupportedModelError(
        where,
        found=f"the unknown gating {gate}",
        needed=" or ".join(ACTIVATIONS) + " of gate, times up",
    )
