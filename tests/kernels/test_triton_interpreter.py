"""The language is prepared once a launch, as Triton would leave it, and restored after it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from hal.triton_interpreter import prepare_once_per_launch

pytestmark = pytest.mark.interpreter


@triton.jit
def _doubled(x):
    return x + x


@triton.jit
def _four_times(x):
    return _doubled(_doubled(x))


@triton.jit
def _kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    # tl.sum is one of Triton's own functions, from a module that sees another part of the language.
    x = _four_times(tl.load(x_ptr + at))
    tl.store(out_ptr + at, x + tl.sum(x, axis=0))


def language():
    """Return what Triton replaces, by name."""
    return {name: getattr(tl, name) for name in ("load", "store", "arange", "reduce", "range")}


def run():
    x, out = torch.arange(8.0), torch.empty(8)
    _kernel[(3,)](x, out, SIZE=8)
    assert torch.equal(out, 4 * x + 4 * x.sum())


def test_each_launch_prepares_once_and_restores(monkeypatch):
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton does not restore what it replaces")
    assert prepare_once_per_launch()
    prepare = interpreter._patch_lang
    seen = []
    real = prepare._prepare
    monkeypatch.setattr(
        prepare, "_prepare", lambda function: seen.append(function) or real(function)
    )
    run()
    # The kernel, and the first of Triton's own functions, which sees `core` beside it.
    first = len(seen)
    assert 1 <= first <= 2
    before = language()
    run()
    assert len(seen) == 2 * first
    assert language() == before


def test_asking_twice_wraps_once():
    assert prepare_once_per_launch() is prepare_once_per_launch()
    if hasattr(interpreter, "_LangPatchScope"):
        prepare = interpreter._patch_lang
        prepare_once_per_launch()
        assert interpreter._patch_lang is prepare


def test_a_failed_launch_leaves_nothing_prepared():
    prepare_once_per_launch()
    with pytest.raises(Exception, match="power of 2"):
        _kernel[(1,)](torch.arange(3.0), torch.empty(3), SIZE=3)
    run()
