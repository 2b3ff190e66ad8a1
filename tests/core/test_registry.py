"""Declarations that contradict themselves or others are refused when they are made."""

from __future__ import annotations

import math
import threading

import pytest
from core_fakes import ANYWHERE, BF16, attach, make_op, took

from hal import registry
from hal.errors import RegistrationError, UnknownNameError
from hal.registry import BANDS, Level, Op, Operand


def test_kernels_are_listed_by_name_whatever_the_order_of_registration() -> None:
    op = make_op()
    for name in ("b", "c", "a"):
        attach(op, name)
    assert [kernel.name for kernel in op.kernels] == ["a", "b", "c"]
    assert op.find("c").entry == "toy:c"
    assert "c" in op
    assert "d" not in op
    with pytest.raises(UnknownNameError, match="kernel of toy 'd'"):
        op.find("d")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "taken"}, "exists already"),
        ({"band": "best"}, "needed one of reference, portable"),
        ({"band": "Tuned"}, "band 'Tuned'"),
        ({"band": "plugin"}, "kernels of plugins"),
        ({"invariance": "one tile"}, "not that it is"),
        ({"band": "tuned", "origin": "elsewhere"}, "kernels of plugins"),
        ({"band": "reference"}, "go together"),
        ({"level": Level.REFERENCE}, "go together"),
        ({"signatures": {}}, "serves no scheme"),
        ({"requires": ()}, "declares no need"),
        ({"entry": "module.function"}, "needed 'module:function'"),
        ({"entry": "module:outer.<locals>.inner"}, "needed 'module:function'"),
        ({"name": ""}, "kernel names"),
        ({"name": "a,b"}, "kernel names"),
        ({"name": "a=b"}, "kernel names"),
        ({"name": "x" * 41}, "kernel names"),
    ],
)
def test_contradictions_are_refused_and_leave_nothing(change, match: str) -> None:
    op = make_op()
    attach(op, "taken")
    values = {
        "name": "new", "level": Level.NATIVE, "band": "tuned", "signatures": BF16,
        "requires": ANYWHERE, "entry": "toy:new",
    }  # fmt: skip
    with pytest.raises(RegistrationError, match=match):
        op.declare(**(values | change))
    assert [kernel.name for kernel in op.kernels] == ["taken"]
    op.declare(**values)


def test_plugins_have_a_band_of_their_own() -> None:
    op = make_op()
    assert attach(op, "theirs", band="plugin", origin="elsewhere").origin == "elsewhere"
    assert BANDS[-1] == "plugin"
    assert attach(op, "their_reference", Level.REFERENCE, origin="elsewhere").band == "reference"


def test_a_local_function_cannot_be_a_binder() -> None:
    op = make_op()

    def bind() -> None:
        """Bind nothing."""

    with pytest.raises(RegistrationError, match="locals"):
        op.kernel("local", level=Level.NATIVE, band="tuned", signatures=BF16, requires=ANYWHERE)(
            bind
        )


def module_level_binder() -> str:
    """Return a word.

    And more about it.
    """
    return "bound"


def test_the_decorator_names_the_function_and_takes_its_first_line() -> None:
    op = make_op()
    declare = op.kernel("one", level=Level.NATIVE, band="tuned", signatures=BF16, requires=ANYWHERE)
    assert declare(module_level_binder) is module_level_binder
    kernel = op.find("one")
    assert kernel.summary == "Return a word."
    assert kernel.load() is module_level_binder
    assert str(kernel) == "toy/one"


@pytest.mark.parametrize("formats", [("fp8",), ("e4m3",), (), "e4m3fn", ("float8_e4m3fn",)])
def test_an_operand_names_exact_formats(formats) -> None:
    with pytest.raises(RegistrationError, match="operand weight"):
        Operand("weight", formats)


@pytest.mark.parametrize(
    "scales",
    [
        {"granularity": "channel"},
        {"scale_format": "float32"},
        {"granularity": "row", "scale_format": "float32"},
        {"granularity": "channel", "scale_format": "fp32"},
    ],
)
def test_an_operand_states_granularity_and_scale_format_together(scales) -> None:
    with pytest.raises(RegistrationError, match="operand weight"):
        Operand("weight", ("e4m3fn",), **scales)


def test_e8m0_scales_and_float_scales_are_different_facts() -> None:
    bytes_per_32 = Operand("weight", ("e4m3fn",), "group32", "e8m0")
    floats = Operand("weight", ("e4m3fn",), "block128", "float32")
    assert bytes_per_32 != floats
    assert str(bytes_per_32) == "weight: e4m3fn x e8m0 per group32"
    assert str(Operand("w", ("int8",), "channel", "float32", layout="k_major")) == (
        "w: int8 x float32 per channel, k_major"
    )


def test_levels() -> None:
    names = [str(level) for level in sorted(Level, reverse=True)]
    assert names == ["native", "weight_only", "dequant", "emulated", "reference"]
    assert Level.parse("Weight_Only") is Level.WEIGHT_ONLY
    with pytest.raises(UnknownNameError, match="did you mean 'native'"):
        Level.parse("nativ")


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_measurement_is_refused(time: float) -> None:
    with pytest.raises(RegistrationError, match="measurement of a"):
        took("a", time, m=1)


def test_sizes_of_a_measurement_are_sorted() -> None:
    assert took("a", 1.0, n=2, m=1) == took("a", 1.0, m=1, n=2)


@pytest.mark.parametrize("size", ["platform", "force", "device", "forced", "scheme"])
def test_sizes_may_not_hide_what_select_takes(size: str) -> None:
    with pytest.raises(RegistrationError, match=size):
        make_op(sizes=("m", size))


def test_an_op_cannot_be_declared_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OPS", {})
    op = Op("toy", ("m",), "a toy")
    with pytest.raises(RegistrationError, match="'toy' exists already"):
        Op("toy", ("m",), "another")
    assert {"toy": op} == registry._OPS


def test_threads_find_the_same_ops() -> None:
    found: list[tuple[str, ...]] = []
    threads = [threading.Thread(target=lambda: found.append(registry.op_names())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert "linear" in found[0]
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        registry.find_op("linaer")
