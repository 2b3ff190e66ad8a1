"""Run the experts of fine-grained fp8 checkpoints, as transformers loads them, through hal.

transformers puts `FP8Experts` in the place of a model's experts and dispatches them over a registry
of their own. Under the name `hal` their parameters are bound as they are, as scheme `fp8_block128`,
or `fp8_block128_ue8m0` where the scales are exponents (`scale_fmt="ue8m0"`):

    gate_up_proj            [experts, 2*intermediate, hidden] e4m3, gate rows before up rows
    gate_up_proj_scale_inv  [experts, 2*intermediate/128, hidden/128] float32 or e8m0, multiplied
    down_proj, down_proj_scale_inv                            the same of [hidden, intermediate]

Source: transformers 5.24, integrations/finegrained_fp8.py, `FP8Experts` and `FP8ExpertsInterface`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hal.errors import ShapeError, UnsupportedModelError
from hal.integrations.conventions import Convention
from hal.integrations.gating import activation_alone, gating_of
from hal.integrations.kept import Kept, kept_binding
from hal.integrations.replace import IMPLEMENTATION
from hal.ops import Routing
from hal.ops.bound_experts import FusedMoE
from hal.ops.checks import check_gradient
from hal.quant.scheme import find_scheme
from hal.quant.tensor import QTensor
from hal.shards import shard_cure

__all__ = ["fp8_experts_forward", "register_fp8_experts"]

SCHEME, EXPONENTS = "fp8_block128", "fp8_block128_ue8m0"
BLOCK = 128


def fp8_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run one module of fp8 experts; transformers calls this under the name `hal`.

    Parameters are bound on the first call, and again when they were written, replaced or moved
    since, or when hidden states have another dtype. Kernels that read another order, or another
    encoding as on MI300, hold a copy.

    Args:
        self: The `FP8Experts` module.
        hidden_states: `[tokens, hidden]` bf16 or fp16.
        top_k_index: `[tokens, top_k]`; ids of at least the number of experts are absent.
        top_k_weights: `[tokens, top_k]`.

    Raises:
        GradientError: If a gradient would have to flow to hidden states or router.
        UnsupportedModelError: For blocks, codes or a gating that hal does not know.
        ShapeError: If gate and up rows share a block.
    """
    check_gradient(IMPLEMENTATION, hidden_states, top_k_weights)
    bound = kept_binding(self, _Fp8, hidden_states.dtype)
    return bound(hidden_states, Routing(ids=top_k_index, weights=top_k_weights))


class _Fp8(Kept):
    """The binding of experts in e4m3 with a scale for each block of 128 x 128."""

    __slots__ = ()

    def examine(self, module: Any, name: str) -> Convention:
        """Return how the module gates, or raise where it is not what this file reads."""
        where = f"{name} of fine-grained fp8"
        block = getattr(module, "block_size", None)
        if block is None or tuple(block) != (BLOCK, BLOCK):
            raise UnsupportedModelError(
                where,
                found=f"blocks of {'a whole weight' if block is None else list(block)}",
                needed=f"blocks of {[BLOCK, BLOCK]}",
                cure="load with FineGrainedFP8Config(dequantize=True) and quantize with hal",
            )
        if (scaling := getattr(module, "activation_scheme", "dynamic")) != "dynamic":
            raise UnsupportedModelError(
                where, found=f"activation_scheme={scaling!r}", needed="'dynamic'"
            )
        gated = bool(getattr(module, "has_gate", True))
        activation = gating_of(module, where) if gated else activation_alone(module, where)
        convention = Convention(activation, False, bool(getattr(module, "has_bias", False)))
        known = {*convention.parameters, *map(_scale_of, convention.parameters)}
        if unknown := sorted({name for name, _ in module.named_parameters()} - known):
            raise UnsupportedModelError(
                where,
                found=f"the unknown parameter {unknown[0]}",
                needed=" and ".join(sorted(known)),
            )
        if convention.biased:
            raise UnsupportedModelError(where, found="has_bias=True", needed="has_bias=False")
        for weight in convention.of(module):
            if weight.dtype is not torch.float8_e4m3fn:
                raise UnsupportedModelError(
                    where, found=f"codes of {weight.dtype}", needed="torch.float8_e4m3fn"
                )
        rows = convention.of(module)[0].shape[1]
        if gated and (rows // 2) % BLOCK:
            raise ShapeError(
                where,
                found=f"{rows // 2} gate rows, so that gate and up share a block of scales",
                needed=f"a multiple of {BLOCK}",
                # The module keeps the size of its configuration when ranks take shards of it.
                cure=shard_cure("intermediate", BLOCK, getattr(module, "intermediate_dim", None))
                + "; or load with FineGrainedFP8Config(dequantize=True) and quantize with hal",
            )
        return convention

    def parameters(self, module: Any, convention: Convention) -> Sequence[torch.Tensor]:
        """Return codes, then scales."""
        names = convention.parameters
        return [getattr(module, name) for name in (*names, *map(_scale_of, names))]

    def bind(self, module: Any, convention: Convention, dtype: torch.dtype) -> FusedMoE:
        """Bind codes and scales as they are.

        Where one of the two weights alone has exponents, they become the numbers that they mean.
        """
        w13, w2, *scales = (tensor.detach() for tensor in self.parameters(module, convention))
        exponents = all(scale.itemsize == 1 for scale in scales)
        scheme = find_scheme(EXPONENTS if exponents else SCHEME)
        scale13, scale2 = (
            scale.view(torch.uint8) if exponents else scale.float() for scale in scales
        )
        return FusedMoE(
            QTensor(w13, scale13, scheme, "e4m3fn"),
            QTensor(w2, scale2, scheme, "e4m3fn"),
            dtype=dtype,
            **convention.options,
        )


def _scale_of(weight: str) -> str:
    return f"{weight}_scale_inv"


def register_fp8_experts() -> None:
    """Register `hal` for fp8 experts, where this release of transformers has a registry for them.

    Those before have nothing to register with, and run their own kernels.
    """
    from transformers.integrations import finegrained_fp8

    registry = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if registry is not None:
        registry.register(IMPLEMENTATION, fp8_experts_forward)
