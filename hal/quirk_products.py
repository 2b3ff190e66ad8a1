"""List how torch's products of quantized and grouped operands differ between releases.

"The wheels" and "tried" mean what they mean in `hal.quirk_facts`.
"""

from __future__ import annotations

from hal.quirk_facts import Quirk, probe

__all__ = ["PRODUCT_QUIRKS"]

PRODUCT_QUIRKS = (
    Quirk(
        "scaled-mm-two-results",
        "2.1",
        "2.5",
        (),
        "torch._scaled_mm returns a pair and takes its scales by keyword only",
        "kernels on it need torch 2.6",
        "the wheels: native_functions.yaml of 2.4.0 and 2.5.0",
        probe("scaled_mm_returns_two"),
    ),
    Quirk(
        "scaled-mm-2d-scales",
        "2.5",
        None,
        (),
        "torch._scaled_mm refuses row-wise scales of one dimension: it wants [M, 1] and [1, N]",
        "torch_compat.scaled_mm_rowwise_function adds the dimension",
        "https://github.com/pytorch/pytorch/pull/130059 , release by its date; tried with 2.13.0",
        probe("scaled_mm_refuses_flat_scales"),
    ),
    Quirk(
        "scaled-mm-private",
        None,
        "2.10",
        (),
        "torch.nn.functional.scaled_mm does not exist",
        "row-wise products go through torch._scaled_mm; kernels on block scales need torch 2.10",
        "the wheels: torch/nn/functional.py of 2.9.0 and 2.10.0",
        probe("no_scaled_mm"),
    ),
    Quirk(
        "scaled-mm-block-orientation",
        "2.9",
        None,
        ("cuda",),
        "scales per 1x128 and 128x128 lie differently for torch._scaled_mm, for scaled_mm and for "
        "torch.compile; cuBLAS wants columns of activation scales, and of weight scales columns "
        "padded to a multiple of four",
        "block scales go through scaled_mm alone, arranged by torch_compat.block128_..._scales",
        "https://github.com/pytorch/pytorch/pull/188996 (review); "
        "https://github.com/pytorch/ao/pull/4229 ; the arrangement was tried on an H200",
    ),
    Quirk(
        "scaled-mm-block-compile",
        "2.9",
        None,
        ("cuda",),
        "torch.compile refuses torch._scaled_mm with block scales that eager mode takes",
        "compiled graphs see one opaque hal operator, inside which the call is eager",
        "https://github.com/pytorch/pytorch/issues/161127 (open, 2.9 nightly), not tried",
    ),
    Quirk(
        "scaled-mm-cpu-no-rows",
        None,
        "2.13",
        ("cpu",),
        "torch._scaled_mm refuses scales per row and column on the CPU",
        "fp8 schemes use other kernels on the CPU",
        "tried: refused by 2.6.0, 2.9.1, 2.10.0 and 2.11.0, taken by 2.13.0",
        probe("scaled_mm_refuses_rows_on_cpu"),
    ),
    Quirk(
        "scaled-mm-cpu-per-tensor",
        None,
        None,
        ("cpu",),
        "torch._scaled_mm with one scale per tensor runs 700 times slower than row-wise",
        "hal does not call it on the CPU: fp8 weights are decoded instead",
        "measured with torch 2.13.0+cpu on an AMX processor, November 2026",
    ),
    Quirk(
        "cpu-converted-products",
        None,
        None,
        ("cpu",),
        "where the CPU has no instructions for bf16 or fp16 products, torch's take up to 7 times "
        "as long as those of float32",
        "from 5 rows on torch_compat.dense_function and mm_function multiply in float32 there",
        "measured with torch 2.13.0+cpu on an AMD EPYC with AVX2 alone, 2026-11-30: docs/cpu.md",
    ),
    Quirk(
        "scaled-mm-cpu-no-blocks",
        "2.10",
        None,
        ("cpu",),
        "torch.nn.functional.scaled_mm refuses 1x128 and 128x128 scales on the CPU",
        "block schemes use other kernels on the CPU",
        "tried with torch 2.13.0+cpu: Invalid scaling configuration",
        probe("scaled_mm_refuses_blocks_on_cpu"),
    ),
    Quirk(
        "scaled-mm-sm120-layout",
        None,
        None,
        ("cuda",),
        "on sm_120 products under 1x16 or 1x32 scales fail with CUBLAS_STATUS_NOT_SUPPORTED unless "
        "b is the transposed view of a row-major weight, before cuBLAS 13.6",
        "hal passes weights as such views everywhere",
        "https://github.com/pytorch/pytorch/issues/198126 , not tried",
    ),
    Quirk(
        "int-mm-one-column",
        None,
        None,
        ("cpu",),
        "torch._int_mm with VNNI is wrong for a weight [N, 1] read as its transpose, where N > 1",
        "kernels on it need an inner size of 2 or more",
        "tried with 2.6.0 and 2.13.0: codes[M, 1] times weight[N, 1].t() for N of 2 to 64; not so "
        "with AVX2 alone (2.13.0)",
        probe("int_mm_is_wrong_for_one_column"),
    ),
    Quirk(
        "rowwise-sm89-stream",
        "2.6",
        "2.12",
        ("cuda",),
        "row-wise torch._scaled_mm on sm_89 launches on the default stream, not the current one",
        "torch_scaled_mm needs torch 2.12 there",
        "aten/src/ATen/native/cuda/RowwiseScaledMM.cu; "
        "https://github.com/pytorch/pytorch/issues/177651 , not tried",
    ),
    Quirk(
        "rowwise-bf16",
        None,
        None,
        ("cuda",),
        "row-wise torch._scaled_mm writes bf16 only, unless cuBLAS 12.9 or later computes it",
        "kernels on it serve bf16 only",
        "https://github.com/pytorch/pytorch/pull/166744 ; https://github.com/pytorch/ao/pull/2431",
    ),
    Quirk(
        "no-grouped-mm",
        None,
        "2.8",
        (),
        "torch has no grouped product in bf16; torch._scaled_grouped_mm is there from 2.7",
        "kernels on it need torch 2.8; torch_compat.grouped_mm_function names the release",
        "the wheels: native_functions.yaml of 2.6.0 to 2.8.0",
        probe("no_grouped_mm"),
    ),
    Quirk(
        "grouped-mm-private",
        "2.8",
        "2.10",
        (),
        "torch.nn.functional.grouped_mm does not exist, only torch._grouped_mm",
        "torch_compat.grouped_mm_function returns whichever there is",
        "the wheels: torch/nn/functional.py of 2.9.0 and 2.10.0",
        probe("grouped_mm_is_private"),
    ),
    Quirk(
        "interpreter-bf16-dot",
        None,
        None,
        (),
        "Triton's interpreter returns garbage for a bf16 tl.dot, without an error",
        "kernels upcast before tl.dot when they are interpreted",
        "measured with Triton 3.7.1: errors of 5e10",
    ),
)
