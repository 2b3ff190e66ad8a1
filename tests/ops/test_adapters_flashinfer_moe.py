"""FlashInfer's experts, against imitations that check what they are given."""

from __future__ import annotations

import enum

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import pytest
import torch
from adapter_fakes import E2M1, columns_of_bytes, repeated, row_major, untiled
from adapter_fakes_experts import gated, in_float64, per_128

from hal.formats import number_format
from hal.ops.adapters.flashinfer_moe import bind_trtllm
from hal.ops.fused_moe import FUSED_MOE
from hal.quant.scheme import SCHEMES

SIZES = {"hidden": 128, "intermediate": 128, "experts": 4}


class ActivationType(enum.IntEnum):
    """Stand in for FlashInfer's enum."""

    Swiglu, Geglu, GegluTanh = 3, 4, 8


class Fp8QuantizationType(enum.IntEnum):
    """Stand in for FlashInfer's enum."""

    DeepSeekFp8, MxFp8 = 1, 2


NAMES = {3: "silu", 4: "gelu", 8: "gelu_tanh"}


def up_first(name):
    """Return what an activation makes of up and gate columns, up first."""
    activate = gated(name)
    return lambda up_gate: activate(torch.cat(up_gate.chunk(2, -1)[::-1], -1))


def check_routing(x, ids, weights, count):
    assert ids.dtype is torch.int32
    assert weights.dtype is torch.float32
    assert ids.shape == weights.shape
    assert row_major(ids)
    assert row_major(weights)
    assert row_major(x)
    assert int(ids.min()) >= 0, "an id of no expert"
    assert int(ids.max()) < count
    assert bool(weights.isfinite().all())


def tiled(stored, rows: int, columns: int):
    """Return float64 factors `[rows, columns]` of exponents in tiles."""
    exponents = untiled(stored.view(torch.uint8).flatten(), rows, columns // 32)
    return torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)


def in_nvfp4(weight, stored, second):
    """Return float64 numbers of e2m1 codes under e4m3 scales in tiles, and a second scale each."""
    numbers = E2M1[columns_of_bytes(weight)]
    count, rows, columns = numbers.shape
    assert stored.dtype is torch.int32
    assert stored.shape == (count, rows, columns // 64)
    assert second.shape == (count,)
    dense = []
    for part, own, factor in zip(numbers, stored, second, strict=True):
        scales = untiled(own.view(torch.uint8).flatten(), rows, columns // 16)
        scales = scales.contiguous().view(torch.float8_e4m3fn).double()
        dense.append(part * scales.repeat_interleave(16, 1) * factor.double())
    return torch.stack(dense)


def per_16(rows, second):
    """Return float64 numbers of rows as NVFP4 under a second scale."""
    from hal.ops.quantize import fake_quantize

    return fake_quantize(rows, SCHEMES["nvfp4_static"], "e2m1", second).double()


def per_32(rows):
    """Return float64 numbers of rows as MXFP8 by the rule of the scheme."""
    from hal.ops.quantize import fake_quantize

    return fake_quantize(rows, SCHEMES["mxfp8"], "e4m3fn").double()


def cutlass_fused_moe(
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights,
    output_dtype, quant_scales, fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None,
    swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None, tp_size=1, tp_rank=0, ep_size=1,
    ep_rank=0, cluster_size=1, cluster_rank=0, output=None, enable_alltoall=False,
    use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False, use_mxfp8_act_scaling=False,
    min_latency_mode=False, use_packed_weights=False, use_wfp4afp8_humming=False,
    tune_max_num_tokens=8192, enable_pdl=None, activation_type=ActivationType.Swiglu,
    swizzled_input_sf=True, use_fused_finalize=None, profile_ids=None, workspace_buffer=None, *,
    clamped_relu2_limit=None, situ_beta=None, situ_linear_beta=None, backend="cutlass",
    nvfp4_4over6=None,
):  # fmt: skip
    """Imitate `flashinfer.fused_moe.cutlass_fused_moe` of 0.7.4."""
    nothing = (fc1_expert_biases, fc2_expert_biases, swiglu_alpha, swiglu_beta, swiglu_limit)
    assert nothing == (None,) * 5
    assert use_fused_finalize is False
    assert isinstance(activation_type, ActivationType)
    w1, w2 = fc1_expert_weights, fc2_expert_weights
    assert w1.dtype is w2.dtype
    assert w1.is_contiguous()
    assert w2.is_contiguous()
    count = w1.shape[0]
    check_routing(input, token_selected_experts, token_final_scales, count)
    tokens, hidden = input.shape
    assert output.shape == (tokens, hidden)
    assert output.dtype is output_dtype
    assert w2.shape[1] == hidden
    dense, seen, x = None, None, input
    if use_mxfp8_act_scaling:
        first, ones, second, others = quant_scales
        assert first.dtype is second.dtype is torch.int32
        assert ones.dtype is others.dtype is torch.float32
        assert ones.tolist() == others.tolist() == [1] * count
        assert input.dtype is torch.float8_e4m3fn
        packed = w1.dtype is torch.int64
        assert packed or w1.dtype is torch.float8_e4m3fn
        dense = []
        for weight, scales in ((w1, first), (w2, second)):
            numbers = E2M1[columns_of_bytes(weight)] if packed else weight.double()
            rows, columns = numbers.shape[1:]
            assert scales.shape == (count, rows, columns // 128)
            dense.append(torch.stack([
                part * tiled(stored, rows, columns)
                for part, stored in zip(numbers, scales, strict=True)
            ]))  # fmt: skip
        given = input.double() * tiled(input_sf, tokens, hidden)
        x = torch.empty(tokens, hidden, dtype=output_dtype)

        def seen(rows, which):
            return per_32(rows) if which else given
    elif w1.dtype is torch.int64:
        of_x, first, alphas, of_h, second, others = quant_scales
        assert input.dtype is torch.bfloat16
        assert input_sf is None
        assert of_x.ndim == of_h.ndim == 0
        assert {part.dtype for part in (of_x, alphas, of_h, others)} == {torch.float32}
        dense = [in_nvfp4(w1, first, alphas * of_x), in_nvfp4(w2, second, others * of_h)]

        def seen(rows, which):
            return per_16(rows, (of_h if which else of_x).reciprocal())
    elif use_deepseek_fp8_block_scale:
        assert input.dtype is torch.bfloat16
        assert input_sf is None
        assert w1.dtype is torch.float8_e4m3fn
        first, second = quant_scales
        dense = [blocks(w1, first), blocks(w2, second)]

        def seen(rows, which):
            return per_128(rows)
    elif input.dtype is torch.float8_e4m3fn:
        assert input_sf is None
        of_first, inverse, of_second, of_x = quant_scales
        assert {part.dtype for part in quant_scales} == {torch.float32}
        assert of_first.shape == of_second.shape == (count,)
        assert inverse.ndim == of_x.ndim == 0
        dense = [w1.double() * of_first.double().view(-1, 1, 1),
                 w2.double() * of_second.double().view(-1, 1, 1)]  # fmt: skip
        x = torch.empty(tokens, hidden, dtype=output_dtype)
        top = number_format("e4m3fn").maximum

        def seen(rows, which):
            if not which:
                return input.double()
            return (rows.float() * inverse).clamp(-top, top).to(torch.float8_e4m3fn).double()
    else:
        assert quant_scales == []
        assert input_sf is None
        assert w1.dtype is input.dtype
        dense = [w1.double(), w2.double()]

        def seen(rows, which):
            return rows.double()

    found = in_float64(
        x, *dense, token_selected_experts, token_final_scales, up_first(NAMES[activation_type]),
        seen,
    )  # fmt: skip
    output.copy_(found)
    return output


def blocks(weight, scales):
    """Return float64 numbers of e4m3fn in blocks of 128 by 128."""
    assert scales.dtype is torch.float32
    assert scales.is_contiguous()
    assert float(scales.min()) >= 0.99e-10, "Hopper's kernel gives NaN"
    assert scales.shape == (weight.shape[0], weight.shape[1] // 128, weight.shape[2] // 128)
    return torch.stack([
        part.double() * repeated(own, part.shape, (128, 128))
        for part, own in zip(weight, scales, strict=True)
    ])  # fmt: skip


def trtllm_fp8_block_scale_routed_moe(
    topk_ids, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
    gemm2_weights, gemm2_weights_scale, num_experts, top_k, n_group, topk_group, intermediate_size,
    local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type=0,
    use_shuffled_weight=False, weight_layout=0, do_finalize=True, enable_pdl=None,
    gemm1_lora_delta=None, output=None, tune_max_num_tokens=8192,
    fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8,
    activation_type=ActivationType.Swiglu.value, gemm1_alpha=None, gemm1_beta=None,
    gemm1_clamp_limit=None, valid_hidden_size=None, valid_intermediate_size=None,
    workspace_buffer=None,
):  # fmt: skip
    """Imitate `flashinfer.fused_moe.trtllm_fp8_block_scale_routed_moe` of 0.7.4."""
    ids, weights = topk_ids
    count = num_experts
    check_routing(hidden_states, ids, weights, count)
    assert routing_bias is n_group is topk_group is routed_scaling_factor is None
    assert (local_expert_offset, local_num_experts) == (0, count)
    assert count % 4 == 0
    assert 0 < top_k < count
    assert top_k == ids.shape[1]
    assert (use_shuffled_weight, weight_layout) == (False, 0)
    assert fp8_quantization_type is Fp8QuantizationType.DeepSeekFp8
    tokens, hidden = hidden_states.shape
    assert hidden_states.dtype is gemm1_weights.dtype is torch.float8_e4m3fn
    assert hidden_states_scale.dtype is torch.float32
    assert hidden_states_scale.shape == (hidden // 128, tokens)
    assert hidden_states_scale.is_contiguous()
    assert gemm1_weights.shape == (count, 2 * intermediate_size, hidden)
    assert gemm2_weights.shape == (count, hidden, intermediate_size)
    assert output.dtype is torch.bfloat16
    assert row_major(output)
    given = hidden_states.double() * repeated(hidden_states_scale.T, (tokens, hidden), (1, 128))
    dense = blocks(gemm1_weights, gemm1_weights_scale), blocks(gemm2_weights, gemm2_weights_scale)
    found = in_float64(
        output, *dense, ids, weights, up_first("silu"),
        lambda rows, which: per_128(rows) if which else given,
    )  # fmt: skip
    output.copy_(found)
    return output


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install an imitation of FlashInfer, and quantize without Triton."""
    for name in ("groups", "flashinfer_moe"):
        monkeypatch.setattr(f"hal.ops.adapters.{name}.quantizer", fakes.reference_quantizer)
    fakes.module(
        monkeypatch,
        "flashinfer.fused_moe",
        cutlass_fused_moe=cutlass_fused_moe,
        trtllm_fp8_block_scale_routed_moe=trtllm_fp8_block_scale_routed_moe,
        ActivationType=ActivationType,
        Fp8QuantizationType=Fp8QuantizationType,
    )


KERNELS = [
    ("cuda:h100", "flashinfer_moe", "bf16"),
    ("cuda:h100", "flashinfer_moe_static", "fp8_static"),
    ("cuda:h100", "flashinfer_moe_block128", "fp8_block128"),
    ("cuda:b200", "flashinfer_moe_mx", "mxfp8"),
    ("cuda:b200", "flashinfer_moe_mx", "mxfp4_w4a8"),
    ("cuda:b200", "flashinfer_moe_nvfp4", "nvfp4_static"),
    ("cuda:b200", "flashinfer_moe_trtllm", "fp8_block128"),
]


@pytest.mark.parametrize(("case", "dtype"), experts.WRAPPED)
@pytest.mark.parametrize(("device", "kernel", "scheme"), KERNELS)
def test_whole_layers(device, kernel, scheme, case, dtype):
    dtype = torch.bfloat16 if scheme in ("fp8_block128", "nvfp4_static") else dtype
    experts.check(device, kernel, scheme, case, dtype, **SIZES)


@pytest.mark.parametrize("case", [experts.GELU, experts.TANH], ids=lambda case: case.name)
@pytest.mark.parametrize(("device", "kernel", "scheme"), KERNELS[:4])
def test_activations(device, kernel, scheme, case):
    experts.check(device, kernel, scheme, case, **SIZES)


def test_a_block_of_zeros_has_a_scale_that_the_kernel_bears():
    layer = experts.make(experts.PLAIN, "fp8_block128", "cuda:h100", **SIZES)
    assert layer.w13.scales is not None
    layer.w13.values.view(torch.uint8)[1] = 0
    layer.w13.scales[1] = 1e-23
    call = experts.bind("cuda:h100", "flashinfer_moe_block128", layer)
    experts.compare(call, layer, quantized=True)


PROBLEM = {
    "experts": 64, "hidden": 2048, "intermediate": 768, "dtype": "bfloat16", "activation": "silu",
    "tokens": 16, "top_k": 8,
}  # fmt: skip
CANDIDATES = {
    ("cuda:h100", "bf16"): {"flashinfer_moe"},
    ("cuda:b200", "bf16"): {"flashinfer_moe"},
    ("cuda:rtx-5090", "bf16"): {"flashinfer_moe"},
    ("cuda:rtx-4090", "bf16"): set(),
    ("cuda:h100", "fp8_block128"): {"flashinfer_moe_block128"},
    ("cuda:b200", "fp8_block128"): {"flashinfer_moe_trtllm"},
    ("cuda:rtx-5090", "fp8_block128"): set(),
    ("cuda:h100", "fp8_static"): {"flashinfer_moe_static"},
    ("cuda:h100", "fp8_channel"): set(),
    ("cuda:b200", "mxfp4_w4a8"): {"flashinfer_moe_mx"},
    ("cuda:rtx-5090", "mxfp4_w4a8"): set(),
    ("cuda:b200", "nvfp4"): set(),
    ("cuda:b200", "nvfp4_static"): {"flashinfer_moe_nvfp4"},
    ("cuda:rtx-5090", "nvfp4_static"): {"flashinfer_moe_nvfp4"},
    ("cuda:h100", "nvfp4_static"): set(),
    ("rocm:mi300x", "bf16"): set(),
}


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates(device, scheme):
    told = "package: found flashinfer-python 0.6.1, needs flashinfer-python >= 0.7.4"
    experts.check_candidates(
        CANDIDATES[device, scheme], "flashinfer", device, scheme,
        without=(("flashinfer-python", "0.6.1"),), told=told, **PROBLEM,
    )  # fmt: skip


def test_what_trtllm_does_not_route_is_declined():
    for more, told in (
        ({"experts": 30}, "experts a multiple of 4"),
        ({"top_k": 40}, "top_k <= 32"),
    ):
        selection = experts.select("cuda:b200", "fp8_block128", **PROBLEM | more)
        assert told in str(selection.candidate("flashinfer_moe_trtllm").failures)
    assert FUSED_MOE.find("flashinfer_moe_trtllm").load() is bind_trtllm
