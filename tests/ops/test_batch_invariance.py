"""Kernels that declare `batch_invariant` give the same bits for a row whatever lies beside it."""

from __future__ import annotations

import pytest
import torch

from hal.errors import ForcedKernelError
from hal.ops import FusedMoE, Linear, Routing
from hal.ops.cases.experts import routing
from hal.ops.cases.trial import calibrated, random
from hal.registry import find_op, op_names
from hal.sources import source_parts

ROWS = 64
# K and N beside powers of two, and more K than any kernel sums at once.
LINEARS = [(256, 64), (2304, 48), (200, 72)]
EXPERTS = [(128, 64), (256, 192)]
TOP_K, COUNT = 2, 5


def claiming(op, *, pinned=False):
    """Return (kernel, scheme) of every declaration that claims it, or must be asked for it."""
    return [
        pytest.param(kernel.name, scheme, id=f"{kernel.name}-{scheme}")
        for kernel in find_op(op).kernels
        if kernel.batch_invariant and (kernel.invariance or not pinned)
        for scheme in kernel.signatures
    ]


def batches(rows=ROWS):
    """Return indices of rows: some alone, of both ends and mixed, and all in other orders."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    every = torch.arange(rows)
    alone = [every[row : row + 1] for row in (0, 1, 16, 17, rows // 2, rows - 1)]
    some = [part for size in (2, 17) for part in (every[:size], every[-size:], order[:size])]
    return [*alone, *some, order, every.flip(0)]


def bound_or_skip(make, kernel):
    try:
        return make()
    except ForcedKernelError as error:
        pytest.skip(f"{kernel}: " + str(error.selection.candidate(kernel).failures[0]))


def require_same(call, x, *beside):
    """Require rows of every batch to be those of the whole, with loud and quiet neighbours."""
    whole = call(x, *beside)
    assert whole.isfinite().all()
    assert whole.any()
    for chosen in batches(x.shape[0]):
        at = chosen.to(x.device)
        found = call(x[at], *(tensor[at] for tensor in beside))
        assert torch.equal(found, whole[at]), f"rows {chosen.tolist()}"
    # Neighbours of another size: scales of rows must not be those of a batch.
    louder = x.clone()
    louder[1::2] *= 1000
    assert torch.equal(call(louder, *beside)[::2], whole[::2])


@pytest.mark.parametrize(("columns", "rows"), LINEARS)
@pytest.mark.parametrize(("kernel", "scheme"), claiming("linear"))
def test_rows_of_linear(device, kernel, scheme, columns, rows):
    weight = calibrated(random(rows, columns, seed=1, device=device), scheme)
    bias = random(rows, seed=2, device=device)
    bound = bound_or_skip(lambda: Linear(weight, bias, force=kernel, batch_invariant=True), kernel)
    require_same(bound, random(ROWS, columns, seed=3, device=device))


@pytest.mark.parametrize(("hidden", "intermediate"), EXPERTS)
@pytest.mark.parametrize(("kernel", "scheme"), claiming("fused_moe"))
def test_tokens_of_experts(device, kernel, scheme, hidden, intermediate):
    w13, w2 = (
        calibrated(random(COUNT, *shape, seed=seed, device=device, scale=0.1), scheme)
        for seed, shape in ((1, (2 * intermediate, hidden)), (2, (hidden, intermediate)))
    )
    bound = bound_or_skip(lambda: FusedMoE(w13, w2, force=kernel, batch_invariant=True), kernel)
    route = routing(ROWS, TOP_K, COUNT, device, "plain")
    x = random(ROWS, hidden, seed=3, device=device)

    def call(x, ids, weights):
        return bound(x, Routing(ids=ids, weights=weights))

    require_same(call, x, route.ids, route.weights)


@pytest.mark.parametrize(("kernel", "scheme"), claiming("fused_moe", pinned=True))
@pytest.mark.gpu
def test_tokens_of_experts_among_many(kernel, scheme):
    """More than weights are decoded for in the loop, beside numbers that are never sorted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "xpu", 0)
    tokens, hidden, intermediate = 1300, 256, 192
    w13, w2 = (
        calibrated(random(COUNT, *shape, seed=seed, device=device, scale=0.1), scheme)
        for seed, shape in ((1, (2 * intermediate, hidden)), (2, (hidden, intermediate)))
    )
    bound = bound_or_skip(lambda: FusedMoE(w13, w2, force=kernel, batch_invariant=True), kernel)
    x, route = (
        random(tokens, hidden, seed=3, device=device),
        routing(tokens, TOP_K, COUNT, device, "one expert"),
    )
    whole = bound(x, route)
    assert whole.isfinite().all()
    for rows in (slice(0, 1), slice(1299, 1300), slice(640, 648), slice(3, 120), slice(200, 900)):
        part = Routing(ids=route.ids[rows], weights=route.weights[rows])
        assert torch.equal(bound(x[rows], part), whole[rows]), rows


def test_a_batch_that_matters_is_seen():
    def by_the_largest(x):
        return (x / x.abs().max()).bfloat16()

    with pytest.raises(AssertionError):
        require_same(by_the_largest, random(ROWS, 16, seed=3, device=torch.device("cpu")))


@pytest.mark.parametrize("op", ["linear", "fused_moe"])
def test_the_reference_makes_the_claim(op):
    assert find_op(op).find("reference").batch_invariant


BY_ROWS = {"bind_few_tokens", "TileChoice", "choose_tile", "few_rows", "some_rows", "way_of",
           "rows_before_expanding"}  # fmt: skip
"""What decides by the number of rows in which order products are summed."""
PINNED = "sorted_sizes"
"""What gives all of them the same numbers where a layer insists on batch invariance."""


@pytest.mark.parametrize("op", op_names())
def test_no_kernel_claims_it_that_sums_in_another_order_for_other_numbers_of_rows(op):
    """Experts of few tokens take another way, and tiles are chosen by rows: they must be asked."""
    deciding = {}
    for kernel in find_op(op).kernels:
        names = {name for _, name in source_parts(kernel.entry)}
        deciding[kernel.name] = bool(names & BY_ROWS)
        if kernel.batch_invariant and deciding[kernel.name]:
            assert kernel.invariance, (kernel, names & BY_ROWS)
        assert not kernel.invariance or PINNED in names, kernel
    if op in ("linear", "fused_moe"):
        assert deciding["triton"]
        assert deciding["triton_fp8"]
