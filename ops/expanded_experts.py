"""Multiply experts with many rows each: expand their weights to bf16 first, a few at a time.

As for one matrix (`decoded`), matrix units wait for weights that are decoded in the loop of a
product; from 256 to 512 rows an expert on, decoding them once, into memory that is held during the
call alone, costs less (H200, benchmarks/moe.py). Weights are rounded to bf16 there; fp16, whose
range is less than that of scales, is never expanded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hal.ops.tiles import Tile

__all__ = ["EXPANDED_BYTES", "expanded_product"]

EXPANDED_BYTES = 512 << 20
"""Bytes of expanded weights at a time; one expert, if that alone takes more."""


def expanded_product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    n_padded: torch.Tensor,
    *,
    kind: str,
    tile: Tile,
    top_k_divisor: int,
    bias: torch.Tensor | None = None,
    fnuz: bool = False,
    a_scales: torch.Tensor | None = None,
    **scales: torch.Tensor | None,
) -> None:
    """Do what `kernels.grouped_gemm` does, of the same arguments, for kinds that decode b.

    Those multiply bf16 rows, so that a_scales is always None.
    """
    from hal.ops.kernels.expand import expand_experts
    from hal.ops.kernels.grouped_gemm import grouped_gemm
    from hal.ops.kernels.kinds import as_weight

    experts, n, k = b.shape[0], b.shape[1], a.shape[1]
    given: dict[str, Any] = {"b_scales": None, **scales}
    weight = as_weight(kind, k, b, **given, fnuz=fnuz)
    step = min(max(EXPANDED_BYTES // (2 * n * k), 1), experts)
    wide = a.new_empty(step, n, k)
    for first in range(0, experts, step):
        part = wide[: experts - first]
        expand_experts(weight, part, kind=kind, first=first)
        own = block_experts
        if step < experts:
            # Blocks of other experts are skipped, as those of absent ones are.
            own = block_experts - first
            own = torch.where(own < part.shape[0], own, -1)
        grouped_gemm(
            a, part, out, sorted_slots, own, n_padded, top_k_divisor=top_k_divisor,
            bias=None if bias is None else bias[first : first + step], kind="bf16", tile=tile,
        )  # fmt: skip
