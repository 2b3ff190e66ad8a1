"""Every error keeps its facts, reads as found/needed/cure, and survives a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest
from core_fakes import make_op, make_spec

from hal import errors
from hal.errors import ArgumentError, HalError, NoKernelError, UnknownNameError, nearest_names
from hal.selection import choose, require

ARGUMENT_ERRORS = [
    kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, ArgumentError)
]


def no_kernel() -> NoKernelError:
    from core_fakes import attach

    from hal.needs import Needs

    op = make_op()
    attach(op, "one", requires=(Needs.platform("rocm"),))
    with pytest.raises(NoKernelError) as caught:
        require(choose(op, "bf16", make_spec(), {}))
    return caught.value


@pytest.mark.parametrize("kind", ARGUMENT_ERRORS)
def test_argument_errors_say_found_needed_and_cure(kind: type[ArgumentError]) -> None:
    error = kind("linear", found=192, needed="a multiple of 128", cure="pad to 256")
    assert str(error) == "linear: found 192, needed a multiple of 128; pad to 256"
    assert (error.where, error.found, error.needed, error.cure) == (
        "linear", "192", "a multiple of 128", "pad to 256",
    )  # fmt: skip
    assert isinstance(error, (HalError, ValueError))
    assert str(kind("x", found=1, needed=2)).endswith("needed 2")


@pytest.mark.parametrize(
    "error",
    [
        *(kind("linear", found=192, needed="128", cure="pad") for kind in ARGUMENT_ERRORS),
        UnknownNameError("scheme", "fp9", ["fp8_channel"], "in a file"),
        errors.SimulatedDeviceError("rocm", "MI300X", "synchronize"),
        errors.RegistrationError("no"),
        errors.PlatformError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_errors_survive_copy_and_pickle(error: HalError, again) -> None:
    other = again(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert other.__dict__ == error.__dict__


def test_no_kernel_error_carries_the_table_through_pickle() -> None:
    error = no_kernel()
    other = pickle.loads(pickle.dumps(error))
    assert str(other) == str(error)
    assert other.selection == error.selection
    assert str(error.selection) in str(error)


def test_unknown_names_bring_the_nearest() -> None:
    error = UnknownNameError("scheme", "FP8-Chanel", ["fp8_channel", "fp8_block128", "bf16"])
    assert error.nearest[0] == "fp8_channel"
    assert "did you mean 'fp8_channel'" in str(error)
    assert isinstance(error, LookupError)
    far = UnknownNameError("scheme", "zzz", ["b", "a", "a"])
    assert str(far) == "unknown scheme 'zzz'; known: a, b"
    assert str(UnknownNameError("op", "x", [])) == "unknown op 'x'; known: none"


def test_nearest_names_do_not_depend_on_the_order_given() -> None:
    names = ["gfx942", "gfx950", "gfx940", "gfx941", "gfx90a"]
    assert nearest_names("gfx94", names) == nearest_names("gfx94", names[::-1])
    assert nearest_names(None, names) == ()
