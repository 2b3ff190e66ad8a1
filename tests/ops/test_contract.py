"""Force every kernel by name on every case of `hal.ops.cases`, which `hal verify` runs as well.

A kernel is tested by existing: the trials come from the registry.
"""

from __future__ import annotations

import pytest
import torch

import hal
from hal.errors import ForcedKernelError
from hal.ops.cases import CASES, Case, Findings, Trial, cases_of, trials_of
from hal.ops.cases.quantizing import near, same
from hal.ops.cases.routing_oracle import ROWS, aligned, oracle
from hal.quant import SCHEMES
from hal.quant.scheme import find_scheme
from hal.registry import Level, op_names, restore, snapshot


@pytest.fixture
def registry():
    """Take back what a test registers."""
    kept = snapshot()
    yield
    restore(kept)


@pytest.mark.parametrize(
    ("kernel", "scheme", "case"),
    [
        pytest.param(kernel.name, scheme, case, id=f"{kernel}-{scheme}-{case.name}")
        for op in op_names()
        for kernel, scheme, case in trials_of(op)
    ],
)
def test_kernel_against_its_reference(device, kernel, scheme, case):
    try:
        found = case.run(Trial(kernel, scheme, device))
    except ForcedKernelError as error:
        failures = error.selection.candidate(kernel).failures
        pytest.skip(f"{kernel}: " + "; ".join(map(str, failures)))
    assert found.faults == []


def test_every_op_has_cases_of_its_own_name():
    assert {case.op for case in CASES} == set(op_names())
    for op in op_names():
        names = [case.name for case in cases_of(op)]
        assert len(set(names)) == len(names)
        assert any(case.small for case in cases_of(op)), f"{op}: nothing for the interpreter"


def test_every_scheme_has_a_kernel_here(device):
    platform = hal.current_platform() if device.type != "cpu" else hal.platform("cpu")
    for op in ("linear", "fused_moe"):
        for scheme in SCHEMES:
            selection = hal.select(op, scheme=scheme, platform=platform)
            assert selection.level > Level.REFERENCE


# What a kernel does wrong, by op: the cases must see it.
def _broken(op, entry):
    from hal.ops.quantize import quantize_reference
    from hal.registry import find_op

    reference = find_op(op).find("reference")
    find_op(op).declare(
        "broken",
        level=Level.NATIVE,
        band="portable",
        signatures=reference.signatures,
        requires=reference.requires,
        entry=f"test_contract:{entry}",
    )
    return reference, quantize_reference


def linear_off_by_two_percent(binding, weight, bias=None):
    from hal.registry import find_op

    launch, tensors = find_op("linear").find("reference").load()(binding, weight, bias)
    return (lambda *given: launch(*given) * 1.02), tensors


def moe_without_absent_slots(binding, w13, w2, layer):
    from hal.registry import find_op

    launch, tensors = find_op("fused_moe").find("reference").load()(binding, w13, w2, layer)
    return (lambda x, ids, *given: launch(x, ids.clamp(0, w13.shape[0] - 1), *given)), tensors


def quantize_with_one_bit_wrong(x, encoding, how, *rest):
    from hal.ops.quantize import quantize_reference

    codes, *scales = quantize_reference(x, encoding, how, *rest)
    if codes.numel():
        codes.view(torch.uint8).view(-1)[0] ^= 1
    return codes, *scales


def route_with_ties_to_the_highest(logits, router, bias, expert_map):
    from hal.ops.route import reference

    turned = None if bias is None else bias.flip(-1)
    ids, weights = reference(logits.flip(-1), router, turned, expert_map)
    return logits.shape[-1] - 1 - ids, weights


def align_one_block_short(ids, experts, block):
    from hal.ops.align import align_reference

    found = align_reference(ids, experts, block)
    return found._replace(n_padded=found.n_padded - block)


@pytest.mark.parametrize(
    ("op", "scheme", "entry", "seen_by"),
    [
        ("linear", "fp8_channel", "linear_off_by_two_percent", "64x512x384"),
        ("fused_moe", "bf16", "moe_without_absent_slots", "absent"),
        ("quantize", "fp8_channel", "quantize_with_one_bit_wrong", "33x512"),
        ("route", "none", "route_with_ties_to_the_highest", "ties across"),
        ("align", "none", "align_one_block_short", "5x3"),
    ],
)
def test_cases_see_what_is_wrong(registry, op, scheme, entry, seen_by):
    _broken(op, entry)
    faults = {}
    for case in cases_of(op):
        if seen_by in case.name:
            found = case.run(Trial("broken", scheme, torch.device("cpu")))
            faults[case.name] = found.faults
    assert faults
    assert all(faults.values()), faults


class TestFindings:
    def test_nothing_compared_is_no_error(self):
        assert (Findings().error, Findings().faults) == (0.0, [])

    def test_the_worst_comparison_is_kept(self):
        found = Findings()
        found.near("small", 0.001, 0.01)
        found.near("large", 0.4, 0.5)
        found.near("middle", 0.02, 0.1)
        assert (found.error, found.allowed, found.faults) == (0.4, 0.5, [])

    def test_nan_and_more_than_allowed_are_faults(self):
        found = Findings()
        found.near("product", float("nan"), 0.01)
        found.near("sum", 0.02, 0.01)
        assert [fault.partition(":")[0] for fault in found.faults] == ["product", "sum"]

    def test_the_interpreter_may_be_off_by_more(self):
        def check(trial: Trial, found: Findings) -> None:
            found.near("product", 0.015, 0.01)

        trial = Trial("any", "bf16", torch.device("cpu"))
        assert Case("op", "name", check).run(trial).faults
        eased = Trial("any", "bf16", torch.device("cpu"), interpreted=True)
        assert not Case("op", "name", check).run(eased).faults


class TestComparisons:
    def test_same_tells_kinds_shapes_and_bits_apart(self):
        one = torch.tensor([1.0, 2.0])
        assert same((one,), (one.clone(),)) == ""
        assert "tensors, needed" in same((one, one), (one,))
        assert "needed" in same((one,), (one.double(),))
        assert "bytes differ" in same((one,), (one + 1,))

    def test_near_tells_shapes_and_nan_apart(self):
        scheme = find_scheme("int8_channel")
        codes = torch.tensor([[100, -50]], dtype=torch.int8)
        scales = torch.tensor([0.5])
        assert near((codes, scales), (codes, scales), scheme, 2) == ("", 0.0)
        assert near((codes, scales), (codes, scales * torch.nan), scheme, 2)[0]
        assert near((codes, scales), (codes, scales * 2), scheme, 2)[1] == pytest.approx(0.5)

    def test_ties_go_to_the_lowest_id(self):
        ids, weights = oracle(ROWS["all equal"], 3, "softmax", True, 1.0, None)
        assert ids == [0, 1, 2]
        assert weights == pytest.approx([1 / 3] * 3)

    def test_slots_are_listed_by_expert_in_whole_blocks(self):
        ids = torch.tensor([[1, 0], [-1, 1]])
        assert aligned(ids, 2, 2) == ([1, 4, 0, 3], [0, 1])
