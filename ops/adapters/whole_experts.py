"""Put a library's function for a whole layer of experts behind the op's own arguments.

Such a function takes rows, ids and weights and returns weighted sums. None of them is asked for
more than gate, up and an activation: biases, clamps and interleaved rows are declined by needs.
Weights on the input, columns that were padded and a shared output are brought in here.

Libraries differ in what they do with an id of no expert, and most read out of bounds. So ids are
never passed on as they come:

- `past_the_end` makes all absent ids `experts`, for functions that take a map of experts and skip
  what it maps to -1.
- `stood_in` gives an absent slot another expert of its token with weight 0, for functions that
  cannot skip. Products of a token's own expert are finite where its output is, so that 0 times
  them is 0. A token without any expert goes to the first one, and `whole_experts` drops what
  comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.needs import Need, Needs
from hal.ops.binding import Launch, Tensors
from hal.ops.expert_layer import ExpertLayer, add_shared

if TYPE_CHECKING:
    import torch

__all__ = [
    "map_past_the_end",
    "past_the_end",
    "plain_layer",
    "present",
    "stood_in",
    "whole_experts",
]

Bound = tuple[Launch, Tensors]
Run = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "Tensors"], "torch.Tensor"]
"""`(x, ids, weights, tensors) -> out`: x contiguous, weights float32, ids as they came."""


def plain_layer(*activations: str) -> tuple[Need, ...]:
    """Return the needs of a function that knows gate, up and these activations."""
    library = "the library's function takes no other"
    return (
        Needs.one_of("activation", *activations),
        Needs.one_of("gated", True, hint=library),
        Needs.one_of("clamped", False, hint=library),
        Needs.one_of("interleaved", False, hint=library),
        Needs.one_of("bias", False, hint="biases are not passed on to the library"),
        Needs.one_of("format", "standard", hint="the library's function takes a routing"),
    )


def present(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Return which ids are of an expert."""
    return (ids >= 0) & (ids < experts)


def past_the_end(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Return int32 ids, `experts` for all that are of none."""
    import torch

    return torch.where(present(ids, experts), ids, experts).to(torch.int32)


def map_past_the_end(experts: int, device: torch.device) -> torch.Tensor:
    """Return int32 `[experts + 1]`, each expert itself and then -1."""
    import torch

    found = torch.arange(experts + 1, dtype=torch.int32, device=device)
    found[experts] = -1
    return found


def stood_in(
    ids: torch.Tensor, weights: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 ids that are all of an expert, and weights of 0 where they were of none."""
    import torch

    here = present(ids, experts)
    own = ids.gather(1, here.to(torch.uint8).argmax(1, keepdim=True))
    own = torch.where(present(own, experts), own, 0)
    return torch.where(here, ids, own).to(torch.int32), torch.where(here, weights, 0.0)


def whole_experts(
    layer: ExpertLayer, experts: int, hidden: int, run: Run, tensors: Tensors
) -> Bound:
    """Return the layer that `run` computes on `[tokens, hidden]`."""
    import torch

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: None = None,
    ) -> torch.Tensor:
        rows, weights = layer.enter(x, weights, hidden)
        wide = torch.ones(ids.shape, device=x.device) if weights is None else weights.float()
        out = run(rows.contiguous(), ids, wide.contiguous(), tensors)
        # Some functions leave rows unwritten to which no expert adds.
        out = torch.where(present(ids, experts).any(1, keepdim=True), out, 0.0)
        return add_shared(out[:, : x.shape[1]], shared, x).contiguous()

    return launch, tensors
