"""Each requirement: met, not met with found and needed, and unchecked where nothing was given."""

from __future__ import annotations

import pickle

import pytest
from core_fakes import make_spec

from hal.arch import CpuArch, CudaArch, GfxArch
from hal.device import Software, format_support
from hal.errors import RegistrationError, UnknownNameError
from hal.needs import Code, Context, Needs

FP8_STORED = format_support({"e4m3fn": "emulated"}, {"bfloat16": "native"}, ["bfloat16"])

# need, facts that do not meet it, text of the failure
CASES = [
    (Needs.platform("rocm", "xpu"), {}, {}, "platform: found cuda, needs rocm or xpu"),
    (
        Needs.at_least(CudaArch(10, 0)), {}, {}, "arch: found sm_90, needs sm_100 or newer",
    ),
    (Needs.in_family("sm_10x"), {}, {}, "arch: found sm_90, needs family sm_10x"),
    (Needs.exactly("sm_89", "sm_100"), {}, {}, "arch: found sm_90, needs sm_89 or sm_100"),
    (
        Needs.math("e4m3fn"),
        {"formats": FP8_STORED},
        {},
        "format: found e4m3fn math absent, emulated storage on sm_90, needs e4m3fn math native",
    ),
    (
        Needs.math("e4m3fn", "int8", emulated=True),
        {"formats": format_support({}, {})},
        {},
        "format: found e4m3fn math absent on sm_90; int8 math absent on sm_90, needs e4m3fn or "
        "int8 math native or emulated",
    ),
    (
        Needs.storage("e4m3fn", emulated=False),
        {"formats": FP8_STORED},
        {},
        "format: found e4m3fn storage emulated on sm_90, needs e4m3fn storage native",
    ),
    (
        Needs.triton_math("e4m3fn"),
        {"formats": FP8_STORED},
        {},
        "format: found bfloat16 on sm_90, needs Triton's own matrix instruction for e4m3fn",
    ),
    (
        Needs.feature("tma", "since sm_90"),
        {},
        {},
        "arch: found sm_90 without, needs feature tma (since sm_90)",
    ),
    (
        Needs.package("deep-gemm", "2.1", hint="build it from source"),
        {},
        {},
        "package: found not installed, needs deep-gemm >= 2.1 (build it from source)",
    ),
    (
        Needs.package("vllm"),
        {"software": Software(packages=(("vllm", "0.9"),), broken=(("vllm", "undefined symbol"),))},
        {},
        "package: found vllm broken: undefined symbol, needs vllm",
    ),
    (
        Needs.package("triton", "3.8"), {}, {}, "package: found triton 3.7.1, needs triton >= 3.8",
    ),
    (
        Needs.package("triton", "3.2", on={"sm_90": "3.8"}), {}, {},
        "package: found triton 3.7.1, needs triton >= 3.8 on sm_90",
    ),
    (
        Needs.package("triton", "3.9", on={"sm_90": "3.8"}), {}, {},
        "package: found triton 3.7.1, needs triton >= 3.9",
    ),
    (
        Needs.torch("2.14", "grouped_mm"),
        {},
        {},
        "torch_version: found 2.13.0+cu130, needs torch >= 2.14 (grouped_mm)",
    ),
    (
        Needs.torch("2.6", "any"),
        {"software": Software()},
        {},
        "torch_version: found torch not installed, needs torch >= 2.6",
    ),
    (
        Needs.dtype("e8m0"),
        {"software": Software(torch="2.6.0+cu124")},
        {},
        "torch_version: found 2.6.0+cu124, needs torch >= 2.7 (torch.float8_e8m0fnu, format e8m0)",
    ),
    (
        Needs.dtype("e4m3fnuz", "e4m3fn"),
        {"software": Software(torch="2.0.1")},
        {},
        "torch_version: found 2.0.1, needs torch >= 2.1 (torch.float8_e4m3fn, format e4m3fn)",
    ),
    (
        Needs.dtypes(("e8m0",), ("e2m1",), ("bfloat16",), ("e8m0",)),
        {"software": Software(torch="2.6.0")},
        {},
        "torch_version: found 2.6.0, needs torch >= 2.8 (torch.float8_e8m0fnu, format e8m0; "
        "torch.float4_e2m1fn_x2, format e2m1)",
    ),
    (
        Needs.dtypes(("bfloat16",), ("e4m3fn",)),
        {"software": Software()},
        {},
        "torch_version: found torch not installed, needs torch >= 2.1 (torch.float8_e4m3fn, format "
        "e4m3fn)",
    ),
    (
        Needs.dtype("bfloat16"),
        {"software": Software()},
        {},
        "torch_version: found torch not installed, needs torch (torch.bfloat16, format bfloat16)",
    ),
    (
        Needs.dtype("e4m3fn"),
        {"software": Software(torch="1f2e3d4")},
        {},
        "torch_version: found 1f2e3d4, needs torch >= 2.1 (torch.float8_e4m3fn, format e4m3fn)",
    ),
    (
        Needs.multiple_of("n", 128),
        {},
        {"n": 192},
        "shape: found n=192, needs n a multiple of 128 (pad to 256)",
    ),
    (Needs.between("n", 1, 64), {}, {"n": 65}, "shape: found n=65, needs 1 <= n <= 64"),
    (Needs.between("n", 2, None, "pad"), {}, {"n": 1}, "shape: found n=1, needs 2 <= n (pad)"),
    (Needs.between("n", 2, 3), {}, {"n": "many"}, "shape: found n=many, needs n to be a number"),
    (
        Needs.multiple_of("n", 8), {}, {"n": "many"}, "shape: found n=many, needs n to be a number",
    ),
    (
        Needs.one_of("m", "silu", "gelu", code=Code.LAYOUT),
        {},
        {"m": "relu"},
        "layout: found m=relu, needs m silu or gelu",
    ),
    (
        Needs.memory("n", "whole weight"),
        {"memory_bytes": 10},
        {"n": 11},
        "memory: found 10 bytes on Toy, needs 11 bytes (whole weight)",
    ),
    (
        Needs.shared_memory(1 << 17),
        {},
        {},
        "memory: found 65536 bytes, needs 131072 bytes of shared memory a block",
    ),
    (
        Needs.only_when_forced("slow"),
        {},
        {},
        "env: found automatic choice, needs to be asked for by name (slow)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("need", "facts", "problem", "text"), CASES)
def test_a_need_that_is_not_met_says_found_and_needed(need, facts, problem, text) -> None:
    failure = need.check(Context(make_spec(**facts), "bf16", problem))
    assert failure is not None
    assert str(failure) == text
    assert isinstance(failure.code, Code)
    assert pickle.loads(pickle.dumps(need)) == need


FP8 = format_support({"e4m3fn": "native"}, {"e4m3fn": "native"}, ["e4m3fn"])
MET = [
    (Needs.platform("rocm", "cuda"), {}, {}),
    (Needs.at_least(CudaArch(9, 0)), {}, {}),
    (Needs.in_family("sm_8x", "sm_9x"), {}, {}),
    (Needs.exactly("sm_90"), {}, {}),
    (Needs.math("int8", "e4m3fn"), {"formats": FP8}, {}),
    (Needs.storage("e4m3fn"), {"formats": FP8_STORED}, {}),
    (Needs.triton_math("int8", "e4m3fn"), {"formats": FP8}, {}),
    (Needs.feature("tma"), {"features": frozenset({"tma"})}, {}),
    (Needs.package("triton", "3.7"), {}, {}),
    (Needs.package("torch"), {}, {}),
    (Needs.torch("2.13", ""), {"software": Software(torch="2.13.0a0+git12")}, {}),
    (Needs.torch("2.14", "", on={"sm_90": "2.13"}), {}, {}),
    (Needs.dtype("e2m1"), {"software": Software(torch="2.8.0a0+git12")}, {}),
    (Needs.dtype("e8m0", "e4m3fn"), {"software": Software(torch="2.1.0")}, {}),
    (Needs.dtype("bfloat16", "float16"), {"software": Software(torch="a commit")}, {}),
    (Needs.multiple_of("n", 128), {}, {"n": 0}),
    (Needs.multiple_of("n", 128), {}, {"n": 256}),
    (Needs.between("n", 1, 64), {}, {"n": 1}),
    (Needs.between("n", 1, 64), {}, {"n": 64}),
    (Needs.between("n", None, 64), {}, {"n": 0}),
    (Needs.one_of("m", "silu"), {}, {"m": "silu"}),
    (Needs.memory("n"), {"memory_bytes": 10}, {"n": 10}),
    (Needs.memory("n"), {"memory_bytes": None}, {"n": 10}),
    (Needs.shared_memory(1 << 16), {}, {}),
    (Needs.only_when_forced("slow"), {}, {"forced": True}),
]


@pytest.mark.parametrize(("need", "facts", "problem"), MET)
def test_a_need_that_is_met_says_nothing(need, facts, problem) -> None:
    assert need.check(Context(make_spec(**facts), "bf16", problem)) is None


@pytest.mark.parametrize(
    "need",
    [
        Needs.multiple_of("n", 128),
        Needs.between("n", 1, 2),
        Needs.one_of("n", "a"),
        Needs.memory("n"),
    ],
)
@pytest.mark.parametrize("problem", [{}, {"n": None}])
def test_what_is_not_given_cannot_fail_and_is_unchecked(need, problem) -> None:
    context = Context(make_spec(), "bf16", problem)
    assert need.check(context) is None
    assert need.unchecked(context) == ("n",)
    assert need.unchecked(Context(make_spec(), "bf16", {"n": 1})) == ()


@pytest.mark.parametrize("arch", [GfxArch("gfx942"), GfxArch("gfx90a"), CpuArch("x86_64")])
def test_a_floor_of_another_vendor_is_never_met(arch) -> None:
    failure = Needs.at_least(CudaArch(8, 0)).check(Context(make_spec(arch), "bf16"))
    assert str(failure) == f"arch: found {arch}, needs sm_80 or newer"


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Needs.platform(),
        lambda: Needs.in_family(),
        lambda: Needs.exactly(),
        lambda: Needs.math(),
        lambda: Needs.triton_math(),
        lambda: Needs.one_of("m"),
        lambda: Needs.multiple_of("n", 0),
        lambda: Needs.between("n", 2, 1),
        lambda: Needs.between("n", None, None),
        lambda: Needs.in_family("sm_100"),
        lambda: Needs.exactly("sm_10x"),
        lambda: Needs.exactly("sm_90a"),
        lambda: Needs.package("triton", "newest"),
        lambda: Needs.torch("2.13.0+cu130", ""),
        lambda: Needs.torch("2.13", "", on={"sm_90": "newest"}),
        lambda: Needs.dtype(),
        lambda: Needs.dtypes(),
        lambda: Needs.dtypes(("bfloat16",), ()),
        lambda: Needs.dtype("int4"),
    ],
)
def test_a_need_that_could_never_be_right_is_refused(declare) -> None:
    with pytest.raises(RegistrationError):
        declare()


@pytest.mark.parametrize("declare", [Needs.math, Needs.storage, Needs.dtype])
def test_bare_fp8_is_refused(declare) -> None:
    with pytest.raises(UnknownNameError, match="number format 'fp8'"):
        declare("fp8")


def test_a_torch_release_of_one_architecture() -> None:
    need = Needs.torch("2.12", "stream", on={"sm_90": "2.14"})
    failure = need.check(Context(make_spec(CudaArch(9, 0)), "bf16"))
    assert "needs torch >= 2.14 on sm_90 (stream)" in str(failure)
    assert need.check(Context(make_spec(CudaArch(8, 9)), "bf16")) is None


def test_triton_math_refuses_unknown_formats() -> None:
    with pytest.raises(UnknownNameError):
        Needs.triton_math("fp8")
