"""Compare routing, alignment and combination with plain torch and Python."""

from __future__ import annotations

import pytest
import torch
from routers_of_models import MODELS, ascending, routed_by_model
from routing_oracle import (
    BIASES,
    EXPERTS,
    GROUPED,
    INFINITE_BIAS,
    ROWS,
    SCORINGS,
    aligned,
    bias_for,
    check,
    clear_logits,
    map_of_rank,
)
from triton.backends.compiler import GPUTarget

from hal.ops.kernels import align_warps
from hal.ops.kernels.align import CHUNK, ONE_PROGRAM, align, capacity, workspace_size
from hal.ops.kernels.align_warps import MOST_EXPERTS, MOST_SLOTS
from hal.ops.kernels.combine import combine
from hal.ops.kernels.common import INTERPRETED, compile_for
from hal.ops.kernels.route import route


def run_route(logits, top_k, **options):
    tokens = logits.shape[0]
    # Rows of more than k places: nothing may be stored behind the k.
    weights = torch.full((tokens, top_k + 3), -5.0, device=logits.device)
    ids = torch.full((tokens, top_k + 3), -5, dtype=torch.int32, device=logits.device)
    route(logits, weights[:, :top_k], ids[:, :top_k], **options)
    assert bool((weights[:, top_k:] == -5).all())
    assert bool((ids[:, top_k:] == -5).all())
    return weights[:, :top_k], ids[:, :top_k]


def reference_route(logits, top_k, scoring, renormalize, scaling, bias):
    logits = logits.double()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = logits if bias is None else scores + bias.double()
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).float(), ids.int()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 8, 2), (1, 1, 1), (3, 8, 8), (5, 60, 4), (4, 256, 8), (2, 1025, 16)],
)
def test_route(device, generator, tokens, experts, top_k, scoring, renormalize, with_bias):
    # A permutation times a step: no two logits, scores or biased scores are close.
    order = [torch.randperm(experts, generator=generator, device=device) for _ in range(tokens)]
    logits = torch.stack(order) * (8 / experts) - 4 if tokens else torch.empty(0, experts)
    logits = logits.to(device)
    bias = None
    if with_bias:
        bias = torch.arange(experts, device=device) % 3 * 0.25
    options = {"scoring": scoring, "renormalize": renormalize, "scaling": 2.5, "bias": bias}
    weights, ids = run_route(logits, top_k, **options)
    expected_weights, expected_ids = reference_route(logits, top_k, **options)
    if not (with_bias and scoring == "softmax" and experts > 100):
        # Biased softmax scores of many experts are within rounding of each other.
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-9)
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_route_ties_go_to_the_lowest_id(device, dtype):
    logits = torch.tensor([[0, -0.0, 1, 1, -3, 1], [-5] * 6, [0] * 6], dtype=dtype, device=device)
    weights, ids = run_route(logits, 4)
    assert ids.tolist() == [[2, 3, 5, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    torch.testing.assert_close(weights.sum(1), torch.ones(3, device=device))


def test_route_saturated_sigmoid_follows_the_logits(device):
    _, ids = run_route(
        torch.tensor([[30.0, 40.0, 50.0, 20.0]], device=device), 2, scoring="sigmoid"
    )
    assert ids.tolist() == [[2, 1]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_route_non_finite_rows(device, scoring):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan] * 5, [1, nan, 2, 0, -1], [-inf] * 5, [inf, 0, inf, 1, 2], [1, 2, 3, 4, 5]],
        device=device,
    )
    for bias in (None, torch.ones(5, device=device)):
        weights, ids = run_route(logits, 3, scoring=scoring, bias=bias)
        for row in ids.tolist():
            assert len(set(row)) == 3
            assert all(0 <= expert < 5 for expert in row)
        assert weights[:2].isnan().all()
        assert weights[4].isfinite().all()
        assert ids[4].tolist() == [4, 3, 2]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("row", list(ROWS))
def test_route_keeps_to_the_definition(device, row, scoring):
    rows = [ROWS[row], ROWS[row][::-1]]
    logits = torch.tensor(rows, device=device)
    for name in BIASES:
        extra = bias_for(row, name, scoring)
        bias = None if extra is None else torch.tensor(extra, device=device)
        for groups, chosen, top_k in ((1, 1, 3), (2, 1, 3), (3, 2, 3)):
            weights, ids = run_route(
                logits, top_k, scoring=scoring, scaling=2.5, bias=bias, expert_groups=groups,
                top_k_groups=chosen,
            )  # fmt: skip
            check((ids, weights), rows, top_k, scoring, True, 2.5, extra, groups, chosen)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_route_infinite_biases(device, scoring):
    rows = [ROWS["plain"], ROWS["ties"]]
    bias = torch.tensor(INFINITE_BIAS, device=device)
    for groups, chosen in ((1, 1), (2, 1), (3, 2), (6, 3)):
        weights, ids = run_route(
            torch.tensor(rows, device=device), 2, scoring=scoring, bias=bias,
            expert_groups=groups, top_k_groups=chosen,
        )  # fmt: skip
        check((ids, weights), rows, 2, scoring, True, 1.0, INFINITE_BIAS, groups, chosen)


# Every top k once or more, among them the largest of each number of experts.
SIZES = [(experts, min(k, experts)) for experts, k in zip(EXPERTS, range(1, 14), strict=True)]
SIZES += [(experts, 14 + turn % 3) for turn, experts in enumerate(EXPERTS[3:])]


@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_route_any_size(device, experts, top_k):
    logits, bias = clear_logits(2, experts)
    for scoring, extra in (("sigmoid", bias), ("softmax_after_top_k", None)):
        given = None if extra is None else extra.to(device)
        weights, ids = run_route(logits.to(device), top_k, scoring=scoring, bias=given)
        extra = None if extra is None else extra.tolist()
        check((ids, weights), logits.tolist(), top_k, scoring, True, 1.0, extra)


def test_route_sizes_hold_every_top_k():
    assert {top_k for _, top_k in SIZES} == set(range(1, 17))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("experts", "groups", "chosen", "top_k"), GROUPED)
def test_route_groups_of_any_size(device, experts, groups, chosen, top_k, biased):
    logits, bias = clear_logits(2, experts)
    expert_map = map_of_rank(experts)
    weights, ids = run_route(
        logits.to(device), top_k, scoring="sigmoid", expert_groups=groups, top_k_groups=chosen,
        bias=bias.to(device) if biased else None, expert_map=expert_map.to(device),
    )  # fmt: skip
    extra, mapped = bias.tolist() if biased else None, expert_map.tolist()
    arguments = ("sigmoid", True, 1.0, extra, groups, chosen, mapped)
    check((ids, weights), logits.tolist(), top_k, *arguments)


@pytest.mark.parametrize("model", list(MODELS))
def test_route_like_the_models_of_transformers(device, model):
    logits, top_k, options, ids, weights = routed_by_model(model, tokens=6)
    if "bias" in options:
        options["bias"] = options["bias"].to(device)
    found_weights, found_ids = run_route(logits.to(device), top_k, **options)
    mine, its = ascending(found_ids, found_weights)
    assert torch.equal(mine, ids)
    torch.testing.assert_close(its, weights, rtol=1e-5, atol=1e-7)


def test_route_experts_first_in_memory(device, generator):
    logits = torch.randn(24, 5, generator=generator, device=device)
    options = {"expert_groups": 4, "top_k_groups": 2}
    found = run_route(logits.T, 3, **options)
    wanted = run_route(logits.T.contiguous(), 3, **options)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0])


def test_route_refuses_more_choices_than_experts(device):
    logits = torch.zeros(1, 6, device=device)
    with pytest.raises(ValueError, match="'top' is not one of"):
        run_route(logits, 1, scoring="top")
    with pytest.raises(ValueError, match="k is 7"):
        run_route(logits, 7)
    with pytest.raises(ValueError, match="k is 3, must be from 1 to experts = 2"):
        run_route(logits, 3, expert_groups=3, top_k_groups=1)
    with pytest.raises(ValueError, match="1 of 4 groups do not fit 6 experts"):
        run_route(logits, 1, expert_groups=4, top_k_groups=1)
    with pytest.raises(ValueError, match="3 of 2 groups"):
        run_route(logits, 1, expert_groups=2, top_k_groups=3)
    with pytest.raises(ValueError, match="must be contiguous"):
        run_route(logits, 1, bias=torch.zeros(12, device=device)[::2])


@pytest.fixture(params=[False, True], ids=["chunks", "warps"])
def by_warps(request, device, monkeypatch):
    """Align with and without the kernel in PTX, which is interpreted by `ptx_interpreter`."""
    if request.param and device == "cuda" and torch.version.hip:
        pytest.skip("PTX: needs an NVIDIA GPU")
    monkeypatch.setattr(align_warps, "serves", lambda *_: request.param)
    if request.param and INTERPRETED.value:
        from ptx_interpreter import ptx

        with ptx():
            yield
    else:
        yield


@pytest.mark.parametrize("slots", [1, 31, 700, 1024, 1025, MOST_SLOTS])
@pytest.mark.parametrize("experts", [1, 8, 31, 32, 128, 256, 320, MOST_EXPERTS])
def test_warps_have_a_thread_an_expert_and_a_row_of_the_table(slots, experts):
    warps = align_warps.warps_of(slots, experts)
    assert warps in (4, 8, 16, 32)
    assert experts <= 32 * warps
    assert (warps + 2) * (experts + 1) <= align_warps.WORDS


@pytest.mark.skipif(INTERPRETED.value, reason="needs a process that compiles")
@pytest.mark.parametrize(
    ("backend", "arch", "compares"),
    [("cuda", 75, False), ("cuda", 80, True), ("cuda", 120, True), ("hip", "gfx942", False)],
)
def test_warps_align_where_their_lanes_can_be_compared(backend, arch, compares):
    with compile_for(GPUTarget(backend, arch, 32)):
        assert align_warps.serves(1, 8) == align_warps.serves(MOST_SLOTS, MOST_EXPERTS) == compares
        assert not align_warps.serves(0, 8)
        assert not align_warps.serves(MOST_SLOTS + 1, 8)
        assert not align_warps.serves(1, MOST_EXPERTS + 1)


def check_align(ids, experts, block):
    device, length = ids.device, capacity(ids.numel(), experts, block)
    sorted_slots = torch.full((length,), -7, dtype=torch.int32, device=device)
    block_experts = torch.full((length // block,), -7, dtype=torch.int32, device=device)
    n_padded = torch.full((1,), -7, dtype=torch.int32, device=device)
    space = workspace_size(ids.numel(), experts)
    guard = torch.full((space + 64,), -9, dtype=torch.int32, device=device)
    align(ids, experts, block, sorted_slots, block_experts, n_padded, guard[:space])
    assert (guard[space:] == -9).all(), "wrote past the workspace"
    slots, blocks = aligned(ids, experts, block)
    assert n_padded.item() == len(slots)
    assert sorted_slots.tolist() == slots + [ids.numel()] * (length - len(slots))
    assert block_experts.tolist() == blocks + [-1] * (length // block - len(blocks))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (1, 8, 256), (5, 3, 7), (40, 6, 60), (128, 8, 8), (180, 8, 33), (300, 8, 512)],
)
def test_align(by_warps, device, generator, tokens, top_k, experts, block, dtype):
    ids = torch.randint(
        -1, experts + 1, (tokens, top_k), generator=generator, device=device, dtype=dtype
    )
    check_align(ids, experts, block)


def test_align_more_experts_than_warps_have_threads(device, generator):
    ids = torch.randint(-1, 1026, (300, 8), generator=generator, device=device)
    check_align(ids, 1025, 16)


@pytest.mark.parametrize("tokens", [3, CHUNK + 1, ONE_PROGRAM, ONE_PROGRAM + 1])
@pytest.mark.parametrize("chosen", [0, 4, -1, 5, 2**31 - 1, -(2**31)])
def test_align_one_expert_takes_all(by_warps, device, tokens, chosen):
    check_align(torch.full((tokens, 1), chosen, dtype=torch.int32, device=device), 5, 16)


def test_align_ids_that_differ_above_bit_31(by_warps, device):
    ids = torch.tensor([[2**32 + 1, 1], [2**40, 0]], device=device)
    check_align(ids, 3, 16)


@pytest.mark.parametrize(("experts", "top_k"), [(257, 16), (160, 6), (3, 3)])
def test_align_what_route_mapped(by_warps, device, experts, top_k):
    """Slots of other ranks' experts are in no block."""
    logits, _ = clear_logits(9, experts)
    mine = map_of_rank(experts)
    _, ids = run_route(logits.to(device), top_k, expert_map=mine.to(device))
    here = int(mine.max()) + 1
    assert 0 < int((ids >= 0).sum()) < ids.numel()
    check_align(ids.contiguous(), here, 16)


def test_align_zero_tokens(device):
    n_padded = torch.ones(1, dtype=torch.int32, device=device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    align(empty.reshape(0, 2), 4, 16, empty, empty.clone(), n_padded)
    assert n_padded.item() == 0


@pytest.mark.parametrize(("slots", "experts", "block"), [(1, 8, 16), (9, 4, 4), (64, 3, 16)])
def test_capacity_suffices_and_is_reached(slots, experts, block):
    """One slot for each expert but the first, which takes the rest, is the worst routing."""
    nonempty = min(slots, experts)
    counts = [slots - nonempty + 1] + [1] * (nonempty - 1)
    used = sum(-(-count // block) * block for count in counts)
    assert used <= capacity(slots, experts, block) < used + block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (5, 6, 130), (3, 2, 2100)], ids=str)
def test_combine(device, generator, shape, dtype, weight_dtype):
    tokens, top_k, hidden = shape
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    ids = torch.randint(-1, 5, (tokens, top_k), generator=generator, device=device)
    present = (ids >= 0) & (ids < 4)
    x[~present] = float("nan")  # nobody wrote these rows
    weights = None
    if weight_dtype is not None:
        weights = torch.rand(tokens, top_k, generator=generator, device=device).to(weight_dtype)
    out = torch.empty(tokens, hidden, dtype=dtype, device=device)
    combine(x, out, ids, 4, weights)
    scale = present.double() if weights is None else weights.double() * present
    expected = (x.nan_to_num(0.0).double() * scale[..., None]).sum(1)
    torch.testing.assert_close(out.double(), expected.to(dtype).double(), rtol=8e-3, atol=1e-2)
    if dtype is torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_combine_propagates_nan_of_present_slots_only(device):
    x = torch.ones(3, 2, 32, device=device)
    x[0, 1] = float("nan")
    x[1, 1] = float("inf")
    ids = torch.tensor([[0, 1], [0, 1], [3, 2**31 + 1]], device=device)
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [float("nan")] * 2], device=device)
    out = torch.empty(3, 32, device=device)
    combine(x, out, ids, 3, weights)
    assert out[0].isnan().all()
    assert out[1].isinf().all()
    assert (out[2] == 0).all()


def test_combine_of_slots_that_come_first_in_memory(device, generator):
    x = torch.randn(3, 5, 40, generator=generator, device=device).transpose(0, 1)
    ids = torch.zeros(5, 3, dtype=torch.int32, device=device)
    out = torch.zeros(5, 64, device=device)
    combine(x, out[:, 8:48], ids, 1)
    torch.testing.assert_close(out[:, 8:48], x.sum(1))
    assert (out[:, :8] == 0).all()
    assert (out[:, 48:] == 0).all()
    with pytest.raises(ValueError, match="must be contiguous"):
        combine(x.transpose(1, 2), out[:, :3], ids, 1)
