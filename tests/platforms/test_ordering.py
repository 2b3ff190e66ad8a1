"""The promise of `ordered`, checked on a model of streams for every short program."""

from __future__ import annotations

import itertools
import threading
from contextlib import nullcontext

import pytest
import torch
from stream_model import CaptureIsolation, ModelDevice, ModelOrdering, ModelTensor, Work

from hal.errors import DeviceMismatchError, SimulatedDeviceError
from hal.platforms.ordering import HostOrdering, SimulatedOrdering
from hal.platforms.streams import stream_ordering

STREAMS = (0, 1, 2)
STEPS = list(itertools.product(STREAMS, (None, *STREAMS)))


def one_body(
    model: ModelDevice, ordering: ModelOrdering, outer: int, inner: int | None
) -> tuple[Work, Work, Work]:
    """Run work, an ordered body and work on `outer`; return the three pieces."""
    streams = model.streams[0]
    with model.stream(streams[outer]):
        before = streams[outer].work()
        stream = None if inner is None else streams[inner]
        with ordering.ordered([ModelTensor()], stream=stream) as given:
            assert given is stream
            body = model.current_stream().work()
        assert model.current_stream() is streams[outer]
        after = streams[outer].work()
    return before, body, after


@pytest.mark.parametrize("first", STEPS)
def test_every_program_of_three_bodies(first: tuple[int, int | None]) -> None:
    for second, third in itertools.product(STEPS, STEPS):
        model = ModelDevice()
        ordering = ModelOrdering(model)
        bodies: list[Work] = []
        for outer, inner in (first, second, third):
            before, body, after = one_body(model, ordering, outer, inner)
            assert body.follows(before), "the body starts after what the outer stream was given"
            assert after.follows(body), "the outer stream goes on after the body"
            assert all(body.follows(earlier) for earlier in bodies)
            bodies.append(body)
        assert len(ordering.ledger.marks) <= len(STREAMS)
        ordering.wait([ModelTensor()])
        waited = frozenset().union(*model.synchronized)
        assert {body.number for body in bodies} <= waited
        assert ordering.ledger.marks == {}


@pytest.mark.parametrize(("outer", "inner"), STEPS)
def test_nested_bodies(outer: int, inner: int | None) -> None:
    for second in (None, *STREAMS):
        model = ModelDevice()
        ordering = ModelOrdering(model)
        streams = model.streams[0]
        with model.stream(streams[outer]):
            with ordering.ordered(
                [ModelTensor()], stream=None if inner is None else streams[inner]
            ):
                first = model.current_stream().work()
                with ordering.ordered(
                    [ModelTensor()], stream=None if second is None else streams[second]
                ):
                    nested = model.current_stream().work()
                last = model.current_stream().work()
            after = streams[outer].work()
        assert nested.follows(first)
        assert last.follows(nested)
        assert after.follows(last)
        assert one_body(model, ordering, 3, None)[1].follows(last)


def test_a_body_that_fails_is_ordered_all_the_same() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    side = model.streams[0][1]
    works: list[Work] = []

    def fail() -> None:
        with ordering.ordered([ModelTensor()], stream=side):
            works.append(side.work())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (work,) = works
    assert model.current_stream() is model.streams[0][0]
    assert model.streams[0][0].work().follows(work)
    assert one_body(model, ordering, 2, 3)[1].follows(work)


def test_memory_is_kept_for_the_stream_that_uses_it() -> None:
    model = ModelDevice()
    side, tensor, elsewhere = model.streams[0][1], ModelTensor(), ModelTensor(kind="cpu")
    with ModelOrdering(model).ordered([tensor, elsewhere], stream=side):
        assert tensor.recorded == [side]
    assert elsewhere.recorded == []


def test_tensors_on_the_host_alone_need_no_order() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    with ordering.ordered([ModelTensor(kind="cpu")]):
        pass
    assert ordering.ledger.marks == {}
    ordering.wait([ModelTensor(kind="cpu")])


def test_devices_have_ledgers_of_their_own() -> None:
    model = ModelDevice(devices=2)
    ordering = ModelOrdering(model)
    (home, side, *_), (far, far_side, *_) = model.streams
    with ordering.ordered([ModelTensor(0)], stream=side):
        first = side.work()
    with ordering.ordered([ModelTensor(1)], stream=far_side):
        second = far_side.work()
    assert not second.follows(first), "devices do not wait for each other"
    with ordering.ordered([ModelTensor(0), ModelTensor(1)], stream=side):
        both = side.work()
    assert both.follows(first)
    assert both.follows(second)
    assert home.work().follows(both)
    assert far.work().follows(both), "the other tensor's stream waits too"
    with ordering.ordered([ModelTensor(1)], stream=far_side):
        assert far_side.work().follows(both)


def test_a_stream_of_another_device_is_refused() -> None:
    model = ModelDevice(devices=2)
    with pytest.raises(DeviceMismatchError, match="a stream of device 1"):
        ModelOrdering(model).ordered([ModelTensor(0)], stream=model.streams[1][0]).__enter__()


def test_bodies_of_two_threads_that_overlap_are_both_waited_for() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    streams = model.streams[0]
    entered, leave = threading.Barrier(2), threading.Event()
    works: list[Work] = []

    def run(number: int) -> None:
        with ordering.ordered([ModelTensor()], stream=streams[number]):
            entered.wait(5)
            works.append(streams[number].work())
            if number == 1:
                leave.wait(5)
        leave.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(works) == 2
    later = one_body(model, ordering, 0, 3)[1]
    assert all(later.follows(work) for work in works)


@pytest.mark.parametrize("knows_captures", [True, False])
def test_captures_never_depend_on_the_world_outside(knows_captures: bool) -> None:
    """Every order of bodies before, in, between and after two captures on every stream."""
    for choices in itertools.product(STEPS, STREAMS, (None, *STREAMS), repeat=1):
        (outer, inner), capturing, captured_inner = choices
        model = ModelDevice()
        ordering = ModelOrdering(model, knows_captures)
        streams = model.streams[0]
        one_body(model, ordering, outer, inner)
        for number in (7, 8):
            model.begin_capture(streams[capturing], number)
            first = one_body(model, ordering, capturing, captured_inner)[1]
            again = one_body(model, ordering, capturing, captured_inner)[1]
            assert again.follows(first)
            model.end_capture(number)
            one_body(model, ordering, outer, inner)
        ordering.wait([ModelTensor()])


def test_inside_a_capture_a_third_stream_waits_too() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    origin, side, early, late = model.streams[0]
    model.begin_capture(origin, 7)
    early.wait_stream(origin)  # forked before the body
    with ordering.ordered([ModelTensor()], stream=side):
        body = side.work()
    with model.stream(early), ordering.ordered([ModelTensor()], stream=late):
        assert late.work().follows(body)


def test_marks_from_before_a_capture_hold_after_it() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    origin, side, _, other = model.streams[0]
    with model.stream(other), ordering.ordered([ModelTensor()], stream=side):
        body = side.work()
    model.begin_capture(origin, 7)
    one_body(model, ordering, 0, 1)  # ends on the stream whose mark must stay
    model.end_capture(7)
    with ordering.ordered([ModelTensor()]):
        assert origin.work().follows(body)


def test_marks_of_old_captures_do_not_pile_up() -> None:
    model = ModelDevice()
    ordering = ModelOrdering(model)
    for number in range(100):
        model.begin_capture(model.streams[0][0], number)
        one_body(model, ordering, 0, 1)
        model.end_capture(number)
    assert len(ordering.ledger.marks) <= 32


def test_the_model_itself_refuses_what_a_runtime_refuses() -> None:
    model = ModelDevice()
    origin, side, *_ = model.streams[0]
    event = side.record_event()
    model.begin_capture(origin, 7)
    with pytest.raises(CaptureIsolation):
        origin.wait_event(event)


def test_one_ordering_a_process() -> None:
    assert stream_ordering("cuda") is stream_ordering("cuda")
    assert stream_ordering("cuda") is not stream_ordering("xpu")


def test_the_host_orders_nothing_and_refuses_devices_with_streams() -> None:
    ordering = HostOrdering()
    with ordering.ordered([torch.zeros(2)]) as stream:
        assert stream is None
    ordering.wait([torch.zeros(2)])
    ordering.synchronize()
    assert ordering.current_stream() is None
    event = ordering.event()
    event.record()
    event.wait()
    event.synchronize()
    assert event.query()
    with pytest.raises(DeviceMismatchError, match="platform_of"):
        ordering.ordered([ModelTensor()])  # type: ignore[list-item]
    with pytest.raises(DeviceMismatchError):
        ordering.wait([ModelTensor()])  # type: ignore[list-item]


def test_simulation_computes_on_the_cpu_and_refuses_the_device() -> None:
    ordering = SimulatedOrdering("rocm", "MI300X")
    with ordering.ordered([torch.zeros(2), torch.zeros(2, device="meta")]):
        pass
    ordering.wait([torch.zeros(2)])
    refused = [
        ordering.synchronize,
        ordering.current_stream,
        ordering.event,
        lambda: ordering.ordered([ModelTensor()]),  # type: ignore[list-item]
        lambda: ordering.wait([ModelTensor()]),  # type: ignore[list-item]
    ]
    for call in refused:
        with pytest.raises(SimulatedDeviceError, match="MI300X"):
            call()
    assert isinstance(ordering.ordered([]), nullcontext)
