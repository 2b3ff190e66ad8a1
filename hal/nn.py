"""Hold quantized weights in `torch.nn` modules: `Linear` and `FusedMoE`.

Modules own their weights as buffers, so `state_dict`, `to`, `deepcopy` and `torch.save` work, and
bind them on the first call on a device. Casting a module (`half()`, `to(torch.float16)`) moves it
and leaves codes and scales as they are: they are not numbers in the dtype of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hal.errors import ArgumentError
from hal.ops import Routing
from hal.ops.bound import FusedMoE as BoundFusedMoE
from hal.ops.bound import Linear as BoundLinear
from hal.ops.prepare import Weight, as_qtensor
from hal.quant.quantize import quantize
from hal.quant.scheme import Scheme
from hal.quant.tensor import QTensor

__all__ = ["FusedMoE", "Linear"]


class _Quantized(torch.nn.Module):
    """Keep named `QTensor`s as buffers of bytes and scales, and one binding to them."""

    def __init__(self, weights: Mapping[str, QTensor], **options: Any) -> None:
        super().__init__()
        self._tags = {name: weight.metadata for name, weight in weights.items()}
        self._options = options
        self._binding: Any = None
        for name, weight in weights.items():
            for part, tensor in weight.state_dict().items():
                self.register_buffer(f"{name}_{part}", tensor)

    def weight_of(self, name: str) -> QTensor:
        """Return the quantized weight called `name`."""
        parts = {part: getattr(self, f"{name}_{part}", None) for part in ("values", "scales")}
        tensors = {part: tensor for part, tensor in parts.items() if tensor is not None}
        return QTensor.from_state_dict(tensors, self._tags[name])

    @property
    def weight_bytes(self) -> int:
        """Return the bytes that codes and scales take."""
        return sum(self.weight_of(name).nbytes for name in self._tags)

    def get_extra_state(self) -> torch.Tensor:
        """Return the tags of the weights as JSON in a byte tensor, which every format can keep."""
        return torch.tensor(list(json.dumps(self._tags).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that tags are those of the weights that this module holds.

        Raises:
            ArgumentError: If scheme, encoding, layout or shape differ.
        """
        tags = json.loads(bytes(state.tolist()))
        if tags != self._tags:
            raise ArgumentError(
                type(self).__name__,
                found=f"a state of {tags}",
                needed=f"{self._tags}",
                cure="build the module from weights of that scheme and shape before loading",
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> None:
        # Torch would look at the tags after the bytes have been overwritten.
        tags = state_dict.get(f"{prefix}_extra_state")
        if tags is not None:
            self.set_extra_state(tags)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self._binding = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_binding": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Only the move counts: scales are float32 whatever the model's dtype is.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        own = {name for name, _ in self.named_buffers(recurse=False) if name != "bias"}
        kept = {name: self._buffers.pop(name) for name in own}
        super()._apply(fn, recurse)
        self._buffers.update(
            {name: None if tensor is None else move(tensor) for name, tensor in kept.items()}
        )
        self._binding = None
        return self


class Linear(_Quantized):
    """A linear layer over a quantized weight.

    Args:
        weight: `[N, K]` QTensor, or a bf16 or fp16 tensor.
        bias: `[N]` or None.
        **options: Options of `hal.ops.Linear`.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None, **options: Any) -> None:
        super().__init__({"weight": as_qtensor("hal.nn.Linear", weight)}, **options)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_module(cls, module: torch.nn.Linear, scheme: str | Scheme, **options: Any) -> Linear:
        """Return the quantized form of a `torch.nn.Linear`, which stays as it is."""
        weight = quantize(module.weight, scheme, platform=options.get("platform"))
        return cls(weight, module.bias, **options)

    @property
    def bound(self) -> BoundLinear:
        """Return the bound op, made on first use."""
        if self._binding is None:
            weight = self.weight_of("weight")
            dtype = None if self.bias is None else self.bias.dtype
            self._binding = BoundLinear(weight, self.bias, **{"dtype": dtype, **self._options})
        found: BoundLinear = self._binding
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for `[..., K]`."""
        return (self._binding or self.bound)(x)

    def extra_repr(self) -> str:
        """Return shape and scheme."""
        tags = self._tags["weight"]
        return f"[{tags['logical_shape']}], {tags['scheme']}, bias={self.bias is not None}"


class FusedMoE(_Quantized):
    """A mixture of experts over quantized weights.

    Args:
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows.
        w2: `[experts, hidden, intermediate]`.
        **options: Options of `hal.ops.FusedMoE`, such as `activation`.
    """

    def __init__(self, w13: Weight, w2: Weight, **options: Any) -> None:
        weights = {
            "w13": as_qtensor("hal.nn.FusedMoE", w13),
            "w2": as_qtensor("hal.nn.FusedMoE", w2),
        }
        super().__init__(weights, **options)

    @property
    def bound(self) -> BoundFusedMoE:
        """Return the bound op, made on first use."""
        if self._binding is None:
            weights = self.weight_of("w13"), self.weight_of("w2")
            self._binding = BoundFusedMoE(*weights, **self._options)
        found: BoundFusedMoE = self._binding
        return found

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return `[tokens, hidden]`, the sum over each token's experts."""
        return (self._binding or self.bound)(x, routing)

    def extra_repr(self) -> str:
        """Return shapes and scheme."""
        tags = self._tags
        return (
            f"w13 [{tags['w13']['logical_shape']}], w2 [{tags['w2']['logical_shape']}], "
            f"{tags['w13']['scheme']}"
        )
