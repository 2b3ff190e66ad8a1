"""Get torch's own products: dense, of 8-bit and of grouped operands, whatever a release calls them.

Each getter looks at the installed torch once and returns what to call, so that a bound op pays
nothing for the choice; `hal.torch_compat` hands them out. Getters raise `PlatformError` where
torch is too old, and say which release has the product. Which devices take which operands is for
kernels to declare: torch itself raises `RuntimeError` for the others.

Source: torch.nn.functional.scaled_mm and grouped_mm (documentation of torch 2.10 and later);
aten/src/ATen/native/cuda/ScaledBlas.cpp (memory layouts of block scales); native_functions.yaml
in the wheels of 2.5.0 to 2.13.0 (`_scaled_mm` and `_scaled_grouped_mm` kept their arguments).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.formats import Support
from hal.torch_lookup import find, require

if TYPE_CHECKING:
    import torch

    from hal.device import DeviceSpec

    Tensor = torch.Tensor
    Call = Callable[..., torch.Tensor]

__all__ = [
    "block128_activation_scales",
    "block128_weight_scales",
    "dense_function",
    "grouped_mm_function",
    "int_mm_function",
    "mm_function",
    "scaled_grouped_mm_function",
    "scaled_mm_block128_function",
    "scaled_mm_rowwise_function",
    "scaled_mm_tensorwise_function",
]

# cuBLAS reads columns of float32 block scales at 16-byte steps: other sizes are padded to it.
_SCALE_STEP = 4

# Up to so many rows the product in the dtype itself takes no longer than widening the weight.
_FEW_ROWS = 4
# Numbers of a weight that are widened at a time: 4 MiB of float32.
_WIDENED = 1 << 20


def dense_function(spec: DeviceSpec, dtype_name: str) -> Call:
    """Return `(a, b, bias=None) -> [M, N]`, which is `a @ b.T + bias` in the dtype of `a`.

    - a: `[M, K]` in the dtype.
    - b: `[N, K]` in the dtype.
    - bias: `[N]` in the dtype, or None.

    Args:
        spec: Facts of the device. A CPU that only converts the dtype multiplies in float32 (see the
            quirk `cpu-converted-products`).
        dtype_name: Name of the number format, such as `bfloat16`.
    """
    import torch

    if _widens(spec, dtype_name):
        return lambda a, b, bias=None: _widened(a, b.t(), bias=bias)
    call: Call = torch.nn.functional.linear
    return call


def mm_function(spec: DeviceSpec, dtype_name: str) -> Call:
    """Return `(a, b, out=None) -> [M, N]`, which is `a @ b` in the dtype of `a`, as `torch.mm`.

    `b` is `[K, N]`, the transposed view of a row-major weight; for the rest see `dense_function`.
    """
    import torch

    call: Call = _widened if _widens(spec, dtype_name) else torch.mm
    return call


def _widens(spec: DeviceSpec, dtype_name: str) -> bool:
    return spec.platform == "cpu" and spec.formats.of("math", dtype_name) is Support.EMULATED


def _widened(
    a: Tensor, b: Tensor, *, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply in float32, some columns of `b [K, N]` at a time, and round once."""
    import torch

    if a.shape[0] <= _FEW_ROWS:
        if bias is None:
            return torch.mm(a, b, out=out)
        return torch.addmm(bias, a, b)
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    rows = a.float()
    step = max(_WIDENED // max(b.shape[0], 1), 1)
    # Memory of this size is given back and fetched anew, page by page, if it is not kept.
    wide = torch.empty(min(step, b.shape[1]), b.shape[0])
    for first in range(0, b.shape[1], step):
        part = b.t()[first : first + step]
        product = torch.mm(rows, wide[: part.shape[0]].copy_(part).t())
        if bias is not None:
            product += bias[first : first + step]
        out[:, first : first + step] = product
    return out


@functools.cache
def scaled_mm_rowwise_function() -> Call:
    """Return `(a, b_t, a_scales, b_scales, out_dtype, bias=None) -> [M, N]`.

    The result is `(a * a_scales[:, None]) @ (b_t * b_scales[None, :]) + bias`.

    - a: `[M, K]` 8-bit float, K contiguous.
    - b_t: `[K, N]` 8-bit float, the transposed view of a row-major `[N, K]` weight.
    - a_scales: float32 `[M]`, or `[M, 1]`, which saves a view.
    - b_scales: float32 `[N]`, or `[1, N]`, which saves a view.
    - out_dtype: On CUDA only bfloat16 is certain (see the quirk `rowwise-bf16`).
    - bias: `[N]` in `out_dtype`, or None.
    """
    # The private call has kept its form since 2.5 and skips three layers of Python that the
    # public one goes through; both end in the same kernel.
    private = find("_scaled_mm")
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


@functools.cache
def scaled_mm_tensorwise_function() -> Call:
    """Return `(a, b_t, a_scale, b_scale, out_dtype) -> [M, N]`, one float32 scale `[]` a matrix.

    - a: `[M, K]` 8-bit float, K contiguous.
    - b_t: `[K, N]` 8-bit float, the transposed view of a row-major `[N, K]` weight.
    - out_dtype: bfloat16, float16 or float32.
    """
    private = find("_scaled_mm")
    if private is not None:

        def through_private(
            a: Tensor, b_t: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
        ) -> Tensor:
            result: Tensor = private(a, b_t, a_scale, b_scale, out_dtype=out_dtype)
            return result

        return through_private

    public, kind = _public("scaled_mm"), _scaling_types().TensorWise

    def through_public(
        a: Tensor, b_t: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        return public(a, b_t, a_scale, kind, b_scale, kind, output_dtype=out_dtype)

    return through_public


@functools.cache
def scaled_mm_block128_function() -> Call:
    """Return `(a, b_t, a_scales, b_scales, out_dtype) -> [M, N]`, scales per 1x128 and 128x128.

    - a: `[M, K]` 8-bit float, K contiguous, any number of rows.
    - b_t: `[K, N]` 8-bit float, the transposed view of a row-major `[N, K]` weight.
    - a_scales: what `block128_activation_scales` returns.
    - b_scales: what `block128_weight_scales` returns.
    - out_dtype: bfloat16 or float32.

    CUDA of sm_90 takes these scales; CPU and ROCm do not.
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


@functools.cache
def grouped_mm_function() -> Call:
    """Return `(a, b, offs=offs) -> [M, N]`: rows of group g of `a` times `b[g]`.

    - a: `[M, K]` bf16 rows, sorted by group.
    - b: `[G, K, N]` bf16, usually the transposed view of `[G, N, K]`.
    - offs: int32 `[G]`, where each group ends; rows beyond the last are not written.
    """
    call: Call = require("nn.functional.grouped_mm", "_grouped_mm", since="2.8")
    return call


@functools.cache
def scaled_grouped_mm_function() -> Call:
    """Return `(a, b, a_scales, b_scales, offs, out_dtype) -> [M, N]`, scales per row and column.

    - a: `[M, K]` e4m3fn, K contiguous, sorted by group.
    - b: `[G, K, N]` e4m3fn, the transposed view of a row-major `[G, N, K]` weight.
    - a_scales: float32 `[M]`.
    - b_scales: float32 `[G, N]`.
    - offs: int32 `[G]`, where each group ends; rows beyond the last are not written.
    - out_dtype: bfloat16.

    K and N must be multiples of 16. Devices other than sm_90 and gfx942 do not take it.
    """
    private = find("_scaled_grouped_mm")
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

    names = "nn.functional.scaled_grouped_mm", "_scaled_grouped_mm"
    public: Call = require(*names, since="2.7")
    kind = _scaling_types().RowWise

    def through_public(
        a: Tensor,
        b: Tensor,
        a_scales: Tensor,
        b_scales: Tensor,
        offs: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return public(a, b, a_scales, kind, b_scales, kind, offs=offs, output_dtype=out_dtype)

    return through_public


@functools.cache
def int_mm_function() -> Call:
    """Return `(a, b) -> [M, N]` int32 of int8 `[M, K]` times int8 `[K, N]`.

    CUDA demands more than 16 rows, and K and N to be multiples of 8; the CPU takes any size but
    K of 1 (see the quirk `int-mm-one-column`).
    """
    call: Call = require("_int_mm", since=None)
    return call


def _column(scales: Tensor) -> Tensor:
    return scales.unsqueeze(1) if scales.dim() == 1 else scales


def _row(scales: Tensor) -> Tensor:
    return scales.unsqueeze(0) if scales.dim() == 1 else scales


def _public(name: str) -> Call:
    call: Call = require(f"nn.functional.{name}", since="2.10")
    return call


def _scaling_types() -> Any:
    return require("nn.functional.ScalingType", since="2.10")
