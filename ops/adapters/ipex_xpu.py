"""Multiply by int4 weights on XPU with Intel Extension for PyTorch (IPEX), which calls oneDNN.

Operands are those of `vllm_xpu_int4`. Which order IPEX reads codes in depends on the engine that it
takes: oneDNN or XeTLA, by the device and a setting of the process. So oneDNN is asked for around
each call, as IPEX's own test does, and the setting is given back. That test is in fp16 alone.

IPEX's releases for XPU are in no registry of Python's: none was looked at, its sources only.

Source: intel/intel-extension-for-pytorch, csrc/gpu/oneDNN/DnnlMatmulQuant.h (operands of
`dnnl_matmul_w4a16`), its test `TestOneDNNInt4Linear`, and `xpu_gemm_use_xetla` of
nn/utils/_quantize_convert.py (which engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import attribute, operator
from hal.ops.adapters.ipex import MODULE, PACKAGE
from hal.ops.adapters.vllm_xpu import SIGNED, int4_operands
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import LINEAR
from hal.quant.scheme import group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

Bound = tuple[Launch, Tensors]


@LINEAR.kernel(
    "ipex_xpu_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=SIGNED,
    requires=(
        Needs.platform("xpu"),
        Needs.package(PACKAGE, "2.8"),
        Needs.math("float16"),
        Needs.one_of("dtype", "float16", hint="IPEX tests it in float16 alone"),
        Needs.multiple_of("in_features", 128),
        Needs.multiple_of("out_features", 8),
    ),
    claimed=True,
)
def bind_int4(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call IPEX's product with an int4 weight, by oneDNN."""
    multiply = operator(PACKAGE, MODULE, "torch_ipex", "mm_int4")
    engine = attribute(PACKAGE, "torch.xpu", "compute_eng")
    onednn = attribute(PACKAGE, "torch.xpu", "XPUComputeEng.ONEDNN")
    group, has_bias = group_of(weight.scheme.weight.granularity), bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        with engine(onednn):
            out: torch.Tensor = multiply(x.contiguous(), *tensors[:3], group, None)
        return out.add_(tensors[3]) if has_bias else out

    return launch, (*int4_operands(binding, weight), *(() if bias is None else (bias,)))
