"""Order work on tensors by streams and events, so that nothing is read before it is written.

The rule is one sentence: a body under `ordered` starts after everything that the outer stream was
given and after every earlier ordered body on the same device, and whoever comes later waits for
it. The device waits, never the host.

The second half is kept by a ledger: per device, the event that ended the last ordered body on each
stream. It goes by device and not by memory on purpose. What a body writes is often allocated in
it, and the caching allocator gives addresses out again, so a ledger by address would miss the
first and be misled by the second. The price is that bodies of two streams do not overlap on the
device; bodies prepare weights, and one such body fills the memory bus.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hal.errors import DeviceMismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["StreamOrdering", "stream_ordering"]

_MOST_CAPTURES = 16  # more than anybody captures at once


@dataclass(frozen=True, slots=True, eq=False)
class _Mark:
    """An event that ends an ordered body.

    `capture` is None outside graph capture. An event of a capture means nothing outside of it,
    and one from outside cannot be waited for inside.
    """

    event: Any
    capture: int | None


@dataclass(slots=True)
class _Ledger:
    """Remember, by device and stream, the mark that ends the last ordered body.

    One mark a stream is enough, because a stream ends its bodies in order; so the ledger is as
    large as the number of streams in use, and no event has to be asked whether it is complete,
    which would be illegal while a graph is captured anywhere in the process.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    marks: dict[tuple[int, Any], _Mark] = field(default_factory=dict)

    def pending(self, index: int, capture: int | None) -> list[_Mark]:
        """Return the marks of a device that a body in `capture` has to wait for."""
        with self.lock:
            return [
                mark
                for (device, _), mark in self.marks.items()
                if device == index and mark.capture == capture
            ]

    def remember(
        self, indices: Iterable[int], stream: Any, capture: int | None, waited: Iterable[_Mark]
    ) -> Any:
        """Record the end of a body on `stream`, which came after `waited`; return the event.

        The event is recorded under the lock, so that of two threads that end bodies on one stream
        the later event is the one that stays.
        """
        done = {id(mark) for mark in waited}
        with self.lock:
            event = stream.record_event()
            mark = _Mark(event, capture)
            for index in indices:
                # A key that was waited for is covered by this mark. A body that another thread
                # ended meanwhile is not, and stays.
                for key in [key for key, old in self.marks.items() if id(old) in done]:
                    if key[0] == index:
                        del self.marks[key]
                # The key tells captures apart: a mark from outside must outlive the capture.
                self.marks[index, (_identity(stream), capture)] = mark
            self._drop_finished_captures()
        return event

    def forget(self, marks: Iterable[_Mark]) -> None:
        """Drop marks that are complete."""
        done = {id(mark) for mark in marks}
        with self.lock:
            for key in [key for key, mark in self.marks.items() if id(mark) in done]:
                del self.marks[key]

    def _drop_finished_captures(self) -> None:
        """Keep marks of the latest captures only: identities never come back."""
        captures = dict.fromkeys(
            mark.capture for mark in self.marks.values() if mark.capture is not None
        )
        for old in list(captures)[:-_MOST_CAPTURES]:
            for key in [key for key, mark in self.marks.items() if mark.capture == old]:
                del self.marks[key]


class StreamOrdering:
    """Order work on devices with streams, through torch's module for their type.

    Args:
        device_type: Type of torch device, `cuda` or `xpu`.
        capture_id: Returns the identity of the graph capture that a stream takes part in, or None
            where it cannot be told.
    """

    def __init__(
        self, device_type: str, capture_id: Callable[[Any], int | None] | None = None
    ) -> None:
        self._type = device_type
        self._capture_id = capture_id
        self.ledger = _Ledger()

    def module(self) -> Any:
        """Return torch.cuda or torch.xpu."""
        import torch

        return getattr(torch, self._type)

    def synchronize(self, index: int | None = None) -> None:
        """Wait on the host for all work of a device."""
        self.module().synchronize(index)

    def current_stream(self, index: int | None = None) -> Any:
        """Return the stream that work is being submitted to."""
        return self.module().current_stream(index)

    def event(self) -> Any:
        """Return a new event that does not measure time."""
        return self.module().Event()

    def ordered(
        self, tensors: Iterable[torch.Tensor], *, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Run the body after every earlier ordered body and before what comes next.

        What a body allocates on another stream belongs to that stream: whoever keeps using it on
        a third stream outside of `ordered` has to call `record_stream` on it, as always in torch.
        """
        return _Ordered(self, tuple(tensors), stream)

    def wait(self, tensors: Iterable[torch.Tensor]) -> None:
        """Block the host until the last ordered body on the devices of `tensors` is done."""
        for index in self.groups(tensors):
            marks = self.ledger.pending(index, None)
            for mark in marks:
                mark.event.synchronize()
            self.ledger.forget(marks)

    def groups(self, tensors: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        """Return the tensors of this type of device by the device's index."""
        groups: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.device.type == self._type:
                groups.setdefault(tensor.device.index, []).append(tensor)
        return groups

    def capture(self, stream: Any) -> int | None:
        """Return the identity of the capture that the current stream is in, or None.

        A capture whose identity cannot be told gives -1: its marks are then not remembered, and
        order among its own streams rests on the waits at the end of each body.
        """
        capturing = getattr(self.module(), "is_current_stream_capturing", None)
        if capturing is None or not capturing():
            return None
        identity = self._capture_id(stream) if self._capture_id else None
        return -1 if identity is None else identity


@functools.cache
def stream_ordering(device_type: str) -> StreamOrdering:
    """Return the one ordering of a device type in this process.

    Streams and the work on them belong to the process, so platform objects that are made anew, by
    `refresh` for example, must go on with the same ledger.
    """
    from hal.platforms.capture import capture_id

    return StreamOrdering(device_type, capture_id if device_type == "cuda" else None)


class _Ordered:
    """One body between its waits and its events."""

    __slots__ = (
        "_capture",
        "_context",
        "_ordering",
        "_outers",
        "_stream",
        "_tensors",
        "_waited",
    )

    def __init__(
        self, ordering: StreamOrdering, tensors: tuple[torch.Tensor, ...], stream: Any
    ) -> None:
        self._ordering, self._tensors, self._stream = ordering, tensors, stream
        self._outers: dict[int, Any] = {}
        self._waited: list[_Mark] = []
        self._capture: int | None = None
        self._context: Any = None

    def __enter__(self) -> Any:
        ordering, stream = self._ordering, self._stream
        module = ordering.module()
        groups = ordering.groups(self._tensors)
        if stream is not None and groups and stream.device.index not in groups:
            raise DeviceMismatchError(
                "ordered",
                found=f"a stream of device {stream.device.index}",
                needed="a stream of the tensors' device " + ", ".join(map(str, groups)),
            )
        if stream is not None:
            groups.setdefault(stream.device.index, [])
        for index in groups:
            outer = self._outers[index] = module.current_stream(index)
            with module.device(index):
                capture = ordering.capture(outer)
            self._capture = capture if self._capture is None else self._capture
        for index, tensors in groups.items():
            outer = self._outers[index]
            body = outer if stream is None else stream
            if body != outer:
                body.wait_stream(outer)
            for mark in ordering.ledger.pending(index, self._capture):
                body.wait_event(mark.event)
                self._waited.append(mark)
            for tensor in tensors:
                # The allocator must not hand out this memory again before the body is through
                # with it. For a tensor of the body's own stream this does nothing.
                tensor.record_stream(body)
        if stream is not None:
            self._context = module.stream(stream)
            self._context.__enter__()
        return stream

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A body that failed may have submitted work before it did, so it is ordered all the same.
        if self._context is not None:
            self._context.__exit__(kind, error, traceback)
        if self._stream is not None:
            event = self._end(self._stream, self._outers)
            for outer in self._outers.values():
                if outer != self._stream:
                    outer.wait_event(event)
        else:
            for index, outer in self._outers.items():
                self._end(outer, [index])

    def _end(self, body: Any, indices: Iterable[int]) -> Any:
        if self._capture == -1:
            return body.record_event()
        return self._ordering.ledger.remember(indices, body, self._capture, self._waited)


def _identity(stream: Any) -> tuple[int, int]:
    return (stream.device_index, stream.stream_id)
