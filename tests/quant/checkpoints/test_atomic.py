"""`hal.quant.checkpoint.atomic`: what a killed run leaves, and who may take it away."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hal.errors import ArgumentError
from hal.quant.checkpoint.atomic import new_folder

fcntl = pytest.importorskip("fcntl")

RUN = """
import os, signal, socket, sys, time
from pathlib import Path
from hal.quant.checkpoint.atomic import new_folder
target, host, pid, moment = sys.argv[1:]
own = os.getpid()
if host:
    socket.gethostname = lambda: host
if pid:
    os.getpid = lambda: int(pid)
if moment == "between":
    move = os.replace
    def replace(source, to):
        move(source, to)
        os.kill(own, signal.SIGKILL)
    os.replace = replace
with new_folder(Path(target), overwrite=True) as folder:
    (folder / "part").write_text("new")
    if moment == "filling":
        print("ready", flush=True)
        time.sleep(100)
"""


@contextlib.contextmanager
def run(target: Path, host: str = "", pid: str = "", moment: str = "filling") -> Iterator[None]:
    """A run that is filling its folder, or has killed itself between the two moves; it ends."""
    arguments = [sys.executable, "-c", RUN, str(target), host, pid, moment]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=target.parent) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == (b"ready\n" if moment == "filling" else b"")
            yield
        finally:
            child.kill()
        assert child.wait(20) == -signal.SIGKILL


def make(target: Path, text: str) -> None:
    with new_folder(target, overwrite=True) as folder:
        (folder / "part").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("host", ["", "elsewhere-12.example.org"], ids=["here", "elsewhere"])
@pytest.mark.parametrize("pid", ["", str(os.getpid()), "1"], ids=["dead", "own", "alive"])
@pytest.mark.parametrize("moment", ["filling", "between"])
def test_killed_and_run_again(host: str, pid: str, moment: str, tmp_path: Path) -> None:
    """On another host, under an id that a living process has by now, or under one's own."""
    target = tmp_path / "m"
    make(target, "old")
    with run(target, host, pid, moment):
        pass
    left = names(tmp_path)
    assert len(left) == 3, left
    assert ("m" in left) is (moment == "filling")
    with pytest.raises(ArgumentError, match="something there already"), new_folder(target):
        raise AssertionError("the old folder was there, or was brought back")
    assert names(tmp_path) == ["m"]
    assert (target / "part").read_text() == "old"
    make(target, "new")
    assert (names(tmp_path), (target / "part").read_text()) == (["m"], "new")


@pytest.mark.parametrize("host", ["", "elsewhere"])
@pytest.mark.parametrize("pid", ["", str(os.getpid())], ids=["its own", "that of another"])
def test_who_lives_keeps_its_folder(host: str, pid: str, tmp_path: Path) -> None:
    """Under whatever name: containers of one host name share neither processes nor their ids."""
    with run(tmp_path / "m", host, pid):
        before = names(tmp_path)
        assert len(before) == 2
        make(tmp_path / "m", "mine")
        assert names(tmp_path) == sorted([*before, "m"])
    make(tmp_path / "m", "mine")
    assert names(tmp_path) == ["m"]


def test_threads_of_a_process_leave_each_other_alone(tmp_path: Path) -> None:
    target, inside, go = tmp_path / "m", threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def fill() -> None:
        try:
            with new_folder(target, overwrite=True) as folder:
                inside.set()
                assert go.wait(20)
                (folder / "part").write_text("theirs")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    assert inside.wait(20)
    make(target, "mine")
    assert (target / "part").read_text() == "mine"
    go.set()
    thread.join(20)
    assert failed == []
    assert (names(tmp_path), (target / "part").read_text()) == (["m"], "theirs")


def test_where_there_are_no_locks_processes_of_this_host_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    here = socket.gethostname()
    for name in (f"{here}-{gone.pid}", f"{here}-{os.getpid()}-0123abcd", f"{here}-1",
                 f"elsewhere-{gone.pid}-0123abcd", f"x.partial-{here}-{gone.pid}"):  # fmt: skip
        (tmp_path / f".m.partial-{name}").mkdir()
    with new_folder(tmp_path / "m") as folder:
        assert names(tmp_path) == sorted([
            f".m.partial-{here}-1",  # alive
            f".m.partial-elsewhere-{gone.pid}-0123abcd",  # unknown
            f".m.partial-x.partial-{here}-{gone.pid}",  # of the target m.partial-x
            folder.name,
        ])  # fmt: skip


def test_a_lock_that_nothing_belongs_to_goes_and_one_that_is_held_stays(tmp_path: Path) -> None:
    """A run that was killed before it made its folder, and one that is about to make it."""
    free, held = (tmp_path / f".m.lock-elsewhere-{n}-0123abcd" for n in (1, 2))
    free.touch()
    with open(held, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make(tmp_path / "m", "mine")
        assert names(tmp_path) == [held.name, "m"]
    make(tmp_path / "m", "mine")
    assert names(tmp_path) == ["m"]
