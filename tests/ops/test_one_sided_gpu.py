"""Two ranks of a one-sided exchange on one GPU, at the same time and in captured graphs."""

from __future__ import annotations

import pytest
import torch
from one_sided_group import Group, calls, check, made, partials_of, sums

from hal.errors import RankError
from hal.ops import Placement, Routing
from hal.ops.payload import FORMATS

pytestmark = pytest.mark.gpu
CHOICES = {"experts": 16, "top_k": 4}


def group_of(format, hidden=1024, ranks=2, **options):
    return Group(ranks, format, hidden, device="cuda", timeout=5.0, **{**CHOICES, **options})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "room", "tokens"),
    [(1024, 8, (7, 3)), (160, 70, (0, 70)), (7168, 300, (300, 257)), (1000, 8, (1, 0))],
)
def test_ranks_at_the_same_time(format, hidden, room, tokens):
    calls(group_of(format, hidden, max_tokens=room), tokens, shared=True)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_three_ranks_and_copies_of_experts(format):
    placement = Placement.balanced([9.0, 1, 2, 1, 5, 1, 1, 1], 3, 4)
    group = group_of(format, 512, 3, max_tokens=20, placement=placement, experts=8)
    calls(group, (20, 0, 9))


@pytest.mark.parametrize("format", FORMATS)
def test_graphs_replay_what_calls_compute(format):
    """An odd number of exchanges, so that slots and flags are not where they were at capture."""
    group = group_of(format, max_tokens=40)
    tokens = (40, 17)
    inputs = made(2, 1024, tokens, **CHOICES)
    there = [group.there(*each) for each in inputs]
    partials = [part.cuda() for part in partials_of(group, 40, 0)]
    group.there = lambda *there: there

    def exchange():
        kept = []
        for _ in range(3):
            received = group.dispatch(there)
            parts = [(each.x.clone(), each.ids.clone(), each.weights.clone()) for each in received]
            kept.append((parts, group.combine(partials, received, dtype=torch.float32), received))
        return kept

    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = exchange()
    for turn in range(4):
        fresh = made(2, 1024, tokens, 100 + turn, **CHOICES)
        for (x, routing), (new, other) in zip(there, fresh, strict=True):
            x.copy_(new)
            routing.ids.copy_(other.ids)
            routing.weights.copy_(other.weights)
        if turn == 2:
            group.combine(partials, group.dispatch(there))  # a call between replays
        graph.replay()
        wanted = sums(group, fresh, [part.cpu() for part in partials], 40)
        for parts, found, received in kept:
            arrived = [
                type(each)(*part, each.state) for part, each in zip(parts, received, strict=True)
            ]
            check(group, fresh, arrived, 40)
            for mine, sum_ in zip(found, wanted, strict=True):
                assert torch.equal(mine.cpu(), sum_)


def test_a_rank_that_does_not_come_is_named_and_nothing_finite_is_left():
    group = Group(2, "bf16", 1024, 8, device="cuda", timeout=0.05, **CHOICES)
    (x, routing), _ = [group.there(*each) for each in made(2, 1024, (8, 8), **CHOICES)]
    mine = group.exchanges[0]
    received = mine.dispatch(x, routing, [8, 8])
    out = torch.empty(8, 1024, device="cuda")
    mine.launch_combine(received.x, out, received.state)
    with pytest.raises(RankError, match=r"no answer from \[1\]"):
        mine.check()
    assert out.isnan().all()
    mine.ranks.broken = ""
    with pytest.raises(RankError, match=r"no answer from \[1\]"):
        mine.combine(received.x, received.state, None, torch.bfloat16)
    with pytest.raises(RankError, match="a call after"):
        mine.dispatch(x, Routing(ids=routing.ids, weights=routing.weights), [8, 8])
