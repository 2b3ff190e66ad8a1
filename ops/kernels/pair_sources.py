"""Prepare words of two bf16 numbers for quantizing: by a gate, a sum, or a norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import has_signed_pairs
from hal.ops.kernels.pairs import (
    fma_pair,
    high_number,
    low_number,
    multiply_pair,
    quick_power,
    quick_reciprocal,
    round_pair,
    unpack_again,
)
from hal.ops.kernels.scale_order import ScaleOrder
from hal.ops.kernels.source import activate, gate_numbers

ONE_PAIR = tl.constexpr(0x3F803F80)


@triton.jit
def add_square(number, total):
    """Add the square of a number to total, f32."""
    return tl.fma(number, number, total)


@triton.jit
def normalized(words, root, weight):
    """Return words times root, rounded, times weight, rounded."""
    low, high = unpack_again(words)
    return multiply_pair(round_pair(low * root, high * root), weight)


@triton.jit
def store_words(places, words, inside, FULL: tl.constexpr):
    """Store to places, all of them or those inside."""
    if FULL:
        tl.store(places, words)
    else:
        tl.store(places, words, mask=inside)


@triton.jit
def sum_of_words(words, others):
    """Return the sums of numbers, rounded once."""
    return fma_pair(words, tl.full(words.shape, ONE_PAIR, tl.int32), others)


@triton.jit
def quick_gate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr):
    """Return activation(gate) * up, f32; see `gate_numbers`.

    A sigmoid below 2^-126 is 0.
    """
    if ACTIVATION == "silu":
        if CLAMPED:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return gate * quick_reciprocal(1.0 + quick_power(gate * -1.4426950408889634)) * up
    else:
        return gate_numbers(gate, up, alpha, limit, ACTIVATION, CLAMPED)


@triton.jit
def gated_words(
    words, up, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr
):
    """Return activation(words) times up, rounded once; without GATED there is no up."""
    low, high = low_number(words), high_number(words)
    if GATED:
        low = quick_gate(low, low_number(up), alpha, limit, ACTIVATION, CLAMPED)
        high = quick_gate(high, high_number(up), alpha, limit, ACTIVATION, CLAMPED)
    else:
        low, high = activate(low, alpha, ACTIVATION), activate(high, alpha, ACTIVATION)
    return round_pair(low, high)


class Rows(NamedTuple):
    """Say what comes before quantizing rows of words, and how programs take them.

    Attributes:
        norm: A `Norm`, or None.
        gate: What `gate_options` returns, not interleaved.
        alpha: Of the activation.
        limit: Of the activation.
        counts: [experts], or None.
        capacity: Rows of an expert.
        scale_floor: Smallest float32 scale.
        exponent_rule: Addend and top exponent of scales that are powers of two.
        order: Where scales belong.
        n_groups: Groups of a row.
        parts: How many times as many groups a program takes.
        groups: Groups of a part, a power of two.
        warps: Warps of a program.
        registers: Most registers of a thread; 0 leaves that to the compiler.
    """

    norm: Any
    gate: dict[str, Any]
    alpha: float
    limit: float
    counts: torch.Tensor | None
    capacity: int
    scale_floor: float
    exponent_rule: tuple[int, int]
    order: ScaleOrder
    n_groups: int
    parts: int
    groups: int
    warps: int
    registers: int

    @property
    def programs(self) -> int:
        """Return how many programs take a row."""
        return -(-self.n_groups // (self.parts * self.groups))

    def options(self) -> dict[str, Any]:
        """Return the constants and options that kernels have in common."""
        gate = {name: value for name, value in self.gate.items() if name != "INTERLEAVED"}
        addend, top_exponent = self.exponent_rule
        return {
            "PARTS": self.parts,
            "GROUPS": self.groups,
            "NORM": self.norm is not None,
            **gate,
            "COUNTED": self.counts is not None,
            "ADDEND": addend,
            "TOP_EXPONENT": top_exponent,
            "ORDER": self.order.name,
            "SIGNED": has_signed_pairs(),
            "num_warps": self.warps,
            **({"maxnreg": self.registers} if self.registers else {}),
        }
