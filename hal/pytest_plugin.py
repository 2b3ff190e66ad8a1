"""Run tests as if on a platform that is not here, and on each of many devices.

Loaded by pytest where hal is installed (entry point `pytest11`), or with `-p hal.pytest_plugin`.

    pytest --hal-platform=rocm:gfx942            every test sees that platform as the current one

    @pytest.mark.needs_format("e4m3fn")          skipped where its matrix math is not native
    @pytest.mark.needs_format("int8", use="storage", emulated=True)
    def test_something(hal_platform): ...

    @pytest.mark.hal_devices("cuda:h100", "rocm")
    def test_on_each(hal_device): ...            once for h100 and for each product of rocm

Under a simulated platform selection, planning and layouts work; a launch is refused by hal itself.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.protocol import Platform

__all__ = ["hal_device", "hal_platform"]

_MARKERS = (
    "needs_format(format, use='math', emulated=False): skip where the platform lacks that format",
    "hal_devices(*names): run once for each of these devices, or products of these platforms",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--hal-platform`."""
    group = parser.getgroup("hal")
    group.addoption(
        "--hal-platform",
        metavar="SPEC",
        default=None,
        help="platform that hal's current platform shall be, such as rocm:gfx942 or cuda:h100",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, and refuse a platform that nobody knows before any test runs."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    name = config.getoption("--hal-platform")
    if name is None:
        return
    from hal.errors import HalError
    from hal.runtime import platform

    try:
        config.stash[_platform_key] = platform(name)
    except HalError as error:
        raise pytest.UsageError(f"--hal-platform: {error}") from None


_platform_key: pytest.StashKey[Any] = pytest.StashKey()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which platform is simulated."""
    found = config.stash.get(_platform_key, None)
    if found is None:
        return None
    kind = "simulated" if found.simulated else "here"
    return f"hal: {found.name}, {found.device(0).name} ({found.device(0).arch}), {kind}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `hal_device` once for each device of its marker."""
    if "hal_device" not in metafunc.fixturenames:
        return
    names: list[str] = []
    for marker in metafunc.definition.iter_markers("hal_devices"):
        for name in marker.args:
            names += _names_of(name)
    if names:
        metafunc.parametrize("hal_device", list(dict.fromkeys(names)), indirect=True)


def _names_of(name: str) -> list[str]:
    """Return a device's name, or those of all products of a platform; `all` for all there are.

    Raises:
        UsageError: If it is neither.
    """
    from hal.errors import HalError
    from hal.platforms.tables import device_names, device_spec, platform_names

    platform, _, key = name.partition(":")
    if name == "all":
        return list(device_names())
    try:
        if key:
            device_spec(platform, key)
            return [name]
        mine = [known for known in device_names() if known.startswith(f"{name}:")]
        if platform in platform_names():
            return mine
        device_spec(platform, key)
    except HalError as error:
        raise pytest.UsageError(f"hal_devices: {error}") from None
    return []


@pytest.fixture
def hal_platform(request: pytest.FixtureRequest) -> Platform:
    """Return the platform that is current in this test."""
    from hal.runtime import current_platform

    return current_platform()


@pytest.fixture
def hal_device(request: pytest.FixtureRequest) -> Iterator[DeviceSpec]:
    """Return the facts of a device: one of the marker's, or the current platform's first.

    A device of the marker is the current platform for the time of the test.
    """
    from hal.runtime import current_platform, platform, use_platform

    name = getattr(request, "param", None)
    if name is None:
        yield current_platform().device(0)
        return
    with use_platform(platform(name)) as found:
        yield found.device(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Make the asked-for platform current for the whole of a test, fixtures included."""
    found = item.config.stash.get(_platform_key, None)
    if found is None:
        return (yield)
    from hal.runtime import use_platform

    with use_platform(found):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Skip a test whose number formats the current platform does not have.

    Asked when all fixtures are there, since `hal_device` may have chosen another platform.
    """
    markers = list(item.iter_markers("needs_format"))
    if not markers:
        return
    from hal.runtime import current_platform

    spec = current_platform().device(0)
    for marker in markers:
        reason = _lacks(spec, *marker.args, **marker.kwargs)
        if reason:
            pytest.skip(reason)


def _lacks(spec: DeviceSpec, format: str, use: str = "math", emulated: bool = False) -> str:
    """Return what a device lacks, in the words of a selection, or the empty text."""
    from hal.needs import Context, Needs

    ask = Needs.math if use == "math" else Needs.storage
    if use not in ("math", "storage"):
        raise pytest.UsageError(f"needs_format: use={use!r}, needed 'math' or 'storage'")
    failure = ask(format, emulated=emulated).check(Context(spec, "none"))
    return str(failure) if failure else ""
