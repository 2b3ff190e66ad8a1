"""Imitate the experts of vLLM 0.25.1, with the schemas and signatures of its own."""

from __future__ import annotations

import enum

import torch
from adapter_fakes import E2M1, block_scaled, repeated, row_major
from adapter_fakes_experts import gated, in_float64, per_128, per_token
from adapter_fakes_mixed import (
    SECRET,
    ScalarTypes,
    codes_of,
    marlin_codes,
    marlin_fp4_scales,
    marlin_scales,
    marlin_zeros,
)

FUSED_EXPERTS = (
    'fused_experts(Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, '
    'Tensor topk_ids, str activation="silu", bool apply_router_weight_on_input=False, '
    'bool use_fp8_w8a8=False, bool use_int8_w8a8=False, bool use_int8_w8a16=False, '
    'bool use_int4_w4a16=False, str? ocp_mx_scheme=None, bool per_channel_quant=False, '
    'SymInt global_num_experts=-1, Tensor? expert_map=None, Tensor? w1_scale=None, '
    'Tensor? w2_scale=None, Tensor? w1_zp=None, Tensor? w2_zp=None, Tensor? a1_scale=None, '
    'Tensor? a2_scale=None, SymInt[]? block_shape=None, Tensor? w1_bias=None, '
    'Tensor? w2_bias=None) -> Tensor'
)  # fmt: skip


def check_routing(x, ids, weights, expert_map, global_num_experts, experts):
    """Return ids of local experts, -1 for those that the map gives to nobody."""
    assert row_major(x)
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert weights.dtype is torch.float32
    assert row_major(weights)
    assert row_major(ids)
    assert ids.dtype is torch.int32
    assert ids.shape == weights.shape
    assert expert_map.dtype is torch.int32
    assert expert_map.shape == (global_num_experts,)
    assert (global_num_experts + 31) // 32 * 32 < 1024
    assert int(ids.min()) >= 0, "the kernel would read before its counters"
    assert int(ids.max()) < global_num_experts
    local = expert_map[ids.long()]
    assert int(local.max()) < experts
    return local


def fused_experts(
    hidden_states, w1, w2, topk_weights, topk_ids, activation="silu",
    apply_router_weight_on_input=False, use_fp8_w8a8=False, use_int8_w8a8=False,
    use_int8_w8a16=False, use_int4_w4a16=False, ocp_mx_scheme=None, per_channel_quant=False,
    global_num_experts=-1, expert_map=None, w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None,
    a1_scale=None, a2_scale=None, block_shape=None, w1_bias=None, w2_bias=None,
):  # fmt: skip
    """Imitate `torch.ops.vllm.fused_experts` for weights of 8 and 16 bits."""
    nothing = (ocp_mx_scheme, w1_zp, w2_zp, w1_bias, w2_bias)
    assert nothing == (None,) * 5
    assert not any((apply_router_weight_on_input, use_int8_w8a16, use_int4_w4a16))
    experts, columns, hidden = w1.shape
    assert w2.shape == (experts, hidden, columns // 2)
    assert hidden_states.shape[1] == hidden
    assert w1.stride(-1) == w2.stride(-1) == 1
    ids = check_routing(
        hidden_states, topk_ids, topk_weights, expert_map, global_num_experts, experts
    )
    arguments = (w1, w1_scale, a1_scale), (w2, w2_scale, a2_scale)
    if use_int8_w8a8:
        assert per_channel_quant
        assert block_shape is None
        assert w1.dtype is w2.dtype is torch.int8
    elif use_fp8_w8a8:
        assert w1.dtype is w2.dtype
        assert w1.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    else:
        assert w1.dtype is w2.dtype is hidden_states.dtype
        assert w1_scale is w2_scale is a1_scale is a2_scale is block_shape is None
        assert not per_channel_quant
    wide = [
        weight.double() if scale is None else decoded(weight, scale, block_shape, per_channel_quant)
        for weight, scale, _ in arguments
    ]

    def seen(rows, which):
        if use_int8_w8a8:
            scales = rows.float().abs().amax(-1, keepdim=True) / 127
            return (rows.float() / scales.clamp_min(1e-12)).round().double() * scales.double()
        if not use_fp8_w8a8:
            return rows.double()
        fixed = arguments[which][2]
        if block_shape is not None:
            assert not per_channel_quant
            assert fixed is None
            return per_128(rows)
        if per_channel_quant:
            assert fixed is None
            return per_token(rows, 448.0 if w1.dtype is torch.float8_e4m3fn else 224.0)
        assert fixed.dtype is torch.float32
        assert fixed.numel() == 1
        top = torch.finfo(w1.dtype).max
        codes = (rows.float() / fixed).clamp(-top, top).to(w1.dtype)
        return codes.double() * fixed.double()

    return in_float64(hidden_states, *wide, ids, topk_weights, gated(activation), seen)


def decoded(weight, scale, block_shape, per_channel):
    """Return numbers `[E, N, K]` of codes, the scales found by their strides as in the kernel."""
    assert scale.dtype is torch.float32
    experts, rows, columns = weight.shape
    if block_shape is not None:
        assert block_shape == [128, 128]
        assert scale.shape == (experts, -(-rows // 128), -(-columns // 128))
        factors = [repeated(part, (rows, columns), (128, 128)) for part in scale]
        return weight.double() * torch.stack(factors)
    if per_channel:
        assert scale.shape[:2] == (experts, rows)
        return weight.double() * scale.double().view(experts, rows, 1)
    assert scale.shape == (experts,)
    return weight.double() * scale.double().view(-1, 1, 1)


class MoEActivation(enum.Enum):
    """Stand in for vLLM's enum of activations."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"


def fused_marlin_moe(
    hidden_states, w1, w2, bias1, bias2, w1_scale, w2_scale, topk_weights, topk_ids, quant_type_id,
    apply_router_weight_on_input=False, global_num_experts=-1, activation=MoEActivation.SILU,
    activation_func=None, moe_sum=None, expert_map=None, input_global_scale1=None,
    input_global_scale2=None, global_scale1=None, global_scale2=None, g_idx1=None, g_idx2=None,
    sort_indices1=None, sort_indices2=None, w1_zeros=None, w2_zeros=None, workspace=None,
    intermediate_cache13=None, intermediate_cache2=None, is_k_full=True, output=None,
    input_dtype=None, clamp_limit=None, gemm1_alpha=1.0, gemm1_beta=0.0,
):  # fmt: skip
    """Imitate `fused_marlin_moe` of 0.25.1 for activations as they are given."""
    nothing = (bias1, bias2, activation_func, moe_sum, input_global_scale1, input_global_scale2,
               g_idx1, g_idx2, sort_indices1, sort_indices2, intermediate_cache13,
               intermediate_cache2, output, input_dtype, clamp_limit)  # fmt: skip
    assert nothing == (None,) * len(nothing)
    assert (is_k_full, apply_router_weight_on_input) == (True, False)
    assert isinstance(activation, MoEActivation)
    experts, hidden = w1.shape[0], hidden_states.shape[1]
    assert w1.shape[1] * 16 == hidden
    intermediate = w2.shape[1] * 16
    assert hidden % 128 == 0
    assert intermediate % 64 == 0
    assert workspace.dtype is torch.int32
    assert not workspace.any()
    assert workspace.numel() >= 4, "four blocks a compute unit"
    ids = check_routing(
        hidden_states, topk_ids, topk_weights, expert_map, global_num_experts, experts
    )
    sizes = (hidden, 2 * intermediate), (intermediate, hidden)
    arguments = (w1, w1_scale, global_scale1, w1_zeros), (w2, w2_scale, global_scale2, w2_zeros)
    wide = [
        torch.stack([
            marlin_weight(
                hidden_states.dtype, quant_type_id, size,
                *(None if part is None else part[expert] for part in tensors),
            )
            for expert in range(experts)
        ])
        for tensors, size in zip(arguments, sizes, strict=True)
    ]  # fmt: skip
    return in_float64(hidden_states, *wide, ids, topk_weights, gated(activation.value))


def marlin_weight(dtype, number, size, words, scales, second, zeros):
    """Return float64 numbers `[N, K]` of one expert in Marlin's order."""
    size_k, size_n = size
    assert words.dtype is torch.int32
    assert words.is_contiguous()
    assert scales.is_contiguous()
    groups = scales.shape[0]
    assert scales.shape == (groups, size_n)
    if number == ScalarTypes.float4_e2m1f.id:
        assert zeros is None
        second = None if second is None else second.reshape(1)
        factors = marlin_fp4_scales(scales, second, size_k, torch.float32)
        return (E2M1[marlin_codes(words, size_k, size_n, 4)] * factors).T
    assert second is None
    assert scales.dtype is dtype
    wide = marlin_scales(scales).double().repeat_interleave(size_k // groups, 0)
    if number == ScalarTypes.float8_e4m3fn.id:
        assert zeros is None
        codes = marlin_codes(words, size_k, size_n, 8).to(torch.uint8).view(torch.float8_e4m3fn)
        return (codes.double() * 2.0 ** -(120 if dtype is torch.bfloat16 else 8) * wide).T
    codes = marlin_codes(words, size_k, size_n, 4).double()
    if number == ScalarTypes.uint4b8.id:
        assert zeros is None
        return ((codes - 8) * wide).T
    assert number == ScalarTypes.uint4.id
    offsets = marlin_zeros(zeros, size_n).repeat_interleave(size_k // groups, 0)
    return ((codes - offsets) * wide).T


CUTLASS_MOE_MM = (
    "cutlass_moe_mm(Tensor! out_tensors, Tensor a_tensors, Tensor b_tensors, Tensor a_scales, "
    "Tensor b_scales, Tensor expert_offsets, Tensor problem_sizes, Tensor a_strides, "
    "Tensor b_strides, Tensor c_strides, bool per_act_token, bool per_out_ch) -> ()"
)


def problems(offsets, sizes, exchanged, columns, inner, rows):
    """Yield each expert with the slice of its rows."""
    assert sizes.dtype is torch.int32
    assert sizes.shape == (offsets.numel(), 3)
    for expert, (start, (m, n, k)) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        m, n = (n, m) if exchanged else (m, n)
        assert (n, k) == (columns, inner)
        assert start + m <= rows
        yield expert, slice(start, start + m)


def all_equal(strides, size):
    assert strides.dtype is torch.int64
    assert bool((strides == size).all())


def cutlass_moe_mm(out, a, b, a_scales, b_scales, offsets, sizes, a_strides, b_strides, c_strides,
                   per_act_token, per_out_ch):  # fmt: skip
    """Imitate vLLM's grouped product of e4m3 operands; rows of no expert stay as they are."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert per_act_token
    assert per_out_ch
    experts, columns, inner = b.shape
    rows = a.shape[0]
    assert row_major(a)
    assert row_major(out)
    assert b.is_contiguous()
    assert columns % 16 == inner % 16 == 0
    assert a_scales.dtype is b_scales.dtype is torch.float32
    assert a_scales.shape == (rows, 1)
    assert a_scales.is_contiguous()
    assert b_scales.is_contiguous()
    assert b_scales.numel() == experts * columns
    assert offsets.dtype is torch.int64
    for strides, size in ((a_strides, inner), (b_strides, inner), (c_strides, columns)):
        all_equal(strides, size)
    out.fill_(torch.nan)
    for expert, own in problems(offsets, sizes, rows <= 64, columns, inner, rows):
        wide = a[own].double() @ b[expert].double().T * a_scales[own].double()
        out[own] = (wide * b_scales.view(experts, 1, columns)[expert].double()).to(out.dtype)


CUTLASS_W4A8_MOE_MM = (
    "cutlass_w4a8_moe_mm(Tensor! out_tensors, Tensor a_tensors, Tensor b_tensors, Tensor a_scales, "
    "Tensor b_scales, Tensor b_group_scales, int b_group_size, Tensor expert_offsets, "
    "Tensor problem_sizes, Tensor a_strides, Tensor b_strides, Tensor c_strides, "
    "Tensor group_scale_strides, str? maybe_schedule) -> ()"
)
REORDER_GROUPED = "cutlass_encode_and_reorder_int4b_grouped(Tensor b_tensors) -> (Tensor, Tensor)"
PACK = "cutlass_pack_scale_fp8(Tensor scales) -> Tensor"


def reorder_grouped(words):
    """Imitate the reordering of int4 words `[E, N, K/8]`; strides are the kernel's own affair."""
    assert words.dtype is torch.int32
    assert words.is_contiguous()
    assert words.ndim == 3
    return words ^ SECRET, torch.full((words.shape[0], 2), 77, dtype=torch.int64)


def pack(scales):
    """Imitate `cutlass_pack_scale_fp8`: eight numbers a scale."""
    assert scales.dtype is torch.float8_e4m3fn
    assert scales.is_contiguous()
    return scales.unsqueeze(-1).repeat(1, 1, 1, 8)


def cutlass_w4a8_moe_mm(out, a, b, a_scales, b_scales, group_scales, group, offsets, sizes,
                        a_strides, b_strides, c_strides, s_strides, schedule):  # fmt: skip
    """Imitate vLLM's grouped product of e4m3 tokens and int4 weights; operands are exchanged."""
    assert a.dtype is torch.float8_e4m3fn
    assert out.dtype is torch.bfloat16
    assert (group, schedule) == (128, None)
    experts, columns, packed = b.shape
    rows, inner = a.shape[0], packed * 8
    assert a.shape[1] == inner
    assert row_major(a)
    assert row_major(out)
    assert a_scales.dtype is b_scales.dtype is torch.float32
    assert a_scales.shape == (rows, 1)
    assert b_scales.shape == (experts, columns, 1)
    assert group_scales.shape == (experts, inner // 128, columns, 8)
    assert offsets.dtype is torch.int64
    all_equal(a_strides, inner)
    all_equal(b_strides, 77)
    all_equal(c_strides, columns)
    assert s_strides.tolist() == [[columns, 0]] * experts
    out.fill_(torch.nan)
    for expert, own in problems(offsets, sizes, True, columns, inner, rows):
        codes = codes_of((b[expert] ^ SECRET).T)
        codes = (codes - (codes > 7) * 16).double()
        weight = codes * group_scales[expert, ..., 0].double().repeat_interleave(128, 0)
        wide = a[own].double() @ (weight * b_scales[expert].double().T)
        out[own] = (wide * a_scales[own].double()).to(out.dtype)


CUTLASS_FP4 = (
    "cutlass_fp4_group_mm(Tensor! out, Tensor a, Tensor b, Tensor a_blockscale, "
    "Tensor b_blockscales, Tensor alphas, Tensor problem_sizes, Tensor expert_offsets, "
    "Tensor sf_offsets) -> ()"
)


def cutlass_fp4_group_mm(out, a, b, a_scales, b_scales, alphas, sizes, offsets, tiles):
    """Imitate vLLM's grouped NVFP4 product: scales of an expert start at its offset times K/16."""
    assert a.dtype is b.dtype is torch.uint8
    assert a_scales.dtype is b_scales.dtype is torch.float8_e4m3fn
    assert out.dtype is torch.bfloat16
    experts, columns, half = b.shape
    rows, groups = a.shape[0], half // 8
    assert row_major(a)
    assert row_major(out)
    assert b.is_contiguous()
    assert alphas.dtype is torch.float32
    assert alphas.shape == (experts,)
    assert offsets.dtype is tiles.dtype is torch.int32
    assert offsets.shape == tiles.shape == (experts,)
    assert b_scales.shape == (experts, columns, groups)
    assert columns % 128 == groups % 4 == 0
    assert a_scales.is_contiguous()
    raw = a_scales.flatten()
    out.fill_(torch.nan)
    for expert, own in problems(offsets, sizes, False, columns, half * 2, rows):
        start, count = int(tiles[expert]), own.stop - own.start
        assert start % 128 == 0
        if not count:
            continue
        size = (count + 127) // 128 * 128 * groups
        assert start * groups + size <= raw.numel()
        own_scales = raw[start * groups : start * groups + size]
        left = block_scaled(a[own], own_scales, 16)
        right = block_scaled(b[expert], b_scales[expert], 16)
        out[own] = (left @ right.T * alphas[expert].double()).to(out.dtype)
