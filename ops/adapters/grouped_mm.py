"""Run a mixture of experts through torch's grouped products, without waiting for the device.

Rows are gathered in the order of experts and the ends of the groups are computed where the ids
are, so that nothing is read back. Rows after the last group, those of absent slots, are not
written by the product: they are zeroed before they are combined.

Source: aten/src/ATen/native/GroupedMMUtils.h and cuda/GroupedBlas.cpp: bf16 on sm_90 from
torch 2.8 and on sm_80 and later from 2.9, strides of whole 16 bytes; fp8 with row-wise scales on
sm_90. (torch has both on CPUs too, where they gain nothing over `hal.ops.experts`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.activations import activate
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer, add_shared
from hal.ops.fused_moe import ACTIVATIONS, FUSED_MOE, moe_signatures
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

COMMON = (
    Needs.package("torch"),
    Needs.one_of("activation", *ACTIVATIONS),
    Needs.one_of("format", "standard", hint="torch's grouped product takes rows sorted by expert"),
    Needs.one_of("lora", False, hint="nothing is added between torch's grouped products"),
    Needs.one_of("dtype", "bfloat16", hint="torch's grouped product is for bfloat16"),
)

Bound = tuple[Launch, Tensors]


def group_slots(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (order `[slots]` int64, ends `[experts]` int32); absent slots come last."""
    import torch

    flat = ids.reshape(-1).long()
    keys = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = keys.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
    return order, counts[:experts].cumsum(0, dtype=torch.int32)


def combine(
    rows: torch.Tensor,
    order: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    experts: int,
) -> torch.Tensor:
    """Return `[tokens, hidden]` float32: the present rows of each token, weighted and summed."""
    import torch

    slots = torch.empty_like(rows)
    slots[order] = rows
    present = ((ids >= 0) & (ids < experts)).unsqueeze(-1)
    wide = slots.view(*ids.shape, -1).float()
    if weights is not None:
        wide = wide * weights.unsqueeze(-1).float()
    return torch.where(present, wide, 0.0).sum(1)


def bind_groups(
    layer: ExpertLayer,
    w13: QTensor,
    first: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Tensors], torch.Tensor],
    second: Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor],
    tensors: Tensors,
) -> Bound:
    """Return a layer whose products go by groups: rows in the order of experts.

    Args:
        layer: What is computed besides the products.
        w13: The first weight, for its sizes.
        first: `(x, token, ends, tensors)`, the product of rows `token` of x with w13.
        second: `(h, ends, tensors)`, the product of rows that lie in order with w2. What either
            gives for rows after the last end, those of absent slots, is not looked at.
        tensors: What they read.
    """
    experts, _, hidden = w13.shape
    biased = layer.first_bias or layer.second_bias

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: None = None,
    ) -> torch.Tensor:
        order, ends = group_slots(ids, experts)
        bias13, bias2 = layer.biases(tensors)
        # Absent slots come last and belong to no group: their rows hold anything, with any bias.
        expert = ids.flatten().index_select(0, order).clamp(0, experts - 1) if biased else order
        rows, weights = layer.enter(x, weights, hidden)
        gate_up = first(rows, order // ids.shape[1], ends, tensors)
        if bias13 is not None:
            gate_up = gate_up.float().add_(bias13.index_select(0, expert))
        y = second(activate(gate_up, layer.activation).to(x.dtype), ends, tensors)
        if bias2 is not None:
            y = y.float().add_(bias2.index_select(0, expert))
        out = combine(y, order, ids, weights, experts)
        return add_shared(out[:, : x.shape[1]], shared, x)

    return launch, tensors


@FUSED_MOE.kernel(
    "torch_grouped_mm",
    level=Level.NATIVE,
    band="portable",
    signatures=moe_signatures("bf16"),
    requires=(
        *COMMON,
        Needs.platform("cuda"),
        Needs.at_least(CudaArch(8, 0)),
        Needs.torch("2.9", "grouped_mm", on={"sm_90": "2.8"}),
        Needs.math("bfloat16"),
        Needs.multiple_of("hidden", 8),
        Needs.multiple_of("intermediate", 8),
    ),
)
def bind_grouped(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Sort rows by expert on the device and call torch's grouped bf16 product."""
    from hal.torch_compat import grouped_mm_function

    multiply = grouped_mm_function()

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        return multiply(x.index_select(0, token), tensors[0].transpose(1, 2), offs=ends)

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return multiply(h, tensors[1].transpose(1, 2), offs=ends)

    return bind_groups(layer, w13, first, second, (w13.values, w2.values))


@FUSED_MOE.kernel(
    "torch_scaled_grouped_mm",
    level=Level.NATIVE,
    band="portable",
    signatures=moe_signatures("fp8_channel"),
    requires=(
        *COMMON,
        Needs.platform("cuda"),
        Needs.exactly("sm_90"),
        Needs.torch("2.8", "scaled_grouped_mm"),
        Needs.multiple_of("hidden", 16),
        Needs.multiple_of("intermediate", 16),
    ),
)
def bind_scaled_grouped(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Quantize per token and call torch's grouped fp8 product with row-wise scales."""
    from hal.torch_compat import scaled_grouped_mm_function

    multiply, encoding = scaled_grouped_mm_function(), w13.encoding
    quantize, how = quantizer(binding, max(w13.shape[2], w2.shape[2])), w13.scheme.activation

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        codes, scales = quantize(x, encoding, how)
        rows, weight = _rows(codes, token), tensors[0].transpose(1, 2)
        return multiply(rows, weight, scales[token], tensors[1], ends, x.dtype)

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(h, encoding, how)
        return multiply(codes, tensors[2].transpose(1, 2), scales, tensors[3], ends, h.dtype)

    return bind_groups(layer, w13, first, second, (*w13.tensors, *w2.tensors))


def _rows(codes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows of 8-bit floats as bytes, which every torch can index."""
    import torch

    return codes.view(torch.uint8).index_select(0, index).view(codes.dtype)
