"""vLLM's experts, against imitations that check what they are given."""

from __future__ import annotations

from dataclasses import replace

import adapter_fakes as fakes
import adapter_fakes_experts as experts
import adapter_fakes_mixed as mixed
import adapter_fakes_vllm_experts as vllm
import expert_cases
import pytest
import torch

from hal.errors import PlatformError
from hal.ops.adapters.foreign import named
from hal.quant import quantize
from hal.quant.uint4 import encode_uint4

MODULE = "vllm.model_executor.layers.fused_moe"
SIZES = {"hidden": 128, "intermediate": 128, "experts": 3}


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Install an imitation of vLLM, and quantize without Triton."""
    monkeypatch.setattr("hal.ops.adapters.groups.quantizer", fakes.reference_quantizer)
    ops, own = fakes.Operators("vllm"), fakes.Operators("_C")
    ops.add(vllm.FUSED_EXPERTS, vllm.fused_experts)
    own.add(vllm.CUTLASS_MOE_MM, vllm.cutlass_moe_mm)
    own.add(vllm.CUTLASS_W4A8_MOE_MM, vllm.cutlass_w4a8_moe_mm)
    own.add(vllm.REORDER_GROUPED, vllm.reorder_grouped)
    own.add(vllm.PACK, vllm.pack)
    own.add(vllm.CUTLASS_FP4, vllm.cutlass_fp4_group_mm)
    fakes.module(monkeypatch, "vllm._custom_ops")
    fakes.module(monkeypatch, "vllm.scalar_type", scalar_types=mixed.ScalarTypes)
    fakes.module(monkeypatch, f"{MODULE}.fused_moe")
    fakes.module(monkeypatch, f"{MODULE}.activation", MoEActivation=vllm.MoEActivation)
    fakes.module(
        monkeypatch, f"{MODULE}.experts.marlin_moe", fused_marlin_moe=vllm.fused_marlin_moe
    )
    yield
    ops.close()
    own.close()


@pytest.mark.parametrize(("case", "dtype"), experts.WRAPPED)
@pytest.mark.parametrize(
    ("device", "kernel", "scheme"),
    [
        ("cuda:rtx-3090", "vllm_triton_moe", "bf16"),
        ("cuda:h100", "vllm_triton_moe_fp8", "fp8_tensor"),
        ("cuda:h100", "vllm_triton_moe_fp8", "fp8_static"),
        ("rocm:mi300x", "vllm_triton_moe_fp8", "fp8_channel"),
        ("cuda:h100", "vllm_triton_moe_block128", "fp8_block128"),
        ("rocm:mi300x", "vllm_triton_moe_int8", "int8_channel"),
    ],
)
def test_triton(device, kernel, scheme, case, dtype):
    experts.check(device, kernel, scheme, case, dtype, **SIZES)


@pytest.mark.parametrize("case", [experts.GELU, experts.TANH], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [("vllm_triton_moe_fp8", "fp8_channel"), ("vllm_marlin_moe_fp8", "fp8_channel")],
)
def test_activations(kernel, scheme, case):
    experts.check("cuda:h100", kernel, scheme, case, **SIZES)


@pytest.mark.parametrize(("case", "dtype"), experts.WRAPPED)
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        ("vllm_marlin_moe_int4", "int4_w4a16"),
        ("vllm_marlin_moe_int4", "int4_w4a16_g32"),
        ("vllm_marlin_moe_fp8", "fp8_w8a16_tensor"),
        ("vllm_marlin_moe_fp8", "fp8_channel"),
        ("vllm_marlin_moe_fp8", "fp8_block128"),
        ("vllm_marlin_moe_fp4", "nvfp4"),
        ("vllm_marlin_moe_fp4", "mxfp4_w4a16"),
    ],
)
def test_marlin(kernel, scheme, case, dtype):
    fakes.skip_without_dtypes(scheme)
    dtype = torch.bfloat16 if kernel.endswith("fp4") else dtype
    experts.check("cuda:rtx-3090", kernel, scheme, case, dtype, **SIZES)


@pytest.mark.parametrize("group", [128, 32])
def test_marlin_with_zero_points(group):
    def with_zeros(weight):
        like = quantize(weight, "int4_w4a16" if group == 128 else f"int4_w4a16_g{group}")
        values, scales, zeros = encode_uint4(weight + 0.02, group)
        return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")

    layer = expert_cases.make(experts.PLAIN, with_zeros, **SIZES)
    call = experts.bind("cuda:rtx-3090", "vllm_marlin_moe_int4", layer)
    experts.compare(call, layer, quantized=False)


@pytest.mark.parametrize(("case", "tokens"), experts.PRODUCTS)
@pytest.mark.parametrize(
    ("device", "kernel", "scheme"),
    [
        ("cuda:h100", "vllm_cutlass_moe_fp8", "fp8_tensor"),
        ("cuda:b200", "vllm_cutlass_moe_fp8", "fp8_channel"),
        ("cuda:h100", "vllm_cutlass_moe_w4a8", "int4_w4a8_fp8"),
        ("cuda:b200", "vllm_cutlass_moe_nvfp4", "nvfp4"),
        ("cuda:rtx-5090", "vllm_cutlass_moe_nvfp4", "nvfp4"),
        ("cuda:b200", "vllm_cutlass_moe_nvfp4", "nvfp4_static"),
    ],
)
def test_grouped(device, kernel, scheme, tokens, case):
    fakes.skip_without_dtypes(scheme)
    # 90 slots are more than 64, where the operands of fp8 are not exchanged.
    experts.check(device, kernel, scheme, case, tokens=tokens, **SIZES)


def test_one_expert_with_more_rows_than_a_tile():
    fakes.skip_without_dtypes("nvfp4")
    sizes = {"tokens": 150, "experts": 2, "hidden": 128, "intermediate": 128}
    for device, kernel, scheme in (
        ("cuda:b200", "vllm_cutlass_moe_nvfp4", "nvfp4"),
        ("cuda:h100", "vllm_cutlass_moe_fp8", "fp8_channel"),
    ):
        experts.check(device, kernel, scheme, experts.PLAIN, **sizes)


@pytest.mark.parametrize("name", ["biases", "gpt-oss", "clamped silu", "relu2", "nemotron"])
def test_what_the_functions_do_not_take_is_declined(name):
    layer = experts.make(experts.BY_NAME[name], "fp8_channel", "cuda:h100", **SIZES)
    _, problem = experts.described(layer)
    selection = experts.select("cuda:h100", "fp8_channel", **problem)
    for kernel in ("vllm_triton_moe_fp8", "vllm_marlin_moe_fp8"):
        told = "; ".join(map(str, selection.candidate(kernel).failures))
        assert ("needs bias False" in told) == bool(layer.biases), told
        assert ("needs clamped False" in told) == problem["clamped"], told
        assert ("needs interleaved False" in told) == problem["interleaved"], told
        assert ("needs gated True" in told) == (not problem["gated"]), told
        assert ("needs activation silu" in told) == (problem["activation"] != "silu"), told
    assert selection.candidate("vllm_cutlass_moe_fp8").can_run


def test_another_signature_is_named_when_it_is_bound(monkeypatch):
    def shorter(hidden_states, w1, w2, surprise, **rest):
        raise AssertionError

    fakes.module(monkeypatch, f"{MODULE}.experts.marlin_moe", fused_marlin_moe=shorter)
    layer = experts.make(experts.PLAIN, "fp8_channel", "cuda:h100", **SIZES)
    with pytest.raises(PlatformError, match=r"vllm: found .*surprise.* in this version"):
        experts.bind("cuda:h100", "vllm_marlin_moe_fp8", layer)


def test_named_says_what_does_not_fit():
    def function(a, b, c=1):
        return a, b, c

    assert named("p", function, "a", b=2)(a=1) == (1, 2, 1)
    with pytest.raises(PlatformError, match="p: found no argument d of function"):
        named("p", function, "a", "d", b=2)
    with pytest.raises(PlatformError, match="p: found a further one b of function"):
        named("p", function, "a")


PROBLEM = {
    "experts": 64, "hidden": 2048, "intermediate": 768, "dtype": "bfloat16", "activation": "silu",
    "tokens": 16,
}  # fmt: skip
CANDIDATES = {
    ("cuda:h100", "bf16"): {"triton_moe"},
    ("cuda:h100", "fp8_channel"): {"triton_moe_fp8", "cutlass_moe_fp8",
                                   "marlin_moe_fp8"},
    ("cuda:h100", "fp8_block128"): {"triton_moe_block128", "marlin_moe_fp8"},
    ("cuda:h100", "int4_w4a8_fp8"): {"cutlass_moe_w4a8"},
    ("cuda:b200", "int4_w4a8_fp8"): set(),
    ("cuda:b200", "nvfp4"): {"cutlass_moe_nvfp4", "marlin_moe_fp4"},
    ("cuda:b200", "nvfp4_static"): {"cutlass_moe_nvfp4", "marlin_moe_fp4"},
    ("cuda:rtx-5090", "nvfp4"): {"cutlass_moe_nvfp4", "marlin_moe_fp4"},
    ("cuda:rtx-3090", "fp8_channel"): {"marlin_moe_fp8"},
    ("cuda:rtx-3090", "int8_channel"): {"triton_moe_int8"},
    ("cuda:rtx-3090", "int4_w4a16"): {"marlin_moe_int4"},
    ("cuda:t4", "mxfp4_w4a16"): set(),
    ("rocm:mi300x", "fp8_channel"): {"triton_moe_fp8"},
    ("rocm:mi250x", "fp8_channel"): set(),
    ("xpu:arc-b580", "bf16"): set(),
    ("cpu:x86-amx", "bf16"): set(),
}  # fmt: skip


@pytest.mark.parametrize(("device", "scheme"), CANDIDATES)
def test_where_they_are_candidates(device, scheme):
    experts.check_candidates(
        {f"vllm_{name}" for name in CANDIDATES[device, scheme]},
        ("vllm_triton", "vllm_marlin", "vllm_cutlass"), device, scheme,
        without=(("vllm", "0.24.0"),), told="package: found vllm 0.24.0, needs vllm >= 0.25.1",
        **PROBLEM,
    )  # fmt: skip


def test_too_many_experts_are_declined():
    selection = experts.select("cuda:h100", "fp8_channel", **PROBLEM | {"experts": 992})
    (failure,) = selection.candidate("vllm_triton_moe_fp8").failures
    assert "experts <= 991" in str(failure)
