"""A model of streams and events that knows what happens before what.

Work on a stream runs in order; an event is a point on a stream; a stream that waits for an event
goes on after that point. Each piece of work carries the set of all work that is certain to be done
before it starts, so a test can ask about any two pieces without running anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

from hal.platforms.streams import StreamOrdering


class CaptureIsolation(Exception):
    """What a runtime raises when a capture would depend on work outside of it."""


@dataclass(frozen=True)
class ModelEvent:
    before: frozenset[int]
    capture: int | None
    synchronized: list[frozenset[int]]

    def synchronize(self) -> None:
        if self.capture is not None:
            raise CaptureIsolation("synchronize")
        self.synchronized.append(self.before)


class ModelStream:
    def __init__(self, device: ModelDevice, number: int, index: int = 0) -> None:
        self.model, self.stream_id, self.device_index = device, number, index
        self.device = SimpleNamespace(type="cuda", index=index)
        self.before: frozenset[int] = frozenset()
        self.capture: int | None = None

    def work(self) -> Work:
        """Submit work and return it."""
        number = next(self.model.numbers)
        done = self.before
        self.before = self.before | {number}
        return Work(number, done)

    def record_event(self) -> ModelEvent:
        return ModelEvent(self.before, self.capture, self.model.synchronized)

    def wait_event(self, event: ModelEvent) -> None:
        if event.capture != self.capture:
            if event.capture is None or self.capture is not None:
                raise CaptureIsolation(f"{self.capture} waits for {event.capture}")
            self.capture = event.capture  # a stream joins the capture that it waits for
        self.before = self.before | event.before

    def wait_stream(self, other: ModelStream) -> None:
        self.wait_event(other.record_event())


@dataclass(frozen=True)
class Work:
    number: int
    done: frozenset[int]

    def follows(self, other: Work) -> bool:
        return other.number in self.done


class ModelDevice:
    """Stands for torch.cuda."""

    def __init__(self, streams: int = 4, devices: int = 1) -> None:
        self.numbers = count(1)
        self.synchronized: list[frozenset[int]] = []
        self.streams = [
            [ModelStream(self, number, index) for number in range(streams)]
            for index in range(devices)
        ]
        self._local = threading.local()

    def _current(self) -> dict[int, ModelStream]:
        if not hasattr(self._local, "current"):
            self._local.current = {index: row[0] for index, row in enumerate(self.streams)}
            self._local.device = 0
        return self._local.current

    def current_stream(self, index: int | None = None) -> ModelStream:
        current = self._current()
        return current[self._local.device if index is None else index]

    @contextmanager
    def stream(self, stream: ModelStream) -> Iterator[None]:
        current = self._current()
        before = current[stream.device_index]
        current[stream.device_index] = stream
        try:
            yield
        finally:
            current[stream.device_index] = before

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        self._current()
        before, self._local.device = self._local.device, index
        try:
            yield
        finally:
            self._local.device = before

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().capture is not None

    def begin_capture(self, stream: ModelStream, number: int) -> None:
        stream.capture = number
        stream.before = frozenset()  # torch synchronises before it captures

    def end_capture(self, number: int) -> None:
        for row in self.streams:
            for stream in row:
                if stream.capture == number:
                    stream.capture = None
                    stream.before = frozenset()


class ModelTensor:
    def __init__(self, index: int = 0, kind: str = "cuda") -> None:
        self.device = SimpleNamespace(type=kind, index=index)
        self.recorded: list[ModelStream] = []

    def record_stream(self, stream: ModelStream) -> None:
        self.recorded.append(stream)


class ModelOrdering(StreamOrdering):
    """The real ordering over the model."""

    def __init__(self, model: ModelDevice, knows_captures: bool = True) -> None:
        super().__init__("cuda", (lambda stream: stream.capture) if knows_captures else None)
        self.model = model

    def module(self) -> Any:
        return self.model
