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
from hal.ops.activations import ACTIVATIONS, Activation, activate
from hal.ops.binding import Binding, Launch, Tensors, measurements
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.expert_layer import (
    FORMATS,
    PLAIN,
    ExpertLayer,
    Updates,
    add_shared,
    batched_ids,
    weighted,
)
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
    from collections.abc import Callable, Iterator

    import torch

    from hal.ops.route import Routing
    from hal.quant.tensor import QTensor

__all__ = ["ACTIVATIONS", "FUSED_MOE", "activate", "fused_moe"]

SWITCHES = ("gated", "clamped", "interleaved", "bias", "lora", "apply_router_weight_on_input")
FUSED_MOE = Op(
    "fused_moe",
    (
        *("tokens", "experts", "top_k", "hidden", "intermediate", "unpadded_hidden", "dtype"),
        *("activation", "gated", "clamped", "interleaved", "bias", "format", "lora"),
        "apply_router_weight_on_input",
    ),
    "run tokens through their experts",
    measurements("fused_moe"),
    choices={
        "dtype": ACTIVATION_DTYPES,
        "activation": ACTIVATIONS,
        "format": FORMATS,
        **dict.fromkeys(SWITCHES, (True, False)),
    },
    at_most=(("top_k", "experts"), ("unpadded_hidden", "hidden")),
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
    Needs.package("triton", "3.3", "slots are aligned with tl.gather"),
    Needs.between("experts", 1, 1025),
    Needs.one_of("activation", *ACTIVATIONS),
)
NO_BATCHES_OF_INT8 = Needs.one_of(
    "format", "standard", hint="int8 activations are quantized for rows with a routing only"
)

Bound = tuple[Launch, Tensors]


def fused_moe(
    x: torch.Tensor,
    w13: QTensor | torch.Tensor,
    w2: QTensor | torch.Tensor,
    routing: Routing | torch.Tensor,
    *,
    shared: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return the experts' output; binds the weights on first use and keeps the binding.

    Args:
        x: `[tokens, hidden]` bf16 or fp16.
        w13: `[experts, 2*intermediate, hidden]`, gate rows before up rows.
        w2: `[experts, hidden, intermediate]`, under the same scheme.
        routing: Experts and weights of each token, or counts if `format="batched"`.
        shared: What is added to the sum, as in a call of `hal.ops.FusedMoE`.
        **options: `activation`, biases, `platform`, `force`, ... as for `hal.ops.FusedMoE`.

    Raises:
        ArgumentError: For a wrong shape, dtype, device or routing.
        NoKernelError: If no kernel can run.
    """
    from hal.ops.cache import bound_fused_moe

    bound = bound_fused_moe(w13, w2, x.dtype, **options)
    result: torch.Tensor = bound(x, routing, shared=shared)
    return result


@FUSED_MOE.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=moe_signatures(*SCHEMES),
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def bind_reference(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Follow the formula expert by expert in float32."""
    import torch

    scheme, encoding = w13.scheme, w13.encoding
    width, both = len(w13.tensors), len(w13.tensors) + len(w2.tensors)
    single = binding.selection.options.batch_invariant
    experts, hidden, _ = w2.shape

    def of_experts(
        x: torch.Tensor, ids: torch.Tensor, tensors: Tensors, updates: Updates | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield, for each expert, its tokens, their slots, and its outputs in float32."""
        seen13, seen2 = w13.with_tensors(tensors[:width]), w2.with_tensors(tensors[width:both])
        wide13, wide2 = seen13.dequantize(), seen2.dequantize()
        fixed13, fixed2 = ((*fixed_scale(seen), None)[0] for seen in (seen13, seen2))
        bias13, bias2 = layer.biases(tensors)
        rows = fake_quantize(x, scheme, encoding, fixed13)
        for expert in range(experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate_up = multiply(rows[token], wide13[expert], single)
            if bias13 is not None:
                gate_up = gate_up + bias13[expert].float()
            slots = token * ids.shape[1] + slot
            if updates is not None:
                updates.first(x, gate_up, slots)
            h = activate(gate_up, layer.activation).to(x.dtype)
            y = multiply(fake_quantize(h, scheme, encoding, fixed2), wide2[expert], single)
            y = y if bias2 is None else y + bias2[expert].float()
            if updates is not None:
                updates.second(h, y, slots)
            yield token, slot, y

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        rows, weights = layer.enter(x, weights, hidden)
        out = rows.new_zeros(rows.shape, dtype=torch.float32)
        for token, slot, y in of_experts(rows, ids, tensors, updates):
            out.index_add_(0, token, weighted(y, None if weights is None else weights[token, slot]))
        return add_shared(out[:, : x.shape[1]], shared, x)

    def launch_batched(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows, _ = layer.enter(x, None, hidden)
        out = torch.zeros_like(rows).flatten(0, 1)
        ids = batched_ids(counts, x.shape[1])
        for row, _, y in of_experts(rows.flatten(0, 1), ids, tensors):
            out[row] = y.to(x.dtype)
        return out.view(rows.shape)[..., : x.shape[2]].contiguous()

    return launch_batched if layer.batched else launch, (*w13.tensors, *w2.tensors)


@FUSED_MOE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures("bf16"),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_bf16(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply bf16 or fp16 in Triton."""
    return _bind_triton(binding, w13, w2, layer, "bf16")


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
def bind_triton_fp8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply 8-bit floats in Triton."""
    return _bind_triton(binding, w13, w2, layer, product_kind(w13.scheme))


@FUSED_MOE.kernel(
    "triton_int8",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(*INT8),
    requires=(
        *TRITON,
        NO_BATCHES_OF_INT8,
        Needs.triton_math("int8"),
        Needs.between("hidden", 1, 32768),
        Needs.between("intermediate", 1, 32768),
    ),
)
def bind_triton_int8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply int8 in Triton."""
    return _bind_triton(binding, w13, w2, layer, "int8_channel")


@FUSED_MOE.kernel(
    "triton_decode",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*BYTEWISE, *E5M2, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_decode(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Decode weight bytes in the loop by integer shifts; needs no fp8 in hardware."""
    return _bind_triton(binding, w13, w2, layer, product_kind(w13.scheme) + "_decode")


@FUSED_MOE.kernel(
    "triton_packed",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*PACKED, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_packed(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Decode codes of four bits, or scales of exponents, in the loop by integer shifts."""
    kinds = packed_kind(w13), packed_kind(w2)  # int4 may have zero points in one of them
    return _bind_triton(binding, w13, w2, layer, *kinds, read=packed_tensors)


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
def bind_triton_w4a8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Turn int4 codes into 8-bit floats in the loop and multiply those."""
    read = partial(w4a8_tensors, binding)
    return _bind_triton(binding, w13, w2, layer, "int4_group_fp8", read=read)


def _bind_triton(
    binding: Binding,
    w13: QTensor,
    w2: QTensor,
    layer: ExpertLayer,
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
    from hal.ops.quantize import launch_triton, quantize_triton

    experts, columns, hidden = w13.shape
    intermediate = w2.shape[2]
    scheme, encoding = w13.scheme, encoding_of_rows(binding, w13)
    activation = layer.activation
    quantizes = not kind.endswith("_decode") and scheme.activation.format is not None
    how, static = scheme.activation, quantizes and scheme.static
    read13, read2 = read(w13), read(w2)
    if static:
        read13, read2 = (*read13, *fixed_scale(w13)), (*read2, *fixed_scale(w2))
    kind2 = kind2 or kind
    width, names13, names2 = len(read13), scale_names(kind), scale_names(kind2)
    both = width + len(read2)
    tiles13 = TileChoice(binding, kind, columns, hidden)
    tiles2 = TileChoice(binding, kind2, hidden, intermediate)
    fnuz = w13.encoding == "e4m3fnuz"
    dynamic = quantizes and not static
    gate = _gate_and_quantize(encoding, how.granularity, activation) if dynamic else None

    def products(
        x: torch.Tensor,
        ids: torch.Tensor,
        tensors: Tensors,
        counts: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        """Return `[slots, hidden]`; rows of absent slots hold anything."""
        top_k, slots = ids.shape[1], ids.numel()
        rows = -(-slots // experts)
        matrices = min(experts, slots)
        tile13 = tiles13(rows, matrices)
        tile2 = tiles2(rows, matrices, tile13.block_m)
        places = align_triton(ids, experts, tile13.block_m)
        bias13, bias2 = layer.biases(tensors)
        b13, *s13 = tensors[:width]
        b2, *s2 = tensors[width:both]
        a, a_scales = x, None
        if static:
            a, a_scales = quantize_triton(x, encoding, how, s13[-1])
        elif quantizes:
            a, a_scales = launch_triton(x, encoding, how, hidden, counts=counts)
        gate_up = x.new_empty(slots, columns)
        grouped_gemm(
            a,
            b13,
            gate_up,
            *places,
            top_k_divisor=top_k,
            a_scales=a_scales,
            bias=bias13,
            kind=kind,
            tile=tile13,
            fnuz=fnuz,
            **dict(zip(names13, s13, strict=False)),
        )
        wide = h_scales = None
        if updates is not None:
            updates.first(x, gate_up, None)
        if gate is not None and updates is None:
            h, h_scales = gate(gate_up, counts)
        else:
            h = wide = x.new_empty(slots, intermediate)
            silu_and_mul(gate_up, h, activation, counts)
            if quantizes:
                h, h_scales = quantize_triton(h, encoding, how, s2[-1] if static else None)
        y = x.new_empty(slots, hidden)
        grouped_gemm(
            h,
            b2,
            y,
            *places,
            top_k_divisor=1,
            a_scales=h_scales,
            bias=bias2,
            kind=kind2,
            tile=tile2,
            fnuz=fnuz,
            **dict(zip(names2, s2, strict=False)),
        )
        if updates is not None:
            assert wide is not None
            updates.second(wide, y, None)
        return y

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        ids = ids.contiguous()
        weights = None if weights is None else weights.contiguous()
        rows, weights = layer.enter(x, weights, hidden)
        y = products(rows, ids, tensors, None, updates)
        out = torch.empty_like(x)
        if shared is not None:
            shared = shared.contiguous()
        combine(y.view(*ids.shape, hidden), out, ids, experts, weights, shared)
        return out

    def launch_batched(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows, _ = layer.enter(x, None, hidden)
        ids = batched_ids(counts, x.shape[1])
        y = products(rows.reshape(-1, hidden), ids, tensors, counts)
        return y.view(rows.shape)[..., : x.shape[-1]].contiguous()

    return launch_batched if layer.batched else launch, (*read13, *read2)


def _gate_and_quantize(
    encoding: str, granularity: str, activation: Activation
) -> Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]:
    import torch

    from hal.formats import number_format
    from hal.ops.kernels import swiglu
    from hal.quant.scheme import scale_shape
    from hal.torch_compat import dtype

    top, target = number_format(encoding).quantization_maximum, dtype(encoding)
    per_row = granularity == "token"
    launch = swiglu.silu_and_mul_quantize_rows if per_row else swiglu.silu_and_mul_quantize_groups

    def gate(
        gate_up: torch.Tensor, counts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (gate_up.shape[0], gate_up.shape[1] // activation.products)
        values = torch.empty(shape, dtype=target, device=gate_up.device)
        scales = torch.empty(
            scale_shape(granularity, shape), dtype=torch.float32, device=gate_up.device
        )
        launch(gate_up, values, scales, top, SCALE_FLOOR, activation, counts)
        return values, scales

    return gate
