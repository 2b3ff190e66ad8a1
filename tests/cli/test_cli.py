"""The command line as a program: help, outputs, colors, pipes and start-up."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hal as package

INFO_CALLS = 800_000
MODULE = (sys.executable, "-m", "hal")


def run(*command: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **changes}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_and_version(hal: Any) -> None:
    assert hal("--version").out == f"hal {package.__version__}\n"
    for call in ((), ("--help",), ("info", "--help"), ("explain", "--help")):
        answer = hal(*call)
        assert (answer.status, answer.err) == (0, "")
        assert answer.out.startswith("usage: hal")
        assert [line for line in answer.out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("ifno",), "unknown command 'ifno'; did you mean 'info'"),
        (("info", "more"), "unrecognized arguments: more"),
        (("info", "--jsn"), "unrecognized arguments: --jsn"),
        (("info", "--json", "--markdown"), "not allowed with"),
        (("info", "--platform", "rocm:gfx94"), "'rocm:gfx942'"),
        (("info", "--platform", "vulkan"), "unknown platform 'vulkan'"),
    ],
)
def test_usage_errors(hal: Any, call: tuple[str, ...], said: str) -> None:
    answer = hal(*call)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err


def test_every_error_of_hal_is_a_message(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_LOG", "loud")
    answer = hal("info")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("hal: HAL_LOG: found 'loud', needed one of")


def test_warnings_and_logs_go_to_stderr(hal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PLATFROM", "cpu")
    monkeypatch.setattr("hal.config._warned", set())
    monkeypatch.setenv("HAL_LOG", "info")
    answer = hal("info", "--json")
    assert answer.json["errors"] == []  # stdout is JSON and nothing else
    assert answer.err == (
        "hal: warning: unknown variable HAL_PLATFROM is ignored; did you mean HAL_PLATFORM?\n"
    )
    assert logging.getLogger("hal").level == logging.INFO


class Terminal:
    """Stand in for a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    "call", [("info",), ("explain", "linear", "--scheme", "bf16", "--platform", "cuda:h100")]
)
def test_color_is_for_terminals_that_want_it(
    hal: Any, monkeypatch: pytest.MonkeyPatch, call: tuple[str, ...]
) -> None:
    def drawn(*more: str) -> str:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            from hal.cli import main

            assert main([*call, *more]) == 0
        return terminal.text

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in drawn()
    assert "\x1b" not in drawn("--json") + drawn("--markdown")
    assert "\x1b" not in hal(*call).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in drawn()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in drawn()


def test_module_equals_script(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("hal"))
    call = ("explain", "linear", "--scheme", "bf16", "--platform", "cuda:h100")
    answers = [run(*start, *call, folder=tmp_path) for start in (MODULE, (script,))]
    assert answers[0].returncode == 0
    assert answers[0].stdout
    assert (answers[0].stdout, answers[0].stderr) == (answers[1].stdout, answers[1].stderr)


def test_ascii_in_any_locale(tmp_path: Path) -> None:
    answer = run(*MODULE, "info", folder=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.isascii()


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    "tail",
    ["| head -n 1 >/dev/null", "| true", ">&-", ">&- 2>&-"],
    ids=["head", "reader gone", "stdout closed", "both closed"],
)
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, tail: str) -> None:
    command = f'{{ "$0" -m hal info --json; echo "status $?" >status; }} {tail}'
    done = run("/bin/sh", "-c", command, sys.executable, folder=tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "status").read_text() == "status 0\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    command = '"$0" -m hal info >/dev/full'
    done = run("/bin/sh", "-c", command, sys.executable, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "hal: cannot write the answer: No space left on device\n"


def test_info_is_quick(calls_made: Any) -> None:
    """Bound the function calls of `hal info --json`, which do not depend on a machine's speed.

    `benchmarks/start_up.py` has times: 0.6 million calls took 0.3 to 0.4 s where an empty
    interpreter starts in 20 to 35 ms.
    """
    calls = calls_made(
        "import contextlib, io\nfrom hal.cli import main",
        "with contextlib.redirect_stdout(io.StringIO()):\n    assert main(['info', '--json']) == 0",
    )
    assert 50_000 < calls <= INFO_CALLS
