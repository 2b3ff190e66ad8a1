"""Run a mixture of experts through torch's grouped products, without waiting for the device.

Rows are gathered in the order of experts and the ends of the groups are computed where the ids
are, so that nothing is read back. Rows after the last group, those of absent slots, are not
written by the product: they are zeroed before they are combined.

Source: aten/src/ATen/native/GroupedMMUtils.h and cuda/GroupedBlas.cpp: bf16 on sm_90 from
torch 2.8 and on sm_80 and later from 2.9, strides of whole 16 bytes; fp8 with row-wise scales on
sm_90. (torch has both on CPUs too, where they gain nothing over `hal.ops.experts`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.fused_moe import ACTIVATIONS, FUSED_MOE, activate, moe_signatures
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

COMMON = (
    Needs.package("torch"),
    Needs.one_of("activation", *ACTIVATIONS),
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
    rows: torch.Tensor, order: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int
) -> torch.Tensor:
    """Return `[tokens, hidden]`: the present rows of each token, weighted and summed in float32."""
    import torch

    slots = torch.empty_like(rows)
    slots[order] = rows
    present = ((ids >= 0) & (ids < experts)).unsqueeze(-1)
    wide = slots.view(*ids.shape, -1).float() * weights.unsqueeze(-1).float()
    return torch.where(present, wide, 0.0).sum(1).to(rows.dtype)


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
def bind_grouped(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Sort rows by expert on the device and call torch's grouped bf16 product."""
    from hal.torch_compat import grouped_mm_function

    multiply, experts = grouped_mm_function(), w13.shape[0]
    activation = binding.problem("activation", "silu")

    def launch(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        order, ends = group_slots(ids, experts)
        rows = x.index_select(0, order // ids.shape[1])
        h = activate(multiply(rows, tensors[0].transpose(1, 2), offs=ends), activation)
        y = multiply(h, tensors[1].transpose(1, 2), offs=ends)
        return combine(y, order, ids, weights, experts)

    return launch, (w13.values, w2.values)


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
def bind_scaled_grouped(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Quantize per token and call torch's grouped fp8 product with row-wise scales."""
    from hal.torch_compat import scaled_grouped_mm_function

    multiply, experts = scaled_grouped_mm_function(), w13.shape[0]
    activation, encoding = binding.problem("activation", "silu"), w13.encoding
    quantize, how = quantizer(binding, max(w13.shape[2], w2.shape[2])), w13.scheme.activation

    def launch(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        b13, s13, b2, s2 = tensors
        order, ends = group_slots(ids, experts)
        token = order // ids.shape[1]
        codes, scales = quantize(x, encoding, how)
        gate_up = multiply(
            _rows(codes, token), b13.transpose(1, 2), scales[token], s13, ends, x.dtype
        )
        codes, scales = quantize(activate(gate_up, activation), encoding, how)
        y = multiply(codes, b2.transpose(1, 2), scales, s2, ends, x.dtype)
        return combine(y, order, ids, weights, experts)

    return launch, (*w13.tensors, *w2.tensors)


def _rows(codes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows of 8-bit floats as bytes, which every torch can index."""
    import torch

    return codes.view(torch.uint8).index_select(0, index).view(codes.dtype)
