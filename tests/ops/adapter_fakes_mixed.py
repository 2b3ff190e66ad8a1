"""Imitate the libraries that multiply by weights in orders of their own, Marlin's above all.

The orders are written down here from the layout of a tensor core's fragments, and not from hal's
tables.
"""

from __future__ import annotations

import torch
from adapter_fakes import E2M1, as_long, columns_of_bytes, per_group, repeated, row_major

SECRET = 0x2B5D17A3
"""What imitated operators that reorder a weight change its words by, so that skipping one shows."""


class Scalar:
    """A member of `vllm.scalar_type.scalar_types`."""

    def __init__(self, number: int) -> None:
        self.id = number


class ScalarTypes:
    """Stand in for vLLM's table of number formats; numbers are arbitrary."""

    uint4b8, uint4, float8_e4m3fn = Scalar(1125899906842627), Scalar(1027), Scalar(8865)
    float4_e2m1f = Scalar(562949953421570)


MARLIN_GEMM = (
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
    "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, "
    "{}Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, {}"
    "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor"
)
MARLIN_SCHEMAS = {
    "2025": "gptq_"
    + MARLIN_GEMM.format("Tensor? g_idx_or_none, Tensor? perm_or_none, ", "bool is_k_full, "),
    "2026": MARLIN_GEMM.format("", ""),
}


def marlin_gemm(a, c_or_none, b_q_weight, b_bias_or_none, b_scales, a_scales, global_scale,
                b_zeros_or_none, *rest):  # fmt: skip
    """Imitate vLLM's `marlin_gemm` for weights whose activations are as given."""
    if len(rest) == 11:  # with act-order
        g_idx, perm, *rest = rest
        assert g_idx is perm is None
        assert rest.pop(5) is True  # is_k_full
    workspace, b_type_id, size_m, size_n, size_k, atomic, _, zeros_are_floats = rest
    assert c_or_none is b_bias_or_none is a_scales is None
    assert (atomic, zeros_are_floats) == (False, False)
    assert a.shape == (size_m, size_k)
    assert row_major(a)
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert size_n % 64 == 0
    assert size_k % 128 == 0
    assert workspace.dtype is torch.int32
    assert not workspace.any()
    assert b_q_weight.dtype is torch.int32
    assert b_q_weight.is_contiguous()
    assert b_scales.is_contiguous()
    groups = b_scales.shape[0]
    assert b_scales.shape == (groups, size_n)
    floats = b_type_id == ScalarTypes.float8_e4m3fn.id
    if b_type_id == ScalarTypes.float4_e2m1f.id:
        codes = marlin_codes(b_q_weight, size_k, size_n, 4)
        kind = SECOND_SCALES["dtype"]
        numbers = E2M1[codes] * marlin_fp4_scales(b_scales, global_scale, size_k, kind)
        return (a.double() @ numbers).to(a.dtype)
    assert global_scale is None
    assert b_scales.dtype is a.dtype
    codes = marlin_codes(b_q_weight, size_k, size_n, 8 if floats else 4)
    if floats:
        shift = 120 if a.dtype is torch.bfloat16 else 8
        numbers = codes.to(torch.uint8).view(torch.float8_e4m3fn).double() * 2.0**-shift
    elif b_type_id == ScalarTypes.uint4b8.id:
        numbers = codes.double() - 8
    else:
        assert b_type_id == ScalarTypes.uint4.id
        zeros = marlin_zeros(b_zeros_or_none, size_n)
        numbers = codes.double() - zeros.repeat_interleave(size_k // groups, 0)
    assert (b_zeros_or_none is None) == (b_type_id != ScalarTypes.uint4.id)
    scales = marlin_scales(b_scales).double().repeat_interleave(size_k // groups, 0)
    return (a.double() @ (numbers * scales)).to(a.dtype)


def marlin_codes(words, size_k: int, size_n: int, bits: int):
    """Return codes `[K, N]`: thread t of a warp holds column t/4 of two 8-column tiles."""
    per_word = 32 // bits
    assert words.shape == (size_k // 16, size_n * 16 // per_word)
    raw = as_long(words)
    codes = torch.zeros(size_k, size_n, dtype=torch.long)
    tile, word = torch.meshgrid(
        torch.arange(words.shape[0]), torch.arange(words.shape[1]), indexing="ij"
    )
    of_thread = 32 // per_word  # words of a thread in 64 columns
    block, place = word // (32 * of_thread), word % (32 * of_thread)
    thread, own = place // of_thread, place % of_thread
    for position in range(per_word):
        if bits == 4:
            quarter, which = own, (position % 4) * 2 + position // 4
        else:
            quarter, which = own // 2, own % 2 * 4 + (0, 2, 1, 3)[position]
        half, row = which // 4, which % 4
        k = tile * 16 + 2 * (thread % 4) + row % 2 + row // 2 * 8
        n = block * 64 + quarter * 16 + thread // 4 + half * 8
        codes[k, n] = raw >> bits * position & (1 << bits) - 1
    return codes


def marlin_scales(stored):
    """Return scales `[groups, N]` of Marlin's order: that of channels where there is one group."""
    groups, columns = stored.shape
    scales = torch.zeros_like(stored)
    for place in range(columns):
        if groups > 1:
            block, inner = place // 64 * 64, place % 64
            scales[:, block + inner // 8 + inner % 8 * 8] = stored[:, place]
        else:
            block, inner = place // 32 * 32, place % 32
            pair = inner % 8
            scales[:, block + inner // 8 * 2 + pair // 2 * 8 + pair % 2] = stored[:, place]
    return scales


SECOND_SCALES = {"dtype": torch.bfloat16}
"""What `marlin_gemm` takes second scales in; float32 from 0.25.1 on."""


def marlin_fp4_scales(stored, second, size_k: int, dtype: torch.dtype):
    """Return factors `[K, N]` of e2m1 codes, whose scales lie in another order within eight."""
    groups, columns = stored.shape
    raw = stored.view(torch.uint8).long()
    scales = torch.zeros(groups, columns, dtype=torch.long)
    for place in range(columns):
        block, inner = place // 64 * 64, place % 64
        within = inner % 8 // 4 * 4 + (0, 2, 1, 3)[inner % 4]
        scales[:, block + inner // 8 + within * 8] = raw[:, place]
    if stored.dtype is torch.float8_e8m0fnu:
        assert second is None
        assert groups * 32 == size_k
        return torch.exp2(scales.double() - 127).repeat_interleave(32, 0)
    assert stored.dtype is torch.float8_e4m3fn
    assert second.dtype is dtype, f"scalar type of global_scale must be {dtype}"
    assert second.shape == (1,)
    assert groups * 16 == size_k
    exponent, fraction = scales // 8, scales % 8
    normal = torch.exp2(exponent.double() - 15) * (1 + fraction.double() / 8)
    numbers = torch.where(exponent > 0, normal, fraction.double() / 8 * 2.0**-14)
    return numbers.repeat_interleave(16, 0) * second.double() * 2.0**-126


def marlin_zeros(words, columns: int):
    """Return zero points `[groups, N]` of Marlin's words."""
    assert words.dtype is torch.int32
    assert words.shape[1] == columns // 8
    raw = as_long(words)
    zeros = torch.zeros(words.shape[0], columns, dtype=torch.long)
    for word in range(columns // 8):
        for position in range(8):
            place = word * 8 + (position % 4) * 2 + position // 4
            block, inner = place // 64 * 64, place % 64
            column = block + inner // 8 + inner % 8 * 8
            zeros[:, column] = raw[:, word] >> 4 * position & 15
    return zeros.double()


def codes_of(words):
    """Return codes `[K, N]` of words `[K/8, N]`, the first of eight in the lowest bits."""
    raw = as_long(words)
    return torch.stack([raw >> 4 * place & 15 for place in range(8)], 1).flatten(0, 1)


def with_k_inside(words) -> bool:
    return words.dtype is torch.int32 and words.stride() == (1, words.shape[0])


MACHETE_MM = (
    "machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, "
    "Tensor? group_zeros, int? group_size, Tensor? channel_scales, Tensor? token_scales, "
    "str? schedule) -> Tensor"
)
MACHETE_PREPACK = (
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) "
    "-> Tensor"
)


def machete_prepack(words, a_type, b_type, group_scales_type):
    """Imitate Machete's reordering by a change of bits that only `machete_mm` undoes."""
    assert with_k_inside(words)
    assert words.shape[0] % 8 == 0
    assert words.shape[1] % 128 == 0
    assert a_type == group_scales_type
    return (words ^ SECRET).contiguous()


def machete_mm(a, b, b_type, out_type, group_scales, group_zeros, group_size, *nothing):
    """Imitate vLLM's `machete_mm`: codes, times scales, plus zeros."""
    assert nothing == (None, None, None)
    assert row_major(a)
    codes = codes_of(b ^ SECRET).double()
    assert codes.shape[0] == a.shape[1]
    assert group_size in (64, 128)
    assert group_scales.dtype is a.dtype
    assert group_scales.is_contiguous()
    assert group_scales.shape == (codes.shape[0] // group_size, codes.shape[1])
    scales = group_scales.double().repeat_interleave(group_size, 0)
    if b_type == ScalarTypes.uint4b8.id:
        assert group_zeros is None
        weight = (codes - 8) * scales
    else:
        assert b_type == ScalarTypes.uint4.id
        assert group_zeros.is_contiguous()
        weight = codes * scales + group_zeros.double().repeat_interleave(group_size, 0)
    return (a.double() @ weight).to(a.dtype)


W4A8_MM = (
    "cutlass_w4a8_mm(Tensor A, Tensor B, Tensor group_scales, int group_size, "
    "Tensor channel_scales, Tensor token_scales, ScalarType? out_type, str? maybe_schedule) "
    "-> Tensor"
)
W4A8_PACK = "cutlass_pack_scale_fp8(Tensor scales) -> Tensor"
W4A8_REORDER = "cutlass_encode_and_reorder_int4b(Tensor B) -> Tensor"


def w4a8_pack(scales):
    """Imitate `cutlass_pack_scale_fp8`: eight numbers a scale."""
    assert scales.dtype is torch.float8_e4m3fn
    assert scales.is_contiguous()
    return scales.unsqueeze(-1).repeat(1, 1, 8)


def w4a8_reorder(words):
    """Imitate `cutlass_encode_and_reorder_int4b`."""
    assert with_k_inside(words)
    return (words ^ SECRET).contiguous()


def w4a8_mm(a, b, group_scales, group_size, channel_scales, token_scales, out_type, schedule):
    """Imitate vLLM's product of e4m3 tokens and signed int4."""
    assert a.dtype is torch.float8_e4m3fn
    assert row_major(a)
    assert (group_size, schedule) == (128, None)
    codes = codes_of(b ^ SECRET)
    codes = codes - (codes > 7) * 16
    rows, columns = a.shape[0], codes.shape[1]
    assert group_scales.shape == (a.shape[1] // 128, columns, 8)
    assert channel_scales.shape == (columns, 1)
    assert token_scales.shape == (rows, 1)
    assert channel_scales.dtype is token_scales.dtype is torch.float32
    weight = codes.double() * group_scales[..., 0].double().repeat_interleave(128, 0)
    out = a.double() @ (weight * channel_scales.double().T) * token_scales.double()
    return out.bfloat16()


def _eight_bits(xq, wq, x_scale, w_scale):
    assert xq.dtype is wq.dtype
    assert row_major(xq)
    assert wq.is_contiguous()
    assert x_scale.dtype is w_scale.dtype is torch.float32
    assert x_scale.is_contiguous()
    assert w_scale.is_contiguous()


def gemm_a8w8(XQ, WQ, x_scale, w_scale, bias=None, dtype=torch.bfloat16, splitK=None):
    """Imitate `aiter.gemm_a8w8` on int8."""
    _eight_bits(XQ, WQ, x_scale, w_scale)
    assert XQ.dtype is torch.int8
    assert x_scale.shape == (XQ.shape[0], 1)
    assert w_scale.shape == (1, WQ.shape[0])
    assert bias is splitK is None
    return (XQ.double() @ WQ.double().T * x_scale.double() * w_scale.double()).to(dtype)


def gemm_a8w8_bpreshuffle(XQ, WQ, x_scale, w_scale, bias=None, dtype=torch.bfloat16, check=False):
    """Imitate `aiter.gemm_a8w8_bpreshuffle`: rows in sixteens, columns in two halves of sixteen."""
    _eight_bits(XQ, WQ, x_scale, w_scale)
    assert XQ.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    assert x_scale.shape == (XQ.shape[0], 1)
    assert w_scale.shape == (1, WQ.shape[0])
    assert bias is None
    rows, columns = WQ.shape
    flat = WQ.view(torch.uint8).flatten()
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = n // 16 * 16 * columns + k // 32 * 512 + k // 16 % 2 * 256 + n % 16 * 16 + k % 16
    weight = flat[offset].view(WQ.dtype).double()
    return (XQ.double() @ weight.T * x_scale.double() * w_scale.double()).to(dtype)


def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=torch.bfloat16, isBpreshuffled=False):
    """Imitate `aiter.gemm_a8w8_blockscale`."""
    _eight_bits(XQ, WQ, x_scale, w_scale)
    assert not isBpreshuffled
    assert x_scale.shape == (XQ.shape[0], XQ.shape[1] // 128)
    assert w_scale.shape == (WQ.shape[0] // 128, WQ.shape[1] // 128)
    left = XQ.double() * repeated(x_scale, XQ.shape, (1, 128))
    return (left @ (WQ.double() * repeated(w_scale, WQ.shape, (128, 128))).T).to(dtype)


def gemm_a4w4(
    A, B, A_scale, B_scale, bias=None, dtype=torch.bfloat16, alpha=1.0, beta=0.0,
    bpreshuffle=True, apreshuffle=False, global_A_scale=None, global_B_scale=None,
):  # fmt: skip
    """Imitate `aiter.gemm_a4w4` on gfx950: bytes of weights in tiles, exponents in others."""
    assert bias is global_A_scale is global_B_scale is None
    assert (alpha, beta, bpreshuffle, apreshuffle) == (1, 0, True, False)
    assert A.dtype is B.dtype is torch.float4_e2m1fn_x2
    (rows, half), columns = A.shape, B.shape[0]
    assert B.shape[1] == half
    assert half % 128 == columns % 32 == 0
    flat = B.view(torch.uint8).flatten()
    n, k = torch.meshgrid(torch.arange(columns), torch.arange(half), indexing="ij")
    offset = n // 16 * 16 * half + k // 32 * 512 + k // 16 % 2 * 256 + n % 16 * 16 + k % 16
    right = E2M1[columns_of_bytes(flat[offset])] * _shuffled(B_scale, columns, half // 16)
    left = E2M1[columns_of_bytes(A)] * _shuffled(A_scale, rows, half // 16)
    out = torch.empty(-(-rows // 32) * 32, columns, dtype=dtype)
    out[:rows] = left @ right.T
    return out[:rows]


def _shuffled(scales, rows, groups):
    """Return the factors that `shuffle_scale` of AITER put into its order, for each number."""
    assert scales.dtype is torch.float8_e8m0fnu
    assert row_major(scales)
    assert scales.shape == (-(-rows // 256) * 256, -(-groups // 8) * 8)
    flat, wide = scales.view(torch.uint8).flatten(), scales.shape[1]
    n, c = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    offset = n // 32 * 32 * wide + c // 8 * 256 + c % 4 * 64 + n % 16 * 4 + c // 4 % 2 * 2
    return per_group(flat[offset + n // 16 % 2], 32)


XPU_FP8 = "fp8_gemm_w8a16(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_) -> Tensor"


def xpu_fp8(a, b, scales, bias):
    """Imitate vllm-xpu-kernels' `fp8_gemm_w8a16`."""
    assert row_major(a)
    assert b.dtype is torch.float8_e4m3fn
    assert b.stride(0) == 1
    assert scales.dtype is torch.float32
    assert scales.is_contiguous()
    if scales.ndim == 2:
        groups = b.shape[0] // 128, b.shape[1] // 128
        assert scales.shape == groups
        weight = b.double() * repeated(scales, b.shape, (128, 128))
    else:
        assert scales.numel() in (1, b.shape[1])
        weight = b.double() * scales.double()
    out = a.double() @ weight
    assert bias is None or bias.dtype is a.dtype
    return (out if bias is None else out + bias.double()).to(a.dtype)


XPU_INT4 = (
    "int4_gemm_w4a16(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, "
    "int group_size, Tensor? g_idx) -> Tensor"
)


def xpu_int4(a, b, bias, scales, zero, group_size, g_idx):
    """Imitate vllm-xpu-kernels' `int4_gemm_w4a16`."""
    assert row_major(a)
    assert with_k_inside(b)
    assert g_idx is None
    assert zero.dtype is torch.int8
    assert zero.tolist() == [8]
    assert scales.dtype is a.dtype
    assert scales.is_contiguous()
    codes = codes_of(b).double() - 8
    assert scales.shape == (codes.shape[0] // group_size, codes.shape[1])
    out = a.double() @ (codes * scales.double().repeat_interleave(group_size, 0))
    return (out if bias is None else out + bias.double()).to(a.dtype)
