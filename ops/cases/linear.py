"""Problems of `linear`, compared with float64."""

from __future__ import annotations

from functools import partial

import torch

from hal.ops.bound_linear import Linear
from hal.ops.cases.trial import (
    QUANTIZES,
    TOLERANCE,
    Case,
    Findings,
    Trial,
    as_seen,
    calibrated,
    error,
    quantizers,
    random,
)
from hal.registry import Level

__all__ = ["LINEAR_CASES"]

BF16_STEP = 2.0**-8
"""Distance of neighbours in bf16, relative to them."""


def _level(bound: Linear) -> Level:
    level = bound.selection.level
    assert level is not None
    return level


def _sizes(trial: Trial, found: Findings, *, tokens: int, columns: int, rows: int) -> None:
    device = trial.device
    x = random(tokens, columns, seed=2, device=device)
    numbers = random(rows, columns, seed=1, device=device, scale=0.05)
    for of, quantized in quantizers(trial, "linear", "weight").items():
        weight = quantized(numbers, trial.scheme)
        bound = Linear(weight, tokens=tokens, **trial.options)
        found.demand(f"bound {bound.kernel}", bound.kernel == trial.kernel)
        seen = as_seen(x, weight, _level(bound))
        y = bound(x)
        found.demand(f"gave {y.dtype}", y.dtype is torch.bfloat16)
        found.near(f"product{of}", error(y, seen @ weight.dequantize().double().T), TOLERANCE)


def _bias_in_fp16(trial: Trial, found: Findings) -> None:
    device = trial.device
    weight = calibrated(random(48, 128, seed=1, device=device, scale=0.05).half(), trial.scheme)
    bias = random(48, seed=3, device=device).half()
    bound = Linear(weight, bias, dtype=torch.float16, tokens=32, **trial.options)
    x = random(32, 128, seed=2, device=device).half()
    seen = as_seen(x, weight, _level(bound))
    y = bound(x)
    found.demand(f"gave {y.dtype}", y.dtype is torch.float16)
    wanted = seen @ weight.dequantize().double().T + bias.double()
    found.near("product and bias", error(y, wanted), TOLERANCE)


def _nasty(trial: Trial, found: Findings) -> None:
    device = trial.device
    plain = random(64, 256, seed=1, device=device)
    plain[:16] = 0  # rows, and with block128 part of a block, of zeros
    weight = calibrated(plain, trial.scheme)
    bound = Linear(weight, tokens=32, **trial.options)
    none = bound(random(0, 256, seed=2, device=device))
    found.demand("no tokens give no rows", none.shape == (0, 64))
    x = random(32, 256, seed=2, device=device)
    x[3], x[5, 7], x[9, 0] = 0, float("nan"), float("inf")
    y = bound(x)
    found.demand("a NaN makes its whole row NaN", y[5].isnan().all())
    if trial.scheme != "bf16" and _level(bound) in QUANTIZES:
        found.demand("an infinity leaves nothing finite", not y[9].isfinite().any())
    rest = [row for row in range(32) if row not in (5, 9)]
    seen = as_seen(x, weight, _level(bound))[rest]
    wanted = seen @ weight.dequantize().double().T
    found.near("rows beside NaN and infinity", error(y[rest], wanted), TOLERANCE)
    found.demand("weights of zero give zeros", not y[rest][:, :16].any())
    # Where zero is a code like others, float32 may leave a rest of what that code adds.
    how = weight.scheme.activation
    left = 0.0 if how.symmetric or how.dynamic else 2**-20 * float(wanted.abs().amax())
    found.demand("a row of zeros gives zeros", bool((y[3].abs() <= left).all()))


def _strides(trial: Trial, found: Findings) -> None:
    device = trial.device
    weight = calibrated(random(128, 128, seed=1, device=device), trial.scheme)
    bound = Linear(weight, tokens=24, **trial.options)
    x = random(2, 12, 128, seed=2, device=device)
    wide = random(24, 256, seed=3, device=device)
    wide[:, :128] = x.reshape(24, 128)
    flat = bound(x.reshape(24, 128))
    alike = {
        "leading dimensions": bound(x).reshape(24, 128),
        "rows with a stride": bound(wide[:, :128]),
    }
    for what, other in alike.items():
        found.demand(f"{what} change the result", torch.equal(other, flat))
    # Libraries may take another path there, and sum in another order (torch in bf16 on AVX2).
    columns = bound(x.reshape(24, 128).T.contiguous().T)
    found.near("columns with a stride", error(columns, flat), BF16_STEP)


SIZES = ((1, 256, 128), (7, 128, 256), (64, 512, 384), (33, 200, 72), (130, 136, 40))
SMALL = {(1, 256, 128), (33, 200, 72)}
LINEAR_CASES = (
    *(
        Case(
            "linear",
            f"{tokens}x{columns}x{rows}",
            partial(_sizes, tokens=tokens, columns=columns, rows=rows),
            small=(tokens, columns, rows) in SMALL,
        )
        for tokens, columns, rows in SIZES
    ),
    Case("linear", "bias in fp16", _bias_in_fp16),
    Case("linear", "nasty input", _nasty, small=True),
    Case("linear", "shapes and strides", _strides),
)
