"""Say when products of experts run with warps that specialize, and with which tiles.

Their kernels are Gluon's, for Hopper: `warp_specialized` for 8-bit floats under 128x128 scales and
many rows an expert, `warp_specialized_packed` for weights that are decoded. Elsewhere, and for
what those do not read, `grouped_gemm` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hal.ops.linear import scale_names

if TYPE_CHECKING:
    from hal.ops.binding import Binding
    from hal.ops.kernels.warp_specialized_packed import Coded
    from hal.ops.tiles import Tile

__all__ = ["SpecializedProducts", "arranged", "specialized_products"]


IN_ORDER: dict[str, Any] = {"ordered": True}
ROWS_IN_ORDER = 32
"""From tiles of so many rows on, bringing rows into order pays (H200)."""


@dataclass(frozen=True)
class SpecializedProducts:
    """Hold the kernel of both products.

    Attributes:
        multiply: Takes the arguments of `grouped_gemm`.
        tiles: Returns the tiles of both for (rows an expert, experts with rows, elements of the
            larger operand), or None where the ordinary product runs: it gives the same numbers.
        decodes: Whether rows are those that come, of 16 bits, beside weights that are decoded.
        begins_early: Whether `multiply` takes the option `dependent`.
    """

    multiply: Callable[..., None]
    tiles: Callable[[int, int, int], tuple[Tile, Tile] | None]
    decodes: bool
    begins_early: bool = True

    def arranged(self, x: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return activations as the kernel copies them, and the option that says how they lie."""
        return arranged(x, tile) if self.decodes else (x, {})

    def step_of_gate(self, tile: Tile) -> int:
        """Return the order in which a gate writes its rows: `step` of `silu_and_mul`."""
        return tile.block_k if self.decodes else 0


def arranged(x: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return rows of 16 bits as `warp_specialized_packed` copies them, and how they lie.

    Rows are whole 16 bytes. Where tiles have many of them, each of which is copied for every tile
    of channels, they are brought into the order of codes: a launch more.
    """
    if tile.block_m >= ROWS_IN_ORDER:
        from hal.ops.kernels.step_order import order_rows

        return order_rows(x if x.stride(-1) == 1 else x.contiguous(), tile.block_k), IN_ORDER
    whole = x.stride(-1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format), {}


def specialized_products(
    binding: Binding,
    kinds: tuple[str, str],
    inner: tuple[int, int],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
) -> SpecializedProducts | None:
    """Return what multiplies both weights, or None where no such kernel runs or reads them.

    Args:
        binding: What is bound.
        kinds: Of both products.
        inner: Elements along k of both.
        first: Codes of w13, and the tensors that `scale_names` names.
        second: Those of w2.
    """
    from hal.ops.kernels.common import MAX_OFFSET_32, has_gluon
    from hal.ops.tiles import (
        ROWS_BEFORE_SPECIALIZING,
        SPECIALIZED_KINDS,
        WARP_SPECIALIZED,
        specialized_tile,
        specializes_warps,
    )

    spec = binding.spec
    if not specializes_warps(spec.platform, spec.arch.name) or not has_gluon():
        return None
    # Imported late: older Tritons have no such language.
    from hal.ops.kernels import warp_specialized, warp_specialized_packed
    from hal.ops.kernels.kinds import as_weight, by_row

    units = spec.compute_units or 64
    if all(
        warp_specialized.fits(kind, part[0])
        for kind, part in zip(kinds, (first, second), strict=True)
    ):

        def both(rows: int, matrices: int, elements: int) -> tuple[Tile, Tile] | None:
            if rows <= ROWS_BEFORE_SPECIALIZING or elements > MAX_OFFSET_32:
                return None
            return WARP_SPECIALIZED, WARP_SPECIALIZED

        multiply = partial(warp_specialized.warp_specialized_gemm, programs=units)
        return SpecializedProducts(multiply, both, decodes=False, begins_early=False)
    if not SPECIALIZED_KINDS.issuperset(kinds):
        return None
    decodes = kinds[0].endswith("_decode")
    if decodes and binding.problem("dtype", "bfloat16") != "bfloat16":
        return None
    sizes = []
    for kind, k, (codes, *scales) in zip(kinds, inner, (first, second), strict=True):
        named: dict[str, Any] = dict(zip(scale_names(kind), scales, strict=False))
        weight = by_row(kind, as_weight(kind, k, codes, **named))
        if not warp_specialized_packed.fits(kind, weight):
            return None
        sizes.append((kind, codes.shape[1], warp_specialized_packed.step_of(kind, weight)))

    def tiles(rows: int, matrices: int, elements: int) -> tuple[Tile, Tile]:
        one, other = (
            specialized_tile(
                kind, rows, n, step, matrices=matrices, compute_units=units,
                shared_memory_bytes=spec.shared_memory_bytes or 0,
            )
            for kind, n, step in sizes
        )  # fmt: skip
        return one, other

    return SpecializedProducts(_Held(units), tiles, decodes)


class _Held:
    """Multiply weights that stay the same from call to call, which are described once.

    Args:
        programs: How many run at once.
    """

    __slots__ = ("_coded", "_programs")
    # Of both products.
    MOST = 2

    def __init__(self, programs: int) -> None:
        self._programs = programs
        self._coded: dict[int, tuple[torch.Tensor, torch.Tensor, Coded]] = {}

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        *places: torch.Tensor,
        kind: str,
        b_scales: torch.Tensor,
        b_second: torch.Tensor | None = None,
        fnuz: bool = False,
        **options: Any,
    ) -> None:
        from hal.ops.kernels.warp_specialized_packed import Coded, warp_specialized_packed_gemm

        found = self._coded.get(id(b))
        if found is None or found[0] is not b or found[1] is not b_scales:
            if len(self._coded) >= self.MOST:
                self._coded.clear()
            coded = Coded(kind, a.shape[-1], b, b_scales, b_second, fnuz=fnuz)
            found = self._coded[id(b)] = b, b_scales, coded
        warp_specialized_packed_gemm(a, found[2], out, *places, programs=self._programs, **options)
