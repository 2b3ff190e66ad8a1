"""Imitate IPEX: check every argument, keep the packed weight in an order of its own, undo it."""

from __future__ import annotations

import torch

SECRET = 0x5A
"""What packing changes bytes by, so that skipping it shows."""
ROWS = 64
"""To a multiple of which IPEX pads rows; 2.8.0 does on every processor."""

PACK = (
    "woq_linear_pack_weight(Tensor W, str W_dtype, int[] W_shape, Tensor scales, "
    "Tensor? zero_points, Tensor? B, Tensor? g_idx, int group_size, int lowp_mode) "
    "-> (Tensor, Tensor[], Tensor[]?, Tensor[]?, Tensor?)"
)
MULTIPLY = (
    "woq_linear(Tensor _0, Tensor _1, str _2, int[] _3, Tensor[] _4, Tensor[]? _5, Tensor[]? _6, "
    "Tensor? _7, int _8, int _9, int _10, Tensor? _11) -> Tensor"
)
MULTIPLY_BY_HANDLE = "ipex_woq_linear(Tensor input, Tensor W_prepack) -> Tensor"


def padded(tensor, value=0):
    """Return a tensor whose rows are padded to a multiple of `ROWS`."""
    missing = -tensor.shape[0] % ROWS
    return torch.cat((tensor, tensor.new_full((missing, *tensor.shape[1:]), value)))


def in_every_dtype(tensor, *further):
    kinds = torch.float32, torch.float16, torch.bfloat16, *further
    return [tensor.to(kind) for kind in kinds]


def pack(W, W_dtype, W_shape, scales, zero_points, B, g_idx, group_size, lowp_mode):
    """Imitate `ipex_prepack::woq_linear_pack_weight`."""
    rows, columns = W_shape
    assert B is g_idx is None
    assert lowp_mode == 0
    assert W.is_contiguous()
    assert scales.dtype is torch.float32
    if W_dtype == "int4":
        assert W.dtype is torch.uint8
        assert W.shape == (rows, columns // 2)
        assert scales.shape == (rows, columns // group_size)
    else:
        assert W_dtype == "int8"
        assert W.dtype is torch.int8
        assert W.shape == (rows, columns)
        assert scales.shape == (rows,)
        assert group_size == -1
        assert zero_points is None
    zeros = None
    if zero_points is not None:
        assert zero_points.dtype is torch.float32
        assert zero_points.shape == scales.shape
        zeros = in_every_dtype(padded(zero_points), torch.int8)
    return padded(W) ^ SECRET, in_every_dtype(padded(scales, 1)), zeros, None, None


def multiply(x, packed, kind, shape, scales, zeros, bias, g_idx, group, lowp, act_mode, rest):
    """Imitate `torch_ipex::woq_linear`."""
    assert bias is g_idx is rest is None
    assert (lowp, act_mode) == (0, 0)
    assert x.is_contiguous()
    assert [t.dtype for t in scales] == [torch.float32, torch.float16, torch.bfloat16]
    rows, columns = shape
    raw = (packed ^ SECRET)[:rows]
    own = scales[0][:rows].double()
    if kind == "int8":
        wide = raw.double() * own.unsqueeze(-1)
    else:
        codes = torch.stack((raw & 15, raw >> 4), -1).flatten(-2).double()
        middle = torch.full_like(own, 8) if zeros is None else zeros[0][:rows].double()
        assert zeros is None or len(zeros) == 4
        middle = middle.repeat_interleave(group, 1)
        wide = (codes - middle) * own.repeat_interleave(group, 1)
    assert wide.shape == (rows, columns)
    return (x.double() @ wide.T).to(x.dtype)


class Packed:
    """What `weight_only_qlinear_prepack` returns: it lives as long as somebody holds it."""

    alive: dict[int, Packed] = {}  # noqa: RUF012

    def __init__(self, weight, wide, bias) -> None:
        self._weight, self.wide, self.bias = weight, wide, bias
        self.alive[id(self)] = self

    def get_data_handle(self):
        return torch.tensor([id(self)])

    def get_weight(self):
        return self._weight


def pack_to_object(
    W, W_dtype, W_shape, scales, zero_points, B, g_idx, batch_size, group_size, lowp_mode,
    act_quant_mode, cache_weight_for_large_batch=False,
):  # fmt: skip
    """Imitate `ipex_prepack::weight_only_qlinear_prepack` for fp8."""
    assert zero_points is g_idx is batch_size is None
    assert (W_dtype, lowp_mode, act_quant_mode) == (4, 0, 0)
    assert cache_weight_for_large_batch is False
    assert W.dtype is torch.float8_e4m3fn
    assert W.is_contiguous()
    rows, columns = W_shape
    assert W.shape == (rows, columns)
    assert scales.dtype is torch.float32
    if group_size == -1:
        assert scales.shape == (rows,)
        wide = W.double() * scales.double().unsqueeze(-1)
    else:
        assert scales.shape == (rows, columns // group_size)
        assert scales.is_contiguous()
        wide = W.double() * scales.double().repeat_interleave(group_size, 1)
    return Packed(padded(W.view(torch.uint8)).view(W.dtype), wide, B)


def multiply_by_handle(input, W_prepack):
    """Imitate `torch_ipex::ipex_woq_linear`."""
    kept = Packed.alive[int(W_prepack)]
    assert input.is_contiguous()
    out = input.double() @ kept.wide.T
    return (out if kept.bias is None else out + kept.bias.double()).to(input.dtype)
