"""Say which cells of the cross-compiler a kernel consists of, and what they prove of it.

A kernel that is `compiled` for an architecture is one of which every cell compiled there, with the
launcher's own specialization, and fits. A `native` one needs its format's own matrix instruction in
the machine code as well: Triton compiles fp8 on gfx90a by converting it, which is `emulated`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hal.ops.few_experts import serves_few
from hal.ops.linear import own_kind, product_kind
from hal.ops.scaled import scaled_kind
from hal.quant.scheme import Scheme, find_scheme
from hal.registry import Kernel, Level

if TYPE_CHECKING:
    from hal.ops.kernels.crosscompile import Cell

__all__ = [
    "SCALE_ORDERS",
    "cells_of",
    "facts_of",
    "fault_of",
    "kind_of",
    "level_of",
    "specialization_of",
]

_SCALED = re.compile(r"block_scale|kind::mx|_scale_f32|mfma_scale|v_mfma_scale|scale_vec")
"""Matrix instructions that take the scales of groups."""
_SCALED_ROWS = {
    **{"mxfp8": "mxfp8", "mxfp4": "mxfp4", "mxfp4_w4a8": "mxfp8"},
    **{"nvfp4": "nvfp4", "nvfp4_static": "nvfp4_static"},
}
"""Which cell quantizes the rows of a product under scales per group."""
_STATIC_ROWS = {"e4m3fn": "fp8_static", "int8": "int8_static"}
SCALE_ORDERS = {
    "mxfp8": ("blocked_128x4", "mn_major_ue8m0"),
    "mxfp4": ("blocked_128x4", "e8m0_shuffle"),
    "nvfp4": ("blocked_128x4",),
}
"""Orders of the scales of rows that have a cell of their own, by the cell that quantizes them."""
_ROWS = {
    ("e4m3fn", "token"): ("fp8_rows", "fp8_channel"),
    ("e4m3fn", "group128"): ("fp8_groups", "fp8_block128"),
    ("int8", "token"): ("int8_rows", "int8_channel"),
}
"""Which cells quantize rows under float32 scales: alone, and after a norm or a gate."""


def kind_of(kernel: Kernel, scheme: Scheme) -> str:
    """Return what the Triton kernels call the product of a kernel of `linear` or `fused_moe`."""
    how = scheme.weight
    if how.format is None:
        return "bf16"
    if kernel.name.startswith("triton_scaled"):
        return scaled_kind(scheme)
    if kernel.name == "triton_w4a8":
        return "int4_group_fp8"
    if kernel.level is Level.NATIVE:
        return own_kind(scheme)
    if how.bytewise or how.format == "e5m2":
        return f"{product_kind(scheme)}_decode"
    if how.format == "int4":
        return "int4_group_decode"
    if how.scale_format == "e4m3fn":
        return "nvfp4_decode"
    return "mxfp4_decode" if how.packed else "mxfp8_decode"


def cells_of(
    kernel: Kernel, scheme: str, *, ptx: bool = False, specialized: bool = False
) -> tuple[str, ...]:
    """Return the cells of a Triton kernel under a scheme; none where there are no cells for it.

    ptx: Whether the device may run kernels that are written in PTX.
    specialized: Whether it may run those whose warps specialize.
    """
    if not kernel.name.startswith("triton"):
        return ()
    if kernel.op in ("linear", "fused_moe"):
        cells = _product_cells(kernel, find_scheme(scheme))
        if ptx:
            cells = (*cells, *_cells_in_ptx(kernel, find_scheme(scheme)))
        return (*cells, *_specialized_cells(kernel, find_scheme(scheme))) if specialized else cells
    if kernel.op == "route":
        return ("route/softmax", "route/sigmoid_bias")
    if kernel.op == "align":
        sizes = "few", "many", "one_expert", "most_experts", "few_of_most"
        return tuple(f"align/{size}" for size in sizes)
    return _quantizing_cells(kernel.op, find_scheme(scheme))


def _product_cells(kernel: Kernel, scheme: Scheme) -> tuple[str, ...]:
    kind = kind_of(kernel, scheme)
    own = "sums" if kernel.name == "triton_scaled_fp8" else "scaled"
    if kernel.name.startswith("triton_scaled") and kernel.op == "fused_moe":
        before = _SCALED_ROWS[scheme.name]
        products = (f"{own}_experts/{kind}/{size}" for size in ("few", "many", "ragged"))
        quantized = (f"quantize/{before}/plain", f"quantize/{before}/gate")
        return (*products, "align/few", "align/many", "combine", *quantized)
    if kernel.name.startswith("triton_scaled"):
        return tuple(f"{own}/{kind}/{size}" for size in ("few", "some", "many", "ragged", "wide"))
    if kernel.op == "linear" and kernel.level is Level.WEIGHT_ONLY and not scheme.weight.symmetric:
        return (f"gemm/{kind}/shifted", f"gemv/{kind}", "shift")
    zeros = not (scheme.weight.symmetric and scheme.activation.symmetric)
    if kernel.op == "linear" and kernel.level is Level.NATIVE and zeros:
        return (f"gemm/{kind}/shifted",)
    layout = _layout_cells(kind)
    if kernel.op == "linear":
        single = [f"{op}/{kind}" for op in ("gemv", "expand") if kind.endswith("_decode")]
        return (f"gemm/{kind}/few", f"gemm/{kind}/many", *single, *layout)
    grouped = (f"grouped_gemm/{kind}/few", f"grouped_gemm/{kind}/many")
    gates = {
        "fp8_channel": "swiglu/silu_fp8_rows",
        "fp8_block128": "swiglu/silu_fp8_groups",
        "fp8_block128_ue8m0": "quantize/fp8_block128_ue8m0/gate",
        "int8_channel": "swiglu/silu_int8_rows",
    }
    few = (f"few_experts/{kind}",) if serves_few(kind) else ()
    gate = gates.get(kind, "swiglu/silu")
    return (*grouped, *few, *layout, "align/few", "align/many", "combine", gate)


def _layout_cells(kind: str) -> tuple[str, ...]:
    """Return the cells of what brings a weight of a kind into the layout that is read."""
    from hal.ops.kernels.kinds import ALL_KINDS

    spec = ALL_KINDS[kind]
    if spec.planes:
        return "planes", "by_column/product"
    if spec.scales != "group" or spec.scale_rows > 1:
        return ()
    return ("by_column/float32" if spec.scale_format == "float32" else "by_column/bytes",)


def _cells_in_ptx(kernel: Kernel, scheme: Scheme) -> tuple[str, ...]:
    from hal.ops.tiles import streams_rows

    kind = kind_of(kernel, scheme)
    sizes = (("one", 1), ("few", 8), ("sixteen", 16))
    if kernel.op == "fused_moe":
        streamed = kind != "bf16" and not kernel.name.startswith("triton_scaled")
        return (f"ring_experts/{kind}",) if streamed and serves_few(kind) else ()
    if not kind.endswith("_decode") or not streams_rows(kind, 4096, 4096, 8):
        return ()
    found = [size for size, rows in sizes if streams_rows(kind, 4096, 4096, rows)]
    return tuple(f"ring_rows/{kind}/{size}" for size in found)


def _specialized_cells(kernel: Kernel, scheme: Scheme) -> tuple[str, ...]:
    from hal.ops.tiles import SPECIALIZED_KINDS

    kind = kind_of(kernel, scheme)
    if kernel.op == "linear":
        if kind not in SPECIALIZED_KINDS or not scheme.weight.symmetric:
            return ()
        found = tuple(f"warp_specialized_rows/{kind}/{n}" for n in ("parts", "ordered", "whole"))
        return (*found, "step_order/rows") if kind.endswith("_decode") else found
    if kind in SPECIALIZED_KINDS:
        sizes = specialized_sizes(kind)
        orders = ("step_order/rows", "step_order/gate") if kind.endswith("_decode") else ()
        return (*(f"warp_specialized_packed/{kind}/{size}" for size in sizes), *orders)
    blocks = kind.startswith("fp8_block128") and "decode" not in kind
    return (f"warp_specialized/{kind}",) if blocks else ()


def specialized_sizes(kind: str) -> tuple[str, ...]:
    """Return the sizes of which `warp_specialized_packed` has cells: one a sort of tile."""
    short = () if kind == "fp8_block128_decode" else ("short",)
    ordered = ("ordered",) if kind.endswith("_decode") else ()
    return ("few", *ordered, "some", "many", "narrow", *short)


def _quantizing_cells(op: str, scheme: Scheme) -> tuple[str, ...]:
    """Return the cell of a quantizing op: what schemes that store rows alike have in common."""
    how = scheme.activation
    before = {"quantize": "plain", "quantize_rms_norm": "norm", "quantize_swiglu": "gate"}[op]
    if how.granularity == "group128" and how.scale_format == "e8m0":
        return (f"quantize/{scheme.name}/{before}",)
    if not how.dynamic and (how.second != "none" or not how.symmetric):
        return (f"quantize/{scheme.name}/{before}",)
    if how.scale_format != "float32" or how.second != "none":
        block = {"e2m1": "mxfp4" if how.second == "none" else "nvfp4"}.get(str(how.format), "mxfp8")
        orders = SCALE_ORDERS[block] if before == "plain" else ()
        return (f"quantize/{block}/{before}", *(f"quantize/{block}/plain/{one}" for one in orders))
    if not how.dynamic:
        return (f"quantize/{_STATIC_ROWS[str(how.format)]}/{before}",)
    if not how.symmetric:
        return (f"quantize/int8_channel_asymmetric/{before}",)
    plain, other = _ROWS[str(how.format), how.granularity]
    return (f"quantize/{plain}" if before == "plain" else f"quantize/{other}/{before}",)


def level_of(kernel: Kernel, cells: Iterable[Cell]) -> Level:
    """Return the level that machine code proves, which may be lower than the declared one.

    `native` is lowered to `emulated` where a product came out without a matrix instruction of the
    scheme's own format: of its codes, or, under scales per group, one that takes the scales.
    """
    lowered = kernel.level is Level.NATIVE and _lacking(kernel, cells)
    return Level.EMULATED if lowered else kernel.level


def _lacking(kernel: Kernel, cells: Iterable[Cell]) -> str:
    """Return which product has no matrix instruction of its own, or the empty text.

    Products that decode weights have that of bf16; `emulated` ones under scales need none.
    """
    from hal.ops.kernels.crosscompile import OWN_FORMAT

    for cell in cells:
        product, _, rest = cell.name.partition("/")
        found = ", ".join(cell.instructions) or "none"
        if product in ("gemm", "grouped_gemm"):
            own = OWN_FORMAT[rest.partition("/")[0]]
            if own not in cell.formats:
                return f"{cell.name}: no matrix instruction of {own}, found {found}"
        if product in ("sums", "sums_experts") and "fp8" not in cell.formats:
            return f"{cell.name}: no matrix instruction of fp8, found {found}"
        scaled = any(_SCALED.search(name) for name in cell.instructions)
        if product in ("scaled", "scaled_experts") and kernel.level is Level.NATIVE and not scaled:
            return f"{cell.name}: no matrix instruction with scales, found {found}"
    return ""


def fault_of(kernel: Kernel, scheme: str, cells: Iterable[Cell], limit_bytes: int) -> str:
    """Return what is wrong with compiled cells in one line, or the empty text.

    Args:
        kernel: The kernel.
        scheme: Name of the scheme.
        cells: All of its cells.
        limit_bytes: Shared memory that a block may have on the device.
    """
    cells = list(cells)
    for cell in cells:
        if cell.error:
            return f"{cell.name}: {cell.error}"
        if cell.shared_memory_bytes > limit_bytes:
            return (
                f"{cell.name}: {cell.shared_memory_bytes} bytes of shared memory of {limit_bytes}"
            )
    proved = level_of(kernel, cells)
    lowered = f" (declared {kernel.level}, is {proved})" if proved is not kernel.level else ""
    fault = _lacking(kernel, cells)
    return fault and fault + lowered


def facts_of(cells: Iterable[Cell]) -> Mapping[str, Any]:
    """Return what to tell of cells: [registers, spilled bytes, shared bytes], and instructions."""
    cells = list(cells)
    return {
        "cells": {
            cell.name: [cell.registers, cell.spilled_bytes, cell.shared_memory_bytes]
            for cell in cells
        },
        "instructions": sorted({name for cell in cells for name in cell.instructions}),
    }


def specialization_of(cells: Iterable[Cell]) -> str:
    """Return a hash of how cells were specialized: types, alignment, constants and options."""
    told = "\n".join(f"{cell.name} {cell.specialization}" for cell in cells)
    return hashlib.sha256(told.encode()).hexdigest()[:12]
