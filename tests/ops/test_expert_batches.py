"""Experts whose rows come as `[experts, capacity, hidden]` with counts: each kernel, by name."""

from __future__ import annotations

from pathlib import Path

import adapter_fakes as fakes
import expert_cases
import pytest
import torch
from calibrated import quantize
from expert_cases import CASES

import hal
from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    ValueRangeError,
)
from hal.needs import Context
from hal.ops import FusedMoE, Routing, fused_moe
from hal.ops.slots import count_runs
from hal.registry import Level, find_op

QUANTIZES = (Level.NATIVE, Level.EMULATED, Level.REFERENCE)
KERNELS = [(kernel.name, kernel.schemes[0]) for kernel in find_op("fused_moe").kernels]
BY_NAME = {case.name: case for case in CASES}
COUNTS = [[3, 0, 9, 1], [0, 0, 0, 0], [9, 9, 9, 9], [0, 0, 0, 5]]


def make(name="biases", scheme="fp8_channel", device="cpu"):
    return expert_cases.make(BY_NAME[name], lambda w: quantize(w, scheme), device=device)


def bind(layer, **options):
    """Return the layer bound for batches, or skip with the reasons for which a kernel cannot."""
    options = {**layer.biases, **layer.case.options, "format": "batched", **options}
    try:
        return FusedMoE(layer.w13, layer.w2, **options)
    except ForcedKernelError as error:
        failures = error.selection.candidate(options["force"]).failures
        pytest.skip(f"{options['force']}: " + "; ".join(map(str, failures)))


@pytest.mark.parametrize("name", ["biases", "gpt-oss", "nemotron", "padded"])
@pytest.mark.parametrize(("kernel", "scheme"), KERNELS)
def test_against_float64(device, kernel, scheme, name):
    layer = make(name, scheme, device)
    bound = bind(layer, force=kernel)
    quantized = bound.selection.level in QUANTIZES
    for given in COUNTS:
        x, counts = expert_cases.batches(layer, 9, given, device)
        out = bound(x, counts)
        assert out.shape == x.shape
        assert out.is_contiguous()
        found = expert_cases.within(out, counts).double()
        if not sum(given):
            continue
        errors = [
            (found - wanted).norm() / wanted.norm()
            for wanted in (
                expert_cases.expected_batches(layer, x, counts, quantized, rounded)
                for rounded in (False, True)
            )
        ]
        assert float(min(errors)) < 0.012
        assert torch.equal(expert_cases.within(bound(x, counts.long()), counts).double(), found)


def test_nothing_to_do(device):
    bound = bind(make(device=device))
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    assert bound(torch.empty(4, 0, 128, device=device).bfloat16(), counts).shape == (4, 0, 128)


def test_int8_activations_are_refused_with_the_reason():
    selection = hal.select("fused_moe", scheme="int8_channel", platform=fakes.newest("cuda:h100"),
                           format="batched")  # fmt: skip
    for kernel in ("triton_int8", "torch_experts_int8"):
        assert "rows with a routing only" in str(selection.candidate(kernel).failures)
    assert selection.kernel.name == "triton_decode"
    grouped = hal.select(
        "fused_moe", scheme="bf16", platform=fakes.newest("cuda:h100"), format="batched"
    )
    assert "sorted by expert" in str(grouped.candidate("torch_grouped_mm").failures)
    layer = make(scheme="int8_channel")
    with pytest.raises(ForcedKernelError, match="rows with a routing only"):
        FusedMoE(layer.w13, layer.w2, format="batched", force="torch_experts_int8")


class TestRefuses:
    def test_shapes_dtypes_and_devices(self):
        layer = make()
        bound = bind(layer)
        x, counts = expert_cases.batches(layer, 9, COUNTS[2])
        with pytest.raises(ShapeError, match=r"needed \[4, capacity, 128\]"):
            bound(x[0], counts)
        with pytest.raises(ShapeError, match=r"needed \[4, capacity, 128\]"):
            bound(x[:3], counts)
        with pytest.raises(ShapeError, match=r"\[\.\.\., 128\]"):
            bound(x[..., :64], counts)
        with pytest.raises(DTypeError, match="float32, needed bfloat16"):
            bound(x.float(), counts)
        with pytest.raises(DTypeError, match=r"counts: found torch\.float32"):
            bound(x, counts.float())
        with pytest.raises(ArgumentError, match="a Routing with format=batched"):
            bound(x, Routing(ids=layer.ids, weights=layer.weights))
        with pytest.raises(ShapeError, match=r"counts: found \[3\], needed \[4\]"):
            bound(x, counts[:3])
        with pytest.raises(DeviceMismatchError, match="counts on meta"):
            bound(x, counts.to("meta"))
        with pytest.raises(GradientError):
            bound(x.clone().requires_grad_(), counts)
        with pytest.raises(ArgumentError, match="shared with format=batched"):
            bound(x, counts, shared=x)

    def test_counts_where_a_routing_is_needed(self):
        layer = make()
        bound = FusedMoE(layer.w13, layer.w2)
        with pytest.raises(ArgumentError, match="found Tensor as routing, needed a Routing"):
            bound(layer.x, torch.zeros(4, dtype=torch.int32))

    def test_bad_values_with_hal_check(self, monkeypatch):
        monkeypatch.setenv("HAL_CHECK", "1")
        layer = make()
        bound = bind(layer)
        x, counts = expert_cases.batches(layer, 9, [3, 0, 9, 1])
        assert bound(x, counts).shape == x.shape
        with pytest.raises(ValueRangeError, match="row 3 of expert 0"):
            bound(x, counts + torch.tensor([1, 0, 0, 0], dtype=torch.int32))
        for wrong in (10, -1):
            counts[1] = wrong
            with pytest.raises(ValueRangeError, match=f"{wrong} rows of expert 1"):
                bound(x, counts)


def test_counts_beyond_the_capacity_write_nowhere_else():
    counts = torch.tensor([12, -3, 2], dtype=torch.int32)
    order, runs, complete = count_runs(counts, 4)
    assert order.tolist() == [0, 1, 2, 3, 8, 9]
    assert runs == [(0, 0, 4), (2, 4, 6)]
    assert not complete


def test_full_graph_and_the_operator(device):
    # Before torch 2.13 opcheck multiplies what it is given, which 8-bit floats cannot be.
    layer = make(scheme="int8_w8a16", device=device)
    bound = bind(layer)
    x, counts = expert_cases.batches(layer, 9, COUNTS[2], device)

    def model(x, counts):
        return bound(x * 2, counts) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, counts), model(x, counts))
    torch.library.opcheck(
        torch.ops.hal.fused_moe_batched.default,
        (x, counts, list(bound.tensors), bound.key),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_function():
    layer = make()
    x, counts = expert_cases.batches(layer, 9, COUNTS[0])
    found = fused_moe(x, layer.w13, layer.w2, counts, format="batched", **layer.biases)
    wanted = bind(layer)(x, counts)
    assert torch.equal(expert_cases.within(found, counts), expert_cases.within(wanted, counts))


def test_the_page_lists_every_kernel_of_hal_and_what_takes_batches():
    page = (Path(__file__).parents[2] / "docs" / "moe.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    listed = {row[0]: row[2] for row in rows if len(row) == 4 and row[0] in find_op("fused_moe")}
    for kernel in (kernel for kernel in find_op("fused_moe").kernels if not kernel.claimed):
        spec = hal.platform("cpu").device(0)
        context = Context(spec, kernel.schemes[0], {"format": "batched"})
        found = [failure for need in kernel.requires if (failure := need.check(context))]
        refused = any("format=batched" in failure.found for failure in found)
        assert listed.pop(kernel.name) == ("no" if refused else "yes"), kernel
    assert not listed
