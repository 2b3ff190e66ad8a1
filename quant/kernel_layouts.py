"""Register the layouts that kernels of other libraries read: orders of codes and scales together.

| layout | weights | codes | scales | kernel's arguments |
|---|---|---|---|---|
| k_major_scales | all | as k_major | per group and block transposed too | as stored |
| marlin | int4 and uint4 per group | marlin_4bit; int4 as value + 8 | marlin_group, of one group \
marlin_channel; zeros as marlin_group, four bits each | int32 words |
| | int8 per channel | marlin_8bit, value + 128 | marlin_channel | int32 words |
| | e4m3fn per tensor, channel, block | marlin_8bit | one a row, marlin_channel or marlin_group | \
int32 words |
| | mxfp8, mxfp4 | marlin_8bit, _4bit | e8m0 in marlin_group_fp4 | int32 words |
| | nvfp4 | marlin_4bit | s0e5m3 in marlin_group_fp4 | int32 words |
| cutlass_w4a8 | int4_w4a8_fp8 | cutlass_int4, unified int4 | `[G, N]`, products with -8 to -1 | \
int32 `[K/8, N]`, N strided; `[G, N, 8]` |
| int4_planes | int4 per group | int4_planes | canonical | as stored |
| blocked_128x4 | nvfp4, mxfp8, mxfp4 | canonical | blocked_128x4 | as stored |
| blackwell_mx | mxfp8, mxfp4 | K in multiples of 128 bytes | blackwell_mx | codes `[K, N]` |
| hopper_mx_w4, _w8 | mxfp4 | hopper_mxfp4 | hopper_mx_w4, _w8 | codes and scales K first |
| cdna4_mx | mxfp8, mxfp4 | canonical | cdna4_mx | codes and scales K first |
| aiter_16x16 | 8 bits, bf16, fp16 | aiter_16x16, of 16 bits _wide | canonical | as stored |
| | mxfp4 | aiter_16x16 | e8m0_shuffle | as stored |
| deep_gemm | e4m3fn per block | canonical | float32 per row and 128 columns, mn_major | scales \
`[N, K/128]`, N contiguous, aligned to 16 bytes |
| deep_gemm_ue8m0 | mxfp8 | canonical | mn_major_ue8m0 | int32 of four exponents, N contiguous |
| | e4m3fn per block, scales powers of two | canonical | the same, one a row | the same |

Names of orders are rows of `hal.quant.repack.CODE_LAYOUTS` and `hal.quant.swizzle.SCALE_LAYOUTS`,
with their sources and padding; other rewritings are in `hal.quant.recode`. On Hopper DeepGEMM's
default recipe (1, 128, 128) takes scales per 128x128 block as `canonical` holds them, and refuses
padded ones; `deep_gemm` is for recipe (1, 1, 128). Marlin multiplies its scales by powers of two
that depend on the activations, and takes those of int4 and 8 bits in their dtype: elementwise, so
that an adapter does both to what `kernel_arguments` returns. On bf16 activations its s0e5m3 scales
below 2**-6 count as 0, in vLLM too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.quant.forms import Form, Layout
from hal.quant.parts import Order, Part, Plain
from hal.quant.recode import E8M0, NIBBLES, PRODUCTS, S0E5M3, UINT4B8, UINT8B128, UNIFIED_INT4
from hal.quant.repack import CODE_LAYOUTS
from hal.quant.swizzle import SCALE_LAYOUTS, transposed

if TYPE_CHECKING:
    import torch

__all__ = ["kernel_layouts"]

_GROUPS = ("group32", "group64", "group128")
_EIGHT = ("e4m3fn", "e4m3fnuz", "int8")
_MX = ("e4m3fn", "e2m1")


def _words(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return stored.view(torch.int32)


def _eights(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return stored.unflatten(-1, (stored.shape[-1] // 8, 8))


def _code(name: str) -> Part:
    return Part(CODE_LAYOUTS[name])


def _scale(name: str) -> Part:
    return Part(SCALE_LAYOUTS[name])


def _marlin() -> tuple[Form, ...]:
    four, eight = CODE_LAYOUTS["marlin_4bit"], CODE_LAYOUTS["marlin_8bit"]
    group: Order = SCALE_LAYOUTS["marlin_group"]
    fp4: Order = SCALE_LAYOUTS["marlin_group_fp4"]
    channel = _scale("marlin_channel")
    forms: list[Form] = []
    for encoding, codes in (("int4", Part(four, UINT4B8)), ("uint4", Part(four))):
        zeros = Part(SCALE_LAYOUTS["marlin_zeros"], NIBBLES, view=_words)
        for one_group, scales in ((True, channel), (False, Part(group))):
            parts = {"values": codes, "scales": scales, "zeros": zeros}
            form = Form((encoding,), parts, _GROUPS, ("float32",), ("none",), one_group=one_group)
            forms.append(form)
    parts = {"values": Part(eight, UINT8B128), "scales": channel}
    forms.append(Form(("int8",), parts, ("channel",), ("float32",)))
    parts = {"values": Part(eight), "scales": channel}
    forms.append(Form(("e4m3fn",), parts, ("tensor", "channel"), ("float32",), spread=True))
    for one_group, scales in ((True, channel), (False, Part(group))):
        parts = {"values": Part(eight), "scales": scales}
        block = Form(
            ("e4m3fn",), parts, ("block128",), ("float32",), spread=True, one_group=one_group
        )
        forms.append(block)
    for encoding, order in (("e4m3fn", eight), ("e2m1", four)):
        parts = {"values": Part(order), "scales": Part(fp4)}
        forms.append(Form((encoding,), parts, ("group32",), ("e8m0",)))
    parts = {"values": Part(four), "scales": Part(fp4, S0E5M3)}
    forms.append(Form(("e2m1",), parts, ("group16",), ("e4m3fn",)))
    return tuple(forms)


def _cutlass_w4a8() -> tuple[Form, ...]:
    scales = Part(SCALE_LAYOUTS["columns"], PRODUCTS, view=_eights)
    parts = {"values": Part(CODE_LAYOUTS["cutlass_int4"], UNIFIED_INT4), "scales": scales}
    return (Form(("int4",), parts, ("group128",), ("e4m3fn",), ("channel",)),)


def _mx(codes: Part, scales: Part, encodings: tuple[str, ...] = _MX) -> tuple[Form, ...]:
    return (Form(encodings, {"values": codes, "scales": scales}, ("group32",), ("e8m0",)),)


def _aiter() -> tuple[Form, ...]:
    narrow = {"values": _code("aiter_16x16")}
    return (
        Form(("bfloat16", "float16"), {"values": _code("aiter_16x16_wide")}),
        Form(_EIGHT, narrow, scale_formats=("float32",)),
        *_mx(_code("aiter_16x16"), _scale("e8m0_shuffle"), ("e2m1",)),
    )


def _k_major_scales(k_major: Part) -> tuple[Form, ...]:
    both = {"values": k_major, "scales": k_major, "zeros": k_major}
    matrices = (*(f"group{size}" for size in (16, 32, 64, 128)), "block128")
    return (Form((), both, matrices), Form((), {"values": k_major}))


def kernel_layouts(k_major: Part) -> tuple[Layout, ...]:
    """Return the layouts of the table above.

    Args:
        k_major: How the stored transpose is made.
    """
    blocked, exponents = _scale("blocked_128x4"), SCALE_LAYOUTS["mn_major_ue8m0"]
    first, block = Part(Plain(view=transposed)), ("block128",)
    return (
        Layout("k_major_scales", _k_major_scales(k_major)),
        Layout("marlin", _marlin()),
        Layout("cutlass_w4a8", _cutlass_w4a8()),
        Layout("int4_planes", (Form(("int4",), {"values": _code("int4_planes")}, _GROUPS),)),
        Layout(
            "blocked_128x4",
            (
                Form(_MX, {"scales": blocked}, ("group32",), ("e8m0",)),
                Form(("e2m1",), {"scales": blocked}, ("group16",), ("e4m3fn",)),
            ),
        ),
        Layout("blackwell_mx", _mx(_code("bytes_128"), _scale("blackwell_mx"))),
        *(
            Layout(name, _mx(_code("hopper_mxfp4"), _scale(name), ("e2m1",)))
            for name in ("hopper_mx_w4", "hopper_mx_w8")
        ),
        Layout("cdna4_mx", _mx(first, _scale("cdna4_mx"))),
        Layout("aiter_16x16", _aiter()),
        Layout(
            "deep_gemm",
            (Form(("e4m3fn",), {"scales": _scale("mn_major")}, block, ("float32",), spread=True),),
        ),
        Layout(
            "deep_gemm_ue8m0",
            (
                Form(("e4m3fn",), {"scales": Part(exponents)}, ("group32",), ("e8m0",)),
                Form(
                    ("e4m3fn",), {"scales": Part(exponents, E8M0)}, block, ("float32",),
                    spread=True,
                ),
            ),
        ),
    )  # fmt: skip
