"""Environment variables and probes: wrong values are refused, and nothing a probe does hurts."""

from __future__ import annotations

import threading
import time
import warnings

import pytest

from hal import config
from hal.errors import SettingError
from hal.probe import Absent, Broken, Found, Probe, run_probe


def test_defaults_and_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.setting("HAL_CHECK") == "0"
    monkeypatch.setenv("HAL_CHECK", "1")
    rows = {row.setting.name: (row.value, row.origin) for row in config.settings()}
    assert rows["HAL_CHECK"] == ("1", "environment")
    assert rows["HAL_LOG"] == ("", "default")
    assert list(rows) == list(config.SETTINGS)


def test_a_value_outside_the_choices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CHECK", "yes")
    with pytest.raises(SettingError, match="HAL_CHECK: found 'yes', needed one of '0', '1'"):
        config.setting("HAL_CHECK")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "3601"])
def test_probe_seconds_must_be_a_sane_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HAL_PROBE_SECONDS", text)
    with pytest.raises(SettingError):
        config.probe_seconds()
    monkeypatch.setenv("HAL_PROBE_SECONDS", "0.5")
    assert config.probe_seconds() == 0.5


def test_forced_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", " linear = triton ,fused_moe=reference,")
    assert config.forced_kernels() == {"linear": "triton", "fused_moe": "reference"}


@pytest.mark.parametrize("text", ["triton", "linear=", "=triton", "linear=a,linear=b", "a=b, "])
def test_forced_kernels_refuse_what_they_cannot_read(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HAL_KERNEL", text)
    with pytest.raises(SettingError, match="HAL_KERNEL"):
        config.forced_kernels()


def test_an_unknown_variable_warns_once_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "_warned", set())
    monkeypatch.setenv("HAL_PLATFROM", "cpu")
    with pytest.warns(UserWarning, match="HAL_PLATFROM is ignored; did you mean HAL_PLATFORM"):
        config.environment()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.settings()


@pytest.mark.parametrize(
    ("terminal", "environment", "colored"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: present and not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_color(monkeypatch: pytest.MonkeyPatch, terminal, environment, colored) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert config.uses_color(terminal) is colored


@pytest.mark.parametrize(
    ("result", "outcome", "detail"),
    [
        (Found("535.1"), "found", "535.1"),
        (Found([1, 2]), "found", "2 devices"),
        (Found((1,)), "found", "1 device"),
        (Absent("no driver"), "absent", "no driver"),
        (Broken("version mismatch"), "broken", "version mismatch"),
    ],
)
def test_a_probe_is_logged(result, outcome: str, detail: str) -> None:
    log: list[Probe] = []
    assert run_probe("nvml", lambda: result, seconds=5, log=log) is result
    assert [(row.name, row.outcome, row.detail) for row in log] == [("nvml", outcome, detail)]
    assert 0 <= log[0].milliseconds < 5000


class Unprintable:
    """Something found that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: exit(3), "SystemExit"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "KeyboardInterrupt"),
        (lambda: None, "AttributeError"),
        (lambda: Found(Unprintable()), "no text"),
    ],
)
def test_a_probe_that_fails_in_any_way_is_broken(ask, reason: str) -> None:
    log: list[Probe] = []
    result = run_probe("nvml", ask, seconds=5, log=log)
    assert isinstance(result, Broken)
    assert reason in result.reason
    assert [row.outcome for row in log] == ["broken"]


def test_a_probe_that_hangs_costs_its_time_limit() -> None:
    log: list[Probe] = []
    release = threading.Event()
    start = time.perf_counter()
    result = run_probe("nvml", lambda: Found(release.wait(60)), seconds=0.1, log=log)
    assert time.perf_counter() - start < 10
    release.set()
    assert result == Broken("no answer within 0.1 s")
    assert [row.outcome for row in log] == ["broken"]


def test_a_probe_without_a_thread_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    log: list[Probe] = []
    assert run_probe("nvml", lambda: Found(1), seconds=1, log=log) == Broken(
        "can't start new thread"
    )


def test_the_report_says_which_value_ops_will_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CHECK", "2")
    found = {row.setting.name: row for row in config.settings()}["HAL_CHECK"]
    assert (found.value, found.origin) == ("2", "environment; refused, needed '0' or '1'")
