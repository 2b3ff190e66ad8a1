"""Keep the binding of a module's own parameters, and make it anew once these were changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hal.integrations.conventions import (
    Convention,
    biases_of,
    convention_of,
    require_weights,
    weights_of,
)
from hal.integrations.replace import UNBOUND
from hal.ops.bound_experts import FusedMoE
from hal.ops.checks import stamp

__all__ = ["Kept", "Unquantized", "kept_binding"]


class Kept:
    """The binding of a module's own parameters, and what they were when it was made.

    Copies and pickles of a model start without one: a binding belongs to a device.
    """

    __slots__ = ("bound", "convention", "stamps", "weights")

    def __init__(self) -> None:
        self.convention: Convention | None = None
        self.bound: FusedMoE | None = None
        self.stamps: tuple[Any, ...] = ()
        self.weights: tuple[torch.Tensor, ...] = ()

    def __deepcopy__(self, memo: Any) -> Kept:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def examine(self, module: Any, name: str) -> Convention:
        """Return how the module keeps its weights and gates, or raise."""
        raise NotImplementedError

    def parameters(self, module: Any, convention: Convention) -> Sequence[torch.Tensor]:
        """Return what the binding is made of."""
        raise NotImplementedError

    def bind(self, module: Any, convention: Convention, dtype: torch.dtype) -> FusedMoE:
        """Return a new binding for activations of a dtype."""
        raise NotImplementedError

    def refresh(self, module: Any, dtype: torch.dtype) -> FusedMoE:
        """Return the binding, made anew if parameters were written, replaced or moved."""
        if self.convention is None:
            self.convention = self.examine(module, type(module).__name__)
        weights = self.parameters(module, self.convention)
        stamps = (dtype, *((id(weight), stamp(weight)) for weight in weights))
        if self.bound is None or stamps != self.stamps:
            # The old binding goes first: it may keep another copy of the weights alive.
            self.bound, self.stamps, self.weights = None, (), ()
            self.bound = self.bind(module, self.convention, dtype)
            # As long as these live, no other weights can take their addresses.
            self.weights = tuple(weight.detach() for weight in weights)
            self.stamps = stamps
        return self.bound


class Unquantized(Kept):
    """The binding of bf16 or fp16 experts."""

    __slots__ = ()

    def examine(self, module: Any, name: str) -> Convention:
        """Return how the module keeps its weights and gates, or raise."""
        return convention_of(module, name)

    def parameters(self, module: Any, convention: Convention) -> Sequence[torch.Tensor]:
        """Return weights and biases."""
        return convention.of(module)

    def bind(self, module: Any, convention: Convention, dtype: torch.dtype) -> FusedMoE:
        """Bind the weights as they are; their dtype decides."""
        require_weights(type(module).__name__, *convention.of(module))
        w13, w2 = weights_of(module, convention)
        return FusedMoE(w13, w2, **biases_of(module, convention), **convention.options)


def kept_binding(module: Any, kind: type[Kept], dtype: torch.dtype) -> FusedMoE:
    """Return the binding of a module's own parameters.

    Raises:
        ValueError: While torch.compile traces a module that was never called.
    """
    kept = module.__dict__.get(UNBOUND)
    if torch.compiler.is_compiling():
        if kept is None or kept.bound is None:
            # Dynamo cannot build hal's errors, and would hide the message.
            raise ValueError(
                "hal: these experts are not quantized by hal and were never called; "
                "call the model once before compiling it"
            )
        bound: FusedMoE = kept.bound
        return bound
    if kept is None:
        kept = module.__dict__[UNBOUND] = kind()
    found: FusedMoE = kept.refresh(module, dtype)
    return found
