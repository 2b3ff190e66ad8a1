"""A choice below the highest level says what would have to change for more."""

from __future__ import annotations

import pytest
from core_fakes import attach, make_op, make_spec, took

import hal
from hal.arch import CudaArch
from hal.needs import Needs
from hal.quant import SCHEMES
from hal.registry import Level, Op
from hal.selection import Options, Selection, choose

BLACKWELL = Needs.at_least(CudaArch(10, 0))
DEVICES = ("cuda:rtx-3090", "cuda:t4", "cuda:h100", "cuda:b200", "cuda:rtx-5090", "rocm:mi300x",
           "rocm:mi355x", "xpu:max-1550", "cpu:avx512")  # fmt: skip


def pick(op: Op, options: Options | None = None, **problem: object) -> Selection:
    return choose(op, "bf16", make_spec(), problem, options or Options())


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        ((BLACKWELL,), "no kernel above weight_only is for sm_90"),
        ((BLACKWELL, Needs.package("fast")), "no kernel above weight_only is for sm_90"),
        ((Needs.package("fast", "2.1"),), "above weight_only: best, needs fast >= 2.1"),
        (
            (Needs.multiple_of("m", 64), Needs.torch("3.0", "a dtype")),
            "above weight_only: best, needs m a multiple of 64 and torch >= 3.0",
        ),
    ],
)
def test_what_would_have_to_change(requires: tuple, told: str) -> None:
    op = make_op()
    attach(op, "best", Level.NATIVE, requires=requires)
    attach(op, "good", Level.WEIGHT_ONLY)
    attach(op, "lower", Level.DEQUANT, requires=(Needs.package("slow"),))
    selection = pick(op, m=100)
    assert selection.above == selection.to_dict()["above"] == told
    assert f"   {told}" in str(selection)


def test_what_can_run_and_is_not_chosen() -> None:
    op = make_op(measured=lambda: (took("good", 1.0), took("slow", 2.0)))
    attach(op, "good", Level.WEIGHT_ONLY)
    attach(op, "slow", Level.NATIVE)
    attach(op, "untried", Level.NATIVE, claimed=True)
    attach(op, "later", Level.NATIVE, claimed=True, requires=(Needs.package("later"),))
    first, _, parts = pick(op).above.partition(": ")
    assert first == "above weight_only"
    assert set(parts.split("; ")) == {
        "slow can run but was measured to be slower (force=slow)",
        "untried can run but is claimed (force=untried)",
        "later, claimed, needs later",
    }


def test_nothing_is_said_where_nothing_is_above_or_the_caller_chose() -> None:
    op = make_op()
    attach(op, "best", Level.NATIVE)
    attach(op, "good", Level.WEIGHT_ONLY)
    assert pick(op).above == ""
    assert pick(op, Options(force="good")).above == ""
    assert pick(op, Options(batch_invariant=True)).above == ""


@pytest.mark.parametrize("device", DEVICES)
def test_every_choice_of_experts_below_native_says_what_would_change(device: str) -> None:
    """Or there is none above for its scheme, on any device."""
    for scheme in SCHEMES:
        selection = hal.select("fused_moe", scheme=scheme, platform=device)
        above = [c for c in selection.candidates if c.serves and c.kernel.level > selection.level]
        assert bool(selection.above) == bool(above), (scheme, selection.above)
        for candidate in above:
            named = candidate.kernel.name in selection.above
            codes = {str(failure.code) for failure in candidate.failures}
            of_device = not codes.isdisjoint({"arch", "format", "platform"})
            assert named is not of_device, (scheme, candidate.kernel.name)
