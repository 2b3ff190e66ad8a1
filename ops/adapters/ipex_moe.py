"""Run a whole layer of experts on a CPU with Intel Extension for PyTorch (IPEX).

`GatedMLPMOE` takes `[E, 2I, H]` with gate rows before up rows and `[E, H, I]`, brings each expert's
matrices into an order of its own, and multiplies expert by expert. It routes by itself, unless it
is given a function that does: that one hands over hal's routing. Routing weights and sums are in
the dtype of x. Ids of no expert would raise in its one-hot encoding: they are stood in for. The
module keeps what it packed at its first call; that stands beside it so that its bytes are counted.
It packs in the memory that it is given where both sizes allow blocks of 16 x 64, so that it gets
copies: the caller's weights stay as they are.

IPEX is for torch 2.8 alone and ends the process under another: `hal.software` says so beforehand.

Source: the wheel of intel-extension-for-pytorch 2.8.0: llm/modules/linear_fusion.py
(`GatedMLPMOE`), transformers/models/cpu/fusions/linear_fusion.py (`_IPEXGatedMLPMOECPU`),
nn/utils/_weight_prepack.py (`Apply_TPPLinear_weight_prepack`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute
from hal.ops.adapters.ipex import MODULE, PACKAGE
from hal.ops.adapters.whole_experts import plain_layer, stood_in, whole_experts
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]


@FUSED_MOE.kernel(
    "ipex_moe",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("bf16"),
    requires=(
        Needs.platform("cpu"),
        Needs.in_family("x86_64"),
        Needs.package(PACKAGE, "2.8"),
        Needs.math_of("dtype"),
        Needs.one_of("dtype", "bfloat16", hint="IPEX packs bfloat16"),
        # Otherwise it may pack w2 in blocks and w13 not, and then fails at its first call.
        Needs.multiple_of("hidden", 64, hint="IPEX's blocks"),
        *plain_layer("silu"),
    ),
    claimed=True,
)
def bind_experts(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Let IPEX pack the experts and call them with a routing that is made."""
    import torch

    experts, _, hidden = w13.shape
    kind = attribute(PACKAGE, f"{MODULE}.llm.modules", "GatedMLPMOE")
    module = kind(w13.values.clone(), w2.values.clone(), use_prepack=True)

    def run(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        ids, weights = stood_in(ids, weights, experts)

        def route(
            hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return weights, ids

        with torch.no_grad():  # its weights are parameters
            out: torch.Tensor = module(
                x, False, ids.shape[1], weights, False, custom_routing_function=route
            )
        return out

    one = torch.zeros(1, 1)
    run(torch.zeros(1, hidden, dtype=w13.values.dtype), one.int(), one, ())
    packed = tuple(part.detach() for part in module.linear_fusion.parameters())
    module.W13 = module.W2 = None
    return whole_experts(layer, experts, hidden, run, packed)
