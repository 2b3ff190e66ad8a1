"""`hal explain` accounts for every kernel, and says by its exit status whether one can run."""

from __future__ import annotations

from typing import Any

import pytest

from hal.platforms.tables import device_names
from hal.registry import find_op, op_names
from hal.runtime import platform
from hal.selection import choose


def one_of_each_architecture() -> list[str]:
    """Return a device of each: `test_selection_of_ops.py` asks for all of them."""
    found: dict[str, str] = {}
    for name in device_names():
        found.setdefault(platform(name).device(0).arch.name, name)
    return list(found.values())


@pytest.mark.parametrize("device", one_of_each_architecture())
def test_every_kernel_is_accounted_for(hal: Any, device: str) -> None:
    for name in op_names():
        op = find_op(name)
        for scheme in sorted({scheme for kernel in op.kernels for scheme in kernel.schemes}):
            call = ("explain", name, "--scheme", scheme, "--platform", device)
            text, plain = hal(*call), hal(*call, "--json")
            chosen = choose(op, scheme, platform(device).device(0), {})
            assert text.status == plain.status == (0 if chosen.kernel else 1)
            assert text.err == plain.err == ""
            assert plain.json["kernel"] == (chosen.kernel.name if chosen.kernel else None)
            assert plain.json["simulated"] is True
            assert "Simulated:" in text.out
            assert all(kernel.name in text.out for kernel in op.kernels)
            assert {row["kernel"] for row in plain.json["candidates"]} == {
                kernel.name for kernel in op.kernels
            }
            assert text.out.isascii()
            assert [line for line in text.out.splitlines() if len(line) > 80] == []


def test_an_op_with_one_scheme_needs_none_named(hal: Any) -> None:
    call = ("--platform", "cuda:h100", "--json", "experts=128")
    assert hal("explain", "route", *call) == hal("explain", "route", "--scheme", "none", *call)


def test_sizes_reach_the_problem(hal: Any) -> None:
    call = ("tokens=16", "--scheme", "bf16", "in_features=4096", "bias=true", "dtype=float16")
    answer = hal("explain", "linear", *call, "--json", "--platform", "cpu:amx")
    assert answer.status == 0
    assert answer.json["problem"] == {
        "tokens": 16,
        "in_features": 4096,
        "bias": True,
        "dtype": "float16",
    }


def test_a_size_out_of_range_is_a_reason(hal: Any) -> None:
    call = ("--scheme", "fp8_channel", "--platform", "cuda:h100", "experts=5000")
    answer = hal("explain", "fused_moe", *call)
    assert "experts=5000" in answer.out
    assert "shape: found experts=5000" in answer.out


def test_forced_kernel(hal: Any) -> None:
    call = ("explain", "linear", "--scheme", "fp8_channel", "--platform", "cuda:h100")
    answer = hal(*call, "--force", "reference", "--json")
    assert answer.status == 0
    assert answer.json["kernel"] == answer.json["forced"] == "reference"
    assert answer.json["reason"] == "forced by --force"


def test_forced_kernel_that_cannot_run(hal: Any) -> None:
    call = ("explain", "linear", "--scheme", "fp8_channel", "--platform", "cuda:rtx-3090")
    answer = hal(*call, "--force", "triton_fp8")
    assert (answer.status, answer.err) == (1, "")
    assert "-> none: triton_fp8, forced by --force, cannot run" in answer.out
    instead = hal(*call, "--json").json["kernel"]
    assert f"Not forced, {instead} would run." in answer.out
    assert hal(*call, "--force", "triton_fp8", "--json").json["instead"] == instead


def test_no_kernel_exits_1_with_the_table(hal: Any) -> None:
    call = ("--scheme", "fp8_channel", "--platform", "cuda:rtx-3090", "--minimum", "native")
    answer = hal("explain", "linear", *call)
    assert (answer.status, answer.err) == (1, "")
    lines = answer.out.splitlines()
    assert lines[:2] == [
        "linear | fp8_channel | cuda:rtx-3090 (sm_86)",
        "  insisting on level native or above",
    ]
    assert lines[2].startswith("-> none: ")
    assert "triton_fp8" in answer.out
    assert "level native or above" in answer.out
    plain = hal("explain", "linear", *call, "--json")
    assert plain.status == 1
    assert plain.json["kernel"] is None
    assert all(row["failures"] for row in plain.json["candidates"])
    assert "triton_fp8" in plain.json["why_not_better"]


def test_markdown_is_one_code_block(hal: Any) -> None:
    call = ("explain", "linear", "--scheme", "bf16")
    assert hal(*call, "--markdown").out == f"```\n{hal(*call).out}```\n"


def test_environment_forces_too(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "linear=reference")
    answer = hal("explain", "linear", "--scheme", "bf16", "--platform", "xpu:b580", "--json")
    assert answer.json["reason"] == "forced by HAL_KERNEL"
    assert answer.json["forced_by"] == "HAL_KERNEL"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("liner", "--scheme", "bf16"), "did you mean 'linear'"),
        (("linear", "--scheme", "fp8_chanel"), "did you mean 'fp8_channel'"),
        (("linear", "--scheme", "bf16", "tokns=3"), "did you mean 'tokens'"),
        (("linear", "--scheme", "bf16", "dtype=bfloat"), "did you mean 'bfloat16'"),
        (("linear", "--scheme", "bf16", "--force", "tritn"), "did you mean 'triton'"),
        (("linear", "--scheme", "bf16", "--minimum", "nativ"), "did you mean 'native'"),
        (("linear", "--scheme", "bf16", "--platform", "cuda:h10"), "'cuda:h100'"),
        (("linear", "--scheme", "bf16", "--platform", "cud"), "'cuda'"),
        (("linear", "--scheme", "bf16", "--platform", "xpu:b580", "--device", "1"), "found 1"),
        (("linear", "--scheme", "bf16", "tokens=many"), "needed a whole number"),
        (("linear", "--scheme", "bf16", "tokens=-1"), "needed a whole number"),
        (("linear", "--scheme", "bf16", "tokens="), "name=value"),
        (("linear", "--scheme", "bf16", "16"), "name=value"),
        (("linear", "--scheme", "bf16", "--tokens", "16"), "unrecognized arguments: --tokens"),
        (("linear",), "found no --scheme, needed bf16 or fp8_block128"),
        (("liner",), "did you mean 'linear'"),
        ((), "required: OP\n"),
    ],
)
def test_usage_errors(hal: Any, call: tuple[str, ...], said: str) -> None:
    answer = hal("explain", *call)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("name", op_names())
def test_every_word_that_a_kernel_needs_is_a_choice_of_its_op(name: str) -> None:
    op = find_op(name)
    needs = [need for kernel in op.kernels for need in kernel.requires]
    words = {need.option for need in needs if type(need).__name__ in ("_OneOf", "_MathOf")}
    assert words <= set(op.choices)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("bias=maybe", "unknown bias of linear 'maybe'; known: False, True"),
        ("dtype=int8", "unknown dtype of linear 'int8'"),
        ("tokens=true", "found 'true', needed a whole number"),
        ("tokens=2", "explain: tokens: found two values, needed one"),
    ],
)
def test_a_value_that_no_size_can_have(hal: Any, size: str, message: str) -> None:
    answer = hal("explain", "linear", "--scheme", "bf16", "tokens=1", size)
    if not size.startswith("tokens=2"):
        answer = hal("explain", "linear", "--scheme", "bf16", size)
    assert answer.status == 2
    assert message in answer.err


def test_insisting_on_batch_invariance(hal: Any) -> None:
    call = ("fused_moe", "--scheme", "mxfp8", "--platform", "cuda:h200")
    answer = hal("explain", *call, "--batch-invariant", "--deterministic")
    assert "  insisting on batch_invariant, deterministic\n-> triton_scaled_fp8" in answer.out
    assert " * triton_scaled_fp8        native       tuned\n     batch_invariant: " in answer.out
    # What was measured is the other way.
    assert "x the best" not in answer.out
    assert "x the best" in hal("explain", *call).out


def test_shards_that_are_refused_when_bound(hal: Any) -> None:
    call = ("explain", "fused_moe", "--scheme", "fp8_block128", "--platform", "cuda:h200")
    answer = hal(*call, "intermediate=192", "intermediate_ranks=4")
    assert answer.status == 1
    words = " ".join(answer.out.split())
    assert "-> triton_fp8" in answer.out
    assert "weights are refused: found intermediate=192 on each of 4 ranks, needed a mul" in words
    assert "tensor-parallel sizes 1, 2, 3, 6 work" in words
    for whole in (("intermediate=256", "intermediate_ranks=4"), ("intermediate=192",)):
        answer = hal(*call, *whole)
        assert answer.status == 0
        assert "refused" not in answer.out
    linear = ("explain", "linear", "--scheme", "fp8_block128", "--platform", "cuda:h200")
    for size in ("in_features", "out_features"):
        answer = hal(*linear, f"{size}=192", f"{size}_ranks=2", "--json")
        assert answer.status == 1
        assert f"{size}=192 on each of 2 ranks" in answer.json["refused"]


def test_what_a_package_alone_would_add(hal: Any) -> None:
    call = ("explain", "fused_moe", "--scheme", "fp8_block128", "--platform", "rocm:mi300x")
    words = " ".join(hal(*call).out.split())
    named = words.partition("a package would add: ")[2].partition(" made for other")[0]
    assert named.startswith("aiter_moe_block128 (amd-aiter >= ")
    # What lacks more than a package is not among them.
    assert "deep_gemm" not in named
    assert named.count("claimed") == 2


def test_what_would_run_without_insisting(hal: Any) -> None:
    call = ("explain", "fused_moe", "--scheme", "nvfp4", "--platform", "cuda:h200")
    answer = hal(*call, "--minimum", "native")
    assert answer.status == 1
    assert "Without insisting on level native or above, triton_packed would run." in answer.out
    assert hal(*call, "--minimum", "native", "--json").json["instead"] == "triton_packed"
