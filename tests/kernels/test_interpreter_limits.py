"""What Triton's interpreter cannot do, each shown with the Triton that is here, and listed in docs.

A probe that fails here is good news: the interpreter has learned it, and what hal does instead may
go. The table of docs/matrix.md is `LIMITS`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from hal.registry import find_op, op_names
from hal.sources import source_parts
from hal.verify_worker import _can_run, _interpreting, _interprets

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
BEGIN = "<!-- interpreter: tests/kernels/test_interpreter_limits.py -->\n"
END = "<!-- end of interpreter -->\n"
LIMITS = {
    "a product of bf16 is garbage, without an error": (
        "every product is one of `kernels/common.py:dot`, which widens to float32 there; a test "
        "refuses others"
    ),
    "bf16 is truncated where devices round to nearest": (
        "three times the error is allowed; what rounds to codes is compared with fp16 or float32"
    ),
    "subnormal numbers of bf16 are misread": "decoding goes through integers or float32",
    "8-bit floats: NaN is a number, and what is too large comes out too small": (
        "kernels decode and encode bytes by integer arithmetic, which is interpreted; the "
        "conversions of hardware are known by what compiles and runs"
    ),
    "e4m3fnuz does not exist": "rows in it are compiled for gfx942 and have run nowhere",
    "`tl.dot_scaled` does not exist": (
        "decoded numbers are multiplied in its place (`tests/ops/test_scaled_binders.py`), which "
        "says which operands are read; kernels of it have no `interpreted` rows: of `linear` and "
        "`fused_moe` `triton_scaled`, `_mixed`, `_nvfp4`, `_emulated`"
    ),
    "inline PTX does not exist": (
        "`ring_rows`, which `triton_packed` and `triton_decode` launch for few rows on NVIDIA "
        "devices, `ring_experts` (few tokens of experts) and `align_warps` (up to 4096 slots) are "
        "interpreted by hal's own `tests/kernels/ptx_interpreter.py`, all threads in "
        "step; `interpreted` rows are of the other launches"
    ),
    "Gluon has none": (
        "`warp_specialized`, which `triton_fp8` of `fused_moe` launches for many rows on sm_90, "
        "and `warp_specialized_packed` are compiled, and have run on an H200; `interpreted` rows "
        "are of the other launches"
    ),
    "programs run one after the other": (
        "races, missing barriers and programs that wait for each other are not seen: kernels "
        "between ranks are interpreted rank by rank, and have run at once on one H200"
    ),
    "shared memory and registers have no limit": "what compiles is held to those of each device",
}
"""What the interpreter cannot do, and what is done about it."""
UNLISTED = {("linear", "triton_scaled_fp8"), ("fused_moe", "triton_scaled_fp8")}
"""Kernels whose source names `dot_scaled` and that never come to it: they sum in plain products."""


def table() -> str:
    rows = "".join(f"| {limit} | {instead} |\n" for limit, instead in LIMITS.items())
    return f"| in the interpreter | so |\n|---|---|\n{rows}"


def test_the_page_lists_all_of_it() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), f"paste this:\n{table()}"


def test_what_is_not_interpreted_is_declared() -> None:
    """And everything else of Triton has a small problem on which `hal verify` interprets it."""
    from hal.ops.cases import trials_of

    places = list(_interpreting())
    declared, named = set(), set()
    for op in map(find_op, op_names()):
        small = {(kernel.name, s) for kernel, s, case in trials_of(op.name) if case.small}
        for kernel in op.kernels:
            if not kernel.name.startswith("triton"):
                assert not kernel.not_interpreted, kernel
                continue
            if "dot_scaled" in {name for _, name in source_parts(kernel.entry)}:
                named.add((op.name, kernel.name))
            if kernel.not_interpreted:
                declared.add((op.name, kernel.name))
                assert kernel.not_interpreted == "tl.dot_scaled"
                continue
            assert _interprets(kernel), kernel
            for scheme in kernel.schemes:
                assert (kernel.name, scheme) in small, (kernel, scheme)
                assert any(_can_run(kernel, scheme, place.spec) for place in places), kernel
    assert named - declared == UNLISTED
    assert declared < named
    text = LIMITS["`tl.dot_scaled` does not exist"]
    for op, name in declared:
        assert f"`{op}`" in text
        assert f"`{name}`" in text or f"`{name.removeprefix('triton_scaled')}`" in text


# ------------------------------------------------------------------------------------- probes
@triton.jit
def _copy(x_ptr, out_ptr, SIZE: tl.constexpr, TYPE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(TYPE))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _scaled(a_ptr, scales_ptr, out_ptr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    scales = tl.load(scales_ptr + tl.arange(0, 32)[:, None])
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, tl.dot_scaled(a, scales, "e4m3", a, scales, "e4m3"))


@triton.jit
def _ptx(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    tl.store(out_ptr + tl.arange(0, 4), y)


@triton.jit
def _place(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def copied(x: torch.Tensor, dtype: torch.dtype, kind: tl.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _copy[(1,)](x, out, x.numel(), kind)
    return out


@pytest.mark.interpreter
def test_bf16() -> None:
    a = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(32, 32)
    _product[(1,)](a, a, out, 32)
    assert (out - a.float() @ a.float()).abs().max() > 1e6
    _product[(1,)](a.float(), a.float(), out, 32)
    torch.testing.assert_close(out, a.float() @ a.float(), rtol=1e-4, atol=1e-4)
    above = torch.tensor([1 + 3 * 2.0**-9, -1 - 3 * 2.0**-9, 1.0, 2.0])
    assert copied(above, torch.bfloat16, tl.bfloat16).tolist() == [1.0, -1.0, 1.0, 2.0]
    assert above.bfloat16()[:2].tolist() == [1 + 2**-7, -1 - 2**-7]
    small = torch.full((4,), 2.0**-130).bfloat16()
    assert (copied(small, torch.float32, tl.float32) != small.float()).all()


@pytest.mark.interpreter
def test_8_bit_floats() -> None:
    codes = torch.tensor([0x7F, 0xFF, 0x38, 0x01], dtype=torch.uint8)
    wide = copied(codes.view(torch.float8_e4m3fn), torch.float32, tl.float32)
    assert wide.tolist() == [480.0, -480.0, 1.0, 2.0**-9]
    large = torch.tensor([500.0, 1.0, 2.0, 4.0])
    assert copied(large, torch.float8_e4m3fn, tl.float8e4nv).float().tolist() == [256, 1, 2, 4]
    with pytest.raises(Exception, match="fp8e4b8"):
        copied(codes.view(torch.float8_e4m3fnuz), torch.float32, tl.float32)


@pytest.mark.interpreter
def test_what_does_not_exist() -> None:
    ones = torch.ones(32, 32).to(torch.float8_e4m3fn)
    with pytest.raises(triton.runtime.errors.InterpreterError):
        _scaled[(1,)](ones, torch.full((32,), 127, dtype=torch.uint8), torch.empty(32, 32))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="inline_asm not supported"):
        _ptx[(1,)](torch.arange(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32))


@pytest.mark.interpreter
def test_programs_one_after_the_other_without_limits() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(50, dtype=torch.int32)
    _place[(50,)](counter, out)
    assert out.tolist() == list(range(50))
    one = torch.ones(512, 512)  # 2 MiB of operands: no device has so much for a program
    out = torch.empty(512, 512)
    _product[(1,)](one, one, out, 512)
    assert (out == 512).all()
