"""Call the parts of torch that differ between its releases; nothing else in hal touches them.

Each operation has a plain function and, where it is used per call, a getter (`..._function`) that
looks at the installed torch once and returns what to call, so that a bound op pays nothing for
the choice. Getters raise `PlatformError` where torch is too old, and say which release has it.

Source: torch.nn.functional.scaled_mm and grouped_mm (documentation of torch 2.10 and later);
aten/src/ATen/native/cuda/ScaledBlas.cpp (memory layouts of block scales).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.errors import PlatformError, UnknownNameError
from hal.formats import FORMATS

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
    Call = Callable[..., torch.Tensor]

__all__ = [
    "block128_activation_scales",
    "block128_weight_scales",
    "dtype",
    "grouped_mm",
    "grouped_mm_function",
    "has_dtype",
    "has_grouped_mm",
    "has_scaled_grouped_mm",
    "has_scaled_mm_block128",
    "int_mm",
    "int_mm_function",
    "is_compiling",
    "is_compiling_function",
    "scaled_grouped_mm",
    "scaled_grouped_mm_function",
    "scaled_mm_block128",
    "scaled_mm_block128_function",
    "scaled_mm_rowwise",
    "scaled_mm_rowwise_function",
    "weight_int8pack_mm",
    "weight_int8pack_mm_function",
]

# cuBLAS reads columns of float32 block scales at 16-byte steps: other sizes are padded to it.
_SCALE_STEP = 4

# Dtypes that are no number format of hal's table and are asked for by name all the same.
_PLAIN = {"uint8": "uint8", "int16": "int16", "bool": "bool", "float64": "float64"}


@functools.cache
def dtype(name: str) -> torch.dtype:
    """Return torch's dtype for the number format `name`, such as `e4m3fn` or `bfloat16`.

    Raises:
        UnknownNameError: If there is no such format.
        PlatformError: If torch has no dtype for it, or only a newer torch has.
    """
    import torch

    row = FORMATS.get(name)
    attribute = _PLAIN.get(name) if row is None else row.torch_name
    if row is None and attribute is None:
        raise UnknownNameError("number format", name, (*FORMATS, *_PLAIN))
    if attribute is None:
        raise PlatformError(f"torch has no dtype for {name}; hold its codes packed, as uint8")
    found = getattr(torch, attribute, None)
    if found is None:
        since = row.since_torch if row else "2.6"
        raise _too_old(f"torch.{attribute} (format {name})", since)
    plain: torch.dtype = found
    return plain


def has_dtype(name: str) -> bool:
    """Tell whether the installed torch has a dtype for the number format `name`."""
    try:
        dtype(name)
    except PlatformError:
        return False
    return True


def scaled_mm_rowwise(
    a: Tensor,
    b_t: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Return `(a * a_scales[:, None]) @ (b_t * b_scales[None, :]) + bias` as `[M, N]`.

    Args:
        a: `[M, K]` 8-bit float, K contiguous.
        b_t: `[K, N]` 8-bit float, the transposed view of a row-major `[N, K]` weight.
        a_scales: float32 `[M]`, or `[M, 1]`, which saves a view.
        b_scales: float32 `[N]`, or `[1, N]`, which saves a view.
        out_dtype: On CUDA only bfloat16 is certain (see the quirk `rowwise-bf16`).
        bias: `[N]` in `out_dtype`, or None.
    """
    return scaled_mm_rowwise_function()(a, b_t, a_scales, b_scales, out_dtype, bias)


@functools.cache
def scaled_mm_rowwise_function() -> Call:
    """Return the function behind `scaled_mm_rowwise`, with its arguments."""
    import torch

    # The private call has kept its form since 2.6 and skips three layers of Python that the
    # public one goes through; both end in the same kernel.
    private = getattr(torch, "_scaled_mm", None)
    if private is not None:

        def through_private(
            a: Tensor,
            b_t: Tensor,
            a_scales: Tensor,
            b_scales: Tensor,
            out_dtype: torch.dtype,
            bias: Tensor | None = None,
        ) -> Tensor:
            result: Tensor = private(
                a, b_t, _column(a_scales), _row(b_scales), bias=bias, out_dtype=out_dtype
            )
            return result

        return through_private

    public, kinds = _public("scaled_mm"), _scaling_types()

    def through_public(
        a: Tensor,
        b_t: Tensor,
        a_scales: Tensor,
        b_scales: Tensor,
        out_dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        return public(
            a,
            b_t,
            _column(a_scales),
            kinds.RowWise,
            _row(b_scales),
            kinds.RowWise,
            bias=bias,
            output_dtype=out_dtype,
        )

    return through_public


def has_scaled_mm_block128() -> bool:
    """Tell whether the installed torch has the operator for block scales (2.10 and later).

    The device matters besides: CUDA of sm_90 takes 1x128 with 128x128, CPU and ROCm do not.
    """
    return _functional("scaled_mm") is not None


def scaled_mm_block128(
    a: Tensor, b_t: Tensor, a_scales: Tensor, b_scales: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Return the product of 8-bit floats under scales of 1x128 (a) and 128x128 (b), `[M, N]`.

    Args:
        a: `[M, K]` 8-bit float, K contiguous.
        b_t: `[K, N]` 8-bit float, the transposed view of a row-major `[N, K]` weight.
        a_scales: float32 `[M, K/128]`; column-major memory saves a copy on CUDA.
        b_scales: float32 `[N/128, K/128]`.
        out_dtype: bfloat16 or float32.

    Raises:
        PlatformError: If torch is older than 2.10.
        RuntimeError: By torch, on the CPU, on ROCm, and on CUDA other than sm_90.
    """
    call = scaled_mm_block128_function()
    kind = a.device.type
    return call(
        a,
        b_t,
        block128_activation_scales(a_scales, kind),
        block128_weight_scales(b_scales, kind),
        out_dtype,
    )


@functools.cache
def scaled_mm_block128_function() -> Call:
    """Return the function behind `scaled_mm_block128`, without the arrangement of scales.

    It takes `(a, b_t, a_scales, b_scales, out_dtype)` with any number of rows, and scales as
    `block128_activation_scales` (per call) and `block128_weight_scales` (once, when the weight is
    bound) return them.
    """
    public, kinds = _public("scaled_mm"), _scaling_types()
    per_row, per_block = kinds.BlockWise1x128, kinds.BlockWise128x128

    def call(
        a: Tensor, b_t: Tensor, a_scales: Tensor, b_scales: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        rows = a.shape[0]
        extra = -rows % _SCALE_STEP
        if extra:
            # Rows do not mix, so what the added ones hold does not matter.
            taller = a.new_empty(rows + extra, a.shape[1])
            taller[:rows] = a
            scales = a_scales.new_empty_strided(
                (rows + extra, a_scales.shape[1]), (1, rows + extra)
            )
            scales[:rows] = a_scales
            a, a_scales = taller, scales
        out = public(a, b_t, a_scales, per_row, b_scales, per_block, output_dtype=out_dtype)
        return out[:rows] if extra else out

    return call


def block128_activation_scales(scales: Tensor, device_type: str) -> Tensor:
    """Return activation scales `[M, K/128]` in the memory order that the product demands.

    On CUDA that is column-major, strides (1, M); the CPU takes any. A tensor that is in order
    comes back as it is.
    """
    rows, blocks = scales.shape
    in_order = scales.stride(0) == 1 and (blocks == 1 or scales.stride(1) == rows)
    if device_type == "cpu" or in_order:
        return scales
    # Strides are stated, because a tensor of one row counts as contiguous in either order.
    return scales.new_empty_strided((rows, blocks), (1, rows)).copy_(scales)


def block128_weight_scales(scales: Tensor, device_type: str) -> Tensor:
    """Return weight scales `[N/128, K/128]` as the product demands them; done once per weight.

    The result is the transpose, `[K/128, N/128]`. On CUDA its column length is padded with zeros
    to a multiple of four.
    """
    if device_type == "cpu":
        return scales.t()
    blocks = scales.shape[1]
    padded = scales.new_zeros(scales.shape[0], blocks + -blocks % _SCALE_STEP)
    padded[:, :blocks] = scales
    return padded.t()


def has_grouped_mm() -> bool:
    """Tell whether the installed torch multiplies groups of rows by a weight each."""
    import torch

    return _functional("grouped_mm") is not None or hasattr(torch, "_grouped_mm")


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Return `[M, N]`: rows of group g of `a` times `b[g]`.

    Args:
        a: `[M, K]` bf16 rows, sorted by group.
        b: `[G, K, N]` bf16, usually the transposed view of `[G, N, K]`.
        offs: int32 `[G]`, where each group ends; rows beyond the last are not written.

    Raises:
        PlatformError: If torch is older than 2.8.
    """
    return grouped_mm_function()(a, b, offs=offs)


@functools.cache
def grouped_mm_function() -> Call:
    """Return the function that `grouped_mm` calls as `(a, b, offs=offs)`."""
    import torch

    found = _functional("grouped_mm") or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise _too_old("grouped_mm", "2.8")
    call: Call = found
    return call


def has_scaled_grouped_mm() -> bool:
    """Tell whether the installed torch has the grouped product of 8-bit floats."""
    import torch

    return _functional("scaled_grouped_mm") is not None or hasattr(torch, "_scaled_grouped_mm")


def scaled_grouped_mm(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return `[M, N]`: rows of group g of `a` times `b[g]`, under scales per row and per column.

    Args:
        a: `[M, K]` e4m3fn, K contiguous, sorted by group.
        b: `[G, K, N]` e4m3fn, the transposed view of a row-major `[G, N, K]` weight.
        a_scales: float32 `[M]`.
        b_scales: float32 `[G, N]`.
        offs: int32 `[G]`, where each group ends; every size must be a multiple of 16 elements of
            K and N, and rows beyond the last offset are not written.
        out_dtype: bfloat16.

    Raises:
        PlatformError: If torch is older than 2.8.
        RuntimeError: By torch, on devices other than sm_90 and gfx942.
    """
    return scaled_grouped_mm_function()(a, b, a_scales, b_scales, offs, out_dtype)


@functools.cache
def scaled_grouped_mm_function() -> Call:
    """Return the function behind `scaled_grouped_mm`, with its arguments."""
    import torch

    private = getattr(torch, "_scaled_grouped_mm", None)
    if private is not None:

        def through_private(
            a: Tensor,
            b: Tensor,
            a_scales: Tensor,
            b_scales: Tensor,
            offs: Tensor,
            out_dtype: torch.dtype,
        ) -> Tensor:
            result: Tensor = private(a, b, a_scales, b_scales, offs=offs, out_dtype=out_dtype)
            return result

        return through_private
    if _functional("scaled_grouped_mm") is None:
        raise _too_old("scaled_grouped_mm", "2.8")
    public, kinds = _public("scaled_grouped_mm"), _scaling_types()

    def through_public(
        a: Tensor,
        b: Tensor,
        a_scales: Tensor,
        b_scales: Tensor,
        offs: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        row_wise = kinds.RowWise
        return public(
            a, b, a_scales, row_wise, b_scales, row_wise, offs=offs, output_dtype=out_dtype
        )

    return through_public


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return int32 `[M, N]` of int8 `[M, K]` times int8 `[K, N]`.

    CUDA demands more than 16 rows, and K and N to be multiples of 8; the CPU takes any size.
    """
    return int_mm_function()(a, b)


@functools.cache
def int_mm_function() -> Call:
    """Return the function that `int_mm` calls as `(a, b)`."""
    return _private("_int_mm")


def weight_int8pack_mm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Return `[M, N]`: `x` times int8 `weight[N, K]`, transposed, times `scales[N]`.

    `x` is `[M, K]` bf16 or fp16 and `scales` has its dtype; the sum is in float32.
    """
    return weight_int8pack_mm_function()(x, weight, scales)


@functools.cache
def weight_int8pack_mm_function() -> Call:
    """Return the function that `weight_int8pack_mm` calls as `(x, weight, scales)`."""
    return _private("_weight_int8pack_mm")


def is_compiling() -> bool:
    """Tell whether this code is being traced by `torch.compile`."""
    import torch

    return torch.compiler.is_compiling()


def is_compiling_function() -> Callable[[], bool]:
    """Return torch's own `is_compiling`, for objects that hold on to it."""
    import torch

    return torch.compiler.is_compiling


def _column(scales: Tensor) -> Tensor:
    return scales.unsqueeze(1) if scales.dim() == 1 else scales


def _row(scales: Tensor) -> Tensor:
    return scales.unsqueeze(0) if scales.dim() == 1 else scales


def _functional(name: str) -> Any:
    import torch

    return getattr(torch.nn.functional, name, None)


def _public(name: str) -> Call:
    found = _functional(name)
    if found is None:
        raise _too_old(f"torch.nn.functional.{name}", "2.10")
    call: Call = found
    return call


def _private(name: str) -> Call:
    import torch

    found = getattr(torch, name, None)
    if found is None:
        raise PlatformError(f"torch {torch.__version__} no longer has torch.{name}")
    call: Call = found
    return call


def _scaling_types() -> Any:
    import torch.nn.functional as functional

    return functional.ScalingType  # type: ignore[attr-defined, unused-ignore]


def _too_old(what: str, since: str) -> PlatformError:
    import torch

    return PlatformError(
        f"{what}: found torch {torch.__version__}, needed torch >= {since}; install a newer torch"
    )
