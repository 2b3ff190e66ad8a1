"""Run quantized and mixture-of-experts ops; importing this imports neither torch nor Triton.

Functions bind on first use and keep the binding; `Linear` and `FusedMoE` bind once and are what an
engine calls in its hot path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Importing a module is what attaches its kernels; their libraries load when they are bound.
from hal.ops import (  # noqa: F401
    adapters,
    experts,
    scaled,
    scaled_experts,
    transports,
    triton_experts,
)
from hal.ops.align import Alignment, align
from hal.ops.fused_moe import fused_moe
from hal.ops.linear import linear
from hal.ops.placement import Placement
from hal.ops.quantize import quantize
from hal.ops.quantize_fused import quantize_rms_norm, quantize_swiglu
from hal.ops.route import Routing, route

if TYPE_CHECKING:
    from hal.ops.bound_experts import FusedMoE
    from hal.ops.bound_linear import Linear
    from hal.ops.expert_parallel import Dispatched, ExpertParallel
    from hal.ops.workspace import Workspace

__all__ = [
    "Alignment",
    "Dispatched",
    "ExpertParallel",
    "FusedMoE",
    "Linear",
    "Placement",
    "Routing",
    "Workspace",
    "align",
    "fused_moe",
    "linear",
    "quantize",
    "quantize_rms_norm",
    "quantize_swiglu",
    "route",
]


# Those whose modules import torch.
_LAZY = {
    "Dispatched": "expert_parallel",
    "ExpertParallel": "expert_parallel",
    "FusedMoE": "bound_experts",
    "Linear": "bound_linear",
    "Workspace": "workspace",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"hal.ops.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'hal.ops' has no attribute {name!r}")
