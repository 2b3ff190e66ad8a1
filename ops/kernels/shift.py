"""Take from products what zero points of channels add to them, in one launch.

    out[m, n] = product[m, n] - sums[n] * sum_k x[m, k] (+ bias[n])      sums = zeros * scales

All of it is float32 until it is stored. Each program adds up the row of x itself: a launch less,
for a row that is small and in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.ops.kernels.common import launch

COLUMNS = 256
MOST_AT_ONCE = 8192


@triton.jit
def _shift_kernel(
    product_ptr, x_ptr, sums_ptr, bias_ptr, out_ptr, n_columns, k_size,
    stride_pm, stride_xm, stride_om,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_columns
    result = tl.load(product_ptr + row * stride_pm + columns, mask=inside, other=0.0)
    sums = tl.load(sums_ptr + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, k_size, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + k, mask=k < k_size, other=0.0)
        total += x.to(tl.float32)
    result -= sums * tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + columns, out, mask=inside)


def shift_rows(
    product: torch.Tensor,
    x: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Write product [m, n] f32 less sums [n] f32 times the sums of rows x [m, k] to out [m, n].

    bias [n] or None. The last dimension of all must be contiguous.
    """
    (m, n), k = product.shape, x.shape[1]
    for name, part, shape in (("x", x, (m, k)), ("sums", sums, (n,)), ("out", out, (m, n))):
        if tuple(part.shape) != shape or part.stride(-1) != 1:
            raise ValueError(
                f"shift_rows: {name} is {list(part.shape)} with strides {list(part.stride())}, "
                f"needs {list(shape)} with a contiguous last dimension"
            )
    if m == 0 or n == 0:
        return
    block_k = min(max(triton.next_power_of_2(k), 16), MOST_AT_ONCE)
    launch(
        _shift_kernel, (m, triton.cdiv(n, COLUMNS)),
        product, x, sums, sums if bias is None else bias, out, n, k,
        product.stride(0), x.stride(0), out.stride(0),
        BLOCK_N=COLUMNS, BLOCK_K=block_k, HAS_BIAS=bias is not None,
    )  # fmt: skip
