"""Imitate torchao: functions with its own signatures that check every argument."""

from __future__ import annotations

import torch
from adapter_fakes import repeated


def int_scaled_matmul(
    a: torch.Tensor, b: torch.Tensor, scales1: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Imitate `torchao.kernel.intmm.int_scaled_matmul`."""
    assert a.dtype is b.dtype is torch.int8
    assert a.shape[1] == b.shape[0]
    assert scales1.dtype is torch.float32
    assert scales1.shape == (a.shape[0], 1)
    assert scales1.is_contiguous()
    return ((a.long() @ b.long()).double() * scales1.double()).to(scales1.dtype)


SCALED_INT8_MM = "scaled_int8_mm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale) -> Tensor"


def scaled_int8_mm(A, B, A_scale, B_scale):
    """Imitate `torchao::scaled_int8_mm`: it reads A's scales by row, whatever their strides."""
    assert A.dtype is B.dtype is torch.int8
    assert A.shape[1] == B.shape[0]
    assert A_scale.dtype is B_scale.dtype is torch.float32
    assert A_scale.numel() == A.shape[0]
    assert B_scale.numel() == B.shape[1]
    assert A_scale.is_contiguous()
    assert B_scale.is_contiguous()
    sums = (A.long() @ B.long()).double()
    return (sums * A_scale.double().view(-1, 1) * B_scale.double()).to(A_scale.dtype)


def blockwise_fp8_gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    block_size: int = 128,
) -> torch.Tensor:
    """Imitate `torchao.kernel.blockwise_quantization.blockwise_fp8_gemm`."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert all(tensor.is_contiguous() for tensor in (a, a_s, b, b_s))
    assert a_s.dtype is b_s.dtype is torch.float32
    (rows, width), columns = a.shape, b.shape[0]
    assert b.shape == (columns, width)
    assert width % block_size == 0
    assert a_s.shape == (rows, width // block_size)
    assert b_s.shape == (-(-columns // block_size), width // block_size)
    left = a.double() * repeated(a_s, a.shape, (1, block_size))
    right = b.double() * repeated(b_s, b.shape, (block_size, block_size))
    return (left @ right.T).to(torch.bfloat16)
