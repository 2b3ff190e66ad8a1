"""Devices that are nearly in the tables get nothing that is not sure, and the reasons for it."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from hal.arch import parse_arch
from hal.device import DeviceSpec, FormatSupport, Software
from hal.formats import Support
from hal.needs import Code, Context, Failure
from hal.platforms.tables import arch_facts, arch_rows, device_spec, make_spec
from hal.registry import Kernel, Level, find_op, op_names
from hal.selection import choose

SOFTWARE = Software(torch="2.13.0", triton="3.7.1")
NEAR_MISSES = (
    "rocm:gfx1202", "rocm:gfx11-generic", "rocm:gfx1300", "rocm:gfx943", "rocm:gfx951",
    "cuda:sm_101", "cuda:sm_130", "cuda:sm_88", "cuda:sm_122", "xpu:xe4", "xpu:unknown",
    "cpu:riscv64",
)  # fmt: skip
# A processor is not named by its machine type, and `unknown` is what no id is listed for.
NAMED = [name for name in NEAR_MISSES if name not in ("cpu:riscv64", "xpu:unknown")]
PROBLEMS = {
    "linear": {"tokens": 16, "in_features": 4096, "out_features": 4096, "dtype": "bfloat16"},
    "fused_moe": {
        "tokens": 16, "experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 768,
        "dtype": "bfloat16", "activation": "silu",
    },
}  # fmt: skip
CELLS = [
    (device, op, scheme)
    for device, op in itertools.product(NEAR_MISSES, op_names())
    for scheme in sorted({name for kernel in find_op(op).kernels for name in kernel.schemes})
]


def spec_of(device: str) -> DeviceSpec:
    """Return what detection would make of the device: its architecture and no product."""
    return make_spec(arch_facts(parse_arch(*device.split(":"))), software=SOFTWARE)


def refused(kernel: Kernel, spec: DeviceSpec, scheme: str) -> list[Failure]:
    """Return what the kernel itself asks for of `spec`, as its failures say it."""
    context = Context(spec, scheme, PROBLEMS.get(kernel.op, {}))
    return list(filter(None, (need.check(context) for need in kernel.requires)))


@pytest.mark.parametrize("device", NEAR_MISSES)
def test_the_device_is_a_guess_that_says_so(device: str) -> None:
    spec = spec_of(device)
    facts = arch_facts(spec.arch)
    assert spec.guess
    assert facts.guess
    assert facts.note.startswith(f"{spec.arch} is not in the table")
    assert spec.arch not in arch_rows()


@pytest.mark.parametrize("device", NEAR_MISSES)
def test_no_row_of_the_tables_is_borrowed(device: str) -> None:
    spec = spec_of(device)
    assert spec.features == frozenset()
    assert spec.formats.triton_math == frozenset()
    assert spec.formats.fp8_encoding is None
    assert spec.formats.of("math", "bfloat16") is Support.EMULATED
    assert {name for name, support in spec.formats.math if support is Support.NATIVE} == {"float32"}
    assert all(spec.formats != facts.formats for facts in arch_rows().values())
    assert spec.name == str(spec.arch)
    measured = (spec.memory_bytes, spec.compute_units, spec.l2_bytes)
    published = (spec.bandwidth_bytes_per_second, spec.interconnect, spec.source or None)
    assert (*measured, *published) == (None,) * 6
    assert spec.rates == ()


@pytest.mark.parametrize("device", NAMED)
def test_a_name_gives_what_detection_makes_of_the_device(device: str) -> None:
    assert device_spec(*device.split(":"), SOFTWARE) == spec_of(device)


@pytest.mark.parametrize(("device", "name", "scheme"), CELLS)
def test_what_is_chosen_needs_torch_alone(device: str, name: str, scheme: str) -> None:
    spec = spec_of(device)
    selection = choose(name, scheme, spec, PROBLEMS.get(name, {}))
    kernel = selection.kernel
    assert kernel is not None
    assert name not in PROBLEMS or kernel.level is not Level.NATIVE
    without = refused(kernel, replace(spec, software=Software()), scheme)
    assert [failure.needed for failure in without] == ["torch"]
    # On a device that can neither store nor multiply anything, the one thing that it may miss is
    # the wide format of the activations, which software will do for.
    for failure in refused(kernel, replace(spec, formats=FormatSupport()), scheme):
        assert failure.code is Code.FORMAT
        assert re.fullmatch(r"(bfloat16|float16)( or float16)? math .*emulated", failure.needed)


@pytest.mark.parametrize(("device", "name", "scheme"), CELLS)
def test_every_other_kernel_has_reasons(device: str, name: str, scheme: str) -> None:
    selection = choose(name, scheme, spec_of(device), PROBLEMS.get(name, {}))
    candidates = {candidate.kernel.name: candidate for candidate in selection.candidates}
    assert candidates.keys() == {kernel.name for kernel in find_op(name).kernels}
    for candidate in candidates.values():
        assert candidate.can_run == (not candidate.failures)
        assert all(failure.needed and failure.found for failure in candidate.failures)
        needs_triton = refused(candidate.kernel, spec_of(device), scheme)
        if any(failure.needed == "feature triton" for failure in needs_triton):
            assert not candidate.can_run
