"""Run a mixture of experts in Triton: sort slots by expert, multiply, activate, multiply, combine.

Few tokens go another way with the same weights, without a sort: `hal.ops.few_experts`. Else slots
are sorted on the device by counting (`align`), so that nothing waits for the host and a launch can
be captured. Both products are `kernels/grouped_gemm.py`; what differs between schemes
is the kind of product, who quantizes the rows, and which tensors of the weight are read.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.activations import ACTIVATIONS, Activation
from hal.ops.binding import TRITON_HERE, Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer, Updates, batched_ids
from hal.ops.fused_moe import BYTEWISE, FUSED_MOE, NO_BATCHES_OF_INT8, PACKED, moe_signatures
from hal.ops.linear import (
    E5M2,
    FP8,
    INT8,
    W4A8,
    TileChoice,
    encoding_of_rows,
    fixed_scale,
    own_kind,
    own_scales,
    packed_kind,
    packed_tensors,
    product_kind,
    row_scales,
    scale_names,
    w4a8_tensors,
)
from hal.ops.triton_since import needs_triton
from hal.quant.codec import SCALE_FLOOR
from hal.registry import Level

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hal.ops.few_experts import FewTokens
    from hal.quant.scheme import Quantization
    from hal.quant.tensor import QTensor

TRITON = (
    TRITON_HERE,
    needs_triton("3.3", "slots are aligned with tl.gather"),
    Needs.between("experts", 1, 1025),
    Needs.one_of("activation", *ACTIVATIONS),
)

INVARIANT_ROWS = 64
"""Rows of an expert that batch-invariant layers choose tiles for: as many as one tile has on most
devices, which few rows fill badly and many rows could have larger."""
INVARIANT: dict[str, Any] = {
    "batch_invariant": True,
    "invariance": f"slots always sorted, tiles of {INVARIANT_ROWS} rows an expert for any batch",
}
"""What kernels declare that decide by `sorted_sizes` alone in which order products are summed."""

Bound = tuple[Launch, Tensors]


@FUSED_MOE.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures("bf16"),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
    **INVARIANT,
)
def bind_triton_bf16(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply bf16 or fp16 in Triton."""
    return bind_products(binding, w13, w2, layer, "bf16")


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
    **INVARIANT,
)
def bind_triton_fp8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply 8-bit floats in Triton."""
    return bind_products(binding, w13, w2, layer, own_kind(w13.scheme), read=own_scales)


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
    **INVARIANT,
)
def bind_triton_int8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert and multiply int8 in Triton."""
    return bind_products(binding, w13, w2, layer, "int8_channel")


@FUSED_MOE.kernel(
    "triton_decode",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*BYTEWISE, *E5M2, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
    **INVARIANT,
)
def bind_triton_decode(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Decode weight bytes in the loop by integer shifts; needs no fp8 in hardware."""
    return bind_products(binding, w13, w2, layer, product_kind(w13.scheme) + "_decode")


@FUSED_MOE.kernel(
    "triton_packed",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=moe_signatures(*PACKED, weight_only=True),
    requires=(*TRITON, Needs.triton_math("bfloat16")),
    **INVARIANT,
)
def bind_triton_packed(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Decode codes of four bits, or scales of exponents, in the loop by integer shifts."""
    kinds = packed_kind(w13), packed_kind(w2)  # int4 may have zero points in one of them
    return bind_products(binding, w13, w2, layer, *kinds, read=packed_tensors)


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
    **INVARIANT,
)
def bind_triton_w4a8(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Turn int4 codes into 8-bit floats in the loop and multiply those."""
    read = partial(w4a8_tensors, binding)
    return bind_products(binding, w13, w2, layer, "int4_group_fp8", read=read)


def bind_products(
    binding: Binding,
    w13: QTensor,
    w2: QTensor,
    layer: ExpertLayer,
    kind: str,
    kind2: str = "",
    *,
    read: Callable[[QTensor], tuple[torch.Tensor, ...]] = row_scales,
) -> Bound:
    from hal.ops.align import align_triton
    from hal.ops.expanded_experts import expanded_product
    from hal.ops.few_experts import bind_few_tokens
    from hal.ops.kernels.common import starts_dependent
    from hal.ops.kernels.grouped_gemm import grouped_gemm
    from hal.ops.kernels.swiglu import silu_and_mul
    from hal.ops.quantize import launch_triton, quantize_triton
    from hal.ops.specialized_experts import IN_ORDER, specialized_products
    from hal.ops.tiles import rows_before_expanding

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
    wide13 = TileChoice(binding, "bf16", columns, hidden)
    wide2 = TileChoice(binding, "bf16", hidden, intermediate)
    decodes = kind.endswith("_decode") and binding.problem("dtype", "bfloat16") == "bfloat16"
    specialized = specialized_products(
        binding, (kind, kind2), (hidden, intermediate), read13, read2
    )
    decoding = specialized is not None and specialized.decodes
    most_rows = rows_before_expanding(kind, specialized=decoding)
    fnuz = w13.encoding == "e4m3fnuz"
    dynamic = quantizes and not static
    invariant = binding.selection.options.batch_invariant
    gate = _gate_and_quantize(encoding, how, activation) if dynamic else None
    dependent = starts_dependent(binding.spec.platform, binding.spec.arch.name)

    def products(
        x: torch.Tensor,
        ids: torch.Tensor,
        tensors: Tensors,
        counts: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> tuple[torch.Tensor, bool]:
        """Return `[slots, hidden]`; rows of absent slots hold anything. See `enter_and_combine`."""
        top_k, slots = ids.shape[1], ids.numel()
        rows, matrices = sorted_sizes(slots, experts, invariant=invariant)
        expands = decodes and rows > most_rows
        # Of others' launches it is not known that a graph records such an edge.
        follows = dependent and not expands and updates is None
        special, step = None, 0
        if specialized is not None and not expands:
            special = specialized.tiles(rows, matrices, max(x.numel(), slots * intermediate))
        if specialized is not None and special is not None:
            multiply, (tile13, tile2) = specialized.multiply, special
            # Of what adds to both products by itself, rows stay as they are.
            step = 0 if updates is not None else specialized.step_of_gate(tile2)
        else:
            multiply = expanded_product if expands else grouped_gemm
            tile13 = (wide13 if expands else tiles13)(rows, matrices)
            tile2 = (wide2 if expands else tiles2)(rows, matrices, tile13.block_m)
        places = align_triton(ids, experts, tile13.block_m)
        bias13, bias2 = layer.biases(tensors)
        b13, *s13 = tensors[:width]
        b2, *s2 = tensors[width:both]
        a, a_scales = x, None
        if static:
            a, a_scales = quantize_triton(x, encoding, how, s13[-1])
        elif quantizes:
            a, a_scales = launch_triton(x, encoding, how, hidden, counts=counts)
        lies13: dict[str, Any] = {}
        lies2: dict[str, Any] = dict(IN_ORDER) if step else {}
        if specialized is not None and special is not None:
            a, lies13 = specialized.arranged(a, tile13)
            lies13 = dict(lies13)
            if specialized.begins_early:
                # Slots are sorted when the launch begins that makes a, or h.
                lies13["dependent"], lies2["dependent"] = follows and a is not x, follows
        gate_up = x.new_empty(slots, columns)
        multiply(
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
            **lies13,
        )
        wide = h_scales = None
        if updates is not None:
            updates.first(x, gate_up, None)
        if gate is not None and updates is None:
            h, h_scales = gate(gate_up, counts)
        else:
            h = wide = x.new_empty(slots, intermediate)
            silu_and_mul(gate_up, h, activation, counts, step=step, dependent=follows)
            if quantizes:
                h, h_scales = quantize_triton(h, encoding, how, s2[-1] if static else None)
        y = x.new_empty(slots, hidden)
        multiply(
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
            **lies2,
        )
        if updates is not None:
            assert wide is not None
            updates.second(wide, y, None)
        return y, follows

    few = None
    if not invariant:
        widths = width, len(read2)
        few = bind_few_tokens(
            binding, w13, w2, layer, (kind, kind2), widths, quantizes=quantizes,
            specialized=decoding,
        )  # fmt: skip
    return enter_and_combine(layer, experts, hidden, products, few), (*read13, *read2)


def sorted_sizes(slots: int, experts: int, *, invariant: bool) -> tuple[int, int]:
    """Return rows of an expert and experts with rows, as tiles and ways of products are chosen for.

    Whatever tile a row lies in, and wherever there, its products are summed in the order of k that
    the tile has: numbers that do not depend on the batch make results that do not.
    """
    if invariant:
        return INVARIANT_ROWS, experts
    return -(-slots // experts), min(experts, slots)


def enter_and_combine(
    layer: ExpertLayer,
    experts: int,
    hidden: int,
    products: Callable[..., tuple[torch.Tensor, bool]],
    few: FewTokens | None = None,
) -> Launch:
    """Return the launcher around `products`, in the format of the layer.

    `products(x, ids, tensors, counts, updates)` returns `[slots, hidden]`, in which rows of absent
    slots may hold anything, and whether what comes next may begin while the last launch ends. `few`
    does all of it where there are few slots.
    """

    from hal.ops.kernels.combine import combine

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
        out = x.new_empty(x.shape)
        if shared is not None:
            shared = shared.contiguous()
        if few is not None and updates is None and ids.numel() <= few.most:
            few.run(rows, ids, weights, tensors, out, shared)
            return out
        y, follows = products(rows, ids, tensors, None, updates)
        combine(y.view(*ids.shape, hidden), out, ids, experts, weights, shared, dependent=follows)
        return out

    def launch_batched(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows, _ = layer.enter(x, None, hidden)
        ids = batched_ids(counts, x.shape[1])
        y, _ = products(rows.reshape(-1, hidden), ids, tensors, counts)
        return y.view(rows.shape)[..., : x.shape[-1]].contiguous()

    return launch_batched if layer.batched else launch


def _gate_and_quantize(
    encoding: str, how: Quantization, activation: Activation
) -> Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]:
    import torch

    from hal.formats import number_format
    from hal.ops.kernels import swiglu
    from hal.quant.scheme import scale_shape
    from hal.torch_compat import dtype

    top, target = number_format(encoding).quantization_maximum, dtype(encoding)
    stored = torch.uint8 if how.scale_format == "e8m0" else torch.float32
    per_row = how.granularity == "token"
    launch = swiglu.silu_and_mul_quantize_rows if per_row else swiglu.silu_and_mul_quantize_groups

    def gate(
        gate_up: torch.Tensor, counts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (gate_up.shape[0], gate_up.shape[1] // activation.products)
        values = torch.empty(shape, dtype=target, device=gate_up.device)
        places = scale_shape(how.granularity, shape)
        scales = torch.empty(places, dtype=stored, device=gate_up.device)
        launch(gate_up, values, scales, top, SCALE_FLOOR, activation, counts)
        return values, scales

    return gate
