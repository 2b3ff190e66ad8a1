"""Multiply by int4 and fp8 weights with Marlin, Machete and CUTLASS's W4A8 product of vLLM.

Marlin reads codes, scales and zero points in the layout `marlin`, scales in the dtype of the
activations. It decodes fp8 by moving bits and leaves the difference of the exponent biases to the
scales: 2**120 in bf16, 2**8 in fp16; of NVFP4 to the second scale, which is rounded to bf16. It
takes a workspace of zeros with a word a compute unit. Machete and W4A8 bring codes into order by
operators of their own, from words of eight codes `[K/8, N]` with K inside: the canonical memory,
transposed as a view.

Source: vllm-project/vllm, csrc/libtorch_stable/torch_bindings.cpp (schemas; arguments that say
nothing here come and go), model_executor/kernels/linear/mixed_precision/{marlin,machete,cutlass}.py
(architectures, groups, multiples), layers/quantization/utils/{marlin_utils,marlin_utils_fp8,
marlin_utils_fp4,machete_utils}.py; vllm/scalar_type.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.arch import CudaArch
from hal.device import version_at_least
from hal.needs import Needs
from hal.ops.adapters.foreign import accepted, attribute, operator
from hal.ops.adapters.int4pack import offset_codes
from hal.ops.adapters.vllm_cutlass import MODULE, VLLM, multiples
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.linear import ALL, FLOAT_BYTES, INT4, LINEAR, NVFP4
from hal.ops.quantize import quantizer
from hal.quant.scheme import SCHEMES, group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor
    from hal.registry import Operand

FP8 = tuple(name for name in FLOAT_BYTES if name.startswith("fp8_"))
FP4 = (*NVFP4, "nvfp4_w4a16", "mxfp4", "mxfp4_w4a8", "mxfp4_w4a16")
MARLIN_TYPES = {
    "int4": "uint4b8",
    "uint4": "uint4",
    "e4m3fn": "float8_e4m3fn",
    "e2m1": "float4_e2m1f",
}
EXPONENT_SHIFT = {"bfloat16": 120, "float16": 8}
"""2 ** (target exponent bits - 1) - 2 ** (4 - 1), for the decoding of e4m3fn."""
FP4_SHIFT = 119
"""The same for e2m1 in bf16, 126, less the 7 by which the layout has scaled its e4m3 scales."""
FLOAT32_SECONDS = "0.25.1"
"""From this release of vLLM on, if not before, Marlin takes second scales of NVFP4 in float32; it
refuses those of another dtype, so that a release between cannot go wrong unseen."""
MOST_COMPUTE_UNITS = 512
MARLIN = (
    Needs.platform("cuda"),
    Needs.package("vllm", "0.14.0"),  # before, Marlin needed sm_80
    Needs.multiple_of("in_features", 128),
    Needs.multiple_of("out_features", 64),
)

Bound = tuple[Launch, Tensors]


def _marlin(*names: str) -> dict[str, tuple[Operand, ...]]:
    return {name: SCHEMES[name].operands(weight_only=True, layout="marlin") for name in names}


@LINEAR.kernel(
    "vllm_marlin_int4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=_marlin(*INT4),
    requires=(*MARLIN, Needs.at_least(CudaArch(7, 5)), Needs.math_of("dtype")),
    claimed=True,
)
@LINEAR.kernel(
    "vllm_marlin_fp8",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=_marlin(*FP8),
    requires=(*MARLIN, Needs.at_least(CudaArch(7, 5)), Needs.math_of("dtype")),
    claimed=True,
)
@LINEAR.kernel(
    "vllm_marlin_fp4",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures=_marlin(*FP4),
    requires=(
        *MARLIN,
        Needs.at_least(CudaArch(8, 0)),
        Needs.math("bfloat16"),
        Needs.one_of("dtype", "bfloat16", hint="fp16 does not hold all of these scales"),
    ),
    claimed=True,
)
def bind_marlin(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call Marlin's product; the layout has brought codes, scales and zeros into its order."""
    import torch

    from hal.quant.layout import kernel_arguments
    from hal.torch_compat import dtype

    multiply = operator("vllm", MODULE, "_C", "marlin_gemm", "gptq_marlin_gemm")
    given = kernel_arguments(weight)
    kind = MARLIN_TYPES[weight.encoding]
    number = int(attribute("vllm", "vllm.scalar_type", f"scalar_types.{kind}.id"))
    name = binding.problem("dtype", "bfloat16")
    assert given.scales is not None
    scales, second = given.scales, given.global_scale
    if weight.encoding != "e2m1":
        shift = EXPONENT_SHIFT[name] if weight.encoding == "e4m3fn" else 0
        scales = (scales * 2.0**shift).to(dtype(name))
    elif second is not None:
        second = (second * 2.0**FP4_SHIFT).reshape(1)
        if not version_at_least(str(binding.spec.software.version_of("vllm")), FLOAT32_SECONDS):
            second = second.to(dtype(name))
    else:
        scales = scales.view(dtype("e8m0"))
    locks = binding.spec.compute_units or MOST_COMPUTE_UNITS
    workspace = torch.zeros(locks, dtype=torch.int32, device=weight.device)
    has_bias, has_zeros = bias is not None, given.zeros is not None
    has_second, (rows_out, columns) = second is not None, weight.shape

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out: torch.Tensor = multiply(
            *accepted(
                multiply,
                a=x.contiguous(),
                c_or_none=None,
                b_q_weight=tensors[0],
                b_bias_or_none=None,
                b_scales=tensors[1],
                a_scales=None,
                global_scale=tensors[3] if has_second else None,
                b_zeros_or_none=tensors[3] if has_zeros else None,
                g_idx_or_none=None,
                perm_or_none=None,
                workspace=tensors[2],
                b_type_id=number,
                size_m=x.shape[0],
                size_n=rows_out,
                size_k=columns,
                is_k_full=True,
                use_atomic_add=False,
                use_fp32_reduce=True,
                is_zp_float=False,
            )
        )
        return out.add_(tensors[-1]) if has_bias else out

    # No weight has both a second scale and zero points.
    rest = (tensor for tensor in (second, given.zeros, bias) if tensor is not None)
    return launch, (given.values, scales, workspace, *rest)


def codes_of_words(codes: torch.Tensor) -> torch.Tensor:
    """Return `[K/8, N]` words of eight codes over the memory of bytes `[N, K/2]`."""
    import torch

    return codes.contiguous().view(torch.int32).t()


@LINEAR.kernel(
    "vllm_machete",
    level=Level.WEIGHT_ONLY,
    band="specialised",
    signatures={name: INT4[name] for name in ("int4_w4a16", "int4_w4a16_g64")},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly("sm_90"),
        Needs.math_of("dtype"),
        *multiples(128),
    ),
    claimed=True,
)
def bind_machete(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Let Machete reorder the codes and call its product; zero points come times scales."""
    from hal.torch_compat import dtype

    multiply = operator("vllm", MODULE, "_C", "machete_mm")
    prepack = operator("vllm", MODULE, "_C", "machete_prepack_B")
    kind = "uint4b8" if weight.zeros is None else "uint4"
    number = int(attribute("vllm", "vllm.scalar_type", f"scalar_types.{kind}.id"))
    wide = dtype(binding.problem("dtype", "bfloat16"))
    group, has_bias = group_of(weight.scheme.weight.granularity), bias is not None
    has_zeros = weight.zeros is not None
    assert weight.scales is not None
    scales = weight.scales.t().to(wide).contiguous()
    tensors = [prepack(codes_of_words(offset_codes(weight)), wide, number, wide), scales]
    if weight.zeros is not None:
        tensors.append(-scales * weight.zeros.t().to(wide))
    if bias is not None:
        tensors.append(bias)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        zeros = tensors[2] if has_zeros else None
        out: torch.Tensor = multiply(
            x.contiguous(), tensors[0], number, wide, tensors[1], zeros, group, None, None, None
        )
        return out.add_(tensors[-1]) if has_bias else out

    return launch, tuple(tensors)


@LINEAR.kernel(
    "vllm_cutlass_w4a8",
    level=Level.NATIVE,
    band="specialised",
    signatures={"int4_w4a8_fp8": ALL["int4_w4a8_fp8"]},
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly("sm_90"),
        Needs.math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="the product is written in bfloat16"),
        *multiples(128),
    ),
    claimed=True,
)
def bind_w4a8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Let vLLM reorder codes and scales, quantize the input per token and call its product."""
    import torch

    multiply = operator("vllm", MODULE, "_C", "cutlass_w4a8_mm")
    reorder = operator("vllm", MODULE, "_C", "cutlass_encode_and_reorder_int4b")
    pack = operator("vllm", MODULE, "_C", "cutlass_pack_scale_fp8")
    quantize, how = quantizer(binding, weight.shape[1]), weight.scheme.activation
    group, has_bias = group_of(weight.scheme.weight.granularity), bias is not None
    assert weight.scales is not None
    assert weight.global_scale is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = quantize(x, "e4m3fn", how)
        rows = scales.unsqueeze(-1)
        out: torch.Tensor = multiply(
            codes, tensors[0], tensors[1], group, tensors[2], rows, torch.bfloat16, None
        )
        return out.add_(tensors[3]) if has_bias else out

    codes = reorder(codes_of_words(weight.values))
    groups = pack(weight.scales.t().contiguous())
    channels = weight.global_scale.unsqueeze(-1).contiguous()
    return launch, (codes, groups, channels, *(() if bias is None else (bias,)))
