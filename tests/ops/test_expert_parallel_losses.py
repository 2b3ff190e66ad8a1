"""A rank that stays away, at whatever point, is named by the others; a new group goes on."""

from __future__ import annotations

import parallel_loss_worker as worker
import pytest
import torch
from parallel_cases import EXPERTS, Case, inputs, local_weights
from test_expert_parallel import error_of, spawn

from hal.errors import ArgumentError, RankError
from hal.ops import ExpertParallel, FusedMoE, Workspace, ranks

pytest.importorskip("torch.distributed")
WAYS = ("stays away", "between", "of pieces", "once")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawn(worker.__file__, 3, tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def alone():
    return FusedMoE(*local_weights(Case("all_gather"), tuple(range(EXPERTS))))


@pytest.mark.parametrize("way", WAYS)
def test_the_missing_rank_is_named_in_time(way, found):
    for results in found[: worker.LOST]:
        told = results[way]
        assert told["missing"] == [worker.LOST], told["error"]
        # A limit to notice, one and a second to hear of the others, and a slow machine.
        assert told["seconds"] < 2 * worker.SECONDS + 1 + 30


@pytest.mark.parametrize("way", WAYS)
def test_buffers_serve_a_new_group(way, found, alone):
    for rank, results in enumerate(found):
        wanted = alone(*inputs("ragged", rank))
        assert error_of(results[way]["y"], wanted) < 0.005


def test_nothing_grows_while_a_graph_is_captured(monkeypatch):
    workspace, cpu = Workspace(), torch.device("cpu")
    workspace.reserve({"rows": 64}, 2, cpu)
    capturing = "is_current_stream_capturing"
    monkeypatch.setattr(torch.cpu, capturing, lambda: True, raising=False)
    workspace.reserve({"rows": 32}, 2, cpu)  # what is there may be used
    with pytest.raises(ArgumentError, match="needs more of rows while a graph is captured"):
        workspace.reserve({"rows": 65}, 2, cpu)
    assert workspace.nbytes == 64
    monkeypatch.setattr(torch.cpu, capturing, lambda: False, raising=False)
    workspace.reserve({"rows": 65}, 2, cpu)
    assert workspace.nbytes == 65


def test_exchanges_are_counted_by_group_and_job(monkeypatch):
    """Ranks that failed alone before, in another group, count alike with the rest."""
    monkeypatch.setattr(ranks, "_made", {})

    def number(store, name):
        one = object.__new__(ranks.Ranks)
        one.store, one.group = store, type("G", (), {"group_name": name})
        return one._number()

    first, second = object(), object()
    assert [number(first, "a"), number(first, "a")] == ["a/0", "a/1"]
    assert number(first, "b") == "b/0"
    assert number(second, "a") == "a/0"


class Work:
    """Stand in for what NCCL returns: waiting for it returns at once."""

    def __init__(self, ended):
        self.ended = ended

    def wait(self):
        pass

    def is_completed(self):
        return self.ended


def test_check_names_who_is_missing_where_waiting_does_not_block(monkeypatch):
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sizes = {"experts": EXPERTS, "top_k": 2, "hidden": 160, "max_tokens": 16}
        layer = ExpertParallel(**sizes, device="cpu", transport="all_gather", timeout=0.1)
        layer.check()
        group, ended = layer.ranks, [True]
        monkeypatch.setattr(group, "backend", "nccl")
        monkeypatch.setattr(group, "limit", ())
        for field in ("all_gather", "reduce_scatter"):
            object.__setattr__(group.do, field, lambda out, given, **_: Work(ended[-1]))
        x, routing = inputs("ragged", 0)
        received = layer.dispatch(x, routing, tokens=[len(x)])
        layer.check()
        ended.append(False)
        layer.combine(received.x, received)
        monkeypatch.setattr(group, "size", 2)
        monkeypatch.setattr(group, "_names", [0, 7])
        with pytest.raises(RankError, match=r"no answer from rank 7 within 0\.1 s") as told:
            layer.check()
        assert told.value.missing == (7,)
        with pytest.raises(RankError, match="a call after ranks had failed"):
            layer.dispatch(x, routing, tokens=[len(x)] * 2)
    finally:
        distributed.destroy_process_group()
