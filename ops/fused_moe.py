"""Run a mixture of experts: each token through its top-k experts, summed by routing weight.

    gate, up = (x[t] @ w13[e].T).split(intermediate)          w13 [experts, 2*intermediate, hidden]
    h        = activation(gate) * up                           rounded to the dtype of x
    y[t]     = sum_k weight[t, k] * (h @ w2[e_k].T)            w2 [experts, hidden, intermediate]

Quantized schemes represent x and h as the scheme's activations do, static ones under the largest
`input_scale` of the experts of w13 and of w2. Slots whose id is below 0 or at
least `experts` contribute nothing; a token without a present slot gets zeros.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral of Experts
(arXiv:2401.04088).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.binding import Binding, Launch, Tensors, measurements
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.linear import (
    E5M2,
    FP8,
    INT8,
    W4A8,
    TileChoice,
    encoding_of_rows,
    fixed_scale,
    multiply,
    packed_kind,
    packed_tensors,
    product_kind,
    row_scales,
    scale_names,
    w4a8_tensors,
)
from hal.ops.quantize import fake_quantize
from hal.quant.codec import SCALE_FLOOR
from hal.quant.scheme import SCHEMES
from hal.registry import Level, Op

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hal.ops.route import Routing
    from hal.quant.tensor import QTensor

__all__ = ["ACTIVATIONS", "FUSED_MOE", "activate", "fused_moe"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
FUSED_MOE = Op(
    "fused_moe",
    ("tokens", "experts", "top_k", "hidden", "intermediate", "dtype", "activation"),
    "run tokens through their experts",
    measurements("fused_moe"),
    choices={"dtype": ACTIVATION_DTYPES, "activation": ACTIVATIONS},
    at_most=(("top_k", "experts"),),
)
QUANTIZED = tuple(name for name in SCHEMES if name != "bf16")
BYTEWISE = tuple(name for name in QUANTIZED if SCHEMES[name].weight.bytewise)
PACKED = tuple(name for name in QUANTIZED if name not in (*BYTEWISE, *E5M2))


def moe_signatures(
    *names: str, weight_only: bool = False, layout: str = "canonical"
) -> dict[str, Any]:
    signatures = {}
    for name in names:
        operands = SCHEMES[name].operands
        x, w13 = operands(weight_only=weight_only, layout=layout, weight="w13")
        _, w2 = operands(weight_only=weight_only, layout=layout, weight="w2")
        signatures[name] = (x, w13, w2)
    return signatures


TRITON = (
    Needs.feature("triton"),
    Needs.package("triton", "3.2"),
    Needs.between("experts", 1, 1025),
    Needs.one_of("activation", *ACTIVATIONS),
)

Bound = tuple[Launch, Tensors]


def fused_moe(
    x: torch.Tensor,
    w13: QTensor | torch.Tensor,
    w2: QTensor | torch.Tensor,
    routing: Routing,
    *,
    activation: str = "silu",
    **options: Any,
) -> torch.Tensor:
    """Return the experts' output; binds the weights on first use and keeps the binding.

    Args:
        x: `[tokens, hidden]` bf16 or fp16.
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows.
        w2: `[experts, hidden, intermediate]`, under the same scheme.
        routing: Experts and weights of each token.
        activation: One of `ACTIVATIONS`.
        **options: `platform`, `force`, `minimum`, ... as for `hal.ops.FusedMoE`.

    Raises:
        ArgumentError: For a wrong shape, dtype, device or routing.
        NoKernelError: If no kernel can run.
    """
    from hal.ops.cache import bound_fused_moe

    bound = bound_fused_moe(w13, w2, x.dtype, activation=activation, **options)
    result: torch.Tensor = bound(x, routing)
    return result


def activate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up of `[..., 2*intermediate]`, in the dtype given."""
    from torch.nn import functional

    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        return functional.silu(gate) * up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return functional.gelu(gate, approximate=approximate) * up


@FUSED_MOE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=moe_signatures(*SCHEMES),
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def bind_reference(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Follow the formula expert by expert in float32."""
    scheme, encoding = w13.scheme, w13.encoding
    activation = binding.problem("activation", "silu")
    width = len(w13.tensors)
    single = binding.selection.options.batch_invariant

    def launch(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        seen13, seen2 = w13.with_tensors(tensors[:width]), w2.with_tensors(tensors[width:])
        wide13, wide2 = seen13.dequantize(), seen2.dequantize()
        fixed13, fixed2 = ((*fixed_scale(seen), None)[0] for seen in (seen13, seen2))
        rows = fake_quantize(x, scheme, encoding, fixed13)
        out = rows.new_zeros(x.shape[0], w2.shape[1])
        for expert in range(w13.shape[0]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            h = activate(multiply(rows[token], wide13[expert], single), activation).to(x.dtype)
            y = multiply(fake_quantize(h, scheme, encoding, fixed2), wide2[expert], single)
            out.index_add_(0, token, y * weights[token, slot].float().unsqueeze(-1))
        return out.to(x.dtype)

    return launch, (*w13.tensors, *w2.tensors)


@FUSED_MOE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures("bf16"),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_bf16(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Sort tokens by expert and multiply bf16 or fp16 in Triton."""
    return _bind_triton(binding, w13, w2, "bf16")


@FUSED_MOE.kernel(
    "triton_fp8",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(*FP8),
    requires=(
        *TRITON,
        Needs.triton_math("e4m3fn", "e4m3fnuz"),
        Needs.between("hidden", 1, 32768),
        Needs.between("intermediate", 1, 32768),
    ),
)
def bind_triton_fp8(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Sort tokens by expert and multiply 8-bit floats in Triton."""
    return _bind_triton(binding, w13, w2, product_kind(w13.scheme))


@FUSED_MOE.kernel(
    "triton_int8",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(*INT8),
    requires=(
        *TRITON,
        Needs.triton_math("int8"),
        Needs.between("hidden", 1, 32768),
        Needs.between("intermediate", 1, 32768),
    ),
)
def bind_triton_int8(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Sort tokens by expert and multiply int8 in Triton."""
    return _bind_triton(binding, w13, w2, "int8_channel")


@FUSED_MOE.kernel(
    "triton_decode",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*BYTEWISE, *E5M2, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_decode(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Decode weight bytes in the loop by integer shifts; needs no fp8 in hardware."""
    return _bind_triton(binding, w13, w2, product_kind(w13.scheme) + "_decode")


@FUSED_MOE.kernel(
    "triton_packed",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*PACKED, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_packed(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Decode codes of four bits, or scales of exponents, in the loop by integer shifts."""
    kinds = packed_kind(w13), packed_kind(w2)  # int4 may have zero points in one of them
    return _bind_triton(binding, w13, w2, *kinds, read=packed_tensors)


@FUSED_MOE.kernel(
    "triton_w4a8",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(W4A8, layout="int4_planes"),
    requires=(
        *TRITON,
        Needs.triton_math("e4m3fn", "e4m3fnuz"),
        Needs.between("hidden", 1, 32768),
        Needs.between("intermediate", 1, 32768),
    ),
)
def bind_triton_w4a8(binding: Binding, w13: QTensor, w2: QTensor) -> Bound:
    """Turn int4 codes into 8-bit floats in the loop and multiply those."""
    read = partial(w4a8_tensors, binding)
    return _bind_triton(binding, w13, w2, "int4_group_fp8", read=read)


def _bind_triton(
    binding: Binding,
    w13: QTensor,
    w2: QTensor,
    kind: str,
    kind2: str = "",
    *,
    read: Callable[[QTensor], tuple[torch.Tensor, ...]] = row_scales,
) -> Bound:
    import torch

    from hal.ops.align import align_triton
    from hal.ops.kernels.combine import combine
    from hal.ops.kernels.grouped_gemm import grouped_gemm
    from hal.ops.kernels.swiglu import silu_and_mul
    from hal.ops.quantize import quantize_triton

    experts, columns, hidden = w13.shape
    intermediate = columns // 2
    scheme, encoding = w13.scheme, encoding_of_rows(binding, w13)
    activation = binding.problem("activation", "silu")
    quantizes = not kind.endswith("_decode") and scheme.activation.format is not None
    how, static = scheme.activation, quantizes and scheme.static
    read13, read2 = read(w13), read(w2)
    if static:
        read13, read2 = (*read13, *fixed_scale(w13)), (*read2, *fixed_scale(w2))
    kind2 = kind2 or kind
    width, names13, names2 = len(read13), scale_names(kind), scale_names(kind2)
    tiles13 = TileChoice(binding, kind, columns, hidden)
    tiles2 = TileChoice(binding, kind2, hidden, intermediate)
    fnuz = w13.encoding == "e4m3fnuz"
    dynamic = quantizes and not static
    gate = _gate_and_quantize(encoding, how.granularity, activation) if dynamic else None

    def launch(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        tokens, top_k = ids.shape
        slots = tokens * top_k
        ids, weights = ids.contiguous(), weights.contiguous()
        rows = -(-slots // experts)
        matrices = min(experts, slots)
        tile13 = tiles13(rows, matrices)
        tile2 = tiles2(rows, matrices, tile13.block_m)
        places = align_triton(ids, experts, tile13.block_m)
        b13, *s13 = tensors[:width]
        b2, *s2 = tensors[width:]
        a, a_scales = x, None
        if quantizes:
            a, a_scales = quantize_triton(x, encoding, how, s13[-1] if static else None)
        gate_up = x.new_empty(slots, columns)
        grouped_gemm(
            a,
            b13,
            gate_up,
            *places,
            top_k_divisor=top_k,
            a_scales=a_scales,
            kind=kind,
            tile=tile13,
            fnuz=fnuz,
            **dict(zip(names13, s13, strict=False)),
        )
        h_scales = None
        if gate is not None:
            h, h_scales = gate(gate_up)
        else:
            h = x.new_empty(slots, intermediate)
            silu_and_mul(gate_up, h, activation=activation)
            if static:
                h, h_scales = quantize_triton(h, encoding, how, s2[-1])
        y = x.new_empty(slots, hidden)
        grouped_gemm(
            h,
            b2,
            y,
            *places,
            top_k_divisor=1,
            a_scales=h_scales,
            kind=kind2,
            tile=tile2,
            fnuz=fnuz,
            **dict(zip(names2, s2, strict=False)),
        )
        out = torch.empty_like(x)
        combine(y.view(tokens, top_k, hidden), out, ids, experts, weights)
        return out

    return launch, (*read13, *read2)


def _gate_and_quantize(
    encoding: str, granularity: str, activation: str
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    import torch

    from hal.formats import number_format
    from hal.ops.kernels import swiglu
    from hal.quant.scheme import scale_shape
    from hal.torch_compat import dtype

    top, target = number_format(encoding).quantization_maximum, dtype(encoding)
    per_row = granularity == "token"
    launch = swiglu.silu_and_mul_quantize_rows if per_row else swiglu.silu_and_mul_quantize_groups

    def gate(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (gate_up.shape[0], gate_up.shape[1] // 2)
        values = torch.empty(shape, dtype=target, device=gate_up.device)
        scales = torch.empty(
            scale_shape(granularity, shape), dtype=torch.float32, device=gate_up.device
        )
        launch(gate_up, values, scales, top, SCALE_FLOOR, activation=activation)
        return values, scales

    return gate
