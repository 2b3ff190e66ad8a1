"""What platforms resolve differently: padded activations, and who quantizes them, and how often.

The table of all rows is in docs/moe.md.
"""

from __future__ import annotations

import importlib

import expert_cases
import pytest
from calibrated import quantize as quantize_with_scale
from expert_cases import CASES, Case

import hal
from hal.ops import FusedMoE, Routing
from hal.quant import SCHEMES, quantize
from hal.registry import Level, find_op

QUANTIZES = (Level.NATIVE, Level.EMULATED, Level.REFERENCE)


# -------------------------------------------------------------------------------- MXFP4 + MXFP8
@pytest.mark.parametrize("platform", ["cpu:x86-avx512", "cuda:h200", "cuda:b200", "rocm:mi355x"])
def test_padding_is_part_of_the_problem(platform):
    sizes = {"hidden": 3072, "unpadded_hidden": 2880, "intermediate": 3072, "experts": 32}
    selection = hal.select("fused_moe", scheme="mxfp4_w4a8", platform=platform, **sizes)
    assert selection.problem["hidden"] == 3072
    assert selection.problem["unpadded_hidden"] == 2880
    assert selection.kernel is not None


@pytest.mark.parametrize("kernel", ["torch_experts_dequant", "reference"])
def test_mxfp4_padded_to_256_gives_the_unpadded_hidden_size(kernel):
    case = Case("padded to 256", CASES[0].formula, {"unpadded_hidden": 200}, second_bias=True)
    layer = expert_cases.make(case, lambda weight: quantize(weight, "mxfp4_w4a8"), hidden=256)
    routing = Routing(ids=layer.ids, weights=layer.weights)
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, **case.options, force=kernel)
    found = bound(layer.x, routing)
    assert found.shape == layer.x.shape == (7, 200)
    level = find_op("fused_moe").find(kernel).level
    assert expert_cases.error(found, layer, level in QUANTIZES) < 0.012


# ------------------------------------------------------------------------- quantize here or later
@pytest.mark.parametrize("kernel", find_op("fused_moe").kernels, ids=lambda kernel: kernel.name)
def test_what_a_kernel_declares_of_its_activations_is_what_its_level_says(kernel):
    for scheme in kernel.schemes:
        activation = SCHEMES[scheme].activation.format
        quantizes = kernel.level in QUANTIZES and activation is not None
        formats = kernel.operand(scheme, "x").formats
        assert ("bfloat16" in formats) is not quantizes, (kernel, scheme, formats)


def place(where):
    """Return the module and the name of a function: `hal.ops` has functions of modules' names."""
    module, _, name = where.rpartition(".")
    return importlib.import_module(f"hal.ops.{module}"), name


COUNTED = [("torch_experts_int8", "int8_channel", "experts.quantize_rows"),
           ("torch_experts_int8", "int8_static", "experts.quantize_rows"),
           ("reference", "fp8_channel", "fused_moe.fake_quantize")]  # fmt: skip
NONE = [(kernel, scheme) for kernel in ("torch_experts_decode", "torch_experts_dequant")
        for scheme in ("int8_channel", "fp8_block128")]  # fmt: skip
QUANTIZERS = ("experts.quantize_rows", "fused_moe.fake_quantize", "quantize.launch_triton",
              "quantize.quantize_triton", "quantize.quantize_torch")  # fmt: skip


def run(kernel, scheme):
    """Run a small layer; return the shapes of x and of h, which has a row a present slot."""
    layer = expert_cases.make(CASES[0], lambda weight: quantize_with_scale(weight, scheme))
    present = int(((layer.ids >= 0) & (layer.ids < 4)).sum())
    bound = FusedMoE(layer.w13, layer.w2, force=kernel)
    bound(layer.x, Routing(ids=layer.ids, weights=layer.weights))
    return layer.x.shape, (present, layer.w2.shape[2])


@pytest.mark.parametrize(("kernel", "scheme", "where"), COUNTED)
def test_each_row_is_quantized_exactly_once(monkeypatch, kernel, scheme, where):
    """Rows of x before they are sorted, of h after: never a slot at a time, never again."""
    module, name = place(where)
    original, seen = getattr(module, name), {}

    def count(rows, *rest):
        seen[rows.shape[1]] = seen.get(rows.shape[1], 0) + rows.shape[0]
        return original(rows, *rest)

    monkeypatch.setattr(module, name, count)
    x, h = run(kernel, scheme)
    assert seen == {x[1]: x[0], h[1]: h[0]}


@pytest.mark.parametrize(("kernel", "scheme"), NONE)
def test_kernels_of_unquantized_input_get_it_as_it_is(monkeypatch, kernel, scheme):
    def refuse(*arguments, **named):
        raise AssertionError("activations were quantized")

    for where in QUANTIZERS:
        monkeypatch.setattr(*place(where), refuse)
    run(kernel, scheme)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [("triton_fp8", "fp8_channel"), ("triton_fp8", "fp8_block128"), ("triton_int8", "int8_channel"),
     ("triton_w4a8", "int4_w4a8_fp8"), ("triton_scaled_fp8", "mxfp8"),
     ("triton_decode", "fp8_w8a16"), ("triton_packed", "mxfp4_w4a8")],
)  # fmt: skip
def test_on_a_device_rows_are_quantized_once_or_not_at_all(monkeypatch, kernel, scheme):
    """Of many tokens, in launches of their own; few are quantized in registers."""
    seen = []

    def counted(original):
        def count(source, *rest, **named):
            seen.append(source.shape[0])
            return original(source, *rest, **named)

        return count

    for name in ("quantize.quantize", "swiglu.silu_and_mul_quantize_rows",
                 "swiglu.silu_and_mul_quantize_groups"):  # fmt: skip
        module, function = place(f"kernels.{name}")
        monkeypatch.setattr(module, function, counted(getattr(module, function)))
    layer = expert_cases.make(
        CASES[0], lambda weight: quantize_with_scale(weight, scheme), tokens=300, intermediate=128,
        device="cuda",
    )  # fmt: skip
    bound = FusedMoE(layer.w13, layer.w2, force=kernel)
    bound(layer.x, Routing(ids=layer.ids, weights=layer.weights))
    later = bound.selection.level is Level.WEIGHT_ONLY
    assert seen == ([] if later else [300, layer.ids.numel()])
