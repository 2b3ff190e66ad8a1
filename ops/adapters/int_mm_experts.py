"""Run experts with `torch._int_mm` on NVIDIA devices for which Triton has no int8 product: sm_75.

    y[m, n] = sx[m] * sw[e, n] * sum_k qx[m, k] * qw[e, n, k]        for the rows m of expert e

One product for each expert that is hit. How many rows each has comes to the host, so a call waits
for the device and cannot be captured; from sm_80 on `triton_int8`, which does neither, comes before
it. cuBLAS wants more than 16 rows: fewer are padded with zeros.

Source: aten/src/ATen/native/cuda/Blas.cpp (`_int_mm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.needs import Needs
from hal.ops.activations import ACTIVATIONS
from hal.ops.adapters.grouped_mm import bind_groups
from hal.ops.adapters.int_mm import CUDA_LEAST_ROWS, MOST_TERMS
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, NO_BATCHES_OF_INT8, moe_signatures
from hal.ops.linear import INT8, fixed_scale, row_scales
from hal.ops.quantize import quantizer
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]


@FUSED_MOE.kernel(
    "torch_experts_int_mm",
    level=Level.NATIVE,
    band="portable",
    signatures=moe_signatures(*INT8),
    requires=(
        Needs.platform("cuda"),
        Needs.at_least(CudaArch(7, 5)),
        Needs.package("torch"),
        Needs.math("int8"),
        Needs.one_of("activation", *ACTIVATIONS),
        NO_BATCHES_OF_INT8,
        Needs.one_of("lora", False, hint="nothing is added between torch's products"),
        *(
            need
            for size in ("hidden", "intermediate")
            for need in (
                Needs.between(size, None, MOST_TERMS, "the int32 sum would overflow"),
                Needs.multiple_of(size, 8),
            )
        ),
    ),
)
def bind_int_mm(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Sort slots by expert and multiply int8 in cuBLAS, expert by expert."""
    quantize, how = quantizer(binding, max(w13.shape[2], w2.shape[2])), w13.scheme.activation
    read13, read2 = (*row_scales(w13), *fixed_scale(w13)), (*row_scales(w2), *fixed_scale(w2))
    width, static = len(read13), w13.scheme.static

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        weight, columns, *fixed = tensors[:width]
        codes, scales = quantize(x, "int8", how, fixed[0] if static else None)
        rows = codes.index_select(0, token), scales.index_select(0, token)
        return by_experts(*rows, ends, weight, columns, x.dtype)

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        weight, columns, *fixed = tensors[width : 2 * width]
        codes, scales = quantize(h, "int8", how, fixed[0] if static else None)
        return by_experts(codes, scales, ends, weight, columns, h.dtype)

    return bind_groups(layer, w13, first, second, (*read13, *read2))


def by_experts(
    codes: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return `[slots, N]` of `dtype`; rows after the last end are zeros.

    Args:
        codes: int8 `[slots, K]`, in the order of experts.
        scales: float32 `[slots]`.
        ends: int32 `[experts]`, the row after the last of each expert.
        weight: int8 `[experts, N, K]`.
        columns: float32 `[experts, N]`.
        dtype: Of the result.
    """
    import torch
    from torch.nn.functional import pad

    from hal.torch_compat import int_mm_function

    multiply = int_mm_function()
    out = torch.zeros(codes.shape[0], weight.shape[1], dtype=dtype, device=codes.device)
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        if stop == start:
            continue
        rows = codes[start:stop]
        if stop - start < CUDA_LEAST_ROWS:
            rows = pad(rows, (0, 0, 0, 32 - (stop - start)))
        sums = multiply(rows, weight[expert].t())[: stop - start].float()
        out[start:stop] = sums.mul_(scales[start:stop].unsqueeze(-1)).mul_(columns[expert])
        start = stop
    return out
