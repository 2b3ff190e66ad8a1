"""Sum the k expert outputs of each token.

    out[t] = (shared[t] +) sum over j with 0 <= ids[t, j] < experts of
             expert_out[t, j] (* weights[t, j])

The sum runs in float32 in the order of j, and begins with the shared output where there is one.
Rows of absent ids are not read: nobody wrote them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch, wait_for_previous


@triton.jit
def _combine_kernel(
    expert_out_ptr, out_ptr, ids_ptr, weights_ptr, shared_ptr, n_experts, hidden,
    stride_xt, stride_xk, stride_ot, stride_it, stride_wt, stride_st,
    TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < hidden
    if SHARED:
        row = shared_ptr + token * stride_st
        total = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK_H], tl.float32)
    row_ptr = expert_out_ptr + token * stride_xt
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * stride_it + k)
        present = (expert >= 0) & (expert < n_experts)
        x = tl.load(row_ptr + columns, mask=inside & present, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * stride_wt + k, mask=present, other=0.0)
            x = x * weight.to(tl.float32)
        total += x
        # Not k * stride_xk: where k comes first in memory, that passes 2^31.
        row_ptr += stride_xk
    tl.store(out_ptr + token * stride_ot + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    expert_out: torch.Tensor,
    out: torch.Tensor,
    ids: torch.Tensor,
    experts: int,
    weights: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    *,
    dependent: bool = False,
) -> None:
    """Sum expert_out [tokens, k, hidden] over k into out [tokens, hidden].

    ids [tokens, k] int32 or int64; weights [tokens, k] f32, bf16 or fp16, or None when they have
    been applied already; shared as out, of any float dtype, or None. Where out has fewer columns
    than expert_out, the first are summed. dependent: the launch may begin while the one before
    ends (`common.starts_dependent`).
    """
    tokens, top_k, columns = expert_out.shape
    hidden = out.shape[1]
    if hidden > columns:
        raise ValueError(f"combine: out has {hidden} columns, expert_out {columns}")
    if tokens == 0 or hidden == 0:
        return
    if expert_out.stride(2) != 1 or out.stride(1) != 1:
        raise ValueError("combine: the last dimension of expert_out and out must be contiguous")
    if ids.stride(1) != 1 or (weights is not None and weights.stride(1) != 1):
        raise ValueError("combine: the last dimension of ids and weights must be contiguous")
    if shared is not None and (shared.shape != out.shape or shared.stride(1) != 1):
        raise ValueError(f"combine: shared is {tuple(shared.shape)}, out {tuple(out.shape)}")
    block = min(max(triton.next_power_of_2(hidden), 16), 1024)
    launch(
        _combine_kernel, (tokens, triton.cdiv(hidden, block)),
        expert_out, out, ids, ids if weights is None else weights,
        out if shared is None else shared, experts, hidden,
        expert_out.stride(0), expert_out.stride(1), out.stride(0), ids.stride(0),
        0 if weights is None else weights.stride(0), 0 if shared is None else shared.stride(0),
        TOP_K=top_k, HAS_WEIGHTS=weights is not None, SHARED=shared is not None, BLOCK_H=block,
        DEPENDENT=dependent, num_warps=4 if block == 1024 else 1,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
