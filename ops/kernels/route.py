"""Choose the top-k experts of each token and their weights, in one launch.

    score = softmax(logits) or sigmoid(logits)                      in float32
    chosen = the k largest of (score + bias), or of the logits when there is no bias
    weight = score[chosen] (/ (sum(score[chosen]) + 1e-20) if renormalize) * scaling

Ties go to the lowest id. Without a bias the choice is made on the logits, of which both scores
are monotone, so scores that saturate in float32 create no ties. A row with a NaN gets NaN
weights; its ids are still distinct and inside [0, experts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch

SCORINGS = ("softmax", "sigmoid")
# DeepSeek-V3 adds this to the sum it divides by: rows of zero scores then stay finite.
RENORMALIZE_FLOOR = tl.constexpr(1e-20)


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
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, n_experts,
    stride_lt, stride_le, stride_wt, stride_it, scaling,
    TOP_K: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    exists = experts < n_experts
    logits = tl.load(
        logits_ptr + token * stride_lt + experts * stride_le, mask=exists, other=float("-inf")
    ).to(tl.float32)
    has_nan = tl.max(tl.where(logits == logits, 0, 1), axis=0) > 0
    if SCORING == "softmax":
        largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=0)
        exponentials = tl.exp(logits - largest)
        scores = exponentials / tl.sum(exponentials, axis=0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = logits
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + experts, mask=exists, other=0.0).to(tl.float32)

    never = tl.full([BLOCK_E], -(2**63), tl.int64)
    keys = tl.where(exists, _order_key(choice, experts), never)
    slots = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.max(keys, axis=0)
        expert = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        taken = experts == expert
        keys = tl.where(taken, never, keys)
        weight = tl.sum(tl.where(taken, scores, 0.0), axis=0)
        ids = tl.where(slots == k, expert, ids)
        weights = tl.where(slots == k, weight, weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + RENORMALIZE_FLOOR)
    weights = tl.where(has_nan, float("nan"), weights * scaling)
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
) -> None:
    """Route logits [tokens, experts] to weights [tokens, k] f32 and ids [tokens, k] int32.

    `bias` [experts] takes part in the choice only.
    """
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    if scoring not in SCORINGS:
        raise ValueError(f"route: scoring {scoring!r} is not one of {SCORINGS}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"route: k is {top_k}, must be from 1 to experts = {experts}")
    if weights.stride(1) != 1 or ids.stride(1) != 1:
        raise ValueError("route: the last dimension of weights and ids must be contiguous")
    if bias is not None and bias.stride(0) != 1:
        raise ValueError("route: bias must be contiguous")
    if tokens == 0:
        return
    block = max(triton.next_power_of_2(experts), 16)
    launch(
        _route_kernel, (tokens,),
        logits, logits if bias is None else bias, weights, ids, experts,
        logits.stride(0), logits.stride(1), weights.stride(0), ids.stride(0), float(scaling),
        TOP_K=top_k, SCORING=scoring, RENORMALIZE=renormalize, HAS_BIAS=bias is not None,
        BLOCK_E=block, BLOCK_K=triton.next_power_of_2(top_k),
        # Up to 512 experts one warp does it, so that no reduction leaves the warp.
        num_warps=1 if block <= 512 else 4,
    )  # fmt: skip
