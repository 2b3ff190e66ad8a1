"""Selection of the real ops for every device of the tables, without any of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from core_fakes import SOFTWARE

import hal
from hal.device import DeviceSpec, Software
from hal.formats import Support
from hal.needs import Context
from hal.platforms.tables import device_names, device_spec
from hal.quant.scheme import SCHEMES
from hal.registry import Level, Op, find_op, op_names
from hal.selection import choose

PROBLEMS = {
    "linear": {"tokens": 16, "in_features": 4096, "out_features": 4096, "dtype": "bfloat16"},
    "fused_moe": {
        "tokens": 16, "experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 768,
        "dtype": "bfloat16", "activation": "silu",
    },
}  # fmt: skip
MATRIX_OPS = tuple(PROBLEMS)


def schemes_of(op: Op) -> list[str]:
    return sorted({scheme for kernel in op.kernels for scheme in kernel.schemes})


CELLS = [
    (device, name, scheme)
    for device, name in itertools.product(device_names(), op_names())
    for scheme in schemes_of(find_op(name))
]


def spec_of(device: str, software: Software = SOFTWARE) -> DeviceSpec:
    return device_spec(*device.split(":"), software)


@pytest.mark.parametrize(("device", "name", "scheme"), CELLS)
def test_every_cell_has_a_kernel_that_can_run_and_reasons_for_the_rest(
    device: str, name: str, scheme: str
) -> None:
    op, spec, problem = find_op(name), spec_of(device), PROBLEMS.get(name, {})
    selection = choose(op, scheme, spec, problem)
    assert {candidate.kernel.name for candidate in selection.candidates} == {
        kernel.name for kernel in op.kernels
    }
    assert selection.kernel is not None  # the reference at least
    context = Context(spec, scheme, problem)
    for candidate in selection.candidates:
        unmet = [need for need in candidate.kernel.requires if need.check(context)]
        serves = scheme in candidate.kernel.signatures
        assert candidate.can_run == (serves and not unmet)
        for failure in candidate.failures:
            assert failure.needed
            assert failure.found
    json.dumps(selection.to_dict())
    assert max(map(len, str(selection).splitlines())) <= 80


@pytest.mark.parametrize("name", MATRIX_OPS)
@pytest.mark.parametrize("device", device_names())
def test_native_means_that_the_hardware_multiplies_the_format(device: str, name: str) -> None:
    spec = spec_of(device)
    for scheme in SCHEMES.values():
        encoding = scheme.weight.format or PROBLEMS[name]["dtype"]
        if encoding == "int4":  # whose codes are 8-bit floats too, exactly
            encoding = scheme.activation.format or encoding
        if encoding == "e2m1" and scheme.activation.format == "e4m3fn":  # the same
            encoding = "e4m3fn"
        if encoding == "e4m3fn":
            encoding = spec.formats.fp8_encoding
        native = encoding and spec.formats.of("math", encoding) is Support.NATIVE
        selection = choose(name, scheme.name, spec, PROBLEMS[name])
        for candidate in selection.candidates:
            if candidate.can_run and candidate.kernel.level is Level.NATIVE:
                assert native, f"{candidate.kernel} on {spec.arch}"


NATIVE, DECODE, EMULATED = "native", "weight_only", "emulated"
# Best level for linear with bf16, fp8_channel, fp8_block128, int8_channel
LEVELS = {
    "cuda:t4": (EMULATED, DECODE, DECODE, NATIVE),
    "cuda:a100-80gb": (NATIVE, DECODE, DECODE, NATIVE),
    "cuda:rtx-3090": (NATIVE, DECODE, DECODE, NATIVE),
    "cuda:l40s": (NATIVE, NATIVE, NATIVE, NATIVE),
    "cuda:h100": (NATIVE, DECODE, DECODE, DECODE),  # for 16 rows, measured
    "cuda:b200": (NATIVE, NATIVE, NATIVE, NATIVE),
    "rocm:mi250x": (NATIVE, DECODE, DECODE, NATIVE),
    "rocm:mi300x": (NATIVE, NATIVE, NATIVE, NATIVE),
    "rocm:mi355x": (NATIVE, NATIVE, NATIVE, NATIVE),
    "rocm:rx-7900-xtx": (NATIVE, DECODE, DECODE, NATIVE),
    "rocm:rx-9070-xt": (NATIVE, NATIVE, NATIVE, NATIVE),
    "xpu:arc-b580": (NATIVE, DECODE, DECODE, NATIVE),
    "xpu:max-1550": (NATIVE, DECODE, DECODE, NATIVE),
    "cpu:x86-avx2": (EMULATED, "dequant", "dequant", DECODE),
    "cpu:x86-amx": (NATIVE, DECODE, DECODE, NATIVE),
}


@pytest.mark.parametrize("device", LEVELS)
def test_best_levels(device: str) -> None:
    found = tuple(
        str(choose("linear", scheme, spec_of(device), PROBLEMS["linear"]).level)
        for scheme in ("bf16", "fp8_channel", "fp8_block128", "int8_channel")
    )
    assert found == LEVELS[device]


@pytest.mark.parametrize("name", MATRIX_OPS)
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128"])
@pytest.mark.parametrize("device", ["rocm:mi250x", "cuda:rtx-3090", "cuda:a100-80gb"])
def test_no_fp8_math_where_there_is_none_even_when_forced(device, name, scheme) -> None:
    op, spec = find_op(name), spec_of(device)
    native = [
        kernel.name
        for kernel in op.kernels
        if kernel.level is Level.NATIVE and scheme in kernel.signatures
    ]
    assert native
    for kernel in native:
        with pytest.raises(hal.errors.ForcedKernelError, match=str(spec.arch)):
            hal.select(name, scheme=scheme, platform=spec, force=kernel)


def test_formats_of_the_devices_that_are_easily_mistaken() -> None:
    formats = {name: spec_of(name).formats for name in device_names()}
    assert formats["cuda:rtx-3090"].of("storage", "e4m3fn") is not Support.ABSENT
    assert formats["cuda:rtx-3090"].of("math", "e4m3fn") is Support.ABSENT
    assert formats["rocm:mi250x"].of("math", "e4m3fnuz") is not Support.NATIVE
    assert formats["rocm:mi250x"].of("math", "e4m3fn") is not Support.NATIVE
    assert formats["rocm:mi300x"].fp8_encoding == "e4m3fnuz"
    assert formats["rocm:mi355x"].fp8_encoding == "e4m3fn"
    assert formats["rocm:rx-9070-xt"].fp8_encoding == "e4m3fn"
    fnuz = {name for name, row in formats.items() if row.fp8_encoding == "e4m3fnuz"}
    assert {str(spec_of(name).arch) for name in fnuz} == {"gfx942"}


@pytest.mark.parametrize("device", [name for name in device_names() if not name.startswith("cuda")])
def test_compute_capability_is_nvidias_alone(device: str) -> None:
    assert hal.platform(device).compute_capability() is None
    with pytest.raises(TypeError):
        assert hal.platform(device).arch() >= hal.platform("cuda:t4").arch()


@pytest.mark.parametrize("name", op_names())
def test_kernels_serve_known_schemes_by_their_own_operands(name: str) -> None:
    for kernel in find_op(name).kernels:
        for scheme, operands in kernel.signatures.items():
            assert scheme == "none" or scheme in SCHEMES
            assert operands
            assert len({operand.name for operand in operands}) == len(operands)


@pytest.mark.parametrize("name", op_names())
def test_without_torch_nothing_runs_and_every_reason_is_given(name: str) -> None:
    op, spec = find_op(name), spec_of("cuda:h100", Software())
    for scheme in schemes_of(op):
        selection = choose(op, scheme, spec, {})
        assert selection.kernel is None
        assert all(candidate.failures for candidate in selection.candidates)


@pytest.mark.parametrize("name", MATRIX_OPS)
def test_an_unknown_arch_gets_a_slow_answer_and_not_a_wrong_one(name: str) -> None:
    spec = device_spec("cuda", "sm_130", SOFTWARE)
    for scheme in ("fp8_channel", "int8_channel"):
        selection = choose(name, scheme, spec, PROBLEMS[name])
        assert selection.kernel is not None
        assert selection.level is not Level.NATIVE


def test_the_guide_shows_what_select_prints() -> None:
    problem = PROBLEMS["fused_moe"] | {"experts": 128}
    selection = choose("fused_moe", "fp8_block128", spec_of("cuda:rtx-3090"), problem)
    guide = Path(__file__).parents[2] / "docs" / "selection.md"
    assert str(selection) in guide.read_text(encoding="utf-8"), "paste the new table into the guide"
