"""Load tiles [GROUPS, WIDTH] of a row: as they are, gated, or normalized by their mean square.

    gated       activation(gate) * up, or activation(x) in float32, rounded once
    normalized  round(x * rsqrt(mean(x^2) + epsilon)) * weight

The normalized row is rounded to the activations' dtype before the product with the weight and
after it, as transformers does. `interleaved`: gate and up columns alternate (gate first), else
halves.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_columns(n_columns, first_group, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the column numbers [GROUPS, WIDTH] of some groups of a row, and which exist."""
    columns = first_group * WIDTH
    columns += tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return columns, columns < n_columns


@triton.jit
def beyond_count(counts_ptr, row, capacity):
    """Say whether a row of [experts * capacity] rows lies beyond its expert's count."""
    return row % capacity >= tl.load(counts_ptr + row // capacity)


@triton.jit
def half_columns(n_columns, GROUPS: tl.constexpr):
    """Return the column numbers [2 * GROUPS, 8] of a row, first all first halves of groups of 16.

    Threads load 8 numbers of 16 bits: this way the halves of a group meet in one.
    """
    half = tl.arange(0, 2 * GROUPS)
    columns = ((half % GROUPS) * 16 + (half // GROUPS) * 8)[:, None] + tl.arange(0, 8)[None, :]
    return columns, columns < n_columns


@triton.jit
def tile_columns(
    n_columns, first_group, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CODEC: tl.constexpr
):
    """Return the column numbers of some groups of a row as a codec wants them."""
    if CODEC == "nvfp4":
        columns, inside = half_columns(n_columns, GROUPS)
    else:
        columns, inside = group_columns(n_columns, first_group, GROUPS, WIDTH)
    return columns, inside


@triton.jit
def activate(gate, alpha, ACTIVATION: tl.constexpr):
    """Return the activation of gate (f32): one of `hal.ops.activations.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "swiglu_oai":
        return gate / (1.0 + tl.exp(-alpha * gate))
    elif ACTIVATION == "relu2":
        # Not by maximum, which drops NaN.
        gate = tl.where(gate < 0.0, 0.0, gate)
        return gate * gate
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) * (g + 0.044715 g^3)
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-doubled))


@triton.jit
def gate_numbers(gate, up, alpha, limit, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr):
    """Return activation(gate) * up, f32. CLAMPED: as in `gated_tile`."""
    if CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == "swiglu_oai":
        up += 1.0
    return activate(gate, alpha, ACTIVATION) * up


@triton.jit
def gated_tile(
    row_ptr, columns, inside, width, alpha, limit,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load gate and up of some columns [GROUPS, WIDTH] and return the product, f32.

    Without GATED there is no up. CLAMPED: gate to at most limit, up to [-limit, limit], NaN kept.
    """
    if not GATED:
        gate = tl.load(row_ptr + columns, mask=inside, other=0.0)
        return activate(gate.to(tl.float32), alpha, ACTIVATION)
    if INTERLEAVED:
        # One contiguous load of the pairs; two strided ones would touch every sector twice.
        pair = tl.arange(0, 2)[None, None, :]
        pairs = tl.load(
            row_ptr + columns[:, :, None] * 2 + pair,
            mask=tl.broadcast_to(inside[:, :, None], GROUPS, WIDTH, 2),
            other=0.0,
        )
        gate, up = tl.split(pairs)
    else:
        gate = tl.load(row_ptr + columns, mask=inside, other=0.0)
        up = tl.load(row_ptr + width + columns, mask=inside, other=0.0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    return gate_numbers(gate, up, alpha, limit, ACTIVATION, CLAMPED)


@triton.jit
def summed_tile(x_ptr, residual_ptr, columns, inside, RESIDUAL: tl.constexpr):
    """Load some columns [GROUPS, WIDTH] of a row, f32. RESIDUAL: add those of another, rounded."""
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def normalized_tile(x, root, weight_ptr, columns, inside, DTYPE: tl.constexpr):
    """Return x [GROUPS, WIDTH], f32, times root and weight, rounded to DTYPE after both."""
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    x = (x * root).to(DTYPE)
    return (x.to(tl.float32) * weight.to(tl.float32)).to(DTYPE).to(tl.float32)
