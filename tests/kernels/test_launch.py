"""Check how kernels are started, with a driver that records launches instead of making them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hal.errors import PlatformError
from hal.ops.kernels import combine as combine_module
from hal.ops.kernels import common, grouped_gemm
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.combine import combine
from hal.ops.tiles import Tile

pytestmark = pytest.mark.skipif(
    common.INTERPRETED.value, reason="needs a process without TRITON_INTERPRET"
)


# Triton 3.2 calls its caches otherwise, and asks a driver for less about what it has loaded.
CACHES, LOADED = ("cache", 4) if triton.__version__.startswith("3.2.") else ("device_caches", 5)


remembers = pytest.mark.skipif(
    not common._Launches.USABLE, reason="needs Triton 3.3: launchers of 3.2 take no constants"
)
gathers = pytest.mark.skipif(not hasattr(tl, "gather"), reason="needs Triton 3.3 (tl.gather)")


class RecordingDriver:
    """Stand in for the driver of an H100: compiles for real, and records what would launch."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        # Of no real machine: Triton keeps what it compiled by this number.
        self.device = 90
        self.utils = SimpleNamespace(
            # No module: Triton 3.8 would unload it through whichever driver is active by then.
            load_binary=lambda name, *_: (None, name, 32, 0, 1024)[:LOADED],
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            launch=None,
        )

    def launcher_cls(self, src, metadata):
        def start(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            self.launched.append((metadata.hash, (x, y, z), stream, function, packed, args))

        return start

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 1000 + device

    def get_device_interface(self):
        return SimpleNamespace(device=self._switch)

    def _switch(self, index):
        recording = self

        class Switched:
            def __enter__(self):
                self.before, recording.device = recording.device, index

            def __exit__(self, *_):
                recording.device = self.before

        return Switched()


@pytest.fixture
def recording(monkeypatch):
    """Put a recording driver in place of Triton's, and forget what was compiled for it."""
    fake = RecordingDriver()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", fake)
    monkeypatch.setattr(common, "_launches", {})
    yield fake
    from hal.ops.kernels import align as align_module

    for module in (combine_module, grouped_gemm, align_module):
        for kernel in vars(module).values():
            for device in (90, 91):
                getattr(kernel, CACHES, {}).pop(device, None)


def run_combine(tokens, top_k, hidden, *, shift=0, weights=None, dtype=torch.bfloat16):
    """Launch `combine` on tensors whose first element stands `shift` elements off."""
    whole = torch.empty(tokens * top_k * hidden + shift, dtype=dtype)
    x = whole[shift:].view(tokens, top_k, hidden)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    given = None if weights is None else torch.ones(tokens, top_k, dtype=weights)
    combine(x, torch.empty(tokens, hidden, dtype=dtype), ids, 8, given)


CASES = [
    {},
    {"shift": 1},
    {"shift": 8},
    {"tokens": 1},
    {"tokens": 7},
    {"hidden": 192},
    {"hidden": 193},
    {"top_k": 1},
    {"weights": torch.float32},
    {"weights": torch.bfloat16},
    {"dtype": torch.float16},
]


@remembers
def test_remembered_kernels_are_the_ones_that_triton_chooses(recording, monkeypatch):
    """Every case, first, again and between others, launches exactly as JITFunction.run would."""

    def record(*, remember):
        monkeypatch.setattr(common._Launches, "USABLE", remember)
        recording.launched.clear()
        for case in [*CASES, *reversed(CASES), *CASES]:
            run_combine(**{"tokens": 4, "top_k": 2, "hidden": 128, **case})
        # Addresses of fresh tensors differ: compare what they were, not which.
        return [
            (*entry[:-1], [str(a.dtype) if isinstance(a, torch.Tensor) else a for a in entry[-1]])
            for entry in recording.launched
        ]

    plain = record(remember=False)
    assert common._launches == {}
    remembered = record(remember=True)
    assert plain == remembered
    assert len({entry[0] for entry in plain}) > 5
    (launches,) = common._launches.values()
    assert 5 < len(launches.compiled) <= len(CASES)


@gathers
def test_sizes_and_places_that_change_compile_nothing_new(recording):
    """Slots, capacity and the place of n_padded change from step to step."""
    for tokens in range(1, 17):
        length = capacity(tokens * 2, 8, 16)
        blocks = length // 16
        whole = torch.empty(length + blocks + 1, dtype=torch.int32)
        align(torch.zeros(tokens, 2, dtype=torch.int32), 8, 16, *whole.split((length, blocks, 1)))
    assert len(recording.launched) == 16
    assert len({entry[0] for entry in recording.launched}) == 1


@remembers
def test_forgets_rather_than_fills_the_memory(recording, monkeypatch):
    monkeypatch.setattr(common._Launches, "MOST", 2)
    for hidden in (16, 32, 48, 64):
        run_combine(2, 2, hidden)
    (launches,) = common._launches.values()
    assert 1 <= len(launches.compiled) <= 2
    assert len(recording.launched) == 4


def test_launches_on_the_device_of_the_tensors(recording):
    class Elsewhere(torch.Tensor):
        """A CPU tensor that says it is on another GPU."""

        device = torch.device("cuda", 91)

    x = torch.empty(2, 2, 16).as_subclass(Elsewhere)
    combine(x, torch.empty(2, 16), torch.zeros(2, 2, dtype=torch.int32), 8)
    assert [entry[2] for entry in recording.launched] == [1091]
    assert recording.device == 90


def test_says_what_is_missing_without_a_driver(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    if hasattr(driver, "_active"):
        monkeypatch.setattr(driver, "_active", None)
        monkeypatch.setattr(driver, "_default", None)
    else:  # before Triton 3.5 a driver is looked for when it is first used
        monkeypatch.setattr(driver, "active", driver.default)
    with pytest.raises(PlatformError, match=r"finds no GPU in this process.*TRITON_INTERPRET=1"):
        run_combine(1, 1, 16)


def test_kernels_import_and_refuse_in_a_process_of_their_own():
    """No driver was ever asked for: neither import nor compile_for leaves one behind."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    program = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from hal.ops.kernels import common
from hal.ops.kernels.combine import combine
def run(device):
    x = torch.empty(2, 2, 16, device=device)
    combine(x, torch.empty(2, 16, device=device), torch.zeros(2, 2, device=device).int(), 8)
with common.compile_for(GPUTarget("cuda", 90, 32)) as compiled:
    run("meta")
assert [entry.name for entry in compiled] == ["_combine_kernel"]
try:
    run("cpu")
except common.PlatformError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no kernel can launch" in done.stdout


@remembers
def test_a_remembered_launch_makes_few_calls(recording):
    """A grouped GEMM has 24 arguments and 18 options: 166 function calls, where this was written.

    They took 25 us, where Triton's own launcher took 33 to 50.
    """
    int32 = torch.int32
    length = capacity(64, 128, 16)
    operands = (
        torch.empty(8, 256, dtype=torch.bfloat16),
        torch.empty(4, 256, 256, dtype=torch.bfloat16),
        torch.empty(64, 256, dtype=torch.bfloat16),
        torch.empty(length, dtype=int32),
        torch.empty(length // 16, dtype=int32),
        torch.empty(1, dtype=int32),
    )
    tile = Tile(16, 128, 64, 4, 2, swap=True)
    grouped_gemm.grouped_gemm(*operands, top_k_divisor=8, kind="bf16", tile=tile)
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        grouped_gemm.grouped_gemm(*operands, top_k_divisor=8, kind="bf16", tile=tile)
    finally:
        sys.setprofile(None)
    assert 10 < sum(event in ("call", "c_call") for event in events) <= 220
