"""Call what vLLM runs for experts, products, quantizers and routers, as its engine calls it.

Written against the public signatures of vLLM 0.25.1; releases in which they differ raise, and the
contender is left out with that message. Imported only where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from rival_cases import Experts, Inputs, Logits, Product, Rows
from rival_kernels import Call, Contender
from torch.nn.functional import pad

from hal.quant import QTensor, kernel_arguments, quantize, to_layout

__all__ = ["CONTENDERS", "contenders"]

FUSED = "vllm.model_executor.layers.fused_moe"
GROUP = 128
MARLIN_EXPONENT = 2.0**120
"""fp8 codes lie in the exponent of bf16 as they are, and scales make up for it (e4m3: 2^120)."""

Make = Callable[[Inputs], Call]


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _triton(layer: Experts) -> Make:
    """Run `fused_experts`, with vLLM's tuned tiles where it has them."""
    experts = _module(f"{FUSED}.fused_moe").fused_experts
    config = _module(f"{FUSED}.config")
    scheme, quantized = layer.stored, None
    if scheme == "int8_channel":
        quantized = config.int8_w8a8_moe_quant_config(
            **_scales(layer), a1_scale=None, a2_scale=None, per_act_token_quant=True
        )
    elif scheme == "fp8_static":
        fixed = {
            name: weight.input_scale.amax().reshape(1)
            for name, weight in (("a1_scale", layer.w13), ("a2_scale", layer.w2))
        }
        scales = {"w1_scale": layer.w13.scales, "w2_scale": layer.w2.scales}
        quantized = config.fp8_w8a8_moe_quant_config(**scales, **fixed)
    elif scheme == "fp8_channel":
        rows = {"per_act_token_quant": True, "per_out_ch_quant": True}
        quantized = config.fp8_w8a8_moe_quant_config(**_scales(layer), **rows)
    elif scheme == "fp8_block128":
        scales = {"w1_scale": layer.w13.scales, "w2_scale": layer.w2.scales}
        quantized = config.fp8_w8a8_moe_quant_config(**scales, block_shape=[GROUP, GROUP])

    def make(given: Inputs) -> Call:
        w13, w2 = layer.w13.values, layer.w2.values
        return lambda: experts(given.x, w13, w2, given.weights, given.ids, quant_config=quantized)

    return make


def _scales(layer: Experts) -> dict[str, torch.Tensor]:
    """Return scales of channels with a last dimension of one, as vLLM keeps them."""
    assert layer.w13.scales is not None
    assert layer.w2.scales is not None
    return {
        "w1_scale": layer.w13.scales.unsqueeze(-1),
        "w2_scale": layer.w2.scales.unsqueeze(-1),
    }


def _modular(layer: Experts, experts: Any, w13: torch.Tensor, w2: torch.Tensor) -> Make:
    """Run one of vLLM's modular experts between its single-device preparation and finish."""
    kernels = _module(f"{FUSED}.modular_kernel")
    prepare = _module(f"{FUSED}.prepare_finalize").MoEPrepareAndFinalizeNoDPEPModular
    silu = _module(f"{FUSED}.activation").MoEActivation.SILU
    kernel = kernels.FusedMoEKernel(prepare(), experts)
    told = {"activation": silu, "global_num_experts": layer.experts, "expert_map": None}

    def make(given: Inputs) -> Call:
        return lambda: kernel.apply(
            hidden_states=given.x,
            w1=w13,
            w2=w2,
            topk_weights=given.weights,
            topk_ids=given.ids,
            apply_router_weight_on_input=False,
            **told,
        )

    return make


def _described(layer: Experts) -> Any:
    config = _module(f"{FUSED}.config")
    return config.FusedMoEConfig(
        num_experts=layer.experts,
        experts_per_token=layer.top_k,
        hidden_dim=layer.hidden,
        intermediate_size=layer.intermediate,
        num_local_experts=layer.experts,
        num_logical_experts=layer.experts,
        activation=_module(f"{FUSED}.activation").MoEActivation.SILU,
        device="cuda",
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=8192,
    )


def _cutlass_fp8(layer: Experts) -> Make:
    config = _module(f"{FUSED}.config")
    rows = {"per_act_token_quant": True, "per_out_ch_quant": True}
    quantized = config.fp8_w8a8_moe_quant_config(**_scales(layer), **rows)
    kind = _module(f"{FUSED}.experts.cutlass_moe").CutlassExpertsFp8
    return _modular(layer, kind(_described(layer), quantized), layer.w13.values, layer.w2.values)


def _cutlass_w4a8(layer: Experts) -> Make:
    calls = _module("vllm._custom_ops")

    def reordered(weight: QTensor) -> tuple[torch.Tensor, ...]:
        assert weight.scales is not None
        assert weight.global_scale is not None
        words, strides = calls.cutlass_encode_and_reorder_int4b_grouped(
            weight.values.view(torch.int32)
        )
        groups = calls.cutlass_pack_scale_fp8(weight.scales.mT.contiguous())
        return words, strides, groups, weight.global_scale.unsqueeze(-1)

    if layer.hidden % GROUP or layer.intermediate % GROUP:
        raise ValueError(f"its groups are of {GROUP}, which do not divide {layer.shape}")
    (w13, strides13, groups13, rows13), (w2, strides2, groups2, rows2) = map(
        reordered, (layer.w13, layer.w2)
    )
    quantized = _module(f"{FUSED}.config").int4_w4afp8_moe_quant_config(
        w1_scale=groups13,
        w2_scale=groups2,
        g1_alphas=rows13,
        g2_alphas=rows2,
        per_act_token_quant=True,
        per_out_ch_quant=True,
    )
    kind = _module(f"{FUSED}.experts.cutlass_moe").CutlassExpertsW4A8Fp8
    strides = {"b_strides1": strides13, "b_strides2": strides2}
    experts = kind(_described(layer), quantized, **strides, group_size=GROUP)
    return _modular(layer, experts, w13, w2)


def _deep_gemm(layer: Experts) -> Make:
    if layer.hidden % GROUP or layer.intermediate % GROUP:
        raise ValueError(f"its blocks are of {GROUP}, which do not divide {layer.shape}")
    config = _module(f"{FUSED}.config")
    _module("vllm.utils.deep_gemm").get_mk_alignment_for_contiguous_layout()
    scales = {"w1_scale": layer.w13.scales, "w2_scale": layer.w2.scales}
    quantized = config.fp8_w8a8_moe_quant_config(**scales, block_shape=[GROUP, GROUP])
    kind = _module(f"{FUSED}.experts.deep_gemm_moe").DeepGemmExperts
    return _modular(layer, kind(_described(layer), quantized), layer.w13.values, layer.w2.values)


def _marlin(layer: Experts) -> Make:
    """Run `fused_marlin_moe`; it wants hidden sizes that 128 divides, so others are padded."""
    run = _module(f"{FUSED}.experts.marlin_moe").fused_marlin_moe
    types = _module("vllm.scalar_type").scalar_types
    workspace = _module(
        "vllm.model_executor.layers.quantization.utils.marlin_utils"
    ).marlin_make_workspace_new(torch.device("cuda"), 4)
    missing = -layer.hidden % GROUP
    fp8 = layer.stored.startswith("fp8")
    kind = (types.float8_e4m3fn if fp8 else types.uint4b8).id

    def read(weight: QTensor, extra: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if missing:
            wide = pad(weight.dequantize(torch.bfloat16), (0, extra[1], 0, extra[0]))
            weight = quantize(wide, weight.scheme)
        given = kernel_arguments(to_layout(weight, "marlin"))
        assert given.scales is not None
        scales = given.scales * MARLIN_EXPONENT if fp8 else given.scales
        return given.values, scales.to(torch.bfloat16)

    (w13, scales13), (w2, scales2) = read(layer.w13, (0, missing)), read(layer.w2, (missing, 0))
    told = {"quant_type_id": kind, "global_num_experts": layer.experts, "workspace": workspace}

    def make(given: Inputs) -> Call:
        x = pad(given.x, (0, missing)).contiguous() if missing else given.x
        return lambda: run(
            x, w13, w2, None, None, scales13, scales2, given.weights, given.ids, **told
        )

    return make


def _deep_gemm_linear(layer: Product) -> Make:
    product = _module("vllm.utils.deep_gemm").fp8_gemm_nt
    quantizers = _module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    weight = layer.weight.values, layer.weight.scales

    def make(given: Inputs) -> Call:
        def call() -> torch.Tensor:
            rows = quantizers.per_token_group_quant_fp8(
                given.x, GROUP, column_major_scales=True, tma_aligned_scales=True
            )
            out = given.x.new_empty(given.x.shape[0], layer.n)
            product(rows, weight, out)
            return out

        return call

    return make


def _triton_block_linear(layer: Product) -> Make:
    tools = _module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    values, scales = layer.weight.values, layer.weight.scales

    def make(given: Inputs) -> Call:
        def call() -> Any:
            codes, factors = tools.per_token_group_quant_fp8(given.x, GROUP, use_ue8m0=False)
            blocks = [GROUP, GROUP]
            return tools.w8a8_triton_block_scaled_mm(
                codes, values, factors, scales, blocks, torch.bfloat16
            )

        return call

    return make


def _quantizer(rows: Rows) -> Make:
    calls = _module("vllm._custom_ops")
    if rows.scheme == "int8_channel":
        return lambda given: lambda: calls.scaled_int8_quant(given.x)
    if rows.scheme == "fp8_channel":
        return lambda given: lambda: calls.scaled_fp8_quant(given.x, use_per_token_if_dynamic=True)
    tools = _module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    return lambda given: lambda: tools.per_token_group_quant_fp8(given.x, GROUP, use_ue8m0=False)


def _router(logits: Logits) -> Make:
    calls, k = _module("vllm._custom_ops"), logits.top_k

    def make(given: Inputs) -> Call:
        x, tokens = given.x, given.x.shape[0]

        def softmax() -> tuple[torch.Tensor, torch.Tensor]:
            weights = x.new_empty(tokens, k)
            ids, places = (x.new_empty(tokens, k, dtype=torch.int32) for _ in range(2))
            calls.topk_softmax(weights, ids, places, x, True)
            return ids, weights

        def grouped() -> tuple[torch.Tensor, torch.Tensor]:
            groups = logits.groups, logits.top_groups
            weights, ids = calls.grouped_topk(x, *groups, k, True, 1.0, logits.bias, 1)
            return ids, weights

        return softmax if logits.groups == 1 else grouped

    return make


CONTENDERS = (
    Contender(
        "vllm triton", "fused_moe",
        ("bf16", "fp8_static", "fp8_channel", "fp8_block128", "int8_channel"), _triton,
    ),
    Contender("vllm cutlass", "fused_moe", ("fp8_channel",), _cutlass_fp8),
    Contender("vllm cutlass", "fused_moe", ("int4_w4a8_fp8",), _cutlass_w4a8),
    Contender("vllm deep_gemm", "fused_moe", ("fp8_block128",), _deep_gemm),
    Contender("vllm marlin", "fused_moe", ("fp8_w8a16", "int4_w4a16"), _marlin),
    Contender("vllm deep_gemm", "linear", ("fp8_block128",), _deep_gemm_linear),
    Contender("vllm triton", "linear", ("fp8_block128",), _triton_block_linear),
    Contender("vllm", "quantize", ("fp8_channel", "fp8_block128", "int8_channel"), _quantizer),
    Contender("vllm", "route", ("none",), _router),
)  # fmt: skip


def contenders(op: str) -> Iterator[Contender]:
    """Yield those of an op."""
    return (contender for contender in CONTENDERS if contender.op == op)
