"""Kernels that other libraries bring: one small file each. Importing this attaches them."""

from __future__ import annotations

from hal.ops.adapters import (
    aiter,
    decode,
    deep_gemm,
    flashinfer,
    grouped_mm,
    int4pack,
    int8pack,
    int_mm,
    int_mm_zeros,
    ipex,
    ipex_xpu,
    scaled_mm,
    scaled_mm_blocked,
    scaled_mm_unit,
    torchao,
    vllm_cutlass,
    vllm_mixed,
    vllm_xpu,
)

__all__ = [
    "aiter",
    "decode",
    "deep_gemm",
    "flashinfer",
    "grouped_mm",
    "int4pack",
    "int8pack",
    "int_mm",
    "int_mm_zeros",
    "ipex",
    "ipex_xpu",
    "scaled_mm",
    "scaled_mm_blocked",
    "scaled_mm_unit",
    "torchao",
    "vllm_cutlass",
    "vllm_mixed",
    "vllm_xpu",
]
