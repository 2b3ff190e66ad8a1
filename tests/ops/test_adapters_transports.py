"""Exchanges of DeepEP, FlashInfer and MoRI, against imitations whose ranks are threads."""

from __future__ import annotations

import inspect
import json
import math
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transport_fakes as fakes
import transport_fakes_more as more_fakes
import transport_signatures as declared

from hal.errors import ArgumentError, PlatformError
from hal.ops import Placement, Routing, Workspace
from hal.ops.adapters import mori
from hal.ops.payload import FORMATS, Payload, workspace
from hal.ops.quantize import fake_quantize, quantize_reference
from hal.ops.transports import EXPERT_PARALLEL
from hal.quant.represent import encoding_of
from hal.quant.scheme import find_scheme

NAMES = ("deep_ep", "deep_ep_low_latency", "flashinfer_one_sided", "mori")
HIDDEN = {"deep_ep_low_latency": 2048}
EXPERTS, TOP_K, MOST = 5, 2, 8


@dataclass
class Ranks:
    """What an exchange asks of its group."""

    group: Any
    rank: int
    size: int
    timeout: float = 2.5
    device: Any = field(default_factory=lambda: torch.device("cpu"))

    def all_gather(self, out, given) -> None:
        out.copy_(torch.cat(self.group.wire.swap(self.rank, given)))


@dataclass
class Setup:
    ranks: Ranks
    payload: Payload
    placement: Placement
    encoding: str
    quantize: Any
    host_sync: bool = True
    max_tokens: int = MOST
    dtype: torch.dtype = torch.bfloat16
    workspace: Workspace = field(default_factory=Workspace)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    for name, module in more_fakes.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mori, "_started", [])


def kernel_of(name):
    return next(kernel for kernel in EXPERT_PARALLEL.kernels if kernel.name == name)


def together(ranks, work):
    """Call `work(rank, group)` as every rank at once; return what each made."""
    wire, found, failed = fakes.Wire(ranks), [None] * ranks, []

    def one(rank):
        group = fakes.Group(wire, rank)
        more_fakes.STARTED.group = group
        try:
            found[rank] = work(rank, group)
        except BaseException as error:
            failed.append(error)
            wire._barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failed:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not failed
    return found


def setup_of(name, format, group, placement, **more):
    payload = Payload(format, HIDDEN.get(name, 256), more.pop("top_k", TOP_K))
    encoding = "bfloat16" if format == "bf16" else encoding_of(payload.how.format, "e4m3fn")
    quantize = None if format == "bf16" else quantize_reference
    ranks = Ranks(group, group.rank(), group.size())
    return Setup(ranks, payload, placement, encoding, quantize, **more)


def inputs(rank, tokens, hidden, change):
    generator = torch.Generator().manual_seed(17 * rank + tokens)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens + 1)]
    )[:tokens]
    weights = torch.rand(tokens, TOP_K, generator=generator)
    if change == "absent" and tokens:
        ids[::2, 1] = -1
        ids[1] = torch.tensor([EXPERTS + 3, -1])
    elif change == "one_expert":
        ids = torch.tensor([[EXPERTS - 1, -1]]).expand(tokens, -1)
    ids = ids.int() if rank % 2 else ids
    return x, Routing(ids=ids, weights=weights)


def factor(expert):
    return 0.5 + expert


def experts(received, placement, rank):
    """Return what experts that multiply by a number of their own make of the rows."""
    held = torch.tensor([factor(e) for e in placement.held[rank]])
    present = received.ids >= 0
    assert (received.ids < len(held)).all()
    scale = (held[received.ids.clamp_min(0)] * received.weights).masked_fill(~present, 0).sum(1)
    rows = received.x.float().masked_fill(~present.any(1, keepdim=True), 0)
    return (rows * scale.unsqueeze(1)).bfloat16()


def alone(x, routing, format):
    """Return what one process makes of the tokens."""
    if format != "bf16":
        scheme = find_scheme(FORMATS[format])
        x = fake_quantize(x, scheme, encoding_of(scheme.activation.format, "e4m3fn")).bfloat16()
    ids = routing.ids.long()
    present = (ids >= 0) & (ids < EXPERTS)
    scale = (torch.tensor([factor(e) for e in range(EXPERTS)])[ids.clamp(0, EXPERTS - 1)]
             * routing.weights).masked_fill(~present, 0).sum(1)  # fmt: skip
    return x.float() * scale.unsqueeze(1)


def formats_of(name):
    return [scheme for scheme in FORMATS if scheme in kernel_of(name).schemes]


def run(name, format, ranks, tokens, change="", placement=None, calls=2, **more):
    placement = placement or Placement.linear(EXPERTS, ranks)
    bind = kernel_of(name).load()

    def work(rank, group):
        setup = setup_of(name, format, group, placement, **more)
        exchange = bind(setup)
        for call in range(calls):
            x, routing = inputs(rank, tokens[rank], setup.payload.hidden, change)
            shared = torch.full_like(x, 0.25) if call else None
            sent = exchange.send(x, routing, None)
            received = exchange.receive(sent)
            partial = experts(received, placement, rank)
            y = exchange.combine(partial, received.state, shared, torch.float32)
            wanted = alone(x, routing, format) + (0.25 if call else 0)
            assert y.shape == wanted.shape
            if y.numel():
                error = (y - wanted).norm() / wanted.norm().clamp_min(1e-9)
                assert float(error) < 0.008, (rank, call, float(error))
        return len(received.x)

    return together(ranks, work)


@pytest.mark.parametrize(
    ("name", "format"), [(name, format) for name in NAMES for format in formats_of(name)]
)
def test_ranks_compute_what_one_process_computes(name, format):
    run(name, format, 2, (7, 3), "absent")  # five experts over two ranks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "change"),
    [((5, 0), ""), ((0, 0), ""), ((8, 8), "one_expert"), ((1, 2), "")],
    ids=["idle", "none", "one_expert", "few"],
)
def test_edges(name, tokens, change):
    run(name, "bf16", 2, tokens, change)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "placement",
    [Placement.round_robin(EXPERTS, 4), Placement.balanced([9.0, 1.0, 2.0, 1.0, 5.0], 4, 3)],
    ids=["round_robin", "copies"],
)
def test_placements(name, placement):
    run(name, "bf16", 4, (3, 0, 8, 2), placement=placement)


def test_without_host_sync_all_room_is_returned():
    assert run("mori", "fp8", 2, (3, 1), host_sync=False) == [2 * MOST] * 2
    assert run("flashinfer_one_sided", "fp8", 2, (3, 1), host_sync=False) == [2 * MOST] * 2
    assert run("mori", "bf16", 2, (3, 1), change="one_expert") == [0, 4]
    assert run("flashinfer_one_sided", "bf16", 2, (3, 1)) == [2 * 3] * 2


@pytest.mark.parametrize("name", ["flashinfer_one_sided", "mori"])
def test_one_dispatch_may_be_open(name):
    def work(rank, group):
        exchange = kernel_of(name).load()(setup_of(name, "bf16", group, Placement.linear(5, 2)))
        x, routing = inputs(rank, 2, 256, "")
        exchange.dispatch(x, routing, None)
        with pytest.raises(ArgumentError, match="one at a time"):
            exchange.dispatch(x, routing, None)

    together(2, work)


def test_two_dispatches_of_low_latency_may_be_open():
    def work(rank, group):
        name, placement = "deep_ep_low_latency", Placement.linear(EXPERTS, 2)
        exchange = kernel_of(name).load()(setup_of(name, "bf16", group, placement))
        pairs = [inputs(rank, tokens, 2048, "") for tokens in (2, 5)]
        sent = [exchange.send(*pair, None) for pair in pairs]
        for each, (x, routing) in zip(sent, pairs, strict=True):
            got = exchange.receive(each)
            partial = experts(got, placement, rank)
            y = exchange.combine(partial, got.state, None, torch.float32)
            wanted = alone(x, routing, "bf16")
            assert float((y - wanted).norm() / wanted.norm()) < 0.008

    together(2, work)


def test_layers_share_what_a_library_keeps():
    def work(rank, group):
        held = Workspace()
        made = []
        for name, format, top_k in (
            ("deep_ep", "bf16", 2), ("deep_ep", "fp8", 4), ("deep_ep_low_latency", "bf16", 2),
            ("deep_ep_low_latency", "bf16", 4), ("deep_ep_low_latency", "fp8", 2),
        ):  # fmt: skip
            place = Placement.linear(EXPERTS, 2)
            setup = setup_of(name, format, group, place, top_k=top_k, workspace=held)
            made.append(kernel_of(name).load()(setup).buffer)
        assert made[0] is made[1]
        assert made[2] is made[3] is made[4]
        assert made[0] is not made[2]
        held.reset()
        setup = setup_of("deep_ep", "bf16", group, place, workspace=held)
        assert kernel_of("deep_ep").load()(setup).buffer is not made[0]

    together(2, work)


def test_a_package_keeps_the_largest_that_was_asked_for():
    held, made = Workspace(), []

    def make(*sizes):
        made.append(sizes)
        return object()

    first = held.package("p", (4, 9), make)
    assert held.package("p", (3, 9), make) is first
    assert held.package("p", (5, 1), make) is not first
    assert made == [(4, 9), (5, 9)]


def test_a_package_is_not_made_while_a_graph_is_captured(monkeypatch):
    held, made = Workspace(), object()
    held.reserve({}, 2, torch.device("cpu"))
    assert held.package("p", (4,), lambda size: made) is made
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
    assert held.package("p", (4,), object) is made
    for name, size in (("p", 5), ("q", 1)):
        with pytest.raises(ArgumentError, match=f"needs more of {name} while a graph is captured"):
            held.package(name, (size,), lambda size: pytest.fail("it was made"))
    assert held.package("p", (4,), object) is made


def test_mori_serves_one_group_a_process():
    mori._started.append("another")
    with pytest.raises(ArgumentError, match="needed another"):
        mori._start(fakes.Group(fakes.Wire(1), 0))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_package_no_longer_takes_is_named(name, monkeypatch):
    def other(*, quite_another_argument):
        raise AssertionError

    where = {
        "deep_ep": (fakes.Buffer, "dispatch"),
        "deep_ep_low_latency": (fakes.Buffer, "low_latency_dispatch"),
        "flashinfer_one_sided": (more_fakes.NVLinkOneSidedAlltoAll, "dispatch"),
        "mori": (more_fakes.EpDispatchCombineOp, "dispatch"),
    }
    monkeypatch.setattr(*where[name], staticmethod(other))

    def work(rank, group):
        setup = setup_of(name, "bf16", group, Placement.linear(EXPERTS, 2))
        with pytest.raises(PlatformError, match="quite_another_argument"):
            kernel_of(name).load()(setup)

    together(2, work)


def test_imitations_are_declared_as_the_libraries_are():
    told = json.loads(declared.TABLE.read_text(encoding="utf-8"))
    wanted = {f"{path}:{name}" for path, names in declared.USED.items() for name in names}
    assert set(told) == wanted
    owners = {"EventOverlap": fakes.Later}
    for key, given in told.items():
        owner, _, method = key.partition(":")[2].partition(".")
        found = owners.get(owner) or getattr(fakes, owner, None) or getattr(more_fakes, owner)
        found = getattr(found, method) if method else found
        parameters = inspect.signature(found).parameters.values()
        mine = [
            p.name + "=" * (p.default is not inspect.Parameter.empty)
            for p in parameters
            if p.name != "self"
        ]
        if not method and hasattr(found, "__dataclass_fields__"):  # given by name alone
            mine, given = sorted(mine), sorted(given)
        assert mine == given, key


def test_installed_packages_are_declared_so():
    folders = declared.installed()
    if not folders:
        pytest.skip("neither deep_ep, flashinfer nor mori is installed")
    told = json.loads(declared.TABLE.read_text(encoding="utf-8"))
    for folder in folders:
        for key, given in declared.signatures(folder).items():
            assert told[key] == given, key


@pytest.mark.parametrize("name", NAMES)
def test_hal_keeps_no_buffers_for_them(name):
    assert workspace(name, Payload("fp8", 256, 2), 2, 8) == {}


def test_time_limits_are_whole_seconds():
    assert math.ceil(Ranks(None, 0, 1).timeout) == 3

    def work(rank, group):
        name = "flashinfer_one_sided"
        setup = setup_of(name, "bf16", group, Placement.linear(EXPERTS, 2))
        return kernel_of(name).load()(setup).exchange.config.timeout_sec

    assert together(2, work) == [3, 3]
