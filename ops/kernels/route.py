"""Choose the top-k experts of each token and their weights, in one launch.

    score = softmax(logits) or sigmoid(logits)                      in float32
    chosen = the k largest of (score + bias), or of the logits when there is no bias
    weight = score[chosen] (/ (sum(score[chosen]) + 1e-20) if renormalize) * scaling

`softmax_after_top_k`: score = logits, weight = softmax(score[chosen]) * scaling. Experts outside
the best groups are not chosen. Ids are those of `expert_map`, where there is one.

`hal.ops.route` says how ties, NaN and infinities are treated; this keeps to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, offsets_need_64_bits

SCORINGS = ("softmax", "sigmoid", "softmax_after_top_k")
# DeepSeek-V3 adds this to the sum it divides by: rows of zero scores then stay finite.
RENORMALIZE_FLOOR = tl.constexpr(1e-20)
# The key of what cannot be chosen: below that of every number.
NEVER = tl.constexpr(-(2**63))


@triton.jit
def _order_key(value, index):
    """Pack f32 and index into an int64 that sorts by value, then by lowest index."""
    # -0 and +0 are equal; NaN goes below every number.
    value = tl.where(value == 0.0, 0.0, value)
    value = tl.where(value == value, value, float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    # Negative floats sort backwards as integers: flip all bits but the sign.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value_of(key):
    """Return the f32 that a key sorts by."""
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _within_groups(
    keys, group_size,
    TOP_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return the keys, NEVER outside the TOP_GROUPS best groups."""
    table = tl.reshape(keys, [BLOCK_G, BLOCK_S])
    best = tl.max(table, axis=1)
    score = _value_of(best)
    if SUM_OF_TWO:
        second = tl.max(tl.where(table == best[:, None], NEVER, table), axis=1)
        score = tl.where(group_size > 1, score + _value_of(second), score)
    # NEVER has the value NaN: groups that do not exist come after all others.
    group_keys = _order_key(score, tl.arange(0, BLOCK_G))
    for _ in range(TOP_GROUPS):
        group_keys = tl.where(group_keys == tl.max(group_keys, axis=0), NEVER, group_keys)
    table = tl.where((group_keys == NEVER)[:, None], table, NEVER)
    return tl.reshape(table, [BLOCK_G * BLOCK_S])


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, map_ptr, weights_ptr, ids_ptr, n_experts, n_groups, group_size,
    stride_lt, stride_le, stride_wt, stride_it, scaling,
    TOP_K: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr, TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if TOP_GROUPS > 0:
        # Every group starts a row of the table, whatever its size.
        place = tl.arange(0, BLOCK_G * BLOCK_S)
        exists = (place % BLOCK_S < group_size) & (place // BLOCK_S < n_groups)
        experts = place // BLOCK_S * group_size + place % BLOCK_S
    else:
        experts = tl.arange(0, BLOCK_S)
        exists = experts < n_experts
    columns = experts.to(tl.int64) if WIDE else experts
    logits = tl.load(
        logits_ptr + token * stride_lt + columns * stride_le, mask=exists, other=float("-inf")
    ).to(tl.float32)
    has_nan = tl.max(tl.where(logits == logits, 0, 1), axis=0) > 0
    if SCORING == "softmax":
        largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=0)
        exponentials = tl.exp(logits - largest)
        scores = exponentials / tl.sum(exponentials, axis=0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = logits
    choice = logits
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + experts, mask=exists, other=0.0).to(tl.float32)

    keys = tl.where(exists, _order_key(choice, experts), NEVER)
    if TOP_GROUPS > 0:
        keys = _within_groups(keys, group_size, TOP_GROUPS, HAS_BIAS, BLOCK_G, BLOCK_S)
    slots = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.max(keys, axis=0)
        expert = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        # By the key, which one place holds: padding of a group counts on into the next.
        taken = keys == best
        keys = tl.where(taken, NEVER, keys)
        weight = tl.sum(tl.where(taken, scores, 0.0), axis=0)
        ids = tl.where(slots == k, expert, ids)
        weights = tl.where(slots == k, weight, weights)
    if SCORING == "softmax_after_top_k":
        chosen = tl.where(slots < TOP_K, weights, float("-inf"))
        largest = tl.max(tl.where(chosen == chosen, chosen, float("-inf")), axis=0)
        exponentials = tl.exp(chosen - largest)
        weights = exponentials / tl.sum(exponentials, axis=0)
    elif RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + RENORMALIZE_FLOOR)
    weights = tl.where(has_nan, float("nan"), weights * scaling)
    if HAS_MAP:
        ids = tl.load(map_ptr + ids, mask=slots < TOP_K, other=-1)
    tl.store(weights_ptr + token * stride_wt + slots, weights, mask=slots < TOP_K)
    tl.store(ids_ptr + token * stride_it + slots, ids, mask=slots < TOP_K)


def route(
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    expert_groups: int = 1,
    top_k_groups: int = 1,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Route logits [tokens, experts] to weights [tokens, k] f32 and ids [tokens, k] int32.

    `bias` [experts] takes part in the choice only, which the best `top_k_groups` of
    `expert_groups` groups of neighbours hold. `expert_map` [experts] int32 gives the ids stored.
    """
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    _check(experts, top_k, scoring, expert_groups, top_k_groups)
    if weights.stride(1) != 1 or ids.stride(1) != 1:
        raise ValueError("route: the last dimension of weights and ids must be contiguous")
    if any(vector is not None and vector.stride(0) != 1 for vector in (bias, expert_map)):
        raise ValueError("route: bias and expert_map must be contiguous")
    if tokens == 0:
        return
    grouped = top_k_groups < expert_groups
    size = experts // expert_groups if grouped else experts
    block_g = triton.next_power_of_2(expert_groups) if grouped else 1
    block_s = max(triton.next_power_of_2(size), 1 if grouped else 16)
    launch(
        _route_kernel, (tokens,),
        logits, logits if bias is None else bias, ids if expert_map is None else expert_map,
        weights, ids, experts, expert_groups, size,
        logits.stride(0), logits.stride(1), weights.stride(0), ids.stride(0), float(scaling),
        TOP_K=top_k, SCORING=scoring, RENORMALIZE=renormalize, HAS_BIAS=bias is not None,
        HAS_MAP=expert_map is not None, TOP_GROUPS=top_k_groups if grouped else 0,
        BLOCK_G=block_g, BLOCK_S=block_s, BLOCK_K=triton.next_power_of_2(top_k),
        # Where experts come first in memory, one of them may be millions of tokens away.
        WIDE=offsets_need_64_bits(logits, skip=1),
        # Up to 512 experts one warp does it, so that no reduction leaves the warp. Up to 1025 there
        # are at most 2048 places, whatever the groups.
        num_warps=1 if block_g * block_s <= 512 else 4,
    )  # fmt: skip


def _check(experts: int, top_k: int, scoring: str, expert_groups: int, top_k_groups: int) -> None:
    if scoring not in SCORINGS:
        raise ValueError(f"route: scoring {scoring!r} is not one of {SCORINGS}")
    if not 1 <= top_k_groups <= expert_groups or experts % expert_groups:
        raise ValueError(
            f"route: {top_k_groups} of {expert_groups} groups do not fit {experts} experts"
        )
    held = experts // expert_groups * top_k_groups
    if not 1 <= top_k <= held:
        raise ValueError(f"route: k is {top_k}, must be from 1 to experts = {held}")
