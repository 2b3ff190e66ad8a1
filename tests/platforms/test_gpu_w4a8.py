"""What only a device can show of the W4A8 step in place: order under delay, two processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from gpu_delay import TIMES, one_second

import hal
from hal.quant import QTensor, to_layout, w4a8_weight
from hal.runtime import platform_for_device_type

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 2048, 4096
LAYOUT = "cutlass_w4a8"


@pytest.fixture
def here() -> hal.Platform:
    return platform_for_device_type("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture(scope="module")
def delay() -> Callable[[], None]:
    return one_second()


def checkpoint(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(ROWS, COLUMNS // 128, generator=generator) + 0.01


def same(found: QTensor, wanted: QTensor) -> bool:
    return all(
        torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(found.tensors, wanted.tensors, strict=True)
    )


def delayed(
    here: hal.Platform, delay: Callable[[], None], seed: int, side: Any, reorder: Any
) -> tuple[QTensor, QTensor, torch.Tensor]:
    """Rewrite and reorder a checkpoint behind a second of other work; return it and what it is."""
    codes, scales = checkpoint(seed)
    wanted = to_layout(w4a8_weight(codes, scales, platform="cpu"), LAYOUT, "cpu")
    packed, moved = codes.cuda(), scales.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        delay()
    start = time.perf_counter()
    weight = w4a8_weight(packed, moved, platform=here, inplace=True, stream=side)
    there = to_layout(weight, LAYOUT, here, stream=reorder)
    assert time.perf_counter() - start < 0.5, "the host must not wait"
    return there, wanted, packed


@pytest.fixture
def warm(here: hal.Platform) -> None:
    """Load every kernel: a first call may wait for the device."""
    codes, scales = checkpoint(0)
    to_layout(w4a8_weight(codes.cuda(), scales.cuda(), platform=here, inplace=True), LAYOUT, here)
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("where", ["the same stream", "another stream", "the caller's stream"])
def test_the_reorder_waits_for_the_step(
    here: hal.Platform, delay: Callable[[], None], where: str
) -> None:
    side, other, right = torch.cuda.Stream(), torch.cuda.Stream(), 0
    reorder = {"the same stream": side, "another stream": other}.get(where)
    for seed in range(TIMES):
        there, wanted, packed = delayed(here, delay, seed, side, reorder)
        early = packed.clone()  # on the caller's stream, which goes on after the step
        right += same(there, wanted) and torch.equal(early.cpu(), checkpoint(seed)[0] ^ 0x88)
    assert right == TIMES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm")
def test_a_third_stream_waits_through_ordered(
    here: hal.Platform, delay: Callable[[], None]
) -> None:
    side, reader, right = torch.cuda.Stream(), torch.cuda.Stream(), 0
    for seed in range(TIMES):
        there, wanted, _ = delayed(here, delay, seed, side, None)
        with torch.cuda.stream(reader), here.ordered(there.tensors):
            copies = [tensor.clone() for tensor in there.tensors]
        torch.cuda.synchronize()
        right += same(there.with_tensors(copies), wanted)
    assert right == TIMES


def read_when_told(memory: torch.Tensor, handle: bytes, told: Any) -> None:
    """Answer how many bytes are rewritten and how many not, after the shared event if told so."""
    event = torch.cuda.Event.from_ipc_handle(memory.device, handle)
    reader = torch.cuda.Stream()
    told.send("ready")
    while (message := told.recv()) is not None:
        seed, waits = message
        source = checkpoint(seed)[0].cuda()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(reader):
            if waits:
                reader.wait_event(event)
            copy = memory.clone()
            counts = int((copy == source ^ 0x88).sum()), int((copy == source).sum())
        told.send(counts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm")
def test_another_process_never_sees_half_a_step(
    here: hal.Platform, delay: Callable[[], None]
) -> None:
    """It waits for an event that the caller's stream records; without, it sees the old codes."""
    context = torch.multiprocessing.get_context("spawn")
    memory = torch.zeros(ROWS, COLUMNS // 2, dtype=torch.uint8, device="cuda")
    event, side = torch.cuda.Event(interprocess=True), torch.cuda.Stream()
    event.record()
    told, theirs = context.Pipe()
    arguments = (memory, event.ipc_handle(), theirs)
    reader = context.Process(target=read_when_told, args=arguments, daemon=True)
    reader.start()
    assert told.recv() == "ready"
    whole, right, early = memory.numel(), 0, 0
    try:
        for seed in range(TIMES):
            codes, scales = checkpoint(seed)
            memory.copy_(codes)
            moved = scales.cuda()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                delay()
            w4a8_weight(memory, moved, platform=here, inplace=True, stream=side)
            event.record()
            told.send((seed, False))
            early += told.recv() == (0, whole)
            told.send((seed, True))
            right += told.recv() == (whole, 0)
    finally:
        told.send(None)
        reader.join(60)
    assert right == TIMES
    assert early > 0, "the delay is long enough to see a missing wait"
