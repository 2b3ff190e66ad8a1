"""While tokens travel, shared experts run, and so do the experts of the tokens before them.

What overlaps is shown by the order of what is started, computed and waited for, not by time.
"""

from __future__ import annotations

import itertools

import parallel_overlap_worker as worker
import pytest
import torch
from parallel_cases import EXPERTS, TRANSPORTS, Case, local_weights
from test_expert_parallel import error_of, spawn

from hal.errors import ArgumentError, ShapeError, ValueRangeError
from hal.ops import ExpertParallel, FusedMoE, Routing, Workspace
from hal.ops.payload import FORMATS
from hal.ops.quantize import fake_quantize
from hal.quant.scheme import find_scheme

distributed = pytest.importorskip("torch.distributed")
WAYS = [(t, s) for t in TRANSPORTS for s in (True, False) if s or t != "all_to_all"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what both ranks saved."""
    return spawn(worker.__file__, 2, tmp_path_factory.mktemp("overlap"))


@pytest.fixture(scope="module")
def alone():
    return FusedMoE(*local_weights(Case("all_gather"), tuple(range(EXPERTS))))


@pytest.mark.parametrize(("transport", "host_sync"), WAYS)
def test_pieces_compute_what_one_process_computes(transport, host_sync, found, alone):
    for rank, results in enumerate(found):
        told = results[f"pieces {transport} {host_sync}"]
        x, routing = worker.inputs(rank, worker.TOKENS[rank])
        wanted = alone(x, routing, shared=worker.shared_of(x))
        assert told["y"].shape == x.shape
        assert told["same"], "the count of tokens or a function of shared experts changed bits"
        if x.numel():
            assert error_of(told["y"], wanted) < 0.005


@pytest.mark.parametrize(("transport", "host_sync"), WAYS)
def test_the_next_piece_travels_while_one_is_computed(transport, host_sync, found):
    """Of three pieces: what moves rows there is started before, and waited for after, experts."""
    moved = "all_to_all" if transport == "all_to_all" else "all_gather"
    for results in found:
        log = results[f"pieces {transport} {host_sync}"]["log"]
        assert log.index("shared") < log.index("experts")
        at = [place for place, what in enumerate(log) if what == "experts"][:3]
        for place, following in itertools.pairwise(at):
            # In flight when experts run: started, and not waited for.
            open_ = list(in_flight(log[:place]))
            assert len(open_) == 1, log[:place]
            assert open_[0].startswith(moved)
            assert f"wait {open_[0]}" in log[place:following]
        assert not list(in_flight(log[: at[2]])), "nothing follows the last piece"


@pytest.mark.parametrize(("transport", "host_sync"), WAYS)
def test_shared_experts_run_while_tokens_travel(transport, host_sync, found):
    for results in found:
        log = results[f"pieces {transport} {host_sync}"]["log"]
        assert len(list(in_flight(log[: log.index("shared")]))) == 1


def in_flight(log):
    """Return what was started and not waited for."""
    waiting = []
    for what in log:
        verb, _, name = what.partition(" ")
        if verb == "start":
            waiting.append(name)
        elif verb == "wait":
            waiting.remove(name)
    return waiting


@pytest.mark.parametrize("transport", [t for t in TRANSPORTS if t != "all_to_all"])
def test_send_returns_before_others_have_come(transport, found, alone):
    """Rank 1 sends only once rank 0 says that its own `send` has returned."""
    for rank, results in enumerate(found):
        told = results[f"send {transport}"]
        if not rank:
            assert not told["done"], "nothing that waits for rank 1 can have ended"
        assert "tokens of another are on their way" in told["refused"]
        assert error_of(told["y"], alone(*worker.inputs(rank, 3))) < 0.005


def test_layers_of_other_top_k_take_turns_in_one_workspace(found, alone):
    for rank, results in enumerate(found):
        told = results["unlike"]
        for name, top_k in (("all_gather", 3), ("all_to_all", 1), ("all_to_all_padded", 2)):
            x, routing = worker.inputs(rank, 3, top_k)
            if top_k == 3:
                x = fake_quantize(x, find_scheme("fp8_channel"), "e4m3fn").bfloat16()
            assert error_of(told[name], alone(x, routing)) < 0.005
        assert told["retired"] == 0


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_calls_in_pieces_are_checked(group):
    layer = worker.layer_of("all_gather", Workspace())
    x, routing = worker.inputs(0, 5)
    calls = {
        "at most 11": (ValueRangeError, lambda: layer(*worker.inputs(0, 12))),
        "routing of 2 tokens": (
            ShapeError,
            lambda: layer(x, Routing(ids=routing.ids[:2], weights=routing.weights[:2])),
        ),
        "tokens of each": (ArgumentError, lambda: layer(x, routing, tokens=[4])),
    }
    for words, (kind, call) in calls.items():
        with pytest.raises(kind, match=words):
            call()
    assert layer(x, routing).isfinite().all()
    with pytest.raises(ValueRangeError, match="max_tokens=8 or more"):
        ExpertParallel(
            experts=EXPERTS, top_k=2, hidden=160, max_tokens=8, batch_tokens=4, device="cpu"
        )


def test_what_fails_between_send_and_receive_is_named_and_reset_cures_it(group):
    workspace = Workspace()
    layer = worker.layer_of("all_gather", workspace, batch_tokens=worker.PIECE)

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        layer(*worker.inputs(0, 2), shared=fails)
    with pytest.raises(ArgumentError, match=r"workspace\.reset\(\) and new layers"):
        layer(*worker.inputs(0, 2))
    workspace.reset()
    again = worker.layer_of("all_gather", workspace, batch_tokens=worker.PIECE)
    assert again(*worker.inputs(0, 2)).isfinite().all()


def test_a_library_with_room_for_one_dispatch_gets_one_at_a_time(group, monkeypatch):
    layer = worker.layer_of("all_gather", Workspace())
    x, routing = worker.inputs(0, 11)
    wanted, log = layer(x, routing), []
    monkeypatch.setattr(layer.group._exchange, "open_dispatches", 1, raising=False)
    monkeypatch.setattr(FusedMoE, "__call__", worker.logged(layer, log))
    assert torch.equal(layer(x, routing), wanted)
    places = [place for place, what in enumerate(log) if what == "experts"]
    assert len(places) == 3
    assert not any(list(in_flight(log[:place])) for place in places)


@pytest.mark.parametrize("format", ["bf16", "fp8_token", "mxfp8"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_activations_of_fp16_travel(transport, format, group):
    """Formats of 16 bits move what they are given; codes are those of fp16 numbers."""
    w13, w2 = (w.half() for w in local_weights(Case(transport), tuple(range(EXPERTS))))
    sizes = {"experts": EXPERTS, "top_k": 2, "hidden": 160, "max_tokens": 4, "batch_tokens": 9}
    exchange = ExpertParallel(
        **sizes, device="cpu", transport=transport, dtype=torch.float16, dispatch=format
    )
    x, routing = worker.inputs(0, 9)
    x = x.half() * 1.001  # numbers that bf16 does not have
    y = FusedMoE(w13, w2, group=exchange)(x, routing)
    assert y.dtype is torch.float16
    if format != "bf16":
        scheme = find_scheme(FORMATS[format])
        x = fake_quantize(x, scheme, "e4m3fn").half()
    assert error_of(y, FusedMoE(w13, w2)(x, routing)) < 0.002
