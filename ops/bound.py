"""Hold what ops that are bound to weights share: `Linear` and `FusedMoE`.

Binding selects the kernel, brings weights into its encoding and layout, and checks their values.
A call checks shapes, dtype and device from attributes and starts the launcher: no registry, no
environment, no question about the architecture. Weights and bias are read as constants: an input
or a routing that requires a gradient is refused, a weight that does gets none. Under
`torch.compile` a call is one opaque `hal::` operator whose weights are real arguments, so that
compilers see what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch

from hal.config import setting
from hal.errors import ValueRangeError
from hal.ops.binding import Binding, Tensors
from hal.ops.library import enroll
from hal.ops.prepare import prepare
from hal.ops.reload import Traits, require_alike, require_reloadable, traits
from hal.protocol import Platform
from hal.quant.tensor import QTensor
from hal.selection import Selection

__all__ = ["BIND_HOOKS", "READ_BY_CALLS", "WARMING", "Bound"]

BIND_HOOKS: list[Callable[[Bound], None]] = []
"""Called with each op once it is bound; `hal.record_shapes` hooks here, so that calls need not."""
WARMING: ContextVar[bool] = ContextVar("hal_warming", default=False)
"""Whether calls are no real ones, but those of `Bound.warm`."""

# What a call reads is declared by each op itself, although their base declares it too: before
# 2.8, torch.compile reads no inherited slot (see the quirk `compile-inherited-slots`).
READ_BY_CALLS = ("_checks", "_dtype", "_launch", "key", "tensors")


class Bound:
    """What every bound op holds.

    Attributes:
        selection: Which kernel was chosen, with every candidate and its reasons.
        platform: Platform that the op is bound to.
        tensors: Exactly what the kernel reads, in its layout and encoding.
        key: Number by which a compiled graph finds this object.
    """

    __slots__ = (
        "__weakref__",
        "_binding",
        "_checks",
        "_dtype",
        "_launch",
        "_traits",
        "key",
        "platform",
        "selection",
        "tensors",
    )
    op: ClassVar[str]

    def __init__(self, binding: Binding, dtype: torch.dtype) -> None:
        self._binding = binding
        self._traits: dict[str, Traits] = {}
        self.selection: Selection = binding.selection
        self.platform: Platform = binding.platform
        self.tensors: Tensors = ()
        self._dtype = dtype
        self._checks = setting("HAL_CHECK") == "1"
        self.key = enroll(self)

    @property
    def kernel(self) -> str:
        """Return the name of the kernel that runs."""
        return str(self.selection.kernel and self.selection.kernel.name)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the kernel's weights and scales take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _finish(
        self, bound: tuple[Callable[..., torch.Tensor], Tensors], device: torch.device
    ) -> None:
        """Keep what a binder returned, once the weights are ready for every stream."""
        launch, self.tensors = bound[0], tuple(bound[1])
        several = self.platform.device_count() > 1
        self._launch = _on_device(launch, device) if several else launch
        # Weights may have been written on any stream; whoever calls later need not know which.
        with self.platform.ordered(self.tensors):
            pass
        self.platform.wait(self.tensors)
        for hook in tuple(BIND_HOOKS):
            hook(self)

    def warm(self, tokens: Sequence[int], **dtypes: torch.dtype) -> None:
        """Compile what calls with so many tokens launch, by running each once on zeros.

        Numbers of tokens between two powers of two of rows per weight mostly share their kernels;
        `hal.no_compiles` tells what is missing.

        Args:
            tokens: Numbers of rows of x; rows of each expert where the format is batched.
            **dtypes: Of experts, `ids` and `weights` of the routings to come, where they are not
                those of `hal.ops.route`, int32 and float32.

        Raises:
            ValueRangeError: For a number that is not at least 1; nothing was run.
            ArgumentError: If the op was bound without a size that its calls have.
        """
        wrong: list[Any] = [count for count in tokens if type(count) is not int or count < 1]
        if wrong:
            raise ValueRangeError(
                f"{self.op}: warmup", found=repr(wrong[0]), needed="whole numbers of tokens, >= 1"
            )
        token = WARMING.set(True)
        try:
            for count in tokens:
                self._warm(count, **dtypes)
        finally:
            WARMING.reset(token)

    def _warm(self, tokens: int, **dtypes: torch.dtype) -> None:
        raise NotImplementedError

    def _prepare(
        self, weights: dict[str, QTensor], inplace: bool, **biases: torch.Tensor | None
    ) -> list[QTensor]:
        """Return the weights as the kernel reads them, and remember of what kind all are."""
        prepared = {
            name: prepare(self._binding, part, name, inplace=inplace)
            for name, part in weights.items()
        }
        self._traits = {name: traits(part) for name, part in (*prepared.items(), *biases.items())}
        return list(prepared.values())

    def _prepare_again(
        self, weights: dict[str, QTensor], **biases: torch.Tensor | None
    ) -> list[QTensor]:
        """Return others as the kernel reads them; raise unless they are of the same kind."""
        kernel = self.selection.kernel
        assert kernel is not None
        require_reloadable(f"{self.op}.reload", kernel)
        for name, part in (*weights.items(), *biases.items()):
            names = ("device", "scheme", "shape") if name in weights else ()
            require_alike(f"{self.op}.reload: {name}", traits(part), self._traits[name], *names)
        prepared = {name: prepare(self._binding, part, name) for name, part in weights.items()}
        for name, part in prepared.items():
            require_alike(f"{self.op}.reload: {name}", traits(part), self._traits[name])
        return list(prepared.values())

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        # A binding is immutable and its weights are shared on purpose.
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} is bound to a device; save its QTensor instead")


def _on_device(launch: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., Any]:
    """Return `launch` with the device made current: Triton starts kernels on the current one."""
    guard = getattr(torch, device.type).device

    def guarded(*arguments: Any) -> torch.Tensor:
        with guard(device.index):
            return launch(*arguments)

    return guarded
