"""Make routings for calls whose results nobody reads: every expert as often as the others."""

from __future__ import annotations

import torch

from hal.errors import ArgumentError

__all__ = ["even_counts", "even_routing"]


def even_routing(
    tokens: int,
    top_k: int | None,
    experts: int,
    device: torch.device,
    ids: torch.dtype = torch.int32,
    weights: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights, `[tokens, top_k]` each.

    Raises:
        ArgumentError: Without `top_k`.
    """
    if top_k is None:
        raise ArgumentError(
            "fused_moe: warmup",
            found="no top_k",
            needed="FusedMoE(..., top_k=N), the experts of a token",
        )
    slots = torch.arange(tokens * top_k, device=device) % experts
    shares = torch.full((tokens, top_k), 1 / top_k, dtype=weights, device=device)
    return slots.view(tokens, top_k).to(ids), shares


def even_counts(
    experts: int, rows: int, device: torch.device, ids: torch.dtype = torch.int32
) -> torch.Tensor:
    """Return `[experts]`: as many rows for each of them."""
    return torch.full((experts,), rows, dtype=ids, device=device)
