"""Load tiles [GROUPS, WIDTH] of a row: as they are, gated, or normalized by their mean square.

    gated       activation(gate) * up                in float32, rounded once
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
def half_columns(n_columns, GROUPS: tl.constexpr):
    """Return the column numbers [2 * GROUPS, 8] of a row, first all first halves of groups of 16.

    Threads load 8 numbers of 16 bits: this way the halves of a group meet in one.
    """
    half = tl.arange(0, 2 * GROUPS)
    columns = ((half % GROUPS) * 16 + (half // GROUPS) * 8)[:, None] + tl.arange(0, 8)[None, :]
    return columns, columns < n_columns


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of gate (f32): silu, gelu (erf) or gelu_tanh."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) * (g + 0.044715 g^3)
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-doubled))


@triton.jit
def gated_tile(
    row_ptr, columns, inside, width,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load gate and up of some columns [GROUPS, WIDTH] and return the product, f32."""
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
    return activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)


@triton.jit
def normalized_tile(
    x_ptr, residual_ptr, total_ptr, weight_ptr, columns, inside, n_columns, epsilon,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Load a whole row [GROUPS, WIDTH] and return it normalized and weighted, f32.

    RESIDUAL: add another row first, and store the sum, rounded, in total.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if RESIDUAL:
        x += tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        total = x.to(DTYPE)
        tl.store(total_ptr + columns, total, mask=inside)
        x = total.to(tl.float32)
    square = tl.sum(tl.sum(x * x, axis=1), axis=0)
    x = (x * tl.rsqrt(square / n_columns + epsilon)).to(DTYPE)
    return (x.to(tl.float32) * weight.to(tl.float32)).to(DTYPE).to(tl.float32)
