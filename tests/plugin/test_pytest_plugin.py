"""hal's pytest plugin, in sessions of their own."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PLUGIN = "hal.pytest_plugin"
TESTS = """
import hal
import pytest

def test_current(hal_platform):
    assert hal.current_platform() is hal_platform
    assert hal_platform.device(0).arch.name == "gfx942"
    assert hal.select("linear", scheme="bf16").spec.arch.name == "gfx942"

@pytest.fixture
def early():
    return hal.current_platform().name

def test_fixtures_see_it_as_well(early):
    assert early == "rocm"

def test_device(hal_device):
    assert hal_device.platform == "rocm"
"""
FORMATS = """
import pytest

@pytest.mark.needs_format("e4m3fnuz")
def test_math():
    pass

@pytest.mark.needs_format("bfloat16")
@pytest.mark.needs_format("e4m3fn")
def test_both():
    pass

@pytest.mark.needs_format("e4m3fn", use="storage")
def test_storage():
    pass
"""
DEVICES = """
import hal
import pytest

SEEN = []

@pytest.mark.hal_devices("cuda:h100", "cuda:rtx-3090", "cpu")
def test_each(hal_device):
    SEEN.append(hal_device.key)
    assert hal.current_platform().device(0) == hal_device
    assert hal.current_platform().simulated

@pytest.mark.hal_devices("cuda:h100", "cuda:rtx-3090")
@pytest.mark.needs_format("e4m3fn")
def test_formats(hal_device):
    assert hal_device.name == "H100"

def test_all_were_seen():
    assert SEEN[:2] == ["cuda:h100", "cuda:rtx-3090"]
    assert len(SEEN) > 3
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Run a file of tests with the plugin, and with no other that happens to be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        pytester.makeini("[pytest]")  # or pytest takes the settings of a checkout that it stands in
        plugins = () if "no:" + PLUGIN in arguments else ("-p", PLUGIN)
        return pytester.runpytest_subprocess(*plugins, "--strict-markers", "-ra", *arguments)

    return run


def test_every_test_sees_the_platform(run) -> None:
    result = run(TESTS, "--hal-platform=rocm:gfx942")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["hal: rocm, *(gfx942), simulated"])


def test_without_the_option_nothing_changes(run) -> None:
    result = run("import hal\ndef test_it():\n    assert not hal.current_platform().simulated\n")
    result.assert_outcomes(passed=1)
    assert "hal: " not in result.stdout.str()


def test_an_unknown_platform_stops_the_session(run) -> None:
    result = run(TESTS, "--hal-platform=cuda:h1000")
    assert result.ret != 0
    text = result.stdout.str() + result.stderr.str()
    assert "--hal-platform" in text
    assert "passed" not in text


@pytest.mark.parametrize("platform", ["rocm:gfx942", "rocm:gfx950", "rocm:gfx90a", "cuda:h100"])
def test_formats_that_are_not_there_skip(run, platform: str) -> None:
    from hal.formats import Support
    from hal.platforms.tables import device_spec

    formats = device_spec(*platform.split(":")).formats
    wanted = [
        formats.of("math", "e4m3fnuz") is Support.NATIVE,
        Support.NATIVE is formats.of("math", "bfloat16") is formats.of("math", "e4m3fn"),
        formats.of("storage", "e4m3fn") is Support.NATIVE,
    ]
    result = run(FORMATS, f"--hal-platform={platform}")
    result.assert_outcomes(passed=sum(wanted), skipped=3 - sum(wanted))
    if not wanted[0]:
        result.stdout.fnmatch_lines(["*SKIPPED*e4m3fnuz math * needs e4m3fnuz math native*"])


def test_once_for_each_device(run) -> None:
    result = run(DEVICES)
    outcomes = result.parseoutcomes()
    assert outcomes["skipped"] == 1
    assert outcomes["passed"] >= 2 + 5 + 1 + 1
    assert "failed" not in outcomes


def test_devices_that_nobody_knows_are_refused(run) -> None:
    result = run(DEVICES.replace("cuda:rtx-3090", "cuda:rtx-3091"))
    assert result.ret != 0
    assert "rtx-3091" in result.stdout.str() + result.stderr.str()


def test_a_use_that_is_none_is_an_error(run) -> None:
    result = run(FORMATS.replace('use="storage"', 'use="adding"'), "--hal-platform=cuda:h100")
    assert "needed 'math' or 'storage'" in result.stdout.str()


def test_pytest_finds_it_by_its_entry_point() -> None:
    """The name is that of the module, so that `-p` and the entry point do not load it twice."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points.pytest11]\n"{PLUGIN}" = "{PLUGIN}"\n' in text
    found = [point for point in entry_points(group="pytest11") if point.name == PLUGIN]
    if not found:
        pytest.skip("hal was installed before it had the entry point: pip install -e .")
    assert found[0].value == PLUGIN
