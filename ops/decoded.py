"""Multiply by coded weights that are decoded on the way: how many rows decide where.

| rows | weights are decoded | because |
|---|---|---|
| few | in registers (`kernels.ring_rows`, `kernels.gemv`) | bytes come while others are decoded |
| some | in the loop of a tiled product (`kernels.linear`, `specialized_linear`) | rows share what \
was decoded |
| many | into memory, then torch multiplies (`kernels.expand`) | matrix units need not wait |

The bounds are those of an H200 (benchmarks/linear.py), and taken elsewhere for want of better.
Weights are rounded to bf16 where they are expanded; fp16, whose range is less than that of scales,
never is. Memory for the expanded rows, `EXPANDED_BYTES` at most, is held during the call alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hal.ops.tiles import (
    FEW,
    MANY,
    few_rows,
    gemv_tile,
    ring_of,
    runs_ptx,
    some_rows,
    streams_rows,
    way_of,
)

if TYPE_CHECKING:
    from hal.ops.binding import Binding, Tensors
    from hal.ops.kernels.kinds import Weight
    from hal.ops.tiles import Tile

__all__ = ["EXPANDED_BYTES", "decoded_product", "few_products"]

EXPANDED_BYTES = 64 << 20
ROWS_OF_BLOCK = 128

FewRows = Callable[["torch.Tensor", "Weight", "torch.Tensor", "torch.Tensor | None"], bool]
Product = Callable[["torch.Tensor", "Tensors"], "torch.Tensor"]


def few_products(binding: Binding, kind: str, shape: tuple[int, ...]) -> tuple[int, FewRows]:
    """Return how many rows are few, and the launcher `(x, weight, out, bias)` for those.

    It says whether it launched anything: rows that lie as `kernels.ring_rows` cannot read them
    are few only where `kernels.gemv` takes them.

    Args:
        binding: Where it runs.
        kind: One of `kernels.kinds.ALL_KINDS` that decodes its weights, or `bf16`.
        shape: Sizes (N, K) of the weight.
    """
    from hal.ops.kernels.common import INTERPRETED
    from hal.ops.kernels.gemv import gemv
    from hal.ops.kernels.kinds import by_row
    from hal.ops.kernels.ring_rows import fits, ring_rows

    n, k = shape
    tile, spec = gemv_tile(kind, n, k), binding.spec
    ptx = runs_ptx(spec.platform, spec.arch.name) and not INTERPRETED.value
    apart = few_rows(kind, n, k, ptx=False)
    units = spec.compute_units or 64

    def launch(
        x: torch.Tensor, weight: Weight, out: torch.Tensor, bias: torch.Tensor | None
    ) -> bool:
        rows = x.shape[0]
        if ptx and streams_rows(kind, n, k, rows):
            held = by_row(kind, weight)
            if fits(kind, x, held):
                ring = ring_of(kind, n, k, rows, units, group=held.group)
                ring_rows(x, held, out, bias=bias, kind=kind, ring=ring)
                return True
        if rows <= apart:
            gemv(x, weight, out, bias=bias, kind=kind, tile=tile)
        return rows <= apart

    return few_rows(kind, n, k, ptx=ptx), launch


def decoded_product(
    binding: Binding,
    kind: str,
    shape: tuple[int, ...],
    tiles: Callable[[int], Tile],
    names: tuple[str, ...],
    *,
    has_bias: bool,
    fnuz: bool,
) -> Product:
    """Return the launcher of a product with a weight of a kind.

    Args:
        binding: Where it runs.
        kind: One of `kernels.kinds.ALL_KINDS` that decodes its weights, or `bf16`.
        shape: Sizes (N, K) of the weight.
        tiles: Chooses the tile of a tiled product for a number of rows.
        names: What tensors after the codes are: arguments of `kernels.kinds.as_weight`.
        has_bias: Whether the last tensor is a bias.
        fnuz: Whether fp8 codes are in the encoding e4m3fnuz.
    """
    from hal.ops.kernels.kinds import as_weight
    from hal.ops.kernels.linear import gemm
    from hal.ops.specialized_linear import specialized_linear

    n, k = shape
    specialized = specialized_linear(binding, kind, shape)
    few, multiply_few = few_products(binding, kind, shape)
    some = some_rows(kind, k)
    wide = kind != "bf16" and binding.problem("dtype", "bfloat16") == "bfloat16"

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = x.shape[0]
        bias = tensors[-1] if has_bias else None
        given = dict(zip(names, tensors[1:], strict=False))
        weight = as_weight(kind, k, tensors[0], **{"b_scales": None, **given}, fnuz=fnuz)
        out = None
        if specialized is not None and specialized.takes(rows):
            out = x.new_empty(rows, n)
            if specialized.multiply(x, tensors, weight, out, bias):
                return out
        way = way_of(rows, few, some)
        if way == MANY and wide:
            return _expanded(x, weight, n, bias, kind)
        out = x.new_empty(rows, n) if out is None else out
        if way != FEW or not multiply_few(x, weight, out, bias):
            gemm(x, weight, out, bias=bias, kind=kind, tile=tiles(rows))
        return out

    return launch


def _expanded(
    x: torch.Tensor, weight: Weight, n: int, bias: torch.Tensor | None, kind: str
) -> torch.Tensor:
    from hal.ops.kernels.expand import expand

    k = x.shape[1]
    step = max(EXPANDED_BYTES // (2 * k) // ROWS_OF_BLOCK, 1) * ROWS_OF_BLOCK
    wide = x.new_empty(min(step, n), k)
    if step >= n:
        expand(weight, wide, kind=kind)
        return torch.nn.functional.linear(x, wide, bias)
    out = x.new_empty(x.shape[0], n)
    for first in range(0, n, step):
        part = wide[: n - first]
        expand(weight, part, kind=kind, first=first)
        torch.mm(x, part.t(), out=out[:, first : first + step])
    return out if bias is None else out.add_(bias)
