"""`no_compiles` names each kernel that is compiled inside, and the parameter that changed.

Kernels are really compiled, for an H100, by the launcher that runs them on one.
"""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

import hal
from hal.compiles import CompileWarning, no_compiles
from hal.errors import ArgumentError, CompiledError
from hal.ops.kernels import common
from hal.ops.kernels.swiglu import silu_and_mul

H100 = GPUTarget("cuda", 90, 32)
compiles = pytest.mark.skipif(
    common.INTERPRETED.value, reason="needs a process without TRITON_INTERPRET"
)


def gate(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Launch the kernel that gates."""
    x = torch.empty(rows, 2 * columns, dtype=dtype, device="meta")
    silu_and_mul(x, torch.empty(rows, columns, dtype=dtype, device="meta"))


@compiles
def test_a_compile_is_an_error_that_names_kernel_and_parameter() -> None:
    with common.compile_for(H100):
        with pytest.raises(CompiledError) as caught, no_compiles():
            gate(4, 512)
        (first,) = caught.value.compiles
        assert first.first
        assert "swiglu" in first.kernel
        with pytest.raises(CompiledError) as caught, no_compiles():
            gate(4, 512, torch.float16)
    (second,) = caught.value.compiles
    assert not second.first
    changed = {name: (earlier, now) for name, earlier, now in second.changed}
    assert any("bf16" in earlier and "fp16" in now for earlier, now in changed.values())
    assert "num_warps" not in changed
    assert second.kernel in str(caught.value)
    assert "warmup" in str(caught.value)


@compiles
def test_the_nearest_earlier_specialization_is_compared() -> None:
    with common.compile_for(H100):
        gate(4, 512)
        gate(4, 512, torch.float16)
        with no_compiles("record") as seen:
            gate(4, 511, torch.float16)
    (one,) = seen.found
    assert one.changed
    # bf16 is another specialization, and not the nearest one
    assert not any("bf16" in earlier for _, earlier, _ in one.changed)
    assert any(
        "16" in earlier and "16" not in now.replace("fp16", "") for _, earlier, now in one.changed
    )


@compiles
def test_what_was_compiled_before_is_silent_and_hooks_are_put_back() -> None:
    with common.compile_for(H100):
        gate(4, 512)
        with no_compiles() as seen:
            gate(4, 512)
            gate(77, 512)  # the number of rows is no specialization
    assert seen.found == []
    assert "nothing was compiled" in str(seen)
    assert knobs.runtime.jit_post_compile_hook is None


@compiles
def test_warn_tells_at_once_and_an_earlier_hook_is_still_called() -> None:
    told = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **facts: told.append(facts["fn"].name)
        with common.compile_for(H100), no_compiles("warn") as outer:
            with pytest.warns(CompileWarning, match="swiglu"), no_compiles("record") as inner:
                gate(4, 512)
            assert len(inner.found) == len(outer.found) == len(told) == 1
            with pytest.warns(CompileWarning):
                gate(4, 512, torch.float16)
        assert len(inner.found) == 1
        assert len(outer.found) == len(told) == 2
        knobs.runtime.jit_post_compile_hook = None


@compiles
def test_an_error_inside_is_not_hidden() -> None:
    def fails() -> None:
        with no_compiles():
            gate(4, 512)
            raise KeyError("mine")

    with common.compile_for(H100), pytest.raises(KeyError):
        fails()
    assert knobs.runtime.jit_post_compile_hook is None


def test_other_actions_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'stop'.*raise, warn or record"), no_compiles("stop"):
        pass


def test_without_triton_it_says_that_nothing_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "triton" else find(name)
    )
    with hal.no_compiles() as seen:
        pass
    assert "not installed" in seen.watching


def test_a_hook_of_another_shape_is_read_as_far_as_it_goes() -> None:
    """Triton 3.2 tells constants by name and attributes as an object; torch tells less."""
    from hal import compiles as module

    jit = SimpleNamespace(arg_names=["x_ptr", "n"], device_caches={})
    function = SimpleNamespace(module="m", name="k", jit_function=jit)
    with warnings.catch_warnings(), no_compiles("record") as seen:
        warnings.simplefilter("error")
        module._compiled(
            fn=function,
            key="a",
            compile={"signature": {0: "*bf16"}, "constants": {"n": 3}, "configs": ["Attrs(16)"]},
        )
        module._compiled(fn=SimpleNamespace(), compile=None)
    assert dict(seen.found[0].parameters) == {
        "x_ptr": "*bf16", "n": "constant 3", "attributes": "Attrs(16)",
    }  # fmt: skip
    assert seen.found[1].kernel == "?.?"
