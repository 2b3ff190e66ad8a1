"""What only a device can show: order under delay, capture, and what the driver says of itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_delay import TIMES, one_second

import hal
from hal.quant.layout import to_layout
from hal.quant.scheme import find_scheme
from hal.quant.tensor import QTensor
from hal.runtime import platform_for_device_type

pytestmark = pytest.mark.gpu

SIZE = 2048


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "xpu"


@pytest.fixture
def here() -> hal.Platform:
    return platform_for_device_type(device_type())


@pytest.fixture(scope="module")
def delay() -> Callable[[], None]:
    return one_second()


def weight(number: int) -> QTensor:
    values = torch.arange(SIZE * SIZE, device="cuda", dtype=torch.int32).view(SIZE, SIZE)
    return QTensor(((values + number) % 251).bfloat16(), None, find_scheme("bf16"), "bfloat16")


def expected(source: QTensor, layout: str) -> torch.Tensor:
    values = source.values.cpu()
    if layout == "k_major":
        return values.t().contiguous()
    return values.view(2, SIZE // 2, SIZE).transpose(0, 1).reshape(SIZE, SIZE)


def spoil(stream: Any) -> None:
    """Fill memory that the stream will be given next, so that reading too early shows."""
    with torch.cuda.stream(stream):
        torch.full((SIZE, SIZE), 777.0, device="cuda", dtype=torch.bfloat16)


CASES = [("k_major", False), ("interleaved", False), ("interleaved", True)]


def delayed_step(
    here: hal.Platform,
    delay: Callable[[], None],
    side: Any,
    number: int,
    layout: str,
    inplace: bool,
) -> tuple[QTensor, torch.Tensor]:
    """Convert a weight on a stream that is busy for a second; return it and what it must hold."""
    source = weight(number)
    wanted = expected(source, layout)
    spoil(side)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        delay()
    start = time.perf_counter()
    result = to_layout(source, layout, here, inplace=inplace, stream=side)
    assert time.perf_counter() - start < 0.5, "the host must not wait"
    return result, wanted


def test_an_unordered_reader_would_be_wrong(delay: Callable[[], None]) -> None:
    side, reader = torch.cuda.Stream(), torch.cuda.Stream()
    target = torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        delay()
        target.fill_(1.0)
    with torch.cuda.stream(reader):
        early = target.clone()
    torch.cuda.synchronize()
    assert early.sum() == 0, "the delay is long enough to see a missing wait"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "inplace"), CASES)
def test_caller_s_stream_waits(
    here: hal.Platform, delay: Callable[[], None], layout: str, inplace: bool
) -> None:
    side, right = torch.cuda.Stream(), 0
    for number in range(TIMES):
        result, wanted = delayed_step(here, delay, side, number, layout, inplace)
        right += torch.equal(result.values.clone().cpu(), wanted)
    assert right == TIMES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "inplace"), CASES)
def test_third_stream_waits_through_ordered(
    here: hal.Platform, delay: Callable[[], None], layout: str, inplace: bool
) -> None:
    side, reader, right = torch.cuda.Stream(), torch.cuda.Stream(), 0
    for number in range(TIMES):
        result, wanted = delayed_step(here, delay, side, number, layout, inplace)
        with torch.cuda.stream(reader), here.ordered(result.tensors):
            read = result.values.clone()
        torch.cuda.synchronize()
        right += torch.equal(read.cpu(), wanted)
    assert right == TIMES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_reader_is_right_after_wait(here: hal.Platform, delay: Callable[[], None]) -> None:
    side, reader, right = torch.cuda.Stream(), torch.cuda.Stream(), 0
    for number in range(TIMES):
        result, wanted = delayed_step(here, delay, side, number, "interleaved", True)
        here.wait(result.tensors)
        with torch.cuda.stream(reader):
            read = result.values.clone()
        torch.cuda.synchronize()
        right += torch.equal(read.cpu(), wanted)
    assert right == TIMES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_step_waits_for_a_late_producer(here: hal.Platform, delay: Callable[[], None]) -> None:
    side, right = torch.cuda.Stream(), 0
    for number in range(TIMES):
        source, fresh = weight(0), weight(number + 1)
        wanted = expected(fresh, "k_major")
        torch.cuda.synchronize()
        delay()
        source.values.copy_(fresh.values)
        result = to_layout(source, "k_major", here, stream=side)
        right += torch.equal(result.values.clone().cpu(), wanted)
    assert right == TIMES


def test_capture_and_replay(here: hal.Platform) -> None:
    side, late, reader = (torch.cuda.Stream() for _ in range(3))
    source, target = (torch.zeros(SIZE, SIZE, device="cuda") for _ in range(2))
    seen = torch.zeros(SIZE, SIZE, device="cuda")
    with here.ordered([source], stream=late):  # a mark from outside, which no capture may use
        source.add_(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        origin = torch.cuda.current_stream()
        reader.wait_stream(origin)  # forked before the body: only the ledger orders it
        with here.ordered([source, target], stream=side):
            torch.cuda._sleep(50_000_000)
            target.copy_(source + 1.0)
        with torch.cuda.stream(reader), here.ordered([target, seen]):
            seen.copy_(target * 2.0)
        origin.wait_stream(reader)
    for value in (1.0, 5.0):
        source.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert target.unique().tolist() == [value + 1.0]
        assert seen.unique().tolist() == [2.0 * (value + 1.0)]
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second), here.ordered([source, target], stream=side):
        target.copy_(source - 1.0)
    second.replay()
    torch.cuda.synchronize()
    assert target.unique().tolist() == [4.0]
    here.wait([target])


def test_facts_agree_with_the_runtime(here: hal.Platform) -> None:
    module: Any = getattr(torch, device_type())
    assert here.device_count() == module.device_count()
    for index in range(here.device_count()):
        properties, spec = module.get_device_properties(index), here.device(index)
        assert spec.memory_bytes is not None
        assert abs(spec.memory_bytes - properties.total_memory) < 0.01 * properties.total_memory
        if here.is_cuda:
            assert here.compute_capability(index) == (properties.major, properties.minor)
            assert spec.compute_units in (None, properties.multi_processor_count)
            if hasattr(properties, "uuid"):
                uuid = here.record(index).uuid  # type: ignore[attr-defined]
                assert uuid is None or uuid.removeprefix("GPU-") == str(properties.uuid)
        free, total = here.memory(index)
        with module.device(index):
            seen_free, seen_total = module.mem_get_info()
        assert total
        assert abs(total - seen_total) < 0.01 * seen_total
        if free is not None:
            assert abs(free - seen_free) < 0.01 * seen_total


def test_links_agree_with_peer_access(here: hal.Platform) -> None:
    if here.device_count() < 2 or not torch.cuda.is_available():
        pytest.skip("needs two torch.cuda devices")
    for index in range(here.device_count()):
        peers = {link.peer: link for link in here.device(index).links}
        assert set(peers) == set(range(here.device_count())) - {index}
        for peer, link in peers.items():
            if link.kind in ("nvlink", "xgmi"):
                assert torch.cuda.can_device_access_peer(index, peer)
                assert link.bytes_per_second


FORK = """
import ctypes, os, sys
import hal
from hal.doctor import doctor_report, subject_here
from hal.report import info_report
platform = hal.current_platform()
report = info_report(platform)
assert report["errors"] == [], report["errors"]
doctor_report(subject_here(), seconds=None)
assert "torch" not in sys.modules, "a report imported torch"
if platform.is_cuda:
    count = ctypes.c_int()
    code = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    assert code == 3, f"the driver answers {code}, needed 3 (CUDA_ERROR_NOT_INITIALIZED)"
import torch
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    assert torch.ones(4, device="cuda").sum().item() == 4.0
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
print(platform.name, platform.device(0).origin)
"""


def test_a_forked_child_can_use_the_device_after_detection(here: hal.Platform) -> None:
    if device_type() != "cuda":
        pytest.skip("no torch.cuda device")
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == here.name


def test_facts_by_torch_agree_with_those_by_the_driver(here: hal.Platform) -> None:
    from hal.platforms.live import find_live

    live = find_live(device_type(), here.device(0).software)
    assert live is not None
    for index in range(here.device_count()):
        mine, theirs = here.device(index), live.device(index)
        assert (mine.name, mine.arch, mine.compute_units) == (
            theirs.name,
            theirs.arch,
            theirs.compute_units,
        )
