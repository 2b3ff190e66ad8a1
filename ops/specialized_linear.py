"""Say when rows meet one coded weight in the kernel whose warps specialize, and with which tile.

`kernels.warp_specialized_packed` is Gluon's, for Hopper. Fewer rows are multiplied straight from
memory; for more of them a weight is expanded first. Elsewhere, and for what the kernel does not
read, `kernels.linear` does the same. Bounds are those of an H200 (benchmarks/linear.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.ops.specialized_experts import arranged
from hal.ops.tiles import (
    SPECIALIZED_KINDS,
    specialized_rows,
    specialized_rows_tile,
    specializes_warps,
)

if TYPE_CHECKING:
    import torch

    from hal.ops.binding import Binding, Tensors
    from hal.ops.kernels.kinds import Weight
    from hal.ops.kernels.warp_specialized_packed import Coded

__all__ = ["SpecializedRows", "specialized_linear"]


def specialized_linear(
    binding: Binding, kind: str, shape: tuple[int, ...]
) -> SpecializedRows | None:
    """Return what multiplies by a weight `[N, K]` of a kind, or None where no such kernel runs."""
    from hal.ops.kernels.common import has_gluon

    spec = binding.spec
    if kind not in SPECIALIZED_KINDS or not specializes_warps(spec.platform, spec.arch.name):
        return None
    decodes = kind.endswith("_decode")
    if not has_gluon() or (decodes and binding.problem("dtype", "bfloat16") != "bfloat16"):
        return None
    return SpecializedRows(
        kind, shape, spec.compute_units or 64, spec.shared_memory_bytes or 0, decodes
    )


class SpecializedRows:
    """Multiply rows by a weight that stays the same from call to call, which is described once.

    Args:
        kind: Of `SPECIALIZED_KINDS`.
        shape: Sizes (N, K) of the weight.
        compute_units: Programs that run at once.
        shared_memory_bytes: The most that one may use.
        decodes: Whether rows are of 16 bits, beside weights that are decoded.
    """

    __slots__ = ("_bounds", "_coded", "_decodes", "_device", "_kind", "_seen", "_shape")

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        compute_units: int,
        shared_memory_bytes: int,
        decodes: bool,
    ) -> None:
        self._kind, self._decodes = kind, decodes
        self._shape = shape[0], shape[1]
        self._device = compute_units, shared_memory_bytes
        self._bounds = specialized_rows(kind, *self._shape)
        self._seen: Tensors = ()
        self._coded: Coded | None = None

    def takes(self, rows: int) -> bool:
        """Say whether the kernel is the one for so many rows."""
        least, most = self._bounds
        return least <= rows <= most

    def multiply(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        weight: Weight,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        a_scales: torch.Tensor | None = None,
    ) -> bool:
        """Write the product of rows that it `takes` to out; say whether it reads this weight.

        Args:
            x: `[rows, K]` bf16, or e4m3fn with a_scales `[rows]`.
            tensors: What is bound: other tensors make another description.
            weight: The same, as `as_weight` returned it.
            out: `[rows, N]` bf16.
            bias: `[N]` or None.
            a_scales: Of rows of 8 bits, which the launch before quantized.
        """
        from hal.ops.kernels.warp_specialized_packed import warp_specialized_packed_rows

        coded = self._described(tensors, weight)
        if coded is None:
            return False
        units, shared_memory_bytes = self._device
        tile = specialized_rows_tile(
            self._kind, x.shape[0], *self._shape, coded.step,
            compute_units=units, shared_memory_bytes=shared_memory_bytes,
        )  # fmt: skip
        rows, options = arranged(x, tile) if self._decodes else (x, {})
        # The launch before is then one of this product.
        dependent = rows is not x or a_scales is not None
        warp_specialized_packed_rows(
            rows, coded, out, tile=tile, programs=units, dependent=dependent, bias=bias,
            a_scales=a_scales, **options,
        )  # fmt: skip
        return True

    def _described(self, tensors: Tensors, weight: Weight) -> Coded | None:
        from hal.ops.kernels.warp_specialized_packed import Coded

        seen = self._seen
        if len(seen) != len(tensors) or any(a is not b for a, b in zip(seen, tensors, strict=True)):
            self._coded = Coded.of_matrix(self._kind, weight)
            self._seen = tensors
        return self._coded
