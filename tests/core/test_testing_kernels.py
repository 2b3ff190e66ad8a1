"""`hal.testing` for kernels: hal's own pass every check, and each check finds what it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="needs the package torch")

import hal.testing
from hal.errors import UnknownNameError
from hal.need import Code, Failure, Need
from hal.needs import Needs
from hal.registry import Level, find_op, op_names
from hal.testing import KERNEL_CHECKS, ConformanceError, check_kernel, compare_kernel, find_kernel

KERNELS = [k for name in op_names(collective=True) for k in find_op(name).kernels]
DENSE = find_op("linear").find("torch_dense")


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kernel_conforms(kernel) -> None:
    check_kernel(str(kernel))


def test_numbers_are_compared_where_a_kernel_runs() -> None:
    # Which one is chosen depends on what this CPU computes itself.
    dense = hal.select("linear", scheme="bf16", platform="cpu").kernel
    assert compare_kernel(dense, "bf16", "cpu", hal.platform("cpu")) >= 5
    check_kernel("align/torch_sort", "cpu")
    there = find_kernel("linear/aiter_fp8")
    with pytest.raises(ConformanceError, match=r"can run no problem on cpu: .*needs rocm"):
        compare_kernel(there, "fp8_channel", "cpu")


def test_wrong_numbers_are_found(monkeypatch) -> None:
    reference = find_op("align").find("reference")
    wrong = replace(reference, name="wrong", entry=f"{__name__}:short")
    monkeypatch.setitem(find_op("align")._kernels, "wrong", wrong)
    with pytest.raises(ConformanceError, match="align/wrong under none: "):
        check_kernel("align/wrong", "cpu")


def short(ids, experts, block):
    from hal.ops.align import align_reference

    found = align_reference(ids, experts, block)
    return found._replace(n_padded=found.n_padded - block)


def takes_too_little(binding):
    return binding


class Silent(Need):
    def check(self, context):
        return Failure(Code.ARCH, "", "")


@pytest.mark.parametrize(
    ("check", "changed", "fault"),
    [
        ("binds_what_the_op_gives", {"entry": "acme.kernels:bind"}, "cannot be imported"),
        ("binds_what_the_op_gives", {"entry": f"{__name__}:DENSE"}, "is no function"),
        (
            "binds_what_the_op_gives",
            {"entry": f"{__name__}:takes_too_little"},
            r"must take \(binding, weight, bias\)",
        ),
        ("has_a_source", {"entry": "acme.kernels:bind"}, "found no source"),
        (
            "serves_schemes_of_its_op",
            {"signatures": {"fp3": DENSE.signatures["bf16"]}},
            r"has no \['fp3'\]",
        ),
        (
            "can_run_somewhere",
            {"requires": (Needs.platform("cuda"), Needs.exactly("gfx942"))},
            "the nearest lacks ",
        ),
        ("says_why_not", {"requires": (Silent(),)}, "says too little"),
        (
            "is_native_where_it_says_so",
            {"signatures": find_op("linear").find("triton_fp8").signatures},
            "multiplies none of e4m3fn",
        ),
    ],
)
def test_each_check_finds_its_fault(check, changed, fault) -> None:
    wrong = replace(DENSE, **{"requires": (Needs.platform("cuda"),), **changed})
    (run,) = (one for one in KERNEL_CHECKS if one.__name__ == check)
    with pytest.raises(ConformanceError, match=fault):
        run(wrong)
    run(DENSE)
    if check == "is_native_where_it_says_so":
        run(replace(wrong, level=Level.EMULATED))


def test_names_are_those_that_hal_reports() -> None:
    assert find_kernel("linear/torch_dense") is DENSE
    for wrong in ("torch_dense", "linear/torch_dens", "linaer/torch_dense"):
        with pytest.raises(UnknownNameError):
            find_kernel(wrong)
