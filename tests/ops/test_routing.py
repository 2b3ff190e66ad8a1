"""Hold every kernel of `route` to one definition, ties and non-finite values included."""

from __future__ import annotations

import pytest
import torch
from routing_oracle import (
    BIASES,
    EXPERTS,
    GROUPED,
    INF,
    INFINITE_BIAS,
    ROWS,
    SCORINGS,
    bias_for,
    check,
    clear_logits,
    map_of_rank,
    oracle,
)

import hal
from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    ForcedKernelError,
    GradientError,
    ShapeError,
    UnknownNameError,
)
from hal.registry import find_op

KERNELS = [kernel.name for kernel in find_op("route").kernels]


def run(kernel, logits, top_k, **options):
    """Return (ids, weights) of a kernel; skip where it cannot run."""
    try:
        routing = hal.ops.route(logits, top_k, force=kernel, **options)
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    assert routing.ids.dtype is torch.int32
    assert routing.weights.dtype is torch.float32
    return routing.ids, routing.weights


@pytest.mark.parametrize("bias", list(BIASES))
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_definition(device, kernel, row, scoring, renormalize, bias):
    extra = bias_for(row, bias, scoring)
    if extra is None and bias != "no bias":
        pytest.skip("saturated scores are within rounding of each other")
    rows = [ROWS[row], ROWS[row][::-1]]
    routed = run(
        kernel, torch.tensor(rows, device=device), 3, scoring=scoring, renormalize=renormalize,
        scaling=2.5, bias=None if extra is None else torch.tensor(extra, device=device),
    )  # fmt: skip
    check(routed, rows, 3, scoring, renormalize, 2.5, extra)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_groups(device, kernel, row, scoring):
    rows = [ROWS[row], ROWS[row][::-1]]
    logits = torch.tensor(rows, device=device)
    for extra in [bias_for(row, bias, scoring) for bias in BIASES]:
        biases = None if extra is None else torch.tensor(extra, device=device)
        for groups, chosen, top_k in ((2, 1, 3), (2, 2, 5), (3, 1, 2), (3, 2, 3), (6, 4, 4)):
            routed = run(
                kernel, logits, top_k, scoring=scoring, scaling=2.5, bias=biases,
                expert_groups=groups, top_k_groups=chosen,
            )  # fmt: skip
            check(routed, rows, top_k, scoring, True, 2.5, extra, groups, chosen)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_biases(device, kernel, scoring):
    rows = [ROWS["plain"], ROWS["ties"]]
    logits = torch.tensor(rows, device=device)
    biases = torch.tensor(INFINITE_BIAS, device=device)
    for groups, chosen in ((1, 1), (2, 1), (3, 2), (6, 3)):
        routed = run(
            kernel, logits, 2, scoring=scoring, bias=biases, expert_groups=groups,
            top_k_groups=chosen,
        )  # fmt: skip
        check(routed, rows, 2, scoring, True, 1.0, INFINITE_BIAS, groups, chosen)


def test_the_oracle_itself():
    """Worked out by hand: biased groups by their two best, a NaN sum last, ties to the first."""
    row = [3.0, 0.0, 2.0, 2.0, 0.0, 3.0]
    zeros = [0.0] * 6
    assert oracle(row, 2, "softmax_after_top_k", True, 1.0, None, 3, 1)[0] == [0, 1]
    assert oracle(row, 2, "softmax_after_top_k", True, 1.0, zeros, 3, 1)[0] == [2, 3]
    infinite = [INF, -INF, -9.0, -9.0, -8.0, -8.0]
    assert oracle(infinite, 2, "softmax_after_top_k", True, 1.0, zeros, 3, 1)[0] == [4, 5]
    assert oracle(infinite, 2, "softmax_after_top_k", True, 1.0, None, 3, 1)[0] == [0, 1]


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_top_k(device, kernel, experts):
    logits, bias = clear_logits(3, experts)
    options = {"scoring": "sigmoid", "scaling": 1.5}
    for top_k in range(1, min(experts, 16) + 1):
        for extra in (None, bias):
            routed = run(
                kernel, logits.to(device), top_k, **options,
                bias=None if extra is None else extra.to(device),
            )  # fmt: skip
            extra = None if extra is None else extra.tolist()
            check(routed, logits.tolist(), top_k, "sigmoid", True, 1.5, extra)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("experts", "groups", "chosen", "top_k"), GROUPED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_of_any_size(device, kernel, experts, groups, chosen, top_k, biased):
    logits, bias = clear_logits(3, experts)
    mine = map_of_rank(experts)
    routed = run(
        kernel, logits.to(device), top_k, scoring="sigmoid", expert_groups=groups,
        top_k_groups=chosen, bias=bias.to(device) if biased else None, expert_map=mine.to(device),
    )  # fmt: skip
    extra = bias.tolist() if biased else None
    check(
        routed, logits.tolist(), top_k, "sigmoid", True, 1.0, extra, groups, chosen, mine.tolist()
    )


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_all_kernels_agree_on_many_experts(device, tokens):
    generator = torch.Generator().manual_seed(20261124)
    logits = torch.randn(tokens, 300, generator=generator).bfloat16().to(device)  # full of ties
    expert_map = map_of_rank(300).to(device)
    for options in ({}, {"expert_groups": 12, "top_k_groups": 5}, {"expert_map": expert_map}):
        wanted = hal.ops.route(logits, 8, force="reference", **options)
        routing = hal.ops.route(logits, 8, **options)
        assert torch.equal(routing.ids, wanted.ids)
        assert torch.equal(routing.ids, hal.ops.route(logits, 8, force="torch_topk", **options).ids)
        torch.testing.assert_close(routing.weights, wanted.weights)
        assert routing.ids.dtype is torch.int32
        assert routing.weights.dtype is torch.float32


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "triton"])
def test_nothing_waits_for_the_host(kernel):
    """On tensors without values torch refuses whatever would have to look at one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for scoring in SCORINGS:
            routing = hal.ops.route(
                torch.empty(5, 24), 4, scoring=scoring, bias=torch.empty(24), expert_groups=4,
                top_k_groups=2, expert_map=torch.empty(24, dtype=torch.int32), force=kernel,
            )  # fmt: skip
            assert routing.ids.shape == routing.weights.shape == (5, 4)


@pytest.mark.parametrize("kernel", KERNELS)
class TestExpertMap:
    def test_weights_do_not_change(self, device, kernel):
        logits, _ = clear_logits(5, 24)
        ids, weights = run(kernel, logits.to(device), 4)
        shuffled = torch.arange(24, dtype=torch.int32, device=device).flip(0)
        mapped, same = run(kernel, logits.to(device), 4, expert_map=shuffled)
        assert torch.equal(mapped, 23 - ids)
        assert torch.equal(same, weights)

    def test_ranks_share_the_experts(self, device, kernel):
        """Each slot is present on exactly one rank, under the local id of its expert."""
        logits, _ = clear_logits(7, 9)
        ids, _ = run(kernel, logits.to(device), 3)
        found = torch.full_like(ids, -1)
        for rank in range(3):
            mine, _ = run(
                kernel, logits.to(device), 3, expert_map=map_of_rank(9, 3, rank).to(device)
            )
            assert bool((found[mine >= 0] == -1).all())
            found = torch.where(mine >= 0, mine * 3 + rank, found)
        assert torch.equal(found, ids)

    def test_a_map_with_gaps(self, device, kernel):
        logits, _ = clear_logits(3, 8)
        wide = torch.stack((map_of_rank(8), torch.full((8,), 77, dtype=torch.int32)), 1).to(device)
        spread, _ = run(kernel, logits.to(device), 2, expert_map=wide[:, 0])
        wanted, _ = run(kernel, logits.to(device), 2, expert_map=map_of_rank(8).to(device))
        assert torch.equal(spread, wanted)

    def test_experts_of_other_ranks_contribute_nothing(self, device, kernel):
        """The outputs of all ranks, each with its own experts, sum to that of one with all."""
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(6, 32, generator=generator).bfloat16().to(device)
        w13 = (torch.randn(6, 32, 32, generator=generator) * 0.2).bfloat16().to(device)
        w2 = (torch.randn(6, 32, 16, generator=generator) * 0.2).bfloat16().to(device)
        logits = torch.randn(6, 6, generator=generator).to(device)

        def output(first, last, **options):
            ids, weights = run(kernel, logits, 2, **options)
            return hal.ops.FusedMoE(w13[first:last], w2[first:last], force="reference")(
                x, hal.ops.Routing(ids=ids, weights=weights)
            ).float()

        summed = torch.zeros(6, 32, device=device)
        for first in (0, 3):
            mine = torch.full((6,), -1, dtype=torch.int32, device=device)
            mine[first : first + 3] = torch.arange(3, dtype=torch.int32, device=device)
            summed += output(first, first + 3, expert_map=mine)
        torch.testing.assert_close(summed, output(0, 6), rtol=2e-2, atol=2e-2)


class TestScoring:
    def test_softmax_after_top_k_is_softmax_renormalized(self):
        logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(3))
        after = hal.ops.route(logits, 5, scoring="softmax_after_top_k", renormalize=False)
        before = hal.ops.route(logits, 5)
        assert torch.equal(after.ids, before.ids)
        torch.testing.assert_close(after.weights, before.weights)

    def test_but_not_with_a_bias(self):
        """The bias is worth more among probabilities than among logits."""
        logits = torch.tensor([[4.0, 2.0, 0.0]])
        bias = torch.tensor([0.0, 0.0, 1.0])
        after = hal.ops.route(logits, 1, scoring="softmax_after_top_k", bias=bias)
        assert after.ids.tolist() == [[0]]
        assert hal.ops.route(logits, 1, bias=bias).ids.tolist() == [[2]]

    def test_nor_where_softmax_underflows(self):
        """The group is chosen for its biases, and softmax gave all of it to the other one."""
        logits = torch.tensor([[200.0, 0.0, 1.0, 2.0]])
        bias = torch.tensor([0.0, 0.0, 300.0, 300.0])
        options = {"bias": bias, "expert_groups": 2, "top_k_groups": 1}
        after = hal.ops.route(logits, 2, scoring="softmax_after_top_k", **options)
        assert after.ids.tolist() == [[3, 2]]
        torch.testing.assert_close(after.weights, torch.tensor([[2.0, 1.0]]).softmax(-1))
        assert hal.ops.route(logits, 2, **options).weights.tolist() == [[0.0, 0.0]]


class TestRefuses:
    def test_more_choices_than_experts(self):
        with pytest.raises(ShapeError, match=r"top_k=5.*1 to 4"):
            hal.ops.route(torch.zeros(2, 4), 5)
        with pytest.raises(ShapeError, match=r"top_k=0.*1 to 4"):
            hal.ops.route(torch.zeros(2, 4), 0)

    def test_groups_that_do_not_divide(self):
        with pytest.raises(ShapeError, match=r"expert_groups=8 for 60 experts.*use .*=6 or 10"):
            hal.ops.route(torch.zeros(2, 60), 4, expert_groups=8, top_k_groups=2)
        with pytest.raises(ShapeError, match=r"expert_groups=2 for 257 experts.*=1 or 257"):
            hal.ops.route(torch.zeros(2, 257), 4, expert_groups=2, top_k_groups=1)
        with pytest.raises(ShapeError, match=r"expert_groups=9 for 4 experts.*=4$"):
            hal.ops.route(torch.zeros(2, 4), 4, expert_groups=9, top_k_groups=1)
        with pytest.raises(ShapeError, match=r"expert_groups=0 for 4 experts.*=1$"):
            hal.ops.route(torch.zeros(2, 4), 4, expert_groups=0, top_k_groups=1)

    def test_more_groups_than_there_are(self):
        with pytest.raises(ShapeError, match=r"top_k_groups=5 of expert_groups=4.*use .*=4"):
            hal.ops.route(torch.zeros(2, 8), 2, expert_groups=4, top_k_groups=5)
        with pytest.raises(ShapeError, match=r"top_k_groups=0 of expert_groups=4"):
            hal.ops.route(torch.zeros(2, 8), 2, expert_groups=4, top_k_groups=0)
        with pytest.raises(ShapeError, match=r"top_k_groups=4 of expert_groups=1"):
            hal.ops.route(torch.zeros(2, 8), 2, top_k_groups=4)

    def test_groups_of_which_nobody_said_how_many(self):
        with pytest.raises(ArgumentError, match=r"expert_groups=4 without top_k_groups"):
            hal.ops.route(torch.zeros(2, 8), 2, expert_groups=4)

    def test_more_choices_than_the_chosen_groups_hold(self):
        with pytest.raises(
            ShapeError, match=r"top_k=5 of 2 groups of 2 experts.*top_k_groups=3 or top_k=4"
        ):
            hal.ops.route(torch.zeros(2, 8), 5, expert_groups=4, top_k_groups=2)
        with pytest.raises(ShapeError, match=r"the 4 experts that these groups hold; use top_k=4"):
            hal.ops.route(torch.zeros(2, 8), 9, expert_groups=4, top_k_groups=2)

    def test_an_expert_map_of_another_kind(self):
        logits = torch.zeros(2, 4)
        with pytest.raises(DTypeError, match=r"expert_map of int64, needed int32"):
            hal.ops.route(logits, 2, expert_map=torch.arange(4))
        with pytest.raises(ShapeError, match=r"expert_map \[3\], needed \[4\]"):
            hal.ops.route(logits, 2, expert_map=torch.arange(3, dtype=torch.int32))
        with pytest.raises(DeviceMismatchError, match="expert_map on meta"):
            hal.ops.route(logits, 2, expert_map=torch.empty(4, dtype=torch.int32, device="meta"))

    def test_a_matrix_of_another_rank(self):
        with pytest.raises(ShapeError, match=r"\[tokens, experts\]"):
            hal.ops.route(torch.zeros(4), 2)

    def test_other_dtypes(self):
        for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
            with pytest.raises(DTypeError, match=str(dtype).removeprefix("torch.")):
                hal.ops.route(torch.zeros(2, 4).to(dtype), 2)

    def test_unknown_scoring(self):
        with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
            hal.ops.route(torch.zeros(2, 4), 2, scoring="soft_max")

    def test_a_bias_of_another_length(self):
        with pytest.raises(ShapeError, match=r"bias \[3\], needed \[4\]"):
            hal.ops.route(torch.zeros(2, 4), 2, bias=torch.zeros(3))

    def test_a_bias_that_requires_a_gradient(self):
        with pytest.raises(GradientError):
            hal.ops.route(torch.zeros(2, 4), 2, bias=torch.zeros(4, requires_grad=True))
