"""What platforms resolve differently: which kernel serves, and why the others do not.

One section for each row of the table in docs/moe.md that selection decides; devices that are not
here are simulated. The other rows are in test_platform_shards.py, test_platform_encodings.py,
test_platform_activations.py and test_platform_memory.py.
"""

from __future__ import annotations

import adapter_fakes as fakes
import expert_cases
import pytest
import torch
from calibrated import quantize

import hal
from hal.arch import CudaArch
from hal.errors import ValueRangeError
from hal.ops import FusedMoE, Routing
from hal.platforms.base import DeviceRecord
from hal.platforms.cpu import CpuPlatform
from hal.platforms.ordering import HostOrdering
from hal.platforms.tables import arch_rows, device_rows
from hal.quant import SCHEMES
from hal.registry import Level
from hal.selection import choose, options_from

SIZES = {
    "tokens": 16, "experts": 8, "top_k": 2, "hidden": 2048, "intermediate": 768,
    "dtype": "bfloat16", "activation": "silu",
}  # fmt: skip


def select(scheme, platform, **problem):
    spec = fakes.newest(platform)
    return hal.select("fused_moe", scheme=scheme, platform=spec, **{**SIZES, **problem})


def why(selection, kernel):
    """Return the reasons for which a kernel is out."""
    return "; ".join(map(str, selection.candidate(kernel).failures))


# ------------------------------------------------------------------------------------- int8 W8A8
WITH_INT8 = ("cuda:rtx-3090", "cuda:h200", "rocm:gfx90a", "rocm:gfx942", "rocm:gfx950",
             "rocm:gfx1100", "rocm:gfx1201", "xpu:arc-b580", "xpu:max-1550")  # fmt: skip


@pytest.mark.parametrize("platform", WITH_INT8)
def test_int8_is_multiplied_as_int8(platform):
    selection = select("int8_channel", platform)
    assert (selection.kernel.name, selection.level) == ("triton_int8", Level.NATIVE)


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_static"])
def test_int8_on_sm_75_is_multiplied_as_int8_by_torch(scheme):
    selection = select(scheme, "cuda:t4")
    assert (selection.kernel.name, selection.level) == ("torch_experts_int_mm", Level.NATIVE)
    assert "feature triton" in why(selection, "triton_int8")
    for platform in ("cuda:v100", "rocm:gfx942", "cpu:x86-avx512"):
        assert "sm_75 or newer" in why(select(scheme, platform), "torch_experts_int_mm")
    odd = select(scheme, "cuda:t4", hidden=1001)
    assert list(map(str, odd.padded)) == ["hidden 1001 to 1008"]


@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("scheme", ["int8_channel", "int8_static"])
@pytest.mark.parametrize("case", expert_cases.CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_what_sm_75_computes_against_float64(case, scheme, tokens):
    """torch's product takes the same on a CPU; the facts are those of a T4."""
    platform = CpuPlatform([DeviceRecord(fakes.newest("cuda:t4"), 0)], HostOrdering())
    layer = expert_cases.make(case, lambda weight: quantize(weight, scheme), tokens=tokens)
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, **case.options, platform=platform)
    assert bound.kernel == "torch_experts_int_mm"
    routing = Routing(ids=layer.ids, weights=layer.weights)
    found = bound(layer.x, routing, shared=layer.shared)
    wanted = torch.zeros_like(found[-1]) if layer.shared is None else layer.shared[-1]
    assert torch.equal(found[-1], wanted)
    if tokens > 1:
        assert expert_cases.error(found, layer, True) < 0.012


def test_int8_is_decoded_where_neither_has_a_product():
    selection = select("int8_channel", "rocm:gfx908")
    assert selection.kernel.name == "torch_experts_dequant"
    assert "feature triton" in why(selection, "triton_int8")


def test_a_single_int8_product_on_sm_75_is_torchs():
    selection = hal.select("linear", scheme="int8_channel", platform="cuda:t4")
    assert (selection.kernel.name, selection.level) == ("torch_int_mm", Level.NATIVE)
    refused = hal.select("linear", scheme="int8_channel", platform="cuda:v100")
    assert "needs sm_75 or newer" in why(refused, "torch_int_mm")


INT8_KERNELS = ("triton_int8", "torch_experts_int8", "torch_experts_int_mm")


@pytest.mark.parametrize("platform", ["cuda:h200", "cpu:x86-avx512"])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if SCHEMES[name].weight.format])
def test_other_activations_than_per_token_are_refused_with_the_reason(scheme, platform):
    """But static ones, whose one scale is handed in: a scheme of its own."""
    taken = scheme in ("int8_channel", "int8_static")
    for kernel in INT8_KERNELS:
        reasons = why(select(scheme, platform), kernel)
        needed = f"found {scheme}, needs int8_channel or int8_static"
        assert (needed in reasons) is not taken, reasons


@pytest.mark.parametrize("platform", [*WITH_INT8, "cpu:x86-avx512"])
def test_int8_batches_are_refused_with_the_reason(platform):
    selection = select("int8_channel", platform, format="batched")
    for kernel in INT8_KERNELS:
        assert "needs format standard (int8 activations are quantized" in why(selection, kernel)
    assert selection.level in (Level.WEIGHT_ONLY, Level.DEQUANT)


# ------------------------------------------------------------------------------------- W8A16-fp8
W8A16 = ("fp8_w8a16_tensor", "fp8_w8a16", "fp8_w8a16_block128")


@pytest.mark.parametrize("scheme", W8A16)
@pytest.mark.parametrize(
    "platform", ["cuda:rtx-3090", "rocm:gfx90a", "rocm:gfx942", "rocm:gfx1100", "rocm:gfx1201"]
)
def test_fp8_weights_alone_are_decoded_in_the_loop(platform, scheme):
    selection = select(scheme, platform)
    assert (selection.kernel.name, selection.level) == ("triton_decode", Level.WEIGHT_ONLY)
    if platform.startswith("rocm"):
        assert "found rocm, needs cpu or cuda or xpu" in why(selection, "torch_experts_decode")


@pytest.mark.parametrize("scheme", W8A16)
def test_a_single_fp8_weight_before_ada_is_decoded(scheme):
    for platform in ("cuda:a100-80gb", "cuda:rtx-3090", "cuda:rtx-a6000"):
        selection = hal.select("linear", scheme=scheme, platform=platform, dtype="bfloat16")
        assert (selection.kernel.name, selection.level) == ("triton_decode", Level.WEIGHT_ONLY)
    for platform in ("cuda:t4", "cuda:v100"):
        selection = hal.select("linear", scheme=scheme, platform=platform, dtype="float16")
        assert (selection.kernel.name, selection.level) == ("torch_decode", Level.WEIGHT_ONLY)
        assert "feature triton" in why(selection, "triton_decode")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", W8A16)
@pytest.mark.parametrize("sizes", [(256, 384), (200, 130)])
def test_what_sm_75_makes_of_fp8_weights_against_float64(scheme, dtype, sizes):
    """Under one scale, one a channel, one a block, ragged ones too; a NaN code is refused."""
    platform = CpuPlatform([DeviceRecord(fakes.newest("cuda:t4"), 0)], HostOrdering())
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(*sizes, generator=generator) * torch.logspace(-2, 0, sizes[0])[:, None]
    weight = quantize(wide.bfloat16(), scheme)
    x = torch.randn(9, sizes[1], generator=generator).to(dtype)
    bound = hal.ops.Linear(weight, platform=platform, dtype=dtype)
    assert bound.kernel == "torch_decode"
    wanted = x.double() @ weight.dequantize().double().T
    assert float((bound(x).double() - wanted).norm() / wanted.norm()) < 4e-3
    weight.values.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ValueRangeError, match="a NaN code in the weight"):
        hal.ops.Linear(weight, platform=platform, dtype=dtype)


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel", "fp8_block128"])
def test_fp8_with_quantized_activations_falls_to_weights_alone_on_an_rtx_3090(scheme):
    selection = select(scheme, "cuda:rtx-3090")
    assert (selection.kernel.name, selection.level) == ("triton_decode", Level.WEIGHT_ONLY)
    assert "Triton's own matrix instruction for e4m3fn" in why(selection, "triton_fp8")


# ------------------------------------------------------------------------- families of Blackwell
@pytest.mark.parametrize("op", ["linear", "fused_moe"])
@pytest.mark.parametrize("arch", ["sm_110", "sm_120", "sm_121"])
def test_kernels_of_family_10_are_for_it_alone(op, arch):
    """Every package is there; what a kernel runs on is only what it names."""
    spec = fakes.spec_of(f"cuda:{arch}")
    checked = 0
    for scheme in SCHEMES:
        selection = choose(op, scheme, spec, {"dtype": "bfloat16"}, options_from(op))
        for candidate in selection.candidates:
            for need in candidate.kernel.requires:
                names = (*getattr(need, "families", ()), *getattr(need, "names", ()))
                floor = getattr(need, "floor", None)
                assert not isinstance(floor, CudaArch) or floor < CudaArch(10, 0), candidate
                if any(name.startswith("sm_10") for name in names):
                    named = arch in names or spec.arch.family in names
                    refused = any(str(failure.code) == "arch" for failure in candidate.failures)
                    assert refused is not named, candidate
                    checked += 1
    assert checked or op == "fused_moe"  # whose kernels name no family yet


def test_fp8_through_triton_on_sm_121_is_not_called_native():
    for op, problem in (("fused_moe", SIZES), ("linear", {"dtype": "bfloat16"})):
        selection = hal.select(op, scheme="fp8_channel", platform="cuda:gb10", **problem)
        assert "the device has one; Triton converts, which is emulated" in why(
            selection, "triton_fp8"
        )
        able = [c.kernel for c in selection.candidates if not c.failures]
        native = [kernel.name for kernel in able if kernel.level is Level.NATIVE]
        assert not any(name.startswith("triton") for name in native)
        assert "emulated" not in why(
            hal.select(op, scheme="fp8_channel", platform="cuda:rtx-3090", **problem), "triton_fp8"
        )


# ----------------------------------------------------------------- sizes that no block divides
ODD = ((200, 192), (33, 9), (2048, 192), (2880, 2880))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu", "cpu"])
def test_odd_sizes_need_no_reference(platform):
    """A shard of 192 columns leaves half a block of 128: tails are masked, so none is refused."""
    for row in device_rows(platform):
        for scheme in SCHEMES:
            for hidden, intermediate in ODD:
                where = f"{platform}:{row.name}"
                selection = select(scheme, where, hidden=hidden, intermediate=intermediate)
                assert selection.level is not Level.REFERENCE, (where, scheme, hidden)


# ----------------------------------------------------------------------------- read well enough
EVERYWHERE = ("cuda:t4", "cuda:rtx-3090", "cuda:rtx-4090", "cuda:h100", "cuda:b200",
              "cuda:rtx-5090", "cuda:gb10", "rocm:mi210", "rocm:mi300x", "rocm:mi355x",
              "rocm:gfx1201", "xpu:max-1550", "xpu:arc-b580", "cpu:avx512")  # fmt: skip


@pytest.mark.parametrize("platform", EVERYWHERE)
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_what_stays_as_given_is_said(platform, scheme):
    """Activations that the scheme quantizes and the choice does not are named, and no others."""
    selection = select(scheme, platform)
    x = next(o for o in selection.kernel.signatures[scheme] if o.name == "x")
    left = SCHEMES[scheme].activation.format is not None and x.scale_format is None
    assert bool(selection.as_given) == left
    assert selection.to_dict()["as_given"] == selection.as_given
    assert selection.as_given in " ".join(str(selection).split())
    if left:
        assert selection.as_given.startswith(f"x stays as given, where {scheme} has ")
        strict = choose(
            "fused_moe", scheme, selection.spec, SIZES,
            options_from("fused_moe", minimum="native"),
        )  # fmt: skip
        assert strict.kernel is None or not strict.as_given


@pytest.mark.parametrize("platform", ["cuda:t4", "xpu:xe-hpg", "cpu:avx512"])
def test_a_device_without_triton_is_told_which_have_it(platform):
    candidate = hal.select("fused_moe", scheme="bf16", platform=platform).candidate("triton")
    (failure,) = [found for found in candidate.failures if found.needed == "feature triton"]
    having = [arch.name for arch, facts in arch_rows().items() if "triton" in facts.features]
    first = {kind: next(n for n in having if n.startswith(kind)) for kind in ("sm_", "gfx")}
    intel = [name for name in having if name.startswith("xe")]
    assert failure.hint == (
        f"of GPUs, {first['sm_']}, {first['gfx']}, {' and '.join(intel)} or newer have it; "
        "torch's kernels run here"
    )
