"""Declare what a kernel needs, as data that explains itself when it is not met.

A `Need` is compared with a `Context`, the facts of one device and one problem. It answers with
None or with a `Failure` that names what was needed and what was found. A size or option that the
caller did not give (None) cannot fail; the selection lists it as unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hal import need_rules as rules
from hal.arch import Arch
from hal.errors import RegistrationError
from hal.formats import Support, number_format
from hal.need import Code, Context, Failure, Need

__all__ = ["Code", "Context", "Failure", "Need", "Needs"]


class Needs:
    """Make requirements."""

    @staticmethod
    def platform(*names: str) -> Need:
        """Need one of the platforms."""
        return rules.Platform(_some("platform", names))

    @staticmethod
    def at_least(floor: Arch) -> Need:
        """Need an architecture of the floor's vendor, the floor or newer."""
        return rules.ArchAtLeast(floor)

    @staticmethod
    def in_family(*families: str) -> Need:
        """Need an architecture of one of these exact families, such as `sm_10x`."""
        for name in families:
            if name.startswith("sm") and not re.fullmatch(r"sm_\d+x", name):
                raise RegistrationError(f"in_family({name!r}): families look like sm_10x")
        return rules.ArchFamily(_some("family", families))

    @staticmethod
    def exactly(*names: str) -> Need:
        """Need one of these architectures, such as `sm_90` or `gfx942`."""
        for name in names:
            if name.startswith("sm") and not re.fullmatch(r"sm_\d{2,3}", name):
                raise RegistrationError(f"exactly({name!r}): architectures look like sm_90")
        return rules.ArchExactly(_some("arch", names))

    @staticmethod
    def math(*formats: str, emulated: bool = False) -> Need:
        """Need matrix math on one of the formats, in hardware unless `emulated` will do."""
        return _support("math", formats, emulated)

    @staticmethod
    def storage(*formats: str, emulated: bool = True) -> Need:
        """Need to hold and convert one of the formats."""
        return _support("storage", formats, emulated)

    @staticmethod
    def math_of(option: str, *support: str, default: str = "bfloat16") -> Need:
        """Need matrix math, in one of these ways, on the format that an option names.

        Args:
            option: Name of the option, such as `dtype`.
            *support: `native` or `emulated`; nothing means native.
            default: Format where the option is not given.
        """
        accepted = tuple(Support(name) for name in support or ("native",))
        return rules.MathOf(option, number_format(default).name, accepted)

    @staticmethod
    def triton_math(*formats: str) -> Need:
        """Need Triton to emit the format's own matrix instruction."""
        for name in formats:
            number_format(name)
        return rules.TritonMath(_some("format", formats))

    @staticmethod
    def feature(name: str, hint: str = "") -> Need:
        """Need a feature of the architecture."""
        return rules.Feature(name, hint)

    @staticmethod
    def package(
        name: str,
        at_least: str | None = None,
        hint: str = "",
        on: Mapping[str, str] | None = None,
    ) -> Need:
        """Need an installed package that is not known to be broken.

        `on` gives later releases for single architectures, by name such as `sm_90`.

        The hint says where to get it. There is none by default: the name that a package is
        imported by is often another one's name in a registry, and the plain builds of torch and
        triton are the wrong ones for many devices.
        """
        later = tuple((on or {}).items())
        for release in (at_least, *(release for _, release in later)):
            if release is not None:
                _release("package", release)
        return rules.Package(name, at_least, hint, later)

    @staticmethod
    def torch(at_least: str, reason: str, on: Mapping[str, str] | None = None) -> Need:
        """Need a torch release or newer; nightlies count as their release.

        `on` gives other releases for single architectures, by name such as `sm_90`.
        """
        exceptions = tuple((on or {}).items())
        for release in (at_least, *(release for _, release in exceptions)):
            _release("torch", release)
        return rules.Torch(at_least, reason, exceptions)

    @staticmethod
    def dtype(*formats: str) -> Need:
        """Need torch to have the dtype of one of the formats; see `dtypes`."""
        return Needs.dtypes(formats)

    @staticmethod
    def dtypes(*groups: tuple[str, ...]) -> Need:
        """Need torch to have dtypes: of each group of formats, that of one.

        A kernel need not state it for its operands: `Operand.dtype_groups` says what they take.
        """
        distinct = tuple(dict.fromkeys(_some("group of formats", groups)))
        for group in distinct:
            for name in _some("format", group):
                if number_format(name).torch_name is None:
                    raise RegistrationError(f"dtype({name!r}): torch has no dtype for it")
        return rules.Dtypes(distinct)

    @staticmethod
    def multiple_of(size: str, divisor: int, hint: str = "") -> Need:
        """Need a size of the problem to be a multiple of `divisor`.

        What is refused is told what to pad to and, where the problem says under `SIZE_ranks` how
        many ranks have as much each, which numbers of ranks would do.
        """
        if divisor < 1:
            raise RegistrationError(f"multiple_of({size!r}): divisor {divisor} is below 1")
        return rules.MultipleOf(size, divisor, hint)

    @staticmethod
    def between(size: str, low: int | None, high: int | None, hint: str = "") -> Need:
        """Need a size of the problem within bounds, both of them allowed values."""
        if low is None and high is None:
            raise RegistrationError(f"between({size!r}): neither bound is given")
        if low is not None and high is not None and low > high:
            raise RegistrationError(f"between({size!r}): {low} is above {high}")
        return rules.Range(size, low, high, hint)

    @staticmethod
    def one_of(option: str, *values: Any, code: Code = Code.SHAPE, hint: str = "") -> Need:
        """Need an option of the problem to have one of the values."""
        return rules.OneOf(option, _some("value", values), code, hint)

    @staticmethod
    def memory(size: str, reason: str = "") -> Need:
        """Need the bytes that the problem gives under `size` to fit into the device."""
        return rules.Memory(size, reason)

    @staticmethod
    def shared_memory(bytes_needed: int) -> Need:
        """Need that much shared memory for one block."""
        return rules.SharedMemory(bytes_needed)

    @staticmethod
    def only_when_forced(reason: str) -> Need:
        """Never choose this kernel unless the caller names it."""
        return rules.OnlyWhenForced(reason)


def _support(use: str, formats: tuple[str, ...], emulated: bool) -> Need:
    for name in _some("format", formats):
        number_format(name)
    accepted = (Support.NATIVE, Support.EMULATED) if emulated else (Support.NATIVE,)
    return rules.FormatSupport(formats, use, accepted)


def _release(need: str, version: str) -> None:
    # A need that no version can meet would switch its kernel off forever and without a sound.
    if not re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version):
        raise RegistrationError(f"{need}: version {version!r}, needed a release such as 2.8")


def _some(kind: str, names: tuple[Any, ...]) -> tuple[Any, ...]:
    if not names:
        raise RegistrationError(f"a requirement needs at least one {kind}")
    return names
