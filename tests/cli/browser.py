"""Drive a headless Chromium through its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0


def find_browser() -> str | None:
    """Return a Chromium of this machine, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of one headless browser.

    Attributes:
        requested: Every address that was asked for since the start.
        errors: What scripts threw.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        self.requested: list[str] = []
        self.errors: list[str] = []
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session = ""
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()

        def hand_over() -> None:
            # The browser reads from 3 and writes to 4; copies first, as these may be those.
            first, second = os.dup(read_commands), os.dup(write_answers)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [
                *(executable, "--headless=new", "--remote-debugging-pipe", "--no-sandbox"),
                *("--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=hand_over,
        )
        os.close(read_commands)
        os.close(write_answers)

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for part in ("Page", "Runtime", "Network"):
            self.ask(f"{part}.enable")
        self.ask("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        number = next(self._numbers)
        told = {"id": number, "method": method, "params": parameters}
        if self._session:
            told["sessionId"] = self._session
        os.write(self._commands, json.dumps(told).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            answer = self._next(until)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"]["text"])

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(until - time.monotonic(), 0))
            assert ready, "the browser did not answer in time"
            read = os.read(self._answers, 1 << 16)
            assert read, "the browser ended"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, code: str) -> Any:
        """Return the value of an expression of the page."""
        result = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, code: str) -> None:
        """Wait until an expression of the page is true."""
        until = time.monotonic() + SECONDS
        while not self.run(code):
            assert time.monotonic() < until, code
            time.sleep(0.05)

    def press(self, key: str, *, text: str = "") -> None:
        """Press a key, as a person would."""
        told = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **told)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        code = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{code}.scrollIntoView({{block: 'center', inline: 'center'}})")
        box = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
                       f"({code}.getBoundingClientRect())")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, **where)

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


KEYS = {
    "Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
    "ArrowDown": 40, "End": 35, "Home": 36,
}  # fmt: skip
