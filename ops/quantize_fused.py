"""Quantize activations together with what comes before them: a norm, or a gated activation.

    quantize_rms_norm  quantize(round(x * rsqrt(mean(x^2) + epsilon)) * weight)
    quantize_swiglu    quantize(round(activation(gate) * up))

Both round to the activations' dtype where the separate ops do, so that a model computes the same
with and without them; the wide result is never written to memory. `round` goes to the dtype of
the activations; all else is float32, and the product with the weight is rounded again, as in
transformers' norms. (Gemma's, which multiply by 1 + weight before rounding, are others.)

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467); Shazeer,
"GLU Variants Improve Transformer" (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, DTypeError, ShapeError
from hal.needs import Needs
from hal.ops.activations import Activation, activate, activation_of
from hal.ops.binding import measurements, select_for
from hal.ops.checks import check_gradient, check_same_device, dtype_name
from hal.ops.quantize import (
    SEARCHED,
    SIGNATURES,
    TRITON,
    check_rows,
    checked_fixed,
    launch_triton,
    quantize_reference,
)
from hal.ops.quantize_pieces import in_pieces, quantize_piece
from hal.ops.scale_layouts import CANONICAL, check_scale_layout, in_layout
from hal.quant.represent import encoding_of
from hal.quant.scheme import find_scheme
from hal.registry import Level, Op

if TYPE_CHECKING:
    import torch

    from hal.quant.represent import Fixed
    from hal.quant.scheme import Quantization, Scheme

__all__ = ["QUANTIZE_RMS_NORM", "QUANTIZE_SWIGLU", "quantize_rms_norm", "quantize_swiglu"]

QUANTIZE_RMS_NORM = Op(
    "quantize_rms_norm",
    ("tokens", "features"),
    "normalize rows by their mean square and quantize them",
    measurements("quantize_rms_norm"),
)
QUANTIZE_SWIGLU = Op(
    "quantize_swiglu",
    ("tokens", "features"),
    "apply a gated activation and quantize the result",
    measurements("quantize_swiglu"),
)
CPU = (Needs.platform("cpu"), Needs.package("torch"))
FIXED = {name: operands for name, operands in SIGNATURES.items() if name not in SEARCHED}
"""Schemes whose scales are fixed, or come with zero points."""
Parts = tuple["torch.Tensor", ...]


def quantize_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scheme: str | Scheme,
    *,
    epsilon: float = 1e-6,
    residual: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    scale_layout: str = CANONICAL,
    platform: Any = None,
    **options: Any,
) -> Parts:
    """Return the quantized norm of `x`, or of `x + residual` and then the sum besides.

    Args:
        x: `[tokens, features]` bf16, fp16 or float32.
        weight: `[features]` of the dtype of `x`.
        scheme: A scheme that quantizes activations.
        epsilon: What is added to the mean square.
        residual: Like `x`, added to it first.
        input_scale: Of a static scheme, float32 `[]`, for the encoding that the device reads.
        input_zero: Of a static scheme with zero points, int8 `[]`.
        scale_layout: Order in which the scales are stored, as in `hal.ops.quantize`.
        platform: Platform to select for; None means that of the device of `x`.
        **options: `force`, `minimum` and the other options of `hal.select`.

    Returns:
        What `hal.ops.quantize` returns for the normalized rows; with a residual followed by
        `x + residual`, which the next layer adds to.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError, GradientError: For tensors that do not fit.
        ArgumentError: If epsilon is negative or not finite, the layout is not defined for the
            scheme's scales, or what the scheme fixes is missing, or given to one that fixes none.
        UnknownNameError: If the scheme does not quantize activations, or no layout has the name.
        NoKernelError: If no kernel can run.
    """
    where = "quantize_rms_norm"
    check_rows(where, x)
    _check_like(where, x, "weight", weight, x.shape[1:])
    if residual is not None:
        _check_like(where, x, "residual", residual, x.shape)
        check_gradient(where, residual)
    if not 0 <= epsilon < float("inf"):
        raise ArgumentError(where, found=f"epsilon={epsilon}", needed="a finite number >= 0")
    function, how, encoding, given = _selected(
        where, x, x.shape[1], scheme, scale_layout, (input_scale, input_zero), platform, options
    )
    before = weight, float(epsilon), residual
    found: Parts = function(x, *before, encoding, how, scale_layout, **given)
    return found


def quantize_swiglu(
    gate_up: torch.Tensor,
    scheme: str | Scheme,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    scale_layout: str = CANONICAL,
    platform: Any = None,
    **options: Any,
) -> Parts:
    """Return activation(gate) * up, quantized.

    Args:
        gate_up: `[tokens, 2 * features]` bf16, fp16 or float32.
        scheme: A scheme that quantizes activations.
        activation: One of `hal.ops.activations.ACTIVATIONS`.
        alpha: Factor of `swiglu_oai`, 1.702 by default.
        limit: Bound of gate and up; None is 7 for `swiglu_oai`, and none for others.
        interleaved: Gate and up columns alternate, gate first; else the gate is the first half.
        input_scale: Of a static scheme, float32 `[]`, for the encoding that the device reads.
        input_zero: Of a static scheme with zero points, int8 `[]`.
        scale_layout: Order in which the scales are stored, as in `hal.ops.quantize`.
        platform: Platform to select for; None means that of the device of `gate_up`.
        **options: `force`, `minimum` and the other options of `hal.select`.

    Returns:
        What `hal.ops.quantize` returns for `[tokens, features]`.

    Raises:
        ShapeError: If `gate_up` is not a matrix of an even number of columns.
        DTypeError, GradientError: If it does not fit.
        ArgumentError: If alpha or limit do not go with the activation, or the layout or what is
            fixed not with the scheme.
        UnknownNameError: If activation or layout are unknown or the scheme does not quantize any.
        NoKernelError: If no kernel can run.
    """
    where = "quantize_swiglu"
    check_rows(where, gate_up)
    if gate_up.shape[1] % 2:
        raise ShapeError(where, found=f"input {list(gate_up.shape)}", needed="an even width")
    gate = activation_of(where, activation, alpha=alpha, limit=limit, interleaved=interleaved)
    columns = gate_up.shape[1] // 2
    function, how, encoding, given = _selected(
        where, gate_up, columns, scheme, scale_layout, (input_scale, input_zero), platform, options
    )
    found: Parts = function(gate_up, gate, encoding, how, scale_layout, **given)
    return found


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, Parts]:
    """Return the normalized rows in the dtype of `x`, and the sum of `x` and residual if any."""
    import torch

    x = x if residual is None else x + residual
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * root).to(x.dtype) * weight, () if residual is None else (x,)


def gated(gate_up: torch.Tensor, gate: Activation) -> torch.Tensor:
    """Return activation(gate) * up, computed in float32, in the dtype of `gate_up`."""
    return activate(gate_up.float(), gate).to(gate_up.dtype)


@QUANTIZE_RMS_NORM.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURES,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None,
    format: str, how: Quantization, layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:  # fmt: skip
    """Follow both formulas in float32."""
    rows, total = rms_norm(x, weight, epsilon, residual)
    return (*quantize_reference(rows, format, how, fixed, layout), *total)


@QUANTIZE_RMS_NORM.kernel(
    "torch_cached",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=CPU,
    batch_invariant=True,
)
def rms_norm_cached(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None,
    format: str, how: Quantization, layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:  # fmt: skip
    """Normalize with torch and quantize, in pieces that stay in the cache of a core."""

    def piece(x: torch.Tensor, residual: torch.Tensor | None = None) -> Parts:
        rows, total = rms_norm(x, weight, epsilon, residual)
        return (*quantize_piece(rows, format, how, fixed), *total)

    more = () if residual is None else (residual,)
    return in_layout(in_pieces(piece, x.shape[1], x, *more), layout)


@QUANTIZE_RMS_NORM.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SEARCHED,
    requires=TRITON,
    batch_invariant=True,
)
def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None,
    format: str, how: Quantization, layout: str = CANONICAL,
) -> Parts:  # fmt: skip
    """Do all of it in one Triton launch that reads each row once."""
    import torch

    from hal.ops.kernels.quantize import Norm

    total = None
    if residual is not None:
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = Norm(weight.contiguous(), epsilon, residual, total)
    coded = launch_triton(x, format, how, x.shape[1], layout, norm=norm)
    return coded if total is None else (*coded, total)


@QUANTIZE_RMS_NORM.kernel(
    "triton_fixed",
    level=Level.NATIVE,
    band="tuned",
    signatures=FIXED,
    requires=TRITON,
    batch_invariant=True,
)
def rms_norm_fixed(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None,
    format: str, how: Quantization, layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:  # fmt: skip
    """Do the same under a fixed scale, or with a zero point for each row."""
    import torch

    from hal.ops.kernels.quantize import Norm

    total = None
    if residual is not None:
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = Norm(weight.contiguous(), epsilon, residual, total)
    coded = _launch_fixed(x, format, how, x.shape[1], layout, fixed=fixed, norm=norm)
    return coded if total is None else (*coded, total)


@QUANTIZE_SWIGLU.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=SIGNATURES,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def swiglu_reference(
    gate_up: torch.Tensor,
    gate: Activation,
    format: str,
    how: Quantization,
    layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:
    """Follow both formulas in float32."""
    return quantize_reference(gated(gate_up, gate), format, how, fixed, layout)


@QUANTIZE_SWIGLU.kernel(
    "torch_cached",
    level=Level.NATIVE,
    band="tuned",
    signatures=SIGNATURES,
    requires=CPU,
    batch_invariant=True,
)
def swiglu_cached(
    gate_up: torch.Tensor,
    gate: Activation,
    format: str,
    how: Quantization,
    layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:
    """Apply the activation with torch and quantize, in pieces that stay in a core's cache."""

    def piece(gate_up: torch.Tensor) -> Parts:
        return quantize_piece(gated(gate_up, gate), format, how, fixed)

    # The float32 copies of gate and up are what must fit.
    return in_layout(in_pieces(piece, gate_up.shape[1], gate_up), layout)


@QUANTIZE_SWIGLU.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=SEARCHED,
    requires=TRITON,
    batch_invariant=True,
)
def swiglu_triton(
    gate_up: torch.Tensor,
    gate: Activation,
    format: str,
    how: Quantization,
    layout: str = CANONICAL,
) -> Parts:
    """Do both in one Triton launch."""
    return launch_triton(gate_up, format, how, gate_up.shape[1] // 2, layout, gate=gate)


@QUANTIZE_SWIGLU.kernel(
    "triton_fixed",
    level=Level.NATIVE,
    band="tuned",
    signatures=FIXED,
    requires=TRITON,
    batch_invariant=True,
)
def swiglu_fixed(
    gate_up: torch.Tensor,
    gate: Activation,
    format: str,
    how: Quantization,
    layout: str = CANONICAL,
    *,
    fixed: Fixed | None = None,
) -> Parts:
    """Do both under a fixed scale, or with a zero point for each row, in one Triton launch."""
    columns = gate_up.shape[1] // 2
    return _launch_fixed(gate_up, format, how, columns, layout, fixed=fixed, gate=gate)


def _launch_fixed(
    x: torch.Tensor,
    format: str,
    how: Quantization,
    columns: int,
    layout: str,
    *,
    fixed: Fixed | None,
    **before: Any,
) -> Parts:
    """Quantize rows of `columns` and return codes, scales and zero points or second scales."""
    import torch

    from hal.formats import number_format
    from hal.ops.kernels.fused_rows import quantize_fused
    from hal.quant.codec import SCALE_FLOOR
    from hal.torch_compat import dtype

    if how.second != "none":
        return launch_triton(x, format, how, columns, layout, fixed=fixed, **before)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = x.shape[0]
    values = torch.empty(rows, columns, dtype=dtype(format), device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    zeros = None
    if not how.symmetric:
        zeros = torch.empty(rows, dtype=torch.int8, device=x.device)
    top = number_format(format).quantization_maximum
    quantize_fused(x, values, scales, top, SCALE_FLOOR, fixed=fixed, zeros=zeros, **before)
    return (values, scales) if zeros is None else (values, scales, zeros)


def _selected(
    where: str,
    x: torch.Tensor,
    columns: int,
    scheme: str | Scheme,
    layout: str,
    given: tuple[torch.Tensor | None, torch.Tensor | None],
    platform: Any,
    options: Any,
) -> tuple[Any, Quantization, str, dict[str, Fixed]]:
    """Return the kernel that is selected, how it shall store, as what, and what is fixed of it."""
    found = find_scheme(scheme)
    check_scale_layout(where, found, layout)
    fixed = checked_fixed(where, found, x, *given)
    problem = {"tokens": x.shape[0], "features": columns}
    selection, _ = select_for(where, found.name, x.device, problem, platform=platform, **options)
    assert selection.kernel is not None
    encoding = encoding_of(found.activation.format, selection.spec.formats.fp8_encoding)
    named = {} if fixed is None else {"fixed": fixed}
    return selection.kernel.load(), found.activation, encoding, named


def _check_like(
    where: str, x: torch.Tensor, name: str, given: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Raise unless a tensor has a shape, and the dtype and device of `x`."""
    if tuple(given.shape) != tuple(shape):
        raise ShapeError(where, found=f"{name} {list(given.shape)}", needed=str(list(shape)))
    if given.dtype is not x.dtype:
        raise DTypeError(
            where,
            found=f"{name} of {dtype_name(given)}",
            needed=f"{dtype_name(x)}, as the input",
            cure=f"{name}.to({x.dtype})",
        )
    check_same_device(where, x.device, **{name: given})
