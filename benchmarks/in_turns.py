"""Compile in many processes at once, then time in one of them after the other.

A worker is this script's own process for a job, `SCRIPT --worker JSON`. It warms up, says `ready`,
waits for its turn, says its rows and ends. Under `alone`, nobody warms up any more once the first
is timed: a device that is shared shows in times. Who is not ready by then is ended, and named.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MARK", "Controller", "Worker", "say", "take_turn"]

MARK = "@in_turns "
MOST_SECONDS_TO_STOP = 10
GRACE_SECONDS = 8.0
"""How long a worker may take to come back from a library when its time to warm up was over."""


# ------------------------------------------------------------------------------------- the worker
def say(kind: str, **facts: Any) -> None:
    """Tell the controller."""
    print(MARK + json.dumps({"kind": kind, **facts}), file=sys.__stdout__, flush=True)


def take_turn(
    warm: Callable[[], None],
    measure: Callable[[], None],
    *,
    warm_until: float | None = None,
    stay: bool = False,
) -> None:
    """Warm up, wait for the word, and measure; what libraries print goes to stderr.

    Args:
        warm: What to do at the same time as others. What it keeps must be valid at any point.
        measure: What to do alone.
        warm_until: Seconds since the epoch, when `warm` is interrupted by a TimeoutError.
        stay: Wait to be ended, so that taking down a device's context disturbs nobody's times.
    """
    sys.stdout = sys.stderr
    with contextlib.suppress(TimeoutError), _interrupted_at(warm_until):
        warm()
    say("ready")
    if sys.stdin.readline().strip() != "go":
        return
    measure()
    say("done")
    if stay:
        sys.stdin.readline()


@contextlib.contextmanager
def _interrupted_at(when: float | None) -> Iterator[None]:
    if when is None or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise TimeoutError("the time to warm up is over")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(when - time.time(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --------------------------------------------------------------------------------- the controller
@dataclass
class Worker:
    """A process that stands for one job."""

    name: str
    job: dict[str, Any]
    process: Any = None
    state: str = "waiting"
    log: list[str] = field(default_factory=list)


class Controller:
    """Start workers, let them be timed one at a time, and keep what they say.

    Args:
        workers: Timed in this order.
        at_a_time: How many may warm up together.
        seconds: Time for all of it.
        share_to_warm: Of that time, before the first is timed, unless all are ready earlier.
        alone: Whether nobody may warm up while another is timed. A job then says in `warm_until`
            and `until`, seconds since the epoch, when to stop warming up and when to stop.
        first: Of two workers, who is started earlier: the one with the smaller value.
    """

    def __init__(
        self,
        workers: list[Worker],
        *,
        at_a_time: int,
        seconds: float,
        share_to_warm: float,
        alone: bool = False,
        first: Callable[[Worker], Any] = lambda worker: 0,
    ) -> None:
        self.workers = workers
        self.rows: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self._at_a_time, self._limit, self._alone = at_a_time, seconds, alone
        self._warm_limit, self._first = share_to_warm * seconds, first
        self._begun = time.monotonic()
        self._said: queue.Queue[tuple[Worker, str]] = queue.Queue()
        if alone:
            for each in workers:
                each.job["warm_until"] = time.time() + self._warm_limit
                each.job["until"] = time.time() + seconds

    @property
    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self._begun

    def run(self) -> None:
        """Run all jobs, or as many as the time allows."""
        while self.seconds < self._warm_limit and self._at_work():
            self._start_more()
            self._hear(0.5)
        if self._alone:
            self._let_none_warm()
        print(f"[{self.seconds:4.0f} s] timing; {self._at_work()} still at work", flush=True)
        while self.seconds < self._limit:
            if not self._alone:
                self._start_more()
            ready = next((w for w in self.workers if w.state == "ready"), None)
            if ready is None:
                if not self._at_work():
                    break
                self._hear(0.5)
                continue
            ready.state = "timed"
            ready.process.stdin.write("go\n")
            ready.process.stdin.flush()
            while ready.state == "timed" and self.seconds < self._limit:
                self._hear(0.5)
        self._stop()

    def _at_work(self) -> int:
        return sum(worker.state in ("waiting", "warming") for worker in self.workers)

    def _let_none_warm(self) -> None:
        end = self.seconds + GRACE_SECONDS
        while self.seconds < end and any(w.state == "warming" for w in self.workers):
            self._hear(0.2)
        for each in self.workers:
            if each.state == "warming":
                each.process.kill()  # only what was started here
                each.process.wait(timeout=MOST_SECONDS_TO_STOP)
            if each.state in ("waiting", "warming"):
                self.failures[each.name] = f"no time left; it was {each.state}"
                each.state = "over"

    def _start_more(self) -> None:
        warming = sum(w.state == "warming" for w in self.workers)
        for each in sorted(self.workers, key=self._first):
            if each.state == "waiting" and warming < self._at_a_time:
                warming += 1
                self._start(each)

    def _start(self, each: Worker) -> None:
        command = [sys.executable, sys.argv[0], "--worker", json.dumps(each.job)]
        pipe = subprocess.PIPE
        each.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        each.state = "warming"
        threading.Thread(target=self._listen, args=(each,), daemon=True).start()

    def _listen(self, each: Worker) -> None:
        for line in each.process.stdout:
            self._said.put((each, line))
        self._said.put((each, MARK + json.dumps({"kind": "exit", "code": each.process.wait()})))

    def _hear(self, seconds: float) -> bool:
        """Take one message; tell whether there was one."""
        try:
            each, line = self._said.get(timeout=seconds)
        except queue.Empty:
            return False
        if not line.startswith(MARK):
            each.log = [*each.log[-30:], line.rstrip()]
            return True
        said = json.loads(line.removeprefix(MARK))
        kind = said.pop("kind")
        if kind == "row":
            self.rows.append(said)
        elif kind == "failed":
            self.failures[f"{each.name}: {said['where']}"] = said["message"]
        elif kind == "ready":
            each.state = "ready"
        elif kind in ("done", "exit"):
            if kind == "exit" and each.state != "over":
                last = each.log[-1] if each.log else ""
                self.failures[each.name] = f"ended with status {said['code']}: {last[:160]}"
            each.state = "over"
        return True

    def _stop(self) -> None:
        for each in self.workers:
            if each.state not in ("over", "waiting"):
                self.failures[each.name] = f"no time left; it was {each.state}"
            elif each.state == "waiting":
                self.failures[each.name] = "no time left; it was not started"
        for each in self.workers:
            if each.process is not None and each.process.poll() is None:
                each.process.kill()  # only what was started here
        end = time.monotonic() + MOST_SECONDS_TO_STOP
        for each in self.workers:
            if each.process is not None:
                each.process.wait(timeout=max(end - time.monotonic(), 0.1))
