"""Multiply by int4, int8 and fp8 weights on a CPU with Intel Extension for PyTorch (IPEX).

| product | weight | scales | zero points |
|---|---|---|---|
| int4 | codes 0 to 15 in bytes `[N, K/2]`, even columns low | `[N, K/group]` | the same |
| int8 | `[N, K]` | `[N]` | none |
| fp8 | e4m3fn `[N, K]` | `[N]` or `[N, K/128]` | none |

That is the canonical memory; IPEX pads N and brings it into an order of its own when it is bound.
Without zero points an int4 code stands for itself less 8. Mode 0 multiplies in the dtype of the
activations. Mode 3 quantizes them to int8, with AMX alone: how it rounds cannot be seen elsewhere,
so it is not offered.

IPEX has its packed order and its products for processors with AMX and AVX512-FP16 only. On others
these operators decode the whole weight at each call, which took 1.3 to 53 times as long as a bf16
product (docs/cpu.md). Importing IPEX replaces operators of torch's CPU, and ends the process where
torch is of another release: `hal.software` says so beforehand.

Source: the wheel of 2.8.0, nn/modules/weight_only_quantization.py, quantization/_qconfig.py and its
registered schemas; intel/intel-extension-for-pytorch, csrc/cpu/aten/Linear.cpp (which names a dtype
has), kernels/WoqTppKrnl.cpp and WoqLinearKrnl.cpp (`CPU_CAPABILITY_AVX512_FP16`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import operator
from hal.ops.adapters.int4pack import offset_codes
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import FLOAT_BYTES, INT4, LINEAR, WEIGHT_ONLY, row_scales
from hal.quant.scheme import BLOCK, group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PACKAGE, MODULE = "intel-extension-for-pytorch", "intel_extension_for_pytorch"
IPEX = (
    Needs.platform("cpu"),
    Needs.in_family("x86_64"),
    Needs.package(PACKAGE, "2.8"),
    Needs.math_of("dtype", "native", "emulated"),
)
INT8 = {name: WEIGHT_ONLY[name] for name in ("int8_channel", "int8_w8a16")}
FP8 = {name: how for name, how in FLOAT_BYTES.items() if name.startswith("fp8_")}
NO_GROUP, AS_GIVEN, FP8_NUMBER = -1, 0, 4
"""No scale per group; multiply in the dtype of the activations; `WoqWeightDtype.FP8`."""

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "ipex_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=INT4,
    requires=(*IPEX, Needs.multiple_of("in_features", 128)),
    claimed=True,
)
@LINEAR.kernel(
    "ipex_int8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=INT8,
    requires=IPEX,
    claimed=True,
)
def bind_integers(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Let IPEX pack codes, scales and zero points, and call its product on what it packed."""
    pack = operator(PACKAGE, MODULE, "ipex_prepack", "woq_linear_pack_weight")
    multiply = operator(PACKAGE, MODULE, "torch_ipex", "woq_linear")
    group = group_of(weight.scheme.weight.granularity) or NO_GROUP
    kind = "int8" if group == NO_GROUP else "int4"
    codes = weight.values if kind == "int8" else offset_codes(weight)
    zeros = None if weight.zeros is None else weight.zeros.float()
    shape = list(weight.shape)
    packed, scales, zeros, _, _ = pack(
        codes.contiguous(), kind, shape, weight.scales, zeros, None, None, group, AS_GIVEN
    )
    has_bias, first_zeros = bias is not None, 1 + len(scales)
    last_zeros = first_zeros + len(zeros or ())

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out: torch.Tensor = multiply(
            x.contiguous(),
            tensors[0],
            kind,
            shape,
            tensors[1:first_zeros],
            tensors[first_zeros:last_zeros] or None,
            None,
            None,
            group,
            AS_GIVEN,
            0,
            None,
        )
        return out.add_(tensors[-1]) if has_bias else out

    return launch, (packed, *scales, *(zeros or ()), *(() if bias is None else (bias,)))


@LINEAR.kernel(
    "ipex_fp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=FP8,
    requires=(*IPEX, Needs.multiple_of("in_features", 128)),
    claimed=True,
)
def bind_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Let IPEX pack the weight into an object of its own, and call its product by the handle.

    Its operator on plain tensors knows no fp8. The handle holds the object's address: the launcher
    keeps the object, and the packed weight stands beside the handle so that its bytes are counted.
    """
    pack = operator(PACKAGE, MODULE, "ipex_prepack", "weight_only_qlinear_prepack")
    multiply = operator(PACKAGE, MODULE, "torch_ipex", "ipex_woq_linear")
    codes, scales = row_scales(weight)
    blocks = weight.scheme.weight.granularity == "block128"
    if blocks:
        scales = scales.repeat_interleave(BLOCK, 0)[: weight.shape[0]].contiguous()
    kept = pack(
        codes.contiguous(),
        FP8_NUMBER,
        list(weight.shape),
        scales,
        None,
        bias,
        None,
        None,
        BLOCK if blocks else NO_GROUP,
        AS_GIVEN,
        0,
        False,
    )

    def launch(x: torch.Tensor, tensors: Tensors, kept: object = kept) -> torch.Tensor:
        out: torch.Tensor = multiply(x.contiguous(), tensors[0])
        return out

    return launch, (kept.get_data_handle(), kept.get_weight())
