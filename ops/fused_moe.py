"""Run a mixture of experts: each token through its top-k experts, summed by routing weight.

    gate, up = (x[t] @ w13[e].T).split(intermediate)          w13 [experts, 2*intermediate, hidden]
    h        = activation(gate) * up                           rounded to the dtype of x
    y[t]     = sum_k weight[t, k] * (h @ w2[e_k].T)            w2 [experts, hidden, intermediate]

Quantized schemes represent x and h as the scheme's activations do, static ones under the largest
`input_scale` of the experts of w13 and of w2. Slots whose id is below 0 or at
least `experts` contribute nothing; a token without a present slot gets zeros.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral of Experts
(arXiv:2401.04088).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.activations import ACTIVATIONS, activate
from hal.ops.binding import Binding, Launch, Tensors, measurements
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.expert_layer import (
    FORMATS,
    PLAIN,
    ExpertLayer,
    Updates,
    add_shared,
    batched_ids,
    weighted,
)
from hal.ops.linear import E5M2, fixed_scale, multiply
from hal.ops.padding import why_unpadded
from hal.ops.quantize import fake_quantize
from hal.ops.shards import why_cut
from hal.quant.scheme import SCHEMES
from hal.registry import Level, Op

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from hal.ops.route import Routing
    from hal.quant.tensor import QTensor

__all__ = ["ACTIVATIONS", "FUSED_MOE", "activate", "fused_moe"]

SWITCHES = ("gated", "clamped", "interleaved", "bias", "lora", "apply_router_weight_on_input",
            "padding")  # fmt: skip
FUSED_MOE = Op(
    "fused_moe",
    (
        *("tokens", "experts", "top_k", "hidden", "intermediate", "unpadded_hidden", "dtype"),
        "intermediate_ranks",
        *("activation", "gated", "clamped", "interleaved", "bias", "format", "lora"),
        "apply_router_weight_on_input",
        "padding",
    ),
    "run tokens through their experts",
    measurements("fused_moe"),
    choices={
        "dtype": ACTIVATION_DTYPES,
        "activation": ACTIVATIONS,
        "format": FORMATS,
        **dict.fromkeys(SWITCHES, (True, False)),
    },
    at_most=(("top_k", "experts"), ("unpadded_hidden", "hidden")),
    pads=("hidden", "intermediate"),
    unpadded=why_unpadded,
    refused=partial(why_cut, intermediate=("rows", "columns")),
)
QUANTIZED = tuple(name for name in SCHEMES if name != "bf16")
SHIFTED = tuple(name for name in QUANTIZED if not SCHEMES[name].weight.symmetric)
"""Schemes whose channels have zero points: experts are expanded."""
BYTEWISE = tuple(
    name for name in QUANTIZED if SCHEMES[name].weight.bytewise and name not in SHIFTED
)
PACKED = tuple(name for name in QUANTIZED if name not in (*BYTEWISE, *E5M2, *SHIFTED))


def moe_signatures(
    *names: str, weight_only: bool = False, layout: str = "canonical"
) -> dict[str, Any]:
    signatures = {}
    for name in names:
        operands = SCHEMES[name].operands
        x, w13 = operands(weight_only=weight_only, layout=layout, weight="w13")
        _, w2 = operands(weight_only=weight_only, layout=layout, weight="w2")
        signatures[name] = (x, w13, w2)
    return signatures


NO_BATCHES_OF_INT8 = Needs.one_of(
    "format", "standard", hint="int8 activations are quantized for rows with a routing only"
)

Bound = tuple[Launch, Tensors]


def fused_moe(
    x: torch.Tensor,
    w13: QTensor | torch.Tensor,
    w2: QTensor | torch.Tensor,
    routing: Routing | torch.Tensor,
    *,
    shared: torch.Tensor | None = None,
    updates: Updates | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return the experts' output; binds the weights on first use and keeps the binding.

    Args:
        x: `[tokens, hidden]` bf16 or fp16.
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows.
        w2: `[experts, hidden, intermediate]`, under the same scheme.
        routing: Experts and weights of each token, or counts if `format="batched"`.
        shared: What is added to the sum, as in a call of `hal.ops.FusedMoE`.
        updates: Low-rank updates of this call, with `lora=True` among the options.
        **options: `activation`, biases, `platform`, `force`, ... as for `hal.ops.FusedMoE`.

    Raises:
        ArgumentError: For a wrong shape, dtype, device or routing.
        NoKernelError: If no kernel can run.
    """
    from hal.ops.cache import bound_fused_moe

    bound = bound_fused_moe(w13, w2, x.dtype, **options)
    result: torch.Tensor = bound(x, routing, shared=shared, updates=updates)
    return result


@FUSED_MOE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=moe_signatures(*SCHEMES),
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def bind_reference(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Follow the formula expert by expert in float32."""
    import torch

    scheme, encoding = w13.scheme, w13.encoding
    width, both = len(w13.tensors), len(w13.tensors) + len(w2.tensors)
    single = binding.selection.options.batch_invariant
    experts, hidden, _ = w2.shape

    def of_experts(
        x: torch.Tensor, ids: torch.Tensor, tensors: Tensors, updates: Updates | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield, for each expert, its tokens, their slots, and its outputs in float32."""
        seen13, seen2 = w13.with_tensors(tensors[:width]), w2.with_tensors(tensors[width:both])
        wide13, wide2 = seen13.dequantize(), seen2.dequantize()
        fixed13, fixed2 = ((*fixed_scale(seen), None)[0] for seen in (seen13, seen2))
        bias13, bias2 = layer.biases(tensors)
        rows = fake_quantize(x, scheme, encoding, fixed13)
        for expert in range(experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate_up = multiply(rows[token], wide13[expert], single)
            if bias13 is not None:
                gate_up = gate_up + bias13[expert].float()
            slots = token * ids.shape[1] + slot
            if updates is not None:
                updates.first(x, gate_up, slots)
            h = activate(gate_up, layer.activation).to(x.dtype)
            y = multiply(fake_quantize(h, scheme, encoding, fixed2), wide2[expert], single)
            y = y if bias2 is None else y + bias2[expert].float()
            if updates is not None:
                updates.second(h, y, slots)
            yield token, slot, y

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        rows, weights = layer.enter(x, weights, hidden)
        out = rows.new_zeros(rows.shape, dtype=torch.float32)
        for token, slot, y in of_experts(rows, ids, tensors, updates):
            out.index_add_(0, token, weighted(y, None if weights is None else weights[token, slot]))
        return add_shared(out[:, : x.shape[1]], shared, x)

    def launch_batched(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows, _ = layer.enter(x, None, hidden)
        out = torch.zeros_like(rows).flatten(0, 1)
        ids = batched_ids(counts, x.shape[1])
        for row, _, y in of_experts(rows.flatten(0, 1), ids, tensors):
            out[row] = y.to(x.dtype)
        return out.view(rows.shape)[..., : x.shape[2]].contiguous()

    return launch_batched if layer.batched else launch, (*w13.tensors, *w2.tensors)
