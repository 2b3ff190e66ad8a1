"""Problems of the quantizing ops, compared with their reference: bit by bit where it says how."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hal.ops.activations import ACTIVATIONS, activation_of
from hal.ops.cases.trial import Case, Findings, Trial, fixed_inputs, random
from hal.ops.quantize import fixed_of, quantize, quantize_reference
from hal.ops.quantize_fused import gated, quantize_rms_norm, quantize_swiglu, rms_norm
from hal.quant.represent import Coded, encoding_of, numbers
from hal.quant.scheme import Scheme, find_scheme

__all__ = ["QUANTIZING_CASES", "near", "same"]

Parts = tuple[torch.Tensor, ...]
MOVED = 0.03
"""Relative error of rows that another order of a sum moved to the next code now and then."""


def same(found: Parts, wanted: Parts) -> str:
    """Return how two results differ in kind, shape or bits; empty if they do not."""
    if len(found) != len(wanted):
        return f"{len(found)} tensors, needed {len(wanted)}"
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        kinds = [(part.dtype, tuple(part.shape), part.device) for part in (one, other)]
        if kinds[0] != kinds[1]:
            return f"tensor {place}: {kinds[0]}, needed {kinds[1]}"
        if one.numel():
            bits = [part.contiguous().view(torch.uint8) for part in (one, other)]
            if not torch.equal(*bits):
                return f"tensor {place}: {int((bits[0] != bits[1]).sum())} bytes differ"
    return ""


def near(found: Parts, wanted: Parts, scheme: Scheme, columns: int) -> tuple[str, float]:
    """Return how two results differ in shape or NaN, and their relative error as numbers."""
    if [part.shape for part in found] != [part.shape for part in wanted]:
        return "shapes differ", 0.0
    one, other = (_decoded(parts, scheme, columns) for parts in (found, wanted))
    if not torch.equal(one.isnan(), other.isnan()):
        return "NaN stand elsewhere", 0.0
    if not one.numel():
        return "", 0.0
    one, other = one.nan_to_num(), other.nan_to_num()
    return "", float((one - other).norm() / (other.norm() + 1e-20))


def _decoded(parts: Parts, scheme: Scheme, columns: int) -> torch.Tensor:
    how = scheme.activation
    codes, scales, *others = parts
    second, zeros = (*others, None, None)[:2] if how.symmetric else (None, *others)
    encoding = str(how.format)
    if how.format == "e4m3fn":
        encoding = str(codes.dtype).removeprefix("torch.float8_")
    return numbers(Coded(codes, scales, second, zeros), how, encoding, columns)


def _reference(trial: Trial, rows: torch.Tensor, fixed: Any = None) -> Parts:
    """Return what the reference gives, in the encoding of the device."""
    from hal.runtime import platform_of

    how = find_scheme(trial.scheme).activation
    spec = platform_of(rows.device, trial.platform).device(rows.device.index)
    encoding = encoding_of(how.format, spec.formats.fp8_encoding)
    return quantize_reference(rows, encoding, how, fixed)


def _quantize(trial: Trial, found: Findings, *, shape: tuple[int, int], nasty: bool) -> None:
    x = random(*shape, seed=1, device=trial.device)
    if nasty:
        x[1], x[2, 7], x[4, 3], x[3] = 0, float("nan"), float("inf"), x[3] * 1e-4
    scheme = find_scheme(trial.scheme)
    given = {name: part.to(trial.device) for name, part in fixed_inputs(scheme).items()}
    codes = quantize(x, scheme, **given, **trial.options)
    wanted = _reference(trial, x, fixed_of(**given))
    if nasty:  # of a NaN, neither sign nor payload counts
        fault, moved = near(codes, wanted, scheme, shape[1])
        found.demand(fault or f"relative error {moved:.3g}", not fault and moved == 0)
        return
    fault = same(codes, wanted)
    found.demand(fault, not fault)


def _norm(trial: Trial, found: Findings, *, shape: tuple[int, int], residual: bool) -> None:
    x = random(*shape, seed=1, device=trial.device)
    if shape[0] > 4:
        x[1], x[2, 7], x[3] = 0, float("nan"), x[3] * 1e-4
    weight = random(shape[1], seed=2, device=trial.device) + 1
    added = random(*shape, seed=3, device=trial.device) if residual else None
    given = {name: part.to(trial.device) for name, part in fixed_inputs(trial.scheme).items()}
    codes = quantize_rms_norm(
        x, weight, trial.scheme, epsilon=1e-5, residual=added, **given, **trial.options
    )
    if added is not None:
        *parts, total = codes
        x, codes = x + added, tuple(parts)
        alike = torch.isclose(total, x, rtol=2**-7 if trial.interpreted else 0, equal_nan=True)
        found.demand("the sum with the residual", alike.all())
    _compare(trial, found, codes, rms_norm(x, weight, 1e-5, None)[0], fixed_of(**given))


def _swiglu(
    trial: Trial, found: Findings, *, shape: tuple[int, int], activation: str, interleaved: bool
) -> None:
    x = random(shape[0], 2 * shape[1], seed=1, device=trial.device)
    if shape[0] > 4:
        x[1], x[2, 7] = 0, float("nan")
    given = {name: part.to(trial.device) for name, part in fixed_inputs(trial.scheme).items()}
    codes = quantize_swiglu(
        x, trial.scheme, activation=activation, interleaved=interleaved, **given, **trial.options
    )
    how = activation_of("quantize_swiglu", activation, interleaved=interleaved)
    _compare(trial, found, codes, gated(x, how), fixed_of(**given))


def _compare(trial: Trial, found: Findings, codes: Parts, rows: torch.Tensor, fixed: Any) -> None:
    wanted = _reference(trial, rows, fixed)
    fault, moved = near(codes, wanted, find_scheme(trial.scheme), rows.shape[1])
    found.demand(fault, not fault)
    found.near("codes", moved, MOVED)


SHAPES = ((0, 64), (1, 1), (5, 200), (33, 512))
QUANTIZING_CASES = (
    *(
        Case(
            "quantize", f"{rows}x{columns}", partial(_quantize, shape=(rows, columns), nasty=False)
        )
        for rows, columns in (*SHAPES, (70, 4096))
    ),
    Case("quantize", "nasty input", partial(_quantize, shape=(6, 200), nasty=True), small=True),
    *(
        Case(
            "quantize_rms_norm",
            f"{rows}x{columns}" + ", residual" * residual,
            partial(_norm, shape=(rows, columns), residual=residual),
            small=residual and rows == 5,
        )
        for rows, columns in SHAPES
        for residual in (False, True)
    ),
    *(
        Case(
            "quantize_swiglu",
            f"{rows}x{columns}, {activation}" + ", interleaved" * interleaved,
            partial(_swiglu, shape=(rows, columns), activation=activation, interleaved=interleaved),
            small=rows == 5 and activation == "silu",
        )
        for rows, columns in SHAPES
        for activation in ACTIVATIONS
        for interleaved in (False, True)
    ),
)
