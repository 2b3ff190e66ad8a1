"""Weights are padded when bound, where a kernel takes whole blocks alone: once, and visibly."""

from __future__ import annotations

import expert_cases
import pytest
import torch
from calibrated import quantize
from expert_cases import CASES

import hal
from hal.errors import ForcedKernelError, ShapeError
from hal.needs import Needs
from hal.ops import FusedMoE, Routing
from hal.padding import MOST
from hal.quant import SCHEMES, to_layout
from hal.quant.padding import pad_rows, pad_weight
from hal.registry import Level, find_op, restore, snapshot

HIDDEN, INTERMEDIATE = 232, 120  # to 256 and 128: 1.18 times the weights
GPT_OSS = {"hidden": 2880, "intermediate": 2880, "experts": 32, "top_k": 4}
BLOCKS = Needs.multiple_of("hidden", 64), Needs.multiple_of("intermediate", 32)


def in_whole_blocks(binding, w13, w2, layer):
    """Refuse what the needs exclude, as a library would, and compute as the reference does."""
    _, hidden, intermediate = w2.shape
    assert hidden % 64 == intermediate % 32 == 0
    assert (w13.layout, w2.layout) == ("k_major", "canonical")
    reference = find_op("fused_moe").find("reference").load()
    return reference(binding, to_layout(w13, "canonical"), w2, layer)


@pytest.fixture
def blocks():
    """Attach a kernel of whole blocks that reads another layout; return its name."""
    kept = snapshot()
    op = find_op("fused_moe")
    signatures = {}
    for name, scheme in SCHEMES.items():
        x, w13 = scheme.operands(layout="k_major", weight="w13")
        signatures[name] = (x, w13, scheme.operands(weight="w2")[1])
    op.declare(
        "in_blocks", level=Level.NATIVE, band="tuned", signatures=signatures, requires=BLOCKS,
        entry="test_padding:in_whole_blocks",
    )  # fmt: skip
    yield "in_blocks"
    restore(kept)


def make(case, scheme, **sizes):
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, **sizes}
    return expert_cases.make(case, lambda weight: quantize(weight, scheme), **sizes)


def call(bound, layer):
    routing = Routing(ids=layer.ids, weights=layer.weights)
    return bound(layer.x, routing, shared=layer.shared).float()


def alike(found, wanted):
    return float((found - wanted).norm() / wanted.norm()) < 4e-3


# ------------------------------------------------------------------------------------- the plan
def test_the_plan_says_what_is_padded():
    sizes = {"hidden": 2890, "intermediate": 2880}
    selection = hal.select("fused_moe", scheme="mxfp4_w4a8", platform="cuda:rtx-4090", **sizes)
    assert selection.kernel.name == "triton_scaled_fp8"
    assert list(map(str, selection.padded)) == ["hidden 2890 to 2912"]
    told = "weights are padded: hidden 2890 to 2912, 1.01 times as large"
    assert told in " ".join(str(selection).split())
    first = selection.to_dict()["candidates"][0]
    assert (first["kernel"], first["padded"]) == ("triton_scaled_fp8", {"hidden": 2912})


@pytest.mark.parametrize("scheme", ["mxfp4_w4a16", "mxfp4_w4a8", "fp8_channel", "bf16", "nvfp4"])
@pytest.mark.parametrize("device", ["h200", "rtx-4090", "b200", "rtx-5090"])
def test_gpt_oss_is_not_padded_without_need(device, scheme):
    """2880 is 90 groups of 32: hal's own kernels take it, only libraries' would have it padded."""
    selection = hal.select("fused_moe", scheme=scheme, platform=f"cuda:{device}", **GPT_OSS)
    assert not selection.padded
    padded = [c.kernel for c in selection.candidates if c.padded]
    assert all(kernel.claimed for kernel in padded), padded


def test_of_one_level_the_weights_as_they_are_come_first(blocks):
    op = find_op("fused_moe")
    op.declare(
        "as_they_are", level=Level.NATIVE, band="portable", signatures=op.find(blocks).signatures,
        requires=(Needs.package("torch"),), entry="test_padding:in_whole_blocks",
    )  # fmt: skip
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE}
    selection = hal.select("fused_moe", scheme="nvfp4", platform="cpu", **sizes)
    assert [c.kernel.name for c in selection.candidates[:2]] == ["as_they_are", blocks]
    assert "takes the weights as they are, in_blocks would have them padded" in selection.reason


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"padding": False}, "hal does not pad: padding=False"),
        ({"lora": True}, "hal does not pad: low-rank updates have the sizes of the weights"),
        ({"hidden": 136}, f"hal does not pad: 1.51 times the weights, {MOST:g} at most"),
        ({"scheme": "fp8_block128"}, "gate and up rows share a block of 128 under one scale"),
    ],
)
def test_why_not(blocks, problem, reason):
    asked = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "scheme": "bf16", **problem}
    with pytest.raises(ForcedKernelError) as caught:
        hal.select("fused_moe", platform="cpu", force=blocks, **asked)
    for failure in caught.value.selection.candidate(blocks).failures:
        assert reason in str(failure)
        assert "pad to" in str(failure)


def test_blocks_of_gate_and_up_that_do_not_meet_are_padded(blocks):
    for whole in ({"interleaved": True}, {"gated": False}):
        asked = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, **whole}
        found = hal.select(
            "fused_moe", scheme="fp8_block128", platform="cpu", force=blocks, **asked
        )
        assert dict(row[::2] for row in found.padded) == {"hidden": 256, "intermediate": 128}


def test_other_needs_that_fail_are_told_and_sizes_are_not():
    """Of a kernel for another device, that sizes would be padded is no news."""
    selection = hal.select("fused_moe", scheme="mxfp4_w4a8", platform="cuda:h200", **GPT_OSS)
    failures = selection.candidate("flashinfer_moe_mx").failures
    assert {str(failure.code) for failure in failures} == {"package", "arch"}


# ----------------------------------------------------------------------------------- the result
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "block128" not in name])
def test_every_scheme_gives_what_the_weights_as_they_are_give(blocks, scheme):
    layer = make(CASES[0], scheme)
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, force=blocks)
    plain = FusedMoE(layer.w13, layer.w2, **layer.biases, force="reference")
    assert bound.selection.problem["hidden"] == HIDDEN
    assert call(bound, layer).shape == layer.x.shape
    assert alike(call(bound, layer), call(plain, layer))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_every_option_against_float64(blocks, case):
    layer = make(case, "mxfp8")
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, **case.options, force=blocks)
    found = call(bound, layer)
    assert found.shape == layer.x.shape
    assert expert_cases.error(found, layer, True) < 0.012


def test_batches(blocks):
    layer = make(CASES[0], "fp8_channel")
    x, counts = expert_cases.batches(layer, 5, [0, 5, 2, 1])
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, force=blocks, format="batched")
    found = bound(x, counts)
    assert found.shape == x.shape
    wanted = expert_cases.expected_batches(layer, x, counts, quantized=True)
    found = expert_cases.within(found, counts).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.012


def test_weights_in_another_layout_and_new_ones(blocks):
    """The weights that are given stay as they are, and so does the memory that calls read."""
    layer, other = make(CASES[0], "int8_channel"), make(CASES[2], "int8_channel")
    turned = to_layout(layer.w13, "interleaved")
    before = [tensor.clone() for tensor in (*turned.tensors, *layer.w2.tensors)]
    bound = FusedMoE(turned, layer.w2, **layer.biases, force=blocks, inplace=True)
    held = [tensor.data_ptr() for tensor in bound.tensors]
    wanted = FusedMoE(layer.w13, layer.w2, **layer.biases, force="reference")
    assert alike(call(bound, layer), call(wanted, layer))
    assert turned.layout == "interleaved"
    now = (*turned.tensors, *layer.w2.tensors)
    assert all(map(torch.equal, now, before))

    bound.reload(other.w13, other.w2, **layer.biases)
    assert [tensor.data_ptr() for tensor in bound.tensors] == held
    wanted = FusedMoE(other.w13, other.w2, **layer.biases, force="reference")
    assert alike(call(bound, layer), call(wanted, layer))


def test_new_weights_of_a_size_that_is_padded_to_the_same_are_refused(blocks):
    layer, other = make(CASES[0], "int8_channel"), make(CASES[0], "int8_channel", hidden=240)
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, force=blocks)
    before = [tensor.clone() for tensor in bound.tensors]
    shape = r"w13: found shape \[4, 240, 240\], needed \[4, 240, 232\], as it was bound"
    with pytest.raises(ShapeError, match=shape):
        bound.reload(other.w13, other.w2, **layer.biases)
    wrong = {**layer.biases, "w2_bias": other.biases["w2_bias"]}
    with pytest.raises(ShapeError, match=r"w2_bias: found shape \[4, 240\], needed \[4, 232\]"):
        bound.reload(layer.w13, layer.w2, **wrong)
    assert all(map(torch.equal, bound.tensors, before))


# ---------------------------------------------------------------------------------- the weights
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_what_is_added_is_zero_and_the_rest_is_as_it_was(scheme):
    generator = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(2, 256, 72, generator=generator).bfloat16(), scheme)
    wide = pad_weight(weight, 512, 200, halves=2)
    assert wide.shape == (2, 512, 200)
    found, old = wide.dequantize(), weight.dequantize()
    gate, up = found.chunk(2, 1)
    assert torch.equal(torch.cat((gate[:, :128, :72], up[:, :128, :72]), 1), old)
    assert not gate[:, 128:].any()
    assert not up[:, 128:].any()
    if not (wide.zeros is not None and weight.zeros.any()):
        assert not found[..., 72:].any()
    assert found.isfinite().all()
    shared = {tensor.data_ptr() for tensor in wide.tensors} & {
        tensor.data_ptr() for tensor in weight.tensors
    }
    assert not shared


def test_zero_points_of_groups():
    from hal.quant import QTensor

    codes = torch.randint(0, 256, (2, 4, 36), dtype=torch.uint8)
    scales, zeros = torch.rand(2, 4, 1) + 0.5, torch.full((2, 4, 1), 7, dtype=torch.uint8)
    weight = QTensor(codes, scales, SCHEMES["int4_w4a16"], "uint4", "canonical", (2, 4, 72),
                     zeros=zeros)  # fmt: skip
    wide = pad_weight(weight, 6, 256)
    found = wide.dequantize()
    assert torch.equal(found[:, :4, :72], weight.dequantize())
    assert not found[:, 4:].any()
    assert not found[:, :, 128:].any()


@pytest.mark.parametrize(
    ("rows", "columns", "halves"), [(63, 72, 1), (64, 71, 1), (65, 72, 2), (66, 72, 4)]
)
def test_sizes_that_cannot_be(rows, columns, halves):
    weight = quantize(torch.randn(1, 64, 72).bfloat16(), "fp8_channel")
    with pytest.raises(ShapeError, match=r"found \[64, 72\] to .*, needed at least the sizes"):
        pad_weight(weight, rows, columns, halves=halves)


def test_halves_within_a_block_of_scales():
    weight = quantize(torch.randn(1, 128, 64).bfloat16(), "fp8_block128")
    with pytest.raises(ShapeError, match="2 parts of 64 rows, to 128 each, needed multiples of 12"):
        pad_weight(weight, 256, 64, halves=2)


def test_rows_of_a_bias():
    bias = torch.tensor([[1.0, 2, 3, 4]])
    assert pad_rows(bias, 6, halves=2).tolist() == [[1, 2, 0, 3, 4, 0]]
    assert pad_rows(bias, 6).tolist() == [[1, 2, 3, 4, 0, 0]]


# --------------------------------------------------------------------------------- on a device
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_w4a8"])
def test_padded_for_a_kernel_on_a_device(scheme):
    """232 columns are no whole groups of 32: padded to 256 they are; x and the output stay 232."""
    layer = make(CASES[0], scheme, intermediate=136, device="cuda")
    try:
        bound = FusedMoE(layer.w13, layer.w2, **layer.biases, force="triton_scaled_fp8")
    except ForcedKernelError as error:
        pytest.skip(str(error))
    assert [row.to for row in bound.selection.padded] == [256, 160]
    found = call(bound, layer)
    assert found.shape == (7, HIDDEN)
    assert expert_cases.error(found, layer, True) < 0.012


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton_packed", "triton_scaled_fp8"])
def test_mxfp4_padded_to_256_by_its_owner_on_a_device(kernel):
    case = expert_cases.Case("to 256", CASES[0].formula, {"unpadded_hidden": 200}, second_bias=True)
    layer = expert_cases.make(
        case, lambda weight: quantize(weight, "mxfp4_w4a8"), hidden=256, device="cuda"
    )
    bound = FusedMoE(layer.w13, layer.w2, **layer.biases, **case.options, force=kernel)
    found = call(bound, layer)
    assert found.shape == (7, 200)
    assert expert_cases.error(found, layer, kernel != "triton_packed") < 0.012
