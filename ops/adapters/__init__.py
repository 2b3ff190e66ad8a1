"""Kernels that other libraries bring: one small file each. Importing this attaches them."""

from __future__ import annotations

from hal.ops.adapters import decode, grouped_mm, int_mm, int_mm_zeros, scaled_mm

__all__ = ["decode", "grouped_mm", "int_mm", "int_mm_zeros", "scaled_mm"]
