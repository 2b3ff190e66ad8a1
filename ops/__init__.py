"""Run quantized and mixture-of-experts ops; importing this imports neither torch nor Triton.

Functions bind on first use and keep the binding; `Linear` and `FusedMoE` bind once and are what an
engine calls in its hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Importing a module is what attaches its kernels; their libraries load when they are bound.
from hal.ops import adapters, experts, scaled, scaled_experts, triton_experts  # noqa: F401
from hal.ops.align import Alignment, align
from hal.ops.fused_moe import fused_moe
from hal.ops.linear import linear
from hal.ops.quantize import quantize
from hal.ops.quantize_fused import quantize_rms_norm, quantize_swiglu
from hal.ops.route import Routing, route

if TYPE_CHECKING:
    from hal.ops.bound_experts import FusedMoE
    from hal.ops.bound_linear import Linear

__all__ = [
    "Alignment",
    "FusedMoE",
    "Linear",
    "Routing",
    "align",
    "fused_moe",
    "linear",
    "quantize",
    "quantize_rms_norm",
    "quantize_swiglu",
    "route",
]


def __getattr__(name: str) -> Any:
    if name == "Linear":
        from hal.ops.bound_linear import Linear

        return Linear
    if name == "FusedMoE":
        from hal.ops.bound_experts import FusedMoE

        return FusedMoE
    raise AttributeError(f"module 'hal.ops' has no attribute {name!r}")
