"""Run experts on a few tokens in two launches, without a sort and without matrix instructions.

    first    h[s] = activation(x[t] @ w13[e].T + bias13[e])         a program: a slot s = (t, e)
    second   out[t] = shared[t]                                     a program: a token
                      + sum_j weight[t, j] * (h[t, j] @ w2[e_j].T + bias2[e_j])

Both do so for some rows of the weight.

A lane holds 16 bytes of each weight row of its program and the activations that they meet, as in
`gemv`, whose decoding this is; lanes of the second kernel lie along k and along the experts of the
token, so that all of its weight can be on its way at once. Sums are float32 in a fixed order, the
output is written once, and slots of absent ids are neither read nor written.

QUANT: activations are rounded to the codes of the scheme in registers, with the formulas of
`encode`. What a whole row must tell of h, its largest magnitude, the first kernel leaves for each
of its programs, and the second takes the largest of those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hal.ops.kernels.common import let_next_start, wait_for_previous
from hal.ops.kernels.encode import INFINITY_BITS, magnitude_bits
from hal.ops.kernels.lane_rows import (
    factors_of_rows,
    lane_products,
    load_lanes,
    load_weights,
    rounded_lanes,
    scale_of,
    top_of_group,
    top_of_lanes,
)
from hal.ops.kernels.packed import twos_complement
from hal.ops.kernels.source import activate, gate_numbers

# As many steps along k are written out, so that loads of one overlap products of another.
AT_ONCE = tl.constexpr(4)
# As many magnitudes a lane loads at once.
TOPS = tl.constexpr(16)


@triton.jit
def _first_kernel(
    x_ptr, w_ptr, h_ptr, ids_ptr, scales_ptr, zeros_ptr, second_ptr, bias_ptr, given_ptr, tops_ptr,
    n_experts, n_rows, k_size, stride_xm, stride_we, stride_wn, stride_wk,
    stride_se, stride_sn, stride_sk, stride_2e, stride_2n, stride_be, n_tops,
    alpha, limit, quant_max, scale_floor, unit,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    HELD: tl.constexpr,
    CODES: tl.constexpr, FNUZ: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr,
    SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANT: tl.constexpr, CODEC: tl.constexpr, CONVERTS: tl.constexpr, STATIC: tl.constexpr,
    WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= n_experts):
        return
    FOUR_BITS: tl.constexpr = (CODES == "int4" or CODES == "uint4") or CODES == "e2m1"
    PER_BYTE: tl.constexpr = 2 if FOUR_BITS else 1
    W: tl.constexpr = HELD if CODES == "" else HELD // (4 * PER_BYTE)
    APART: tl.constexpr = 1 if WORDS or CODES == "" else 4
    # Up rows lie behind all gate rows, or each behind its own.
    STEP: tl.constexpr = 2 if GATED and INTERLEAVED else 1
    first_row = tl.program_id(1) * ROWS
    numbers = first_row + tl.arange(0, ROWS)
    inside = numbers < n_rows
    gate_rows = numbers * STEP
    up_from = 1 if INTERLEAVED else n_rows
    up_rows = gate_rows + up_from
    nothing = n_rows >> 31
    w_ptr += expert * stride_we
    scales_ptr += expert * stride_se
    zeros_ptr += expert * stride_se
    x_ptr += (slot // TOP_K).to(tl.int64) * stride_xm
    lane = tl.arange(0, LANES)
    word = tl.arange(0, W) * (APART * stride_wk)
    gate_ptrs = w_ptr + (gate_rows.to(tl.int64) * stride_wn)[:, None, None] + word[None, None, :]
    up_ptrs = w_ptr + (up_rows.to(tl.int64) * stride_wn)[:, None, None] + word[None, None, :]
    # All that memory is asked for at once is asked for before anything waits for another thread.
    gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3 = _load_first(
        gate_ptrs, up_ptrs, scales_ptr, x_ptr, gate_rows, up_rows, inside, lane * HELD, k_size,
        stride_wk, stride_sn, stride_sk, GATED,
        CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    gate_second, gate_bias = factors_of_rows(
        expert, gate_rows, inside, second_ptr, bias_ptr, stride_2e, stride_2n, stride_be,
        SECOND, HAS_BIAS,
    )  # fmt: skip
    up_second, up_bias = gate_second, gate_bias
    if GATED:
        up_second, up_bias = factors_of_rows(
            expert, up_rows, inside, second_ptr, bias_ptr, stride_2e, stride_2n, stride_be,
            SECOND, HAS_BIAS,
        )  # fmt: skip
    scale = tl.full((LANES,), 1.0, tl.float32)
    row_factor = 1.0
    if QUANT == "row":
        if STEPS == 1:
            top = tl.max(top_of_lanes(x0, x1, x2, x3, HELD), axis=0)
        else:
            # The row is read twice, the second time from L1.
            column = tl.arange(0, WIDTH)
            whole = tl.load(x_ptr + column, mask=column < k_size, other=0.0).to(tl.float32)
            top = tl.max(magnitude_bits(whole), axis=0)
        scale, _ = scale_of(tl.zeros((LANES,), tl.int32) + top, quant_max, scale_floor)
        row_factor = tl.where(top >= INFINITY_BITS, float("nan"), unit)
        if STATIC:
            scale = tl.zeros((LANES,), tl.float32) + tl.load(given_ptr)
    gate_total = tl.zeros((ROWS, LANES), tl.float32)
    up_total = tl.zeros((ROWS, LANES), tl.float32)
    if STEPS <= AT_ONCE:
        for step in tl.static_range(0, STEPS):
            first_k = step * (LANES * HELD) + lane * HELD
            if step + 1 < STEPS:
                # The next step's weights are on their way while these are multiplied.
                next_gate, next_gate_scale, next_up, next_up_scale, n0, n1, n2, n3 = _load_first(
                    gate_ptrs, up_ptrs, scales_ptr, x_ptr, gate_rows, up_rows, inside,
                    first_k + LANES * HELD, k_size, stride_wk, stride_sn, stride_sk, GATED,
                    CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
                )  # fmt: skip
            gate_total, up_total = _add_first(
                gate_total, up_total, gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3,
                scale, zeros_ptr, first_row, n_rows, up_from, first_k, k_size, stride_sn, stride_sk,
                quant_max, scale_floor, nothing, STEP, GATED, QUANT, CODEC, CONVERTS, STATIC,
                PLANES, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
            )  # fmt: skip
            if step + 1 < STEPS:
                gate_codes, gate_scale = next_gate, next_gate_scale
                up_codes, up_scale = next_up, next_up_scale
                x0, x1, x2, x3 = n0, n1, n2, n3
    else:
        for step in range(0, STEPS):
            first_k = step * (LANES * HELD) + lane * HELD
            gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3 = _load_first(
                gate_ptrs, up_ptrs, scales_ptr, x_ptr, gate_rows, up_rows, inside, first_k, k_size,
                stride_wk, stride_sn, stride_sk, GATED,
                CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
            )  # fmt: skip
            gate_total, up_total = _add_first(
                gate_total, up_total, gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3,
                scale, zeros_ptr, first_row, n_rows, up_from, first_k, k_size, stride_sn, stride_sk,
                quant_max, scale_floor, nothing, STEP, GATED, QUANT, CODEC, CONVERTS, STATIC,
                PLANES, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
            )  # fmt: skip
    if DEPENDENT:
        # Not before: those that wait would take the room of those that have not begun.
        let_next_start()
    gate = tl.sum(gate_total, axis=1)
    up = tl.sum(up_total, axis=1)
    if QUANT == "row":
        # As one number: the scale is the same in all lanes.
        row_factor *= tl.max(scale, axis=0)
        gate *= row_factor
        up *= row_factor
    gate = gate * gate_second + gate_bias
    if GATED:
        up = up * up_second + up_bias
        h = gate_numbers(gate, up, alpha, limit, ACTIVATION, CLAMPED)
    else:
        h = activate(gate, alpha, ACTIVATION)
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + slot.to(tl.int64) * n_rows + numbers, h, mask=inside)
    if QUANT == "row":
        bits = magnitude_bits(h.to(tl.float32))
        top = tl.max(tl.where(inside, bits, 0), axis=0)
        tl.store(tops_ptr + slot * n_tops + tl.program_id(1), top)


@triton.jit
def _load_first(
    gate_ptrs, up_ptrs, scales_ptr, x_ptr, gate_rows, up_rows, inside, first_k, k_size,
    stride_wk, stride_sn, stride_sk, GATED: tl.constexpr,
    CODES: tl.constexpr, PER_BYTE: tl.constexpr, APART: tl.constexpr, WORDS: tl.constexpr,
    WHOLE: tl.constexpr, HELD: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """Load what a step of the first kernel multiplies; up is gate where there is none."""
    left = k_size - first_k
    base = tl.zeros(first_k.shape, tl.int64)
    gate_codes, gate_scale = load_weights(
        gate_ptrs, scales_ptr, base, gate_rows, inside, first_k, left, base, stride_wk, stride_sn,
        stride_sk, CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    up_codes, up_scale = gate_codes, gate_scale
    if GATED:
        up_codes, up_scale = load_weights(
            up_ptrs, scales_ptr, base, up_rows, inside, first_k, left, base, stride_wk, stride_sn,
            stride_sk, CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
        )  # fmt: skip
    x0, x1, x2, x3 = load_lanes(x_ptr + first_k, left, HELD, WHOLE)
    return gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3


@triton.jit
def _add_first(
    gate_total, up_total, gate_codes, gate_scale, up_codes, up_scale, x0, x1, x2, x3,
    scale, zeros_ptr, first_row, n_rows, up_from, first_k, k_size, stride_sn, stride_sk,
    quant_max, scale_floor, nothing,
    STEP: tl.constexpr, GATED: tl.constexpr, QUANT: tl.constexpr, CODEC: tl.constexpr,
    CONVERTS: tl.constexpr, STATIC: tl.constexpr, PLANES: tl.constexpr,
    CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Add the products of a step to the totals of gate and up, [rows, lanes]."""
    factor = scale
    if QUANT == "group":
        top = top_of_group(top_of_lanes(x0, x1, x2, x3, HELD), 128 // HELD)
        scale, factor = scale_of(top, quant_max, scale_floor)
    x0, x1, x2, x3 = rounded_lanes(
        x0, x1, x2, x3, scale, quant_max, HELD, CODEC, CONVERTS, STATIC, PLANES
    )
    if PLANES:
        gate_codes, up_codes = twos_complement(gate_codes), twos_complement(up_codes)
    zero_ptrs = zeros_ptr + tl.where(first_k < k_size, first_k // GROUP, 0) * stride_sk
    gate = lane_products(
        gate_codes, gate_scale, first_row, n_rows, zero_ptrs, stride_sn * STEP, x0, x1, x2, x3,
        nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    if QUANT == "group":
        gate *= factor[None, :]
    gate_total += gate
    if GATED:
        up = lane_products(
            up_codes, up_scale, first_row, n_rows, zero_ptrs + up_from * stride_sn,
            stride_sn * STEP, x0, x1, x2, x3, nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
        )  # fmt: skip
        if QUANT == "group":
            up *= factor[None, :]
        up_total += up
    return gate_total, up_total


@triton.jit
def _second_kernel(
    h_ptr, w_ptr, out_ptr, ids_ptr, weights_ptr, shared_ptr, scales_ptr, zeros_ptr, second_ptr,
    bias_ptr, given_ptr, tops_ptr,
    n_experts, n_rows, k_size, stride_om, stride_ym, stride_we, stride_wn, stride_wk,
    stride_se, stride_sn, stride_sk, stride_2e, stride_2n, stride_be, n_tops,
    quant_max, scale_floor, unit,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr, HELD: tl.constexpr, CODES: tl.constexpr, FNUZ: tl.constexpr,
    WORDS: tl.constexpr, WHOLE: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, PLANES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, SHARED: tl.constexpr,
    QUANT: tl.constexpr, CODEC: tl.constexpr, CONVERTS: tl.constexpr, STATIC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """EXPERTS at a time lie side by side along the lanes, LANES for each."""
    token = tl.program_id(0)
    FOUR_BITS: tl.constexpr = (CODES == "int4" or CODES == "uint4") or CODES == "e2m1"
    PER_BYTE: tl.constexpr = 2 if FOUR_BITS else 1
    W: tl.constexpr = HELD if CODES == "" else HELD // (4 * PER_BYTE)
    APART: tl.constexpr = 1 if WORDS or CODES == "" else 4
    ALL: tl.constexpr = EXPERTS * LANES
    first_row = tl.program_id(1) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n_rows
    nothing = n_rows >> 31
    lane = tl.arange(0, ALL)
    word = tl.arange(0, W) * (APART * stride_wk)
    w_ptrs = w_ptr + (rows.to(tl.int64) * stride_wn)[:, None, None] + word[None, None, :]
    result = tl.zeros((ROWS,), tl.float32)
    if SHARED:
        shared = shared_ptr + token.to(tl.int64) * stride_ym + rows
        result += tl.load(shared, mask=inside, other=0.0).to(tl.float32)
    for first in tl.static_range(0, TOP_K, EXPERTS):
        j = first + lane // LANES
        expert = tl.load(ids_ptr + token * TOP_K + j, mask=j < TOP_K, other=-1).to(tl.int64)
        present = (expert >= 0) & (expert < n_experts)
        expert = tl.where(present, expert, 0)
        first_k = lane % LANES * HELD
        left = tl.where(present, k_size - first_k, 0)
        codes, w_scale = load_weights(
            w_ptrs, scales_ptr, expert * stride_we, rows, inside, first_k, left, expert * stride_se,
            stride_wk, stride_sn, stride_sk,
            CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
        )  # fmt: skip
        one = first + tl.arange(0, EXPERTS)
        number = tl.load(ids_ptr + token * TOP_K + one, mask=one < TOP_K, other=-1).to(tl.int64)
        exists = (number >= 0) & (number < n_experts)
        number = tl.where(exists, number, 0)
        mask = inside[:, None] & exists[None, :]
        factor = tl.zeros((ROWS, EXPERTS), tl.float32) + unit
        bias = tl.zeros((ROWS, EXPERTS), tl.float32)
        weight = tl.full((EXPERTS,), 1.0, tl.float32)
        if SECOND:
            second = (number * stride_2e)[None, :] + (rows * stride_2n)[:, None]
            factor *= tl.load(second_ptr + second, mask=mask, other=0.0)
        if HAS_BIAS:
            bias_ptrs = bias_ptr + (number * stride_be)[None, :] + rows[:, None]
            bias = tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * TOP_K + one, mask=exists, other=0.0)
            weight = weight.to(tl.float32)
        if DEPENDENT:
            # What is above does not depend on the first kernel.
            wait_for_previous()
        slot = (token * TOP_K + j).to(tl.int64)
        x0, x1, x2, x3 = load_lanes(h_ptr + slot * k_size + first_k, left, HELD, WHOLE)
        scale = tl.full((ALL,), 1.0, tl.float32)
        a_factor = scale
        if QUANT == "row":
            # Of all programs that made the row: each lane looks at some, then at its neighbours'.
            top = tl.zeros((ALL,), tl.int32)
            for piece in range(0, n_tops, LANES * TOPS):
                made = (piece + lane % LANES * TOPS)[:, None] + tl.arange(0, TOPS)[None, :]
                tops = tops_ptr + (slot * n_tops)[:, None] + made
                there = present[:, None] & (made < n_tops)
                tops = tl.load(tops, mask=there, other=0)
                top = tl.maximum(top, tl.max(tops, axis=1))
            scale, a_factor = scale_of(top_of_group(top, LANES), quant_max, scale_floor)
            if STATIC:
                given = tl.load(given_ptr)
                a_factor = tl.where(a_factor == a_factor, given, a_factor)
                scale = tl.zeros((ALL,), tl.float32) + given
        total = tl.zeros((ROWS, ALL), tl.float32)
        if STEPS <= AT_ONCE:
            for step in tl.static_range(0, STEPS):
                this_k = step * (LANES * HELD) + first_k
                if step + 1 < STEPS:
                    next_codes, next_scale, n0, n1, n2, n3 = _load_second(
                        w_ptrs, scales_ptr, h_ptr + slot * k_size, expert, present, rows, inside,
                        this_k + LANES * HELD, k_size, stride_we, stride_se, stride_wk, stride_sn,
                        stride_sk, CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP,
                        SCALE_ROWS,
                    )  # fmt: skip
                total += _second_products(
                    codes, w_scale, x0, x1, x2, x3, scale, a_factor, zeros_ptr + expert * stride_se,
                    first_row, n_rows, this_k, present, k_size, stride_sn, stride_sk, quant_max,
                    scale_floor, nothing, QUANT, CODEC, CONVERTS, STATIC, PLANES,
                    CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
                )  # fmt: skip
                if step + 1 < STEPS:
                    codes, w_scale = next_codes, next_scale
                    x0, x1, x2, x3 = n0, n1, n2, n3
        else:
            for step in range(0, STEPS):
                this_k = step * (LANES * HELD) + first_k
                codes, w_scale, x0, x1, x2, x3 = _load_second(
                    w_ptrs, scales_ptr, h_ptr + slot * k_size, expert, present, rows, inside,
                    this_k, k_size, stride_we, stride_se, stride_wk, stride_sn, stride_sk,
                    CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
                )  # fmt: skip
                total += _second_products(
                    codes, w_scale, x0, x1, x2, x3, scale, a_factor, zeros_ptr + expert * stride_se,
                    first_row, n_rows, this_k, present, k_size, stride_sn, stride_sk, quant_max,
                    scale_floor, nothing, QUANT, CODEC, CONVERTS, STATIC, PLANES,
                    CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
                )  # fmt: skip
        sums = tl.sum(total.reshape(ROWS, EXPERTS, LANES), axis=2) * factor + bias
        result += tl.sum(tl.where(mask, sums * weight[None, :], 0.0), axis=1)
    out_ptrs = out_ptr + token.to(tl.int64) * stride_om + rows
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_second(
    w_ptrs, scales_ptr, h_ptrs, expert, present, rows, inside, first_k, k_size,
    stride_we, stride_se, stride_wk, stride_sn, stride_sk,
    CODES: tl.constexpr, PER_BYTE: tl.constexpr, APART: tl.constexpr, WORDS: tl.constexpr,
    WHOLE: tl.constexpr, HELD: tl.constexpr, SCALE_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """Load what a step of the second kernel multiplies."""
    left = tl.where(present, k_size - first_k, 0)
    codes, scale = load_weights(
        w_ptrs, scales_ptr, expert * stride_we, rows, inside, first_k, left, expert * stride_se,
        stride_wk, stride_sn, stride_sk,
        CODES, PER_BYTE, APART, WORDS, WHOLE, HELD, SCALE_FORMAT, GROUP, SCALE_ROWS,
    )  # fmt: skip
    x0, x1, x2, x3 = load_lanes(h_ptrs + first_k, left, HELD, WHOLE)
    return codes, scale, x0, x1, x2, x3


@triton.jit
def _second_products(
    codes, w_scale, x0, x1, x2, x3, scale, factor, zero_ptrs, first_row, n_rows, first_k, present,
    k_size, stride_sn, stride_sk, quant_max, scale_floor, nothing,
    QUANT: tl.constexpr, CODEC: tl.constexpr, CONVERTS: tl.constexpr, STATIC: tl.constexpr,
    PLANES: tl.constexpr, CODES: tl.constexpr, FNUZ: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    GROUP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Return the products of a step, [rows, lanes]."""
    if QUANT == "group":
        top = top_of_group(top_of_lanes(x0, x1, x2, x3, HELD), 128 // HELD)
        scale, factor = scale_of(top, quant_max, scale_floor)
    x0, x1, x2, x3 = rounded_lanes(
        x0, x1, x2, x3, scale, quant_max, HELD, CODEC, CONVERTS, STATIC, PLANES
    )
    if PLANES:
        codes = twos_complement(codes)
    group = tl.where(present & (first_k < k_size), first_k // GROUP, 0)
    part = lane_products(
        codes, w_scale, first_row, n_rows, zero_ptrs + group * stride_sk, stride_sn, x0, x1, x2, x3,
        nothing, CODES, FNUZ, SCALE_FORMAT, GROUP, HELD,
    )  # fmt: skip
    if QUANT != "":
        part *= factor[None, :]
    return part
