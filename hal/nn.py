"""Hold quantized weights in `torch.nn` modules: `Linear` and `FusedMoE`.

Modules own their weights as buffers, so `state_dict`, `to`, `deepcopy` and `torch.save` work, and
bind them on the first call on a device, and again after a buffer was written or replaced. Casting a
module to bf16 or fp16 (`half()`) changes the dtype of the activations that it takes, of its bias
and of weights under scheme `bf16`. Codes and scales stay as they are: they are not numbers in the
dtype of the model. A cast to any other dtype moves only: there is no activation of that dtype to
compute with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.ops import Routing
from hal.ops.bound_experts import FusedMoE as BoundFusedMoE
from hal.ops.bound_linear import Linear as BoundLinear
from hal.ops.checks import ACTIVATION_DTYPES, stamp
from hal.ops.expert_layer import Updates
from hal.ops.prepare import Weight, activation_dtype, as_qtensor, check_bias, check_experts
from hal.quant.quantize import quantize
from hal.quant.scheme import Scheme, find_scheme
from hal.quant.tensor import TENSORS, QTensor
from hal.torch_compat import is_compiling_function

__all__ = ["FusedMoE", "Linear"]

is_compiling = is_compiling_function()
HALVES = (torch.bfloat16, torch.float16)


class _Options(dict[str, Any]):
    """Options of a binding. A copied module shares their values: a platform is not copied."""

    def __deepcopy__(self, memo: Any) -> _Options:
        return _Options(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A platform that is here cannot travel; where the module is loaded, that of its device is.
        kept = dict(self)
        platform = kept.get("platform")
        if platform is not None and not isinstance(platform, str) and not platform.simulated:
            del kept["platform"]
        return _Options, (kept,)


class _Quantized(torch.nn.Module):
    """Keep named `QTensor`s as buffers of bytes and scales, and one binding to them."""

    def __init__(self, weights: Mapping[str, QTensor], **options: Any) -> None:
        super().__init__()
        self._tags = {name: weight.metadata for name, weight in weights.items()}
        self._options = _Options(options)
        self._unbind()
        for name, weight in weights.items():
            for part, tensor in weight.state_dict().items():
                self.register_buffer(f"{name}_{part}", tensor)

    def _bind(self) -> Any:
        raise NotImplementedError

    def _unbind(self) -> None:
        """Forget the binding and all that it was made from, which may be on another device."""
        self._binding: Any = None
        self._stamps: list[Any] = []
        self._parts: list[torch.Tensor] = []

    def _bound(self) -> Any:
        """Return the bound op, made on first use and again after a buffer was written."""
        if is_compiling():
            if self._binding is None:
                # Dynamo cannot build hal's errors, and would hide the message.
                raise ValueError(
                    "hal.nn: nothing is bound since this module was made, loaded or moved; "
                    "call it once before compiling it"
                )
            return self._binding
        parts, stamps = self._seen()
        if self._binding is None or stamps != self._stamps:
            self._unbind()  # first: it may keep another copy of the weights alive
            # As long as these parts live, no others can take their addresses.
            self._binding, self._stamps, self._parts = self._bind(), stamps, parts
        return self._binding

    def _seen(self) -> tuple[list[torch.Tensor], list[Any]]:
        """Return the buffers, and what changes when one is written or replaced."""
        parts = [part for part in self._buffers.values() if part is not None]
        return parts, [(id(part), stamp(part)) for part in parts]

    def _reload(self, weights: dict[str, QTensor], **biases: torch.Tensor | None) -> None:
        """Put weights and biases into the buffers and into the memory of the binding."""
        bound = self._bound()
        for name, weight in weights.items():
            if weight.metadata != self._tags[name]:
                raise ArgumentError(
                    f"{type(self).__name__}.reload: {name}",
                    found=weight.metadata,
                    needed=self._tags[name],
                    cure="make a module of the new weights",
                )
        bound.reload(*weights.values(), **biases)
        new = {name: bias for name, bias in biases.items() if bias is not None}
        for name, weight in weights.items():
            new |= {f"{name}_{part}": tensor for part, tensor in weight.state_dict().items()}
        with torch.inference_mode():
            for name, tensor in new.items():
                held = self.get_buffer(name)
                if held.data_ptr() != tensor.data_ptr():
                    held.copy_(tensor)
        self._parts, self._stamps = self._seen()

    def weight_of(self, name: str) -> QTensor:
        """Return the quantized weight called `name`."""
        parts = {part: getattr(self, f"{name}_{part}", None) for part in TENSORS}
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
        # Torch would look at the tags after the bytes have been overwritten, and would cast.
        own = {f"{prefix}{name}": tensor for name, tensor in self._buffers.items()}
        given = {key: tensor for key, tensor in own.items() if key in state_dict}
        tags = state_dict.get(f"{prefix}_extra_state")
        if tags is not None:
            self.set_extra_state(tags)
        elif any(not key.endswith("bias") for key in given):
            raise ArgumentError(
                f"loading {prefix.rstrip('.') or type(self).__name__}",
                found=f"weights without {prefix}_extra_state, which says what the bytes mean",
                needed="every key that state_dict() gave",
            )
        for key, tensor in given.items():
            new = state_dict[key]
            if tensor is not None and (new.dtype, new.shape) != (tensor.dtype, tensor.shape):
                raise ArgumentError(
                    f"loading {key}",
                    found=f"{new.dtype} {list(new.shape)}",
                    needed=f"{tensor.dtype} {list(tensor.shape)}",
                )
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self._unbind()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_binding": None, "_stamps": [], "_parts": []}

    def _is_number(self, name: str) -> bool:
        """Return whether the buffer holds numbers in the dtype of the activations."""
        stem, _, part = name.rpartition("_")
        return part == "bias" or (part == "values" and f"{stem}_scales" not in self._buffers)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            castable = self._is_number(name) and moved.dtype in HALVES
            kept = moved.dtype is tensor.dtype or castable
            return moved if kept else tensor.to(moved.device)

        # All is moved before anything is replaced: where that fails, the module stays whole.
        buffers = self._buffers
        present = {name: tensor for name, tensor in buffers.items() if tensor is not None}
        moved = {name: move(name, tensor) for name, tensor in present.items()}
        probe = next(iter(present.values())).new_empty(0, dtype=self.activation_dtype)
        dtype = fn(probe).dtype
        self._buffers = {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = buffers
        buffers.update(moved)
        for name, tags in self._tags.items():
            if self._is_number(f"{name}_values"):
                encoding = str(moved[f"{name}_values"].dtype).removeprefix("torch.")
                self._tags[name] = {**tags, "encoding": encoding}
        if dtype in HALVES:
            self._options["dtype"] = dtype
        self._unbind()
        return self

    @property
    def activation_dtype(self) -> torch.dtype:
        """Return the dtype of the activations that this module takes."""
        given: torch.dtype | None = self._options.get("dtype")
        bias = self._buffers.get("bias")
        if given is None and bias is not None:
            given = bias.dtype
        return activation_dtype(type(self).__name__, self.weight_of(next(iter(self._tags))), given)


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
        if bias is not None and bias.dtype not in HALVES:
            raise DTypeError(
                "hal.nn.Linear",
                found=f"bias of {bias.dtype}",
                needed=" or ".join(ACTIVATION_DTYPES),
            )
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(
                "hal.nn.Linear", found=f"bias {list(bias.shape)}", needed=f"[{self.out_features}]"
            )
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Linear,
        scheme: str | Scheme,
        *,
        input_scale: torch.Tensor | float | None = None,
        input_zero: torch.Tensor | int | None = None,
        **options: Any,
    ) -> Linear:
        """Return the quantized form of a `torch.nn.Linear`, which stays as it is.

        Args:
            module: A linear in bf16 or fp16; in float32 only with `dtype` among the options.
            scheme: Name of a scheme.
            input_scale: Scale of the activations of a static scheme (`hal.quant.input_scale`).
            input_zero: Their zero point, where the scheme has one (`hal.quant.input_range`).
            **options: Options of `hal.ops.Linear`; `dtype` is that of the module by default.

        Raises:
            DTypeError: If there is no dtype for the activations.
        """
        dtype = options.setdefault("dtype", module.weight.dtype)
        if dtype not in HALVES:
            raise DTypeError(
                "hal.nn.Linear.from_module",
                found=f"activations of {dtype}",
                needed=" or ".join(ACTIVATION_DTYPES),
                cure="module.to(torch.bfloat16), or dtype=torch.bfloat16",
            )
        plain = find_scheme(scheme).weight.format is None
        # A copy under scheme bf16: what is loaded later must not write into the source's weight.
        source = module.weight.detach().to(dtype, copy=True) if plain else module.weight
        weight = quantize(
            source,
            scheme,
            platform=options.get("platform"),
            input_scale=input_scale,
            input_zero=input_zero,
        )
        given = module._parameters["bias"]
        bias = None if given is None else given.detach().to(dtype, copy=True)
        return cls(weight, bias, **options)

    @property
    def in_features(self) -> int:
        """Return the size of an input row."""
        return self._sizes[1]

    @property
    def out_features(self) -> int:
        """Return the size of an output row."""
        return self._sizes[0]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self._tags["weight"]["logical_shape"].split(","))

    def _bind(self) -> BoundLinear:
        options = {**self._options, "dtype": self.activation_dtype}
        return BoundLinear(self.weight_of("weight"), self.bias, **options)

    @property
    def bound(self) -> BoundLinear:
        """Return the bound op, made on first use."""
        found: BoundLinear = self._bound()
        return found

    def reload(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        """Put a new weight in the place of the old, as `hal.ops.Linear.reload` does.

        Raises:
            ArgumentError: Of the kind that fits the fault; nothing was changed.
        """
        self._reload({"weight": as_qtensor("hal.nn.Linear.reload", weight)}, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for `[..., K]`."""
        return self._bound()(x)

    def extra_repr(self) -> str:
        """Return shape and scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._tags['weight']['scheme']}"
        )


class FusedMoE(_Quantized):
    """A mixture of experts over quantized weights.

    Args:
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows.
        w2: `[experts, hidden, intermediate]`.
        w13_bias: `[experts, rows of w13]` float32, bf16 or fp16, or None.
        w2_bias: `[experts, hidden]`, or None.
        **options: Options of `hal.ops.FusedMoE`, such as `activation`.
    """

    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None

    def __init__(
        self,
        w13: Weight,
        w2: Weight,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        weights = {
            "w13": as_qtensor("hal.nn.FusedMoE", w13),
            "w2": as_qtensor("hal.nn.FusedMoE", w2),
        }
        check_experts(weights["w13"], weights["w2"], options.get("gated", True))
        super().__init__(weights, **options)
        for name, bias in (("w13", w13_bias), ("w2", w2_bias)):
            where, shape = f"hal.nn.FusedMoE: {name}_bias", tuple(weights[name].shape[:2])
            bias = check_bias(where, bias, shape, weights[name].device)
            self.register_buffer(f"{name}_bias", bias)

    def _bind(self) -> BoundFusedMoE:
        return BoundFusedMoE(
            self.weight_of("w13"),
            self.weight_of("w2"),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            **self._options,
        )

    @property
    def bound(self) -> BoundFusedMoE:
        """Return the bound op, made on first use."""
        found: BoundFusedMoE = self._bound()
        return found

    def reload(
        self,
        w13: Weight,
        w2: Weight,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
    ) -> None:
        """Put new weights in the place of the old, as `hal.ops.FusedMoE.reload` does.

        Raises:
            ArgumentError: Of the kind that fits the fault; nothing was changed.
        """
        where = "hal.nn.FusedMoE.reload"
        weights = {"w13": as_qtensor(where, w13), "w2": as_qtensor(where, w2)}
        self._reload(weights, w13_bias=w13_bias, w2_bias=w2_bias)

    def forward(
        self,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        *,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        """Return `[tokens, hidden]`, the sum over each token's experts and a shared output."""
        return self._bound()(x, routing, shared=shared, updates=updates)

    def extra_repr(self) -> str:
        """Return shapes and scheme."""
        experts, hidden, intermediate = self._tags["w2"]["logical_shape"].split(",")
        return (
            f"experts={experts}, hidden={hidden}, intermediate={intermediate}, "
            f"{self._tags['w13']['scheme']}"
        )
