"""A one-sided call that repeats a launch passes what the whole launcher would pass."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from one_sided_group import Group, made

from hal.errors import ArgumentError
from hal.ops import Routing
from hal.ops.kernels import combine_rows, common, dispatch_rows
from hal.ops.transports.kept import Sent
from hal.ops.transports.one_sided import OneSided

if common.INTERPRETED.value:
    pytest.skip("kernels that are interpreted are launched anew", allow_module_level=True)

DEVICE = 3


class Kernel:
    """A kernel that notes what it is launched with, by name, and how."""

    def __init__(self, kernel, log) -> None:
        self.fn, self.params, self.arg_names = kernel.fn, kernel.params, kernel.arg_names
        self.pre_run_hooks, self.log = [], log

    def __getitem__(self, grid):
        def run(*arguments, **options):
            warps = options.pop("num_warps")
            options.pop("maxnreg", None)
            given = dict(zip(self.arg_names, (*arguments, *options.values()), strict=True))
            assert [*given][len(arguments) :] == [*options]
            self.log.append(("whole", (*grid, 1, 1)[:3], given))
            return Compiled(self, warps)

        return run


class Compiled:
    def __init__(self, kernel, warps) -> None:
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        assert len(grid) == 3

        def run(*arguments):
            given = dict(zip(self.kernel.arg_names, arguments, strict=True))
            self.kernel.log.append(("again", grid, given))

        return run


@pytest.fixture
def log(monkeypatch):
    found, here = [], [DEVICE]
    target = SimpleNamespace(backend="cuda", arch=90)
    driver = SimpleNamespace(
        get_current_device=lambda: here[0], get_current_target=lambda: target, here=here
    )
    monkeypatch.setattr(common, "_active_driver", lambda: driver)
    monkeypatch.setattr(common, "_launches", {})
    for module, name in ((dispatch_rows, "_dispatch_kernel"), (combine_rows, "_combine_kernel")):
        monkeypatch.setattr(module, name, Kernel(getattr(module, name), found))
    return SimpleNamespace(found=found, driver=driver)


def called(exchange, x, routing, shared=None, room=None):
    """Return what both launches of a call are told."""
    log = dispatch_rows._dispatch_kernel.log
    first = len(log)
    received, state = exchange.open(x, len(x) if room is None else room)
    exchange.launch_dispatch(x, routing, received, state)
    partial = torch.zeros_like(received.x)
    exchange.combine(partial, state, shared, torch.float32)
    return received, partial, log[first:]


def inputs(n, seed=0):
    ((x, routing),) = made(1, 160, (n,), seed=seed)
    return x, Routing(ids=routing.ids.int(), weights=routing.weights)


def misaligned(x):
    wide = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return wide[1:].view(x.shape).copy_(x)


CHANGES = {
    "none": lambda x, r: (x, r),
    "fewer tokens": lambda x, r: (x[:2], Routing(ids=r.ids[:2], weights=r.weights[:2])),
    "long ids": lambda x, r: (x, Routing(ids=r.ids.long(), weights=r.weights)),
    "half weights": lambda x, r: (x, Routing(ids=r.ids, weights=r.weights.bfloat16())),
    "rows apart": lambda x, r: (torch.cat((x, x), 1)[:, :160], r),
    "columns apart": lambda x, r: (x.t().contiguous().t(), r),
    "misaligned": lambda x, r: (misaligned(x), r),
    "misaligned ids": lambda x, r: (x, Routing(ids=misaligned(r.ids), weights=r.weights)),
}


@pytest.mark.parametrize("format", ["bf16", "nvfp4"])
@pytest.mark.parametrize("change", CHANGES)
def test_repeats_pass_what_the_launcher_passes(format, change, log):
    group = Group(1, format)
    exchange = group.exchanges[0]
    called(exchange, *inputs(5), room=8)
    x, routing = CHANGES[change](*inputs(5, seed=1))
    shared = torch.randn(len(x), 160)
    found = []
    for one in (exchange, exchange, OneSided(group.setups[0], group.windows[0])):
        common._launches.clear()  # so that a launch that is no repetition is a whole one
        for more in (None, shared):
            received, partial, told = called(one, x, routing, more, room=8)
            assert told[0][2]["hits_ptr"] is received.state.hits
            read = told[0][2]["x_ptr"] if format == "bf16" else received.x
            assert told[0][2]["out_ptr"] is read
            assert told[1][2]["partial_ptr"] is partial
            assert told[1][2]["n_tokens"] == len(x)
            if more is not None:
                assert told[1][2]["shared_ptr"] is more
            found += [told]
    # What is made contiguous first is like what came before.
    like = change in ("none", "fewer tokens", "columns apart")
    assert found[0][0][0] == ("again" if like else "whole")
    assert {way for told in found[2:4] for way, _, _ in told} == {"again"}
    assert {way for told in found[4:5] for way, _, _ in told} == {"whole"}
    for again, whole in zip(found[2:4], found[4:6], strict=True):
        for mine, wanted in zip(again, whole, strict=True):
            assert mine[1] == wanted[1]
            assert mine[2].keys() == wanted[2].keys()
            for name, value in wanted[2].items():
                if isinstance(value, torch.Tensor):
                    # Tensors of a call are its own.
                    assert mine[2][name].dtype == value.dtype
                    assert mine[2][name].shape == value.shape
                    assert mine[2][name].stride() == value.stride()
                    assert mine[2][name].data_ptr() % 16 == value.data_ptr() % 16
                else:
                    assert mine[2][name] == value, name
                    assert type(mine[2][name]) is type(value), name


def test_what_was_launched_before_is_not_held(log):
    exchange = Group(1).exchanges[0]
    x, routing = inputs(5)
    called(exchange, x, routing)
    held = weakref.ref(x)
    log.found.clear()
    del x, routing
    gc.collect()
    assert held() is None


def test_hooks_and_other_devices_take_the_whole_launcher(log):
    exchange = Group(1).exchanges[0]
    x, routing = inputs(5)
    ways = []
    for device, hooks in ((DEVICE, []), (DEVICE, []), (DEVICE + 1, []), (DEVICE, [print])):
        common._launches.clear()
        log.driver.here[0] = device
        for module in (dispatch_rows._dispatch_kernel, combine_rows._combine_kernel):
            module.pre_run_hooks[:] = hooks
        ways.append([way for way, _, _ in called(exchange, x, routing)[2]])
    assert ways == [["whole"] * 2, ["again"] * 2, ["whole"] * 2, ["whole"] * 2]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device than the current one."""

    device = property(lambda self: torch.device("cuda", DEVICE + 1))


def test_a_launch_on_another_device_is_not_repeated_on_the_current_one(log):
    group = Group(1)
    here, there = group.exchanges[0], OneSided(group.setups[0], group.windows[0])
    x, routing = inputs(5)
    called(here, x, routing)  # compiled for the current device, for arguments just like those below

    @contextlib.contextmanager
    def device(index):
        before, log.driver.here[0] = log.driver.here[0], index
        yield
        log.driver.here[0] = before

    log.driver.get_device_interface = lambda: SimpleNamespace(device=device)
    received, state = there.open(x, len(x))
    ways = []
    for _ in range(2):
        first = len(log.found)
        there.launch_dispatch(x.as_subclass(Elsewhere), routing, received, state)
        ways += [way for way, _, _ in log.found[first:]]
        assert not state.kept.dispatches._found
    assert ways == ["whole", "again"]  # the second by `launch`, which goes to the other device


def test_a_window_that_was_replaced_is_looked_at_anew(log):
    group, other = Group(1, max_tokens=8), Group(1, max_tokens=8)
    exchange = group.exchanges[0]
    x, routing = inputs(5)
    before = called(exchange, x, routing)[0]
    exchange._window = other.windows[0]
    for _ in range(2):
        after, _, told = called(exchange, x, routing)
        begin = other.windows[0].memory.data_ptr()
        assert begin <= after.ids.data_ptr() < begin + other.windows[0].memory.numel()
        assert after.ids.data_ptr() != before.ids.data_ptr()
        assert told[0][2]["peers_ptr"] is other.windows[0].peers
        assert told[1][2]["state_ptr"] is other.windows[0].state


def test_a_dispatch_does_not_go_on_in_other_memory(log):
    group, other = Group(1, max_tokens=8), Group(1, max_tokens=16)
    exchange, window = group.exchanges[0], other.windows[0]
    x, routing = inputs(5)
    sent = Sent(x, routing, *exchange.open(x, 5))
    exchange.launch_dispatch(*sent, receive=False)
    exchange._window = window
    window.take()  # by the layer that made it grow: the slot of the same number is not free
    launched = len(log.found)
    with pytest.raises(ArgumentError, match="has replaced"):
        exchange.receive(sent)
    with pytest.raises(ArgumentError, match="has replaced"):
        exchange.combine(torch.zeros(5, 160), sent.state, None, torch.float32)
    assert window._taken == [True, False]
    assert len(log.found) == launched


def test_many_numbers_of_rows_do_not_fill_the_memory(log, monkeypatch):
    from hal.ops.transports import one_sided

    monkeypatch.setattr(one_sided, "MOST_KEPT", 4)
    exchange = Group(1, max_tokens=16).exchanges[0]
    for room in range(1, 13):
        called(exchange, *inputs(room))
        assert len(exchange._kept) <= 4
