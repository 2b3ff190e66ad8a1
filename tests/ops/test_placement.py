"""Every copy of every expert has one place, and what cannot be a placement is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import UnknownNameError, ValueRangeError
from hal.ops.placement import Placement, placement_of

sizes = st.integers(1, 9).flatmap(lambda ranks: st.tuples(st.integers(ranks, 40), st.just(ranks)))


def require_consistent(placement: Placement) -> None:
    """Every physical id is one expert of one rank, and `copies` finds exactly those."""
    offsets, copies = placement.offsets, placement.copies()
    assert offsets[-1] == placement.physical == len(placement.rank_of)
    seen = {}
    for expert, places in enumerate(copies):
        assert places
        assert list(places) == sorted(set(places))
        for physical in places:
            rank = placement.rank_of[physical]
            assert offsets[rank] <= physical < offsets[rank + 1]
            assert placement.held[rank][physical - offsets[rank]] == expert
            seen[physical] = expert
    assert set(seen) == set(range(placement.physical))


@given(sizes)
def test_linear_and_round_robin_differ_by_one_at_most(size):
    for name in ("linear", "round_robin"):
        placement = placement_of(name, *size)
        require_consistent(placement)
        counts = [len(mine) for mine in placement.held]
        assert placement.physical == size[0]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def test_five_experts_over_two_ranks():
    assert Placement.linear(5, 2).held == ((0, 1, 2), (3, 4))
    assert Placement.round_robin(5, 2).held == ((0, 2, 4), (1, 3))
    assert Placement.linear(5, 2).offsets == (0, 3, 5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_any_rank_may_hold_any_expert(ranks):
    if set(ranks) != {0, 1, 2, 3}:
        with pytest.raises(ValueRangeError, match="no expert on rank"):
            Placement.of_ranks(ranks, 4)
        return
    placement = Placement.of_ranks(ranks, 4)
    require_consistent(placement)
    assert [placement.rank_of[places[0]] for places in placement.copies()] == ranks


@st.composite
def loads_and_room(draw):
    ranks = draw(st.integers(1, 6))
    loads = draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=24))
    low = -(-len(loads) // ranks)
    return loads, ranks, draw(st.integers(low, max(low, len(loads))))


@given(loads_and_room())
def test_balanced_fills_every_place_and_copies_the_busiest(problem):
    loads, ranks, held = problem
    if ranks * held < len(loads) or held > len(loads):
        return
    placement = Placement.balanced(loads, ranks, held)
    require_consistent(placement)
    assert [len(mine) for mine in placement.held] == [held] * ranks
    copies = [len(places) for places in placement.copies()]
    # No copy would have been better given to another expert.
    for busy, load in enumerate(loads):
        for other, less in enumerate(loads):
            if copies[busy] < ranks and copies[other] > 1:
                assert load / copies[busy] <= less / (copies[other] - 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Placement(2, ()), "no rank"),
        (lambda: Placement(2, ((0, 1), ())), "no expert on rank 1"),
        (lambda: Placement(2, ((0, 0, 1),)), "twice on rank 0"),
        (lambda: Placement(2, ((0, 1, 2),)), "expert 2 on rank 0"),
        (lambda: Placement(3, ((0,), (2,))), "expert 1 on no rank"),
        (lambda: Placement.linear(2, 4), "no expert on rank 2"),
        (lambda: Placement.of_ranks([0, 1, 2], 2), "rank 2 of expert 2"),
        (lambda: Placement.balanced([1.0] * 8, 2, 3), "8 to 16 places"),
        (lambda: Placement.balanced([1.0, -1.0], 2, 1), "load -1.0"),
        (lambda: Placement.balanced([1.0, float("nan")], 2, 1), "load"),
        (lambda: placement_of(Placement.linear(4, 2), 4, 4), "4 experts over 2 ranks"),
    ],
)
def test_refuses(make, words):
    with pytest.raises(ValueRangeError, match=words):
        make()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="round_robin"):
        placement_of("roundrobin", 4, 2)
