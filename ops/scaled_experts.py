"""Run experts whose two operands both have scales per group, in their own formats.

The schemes mxfp8, mxfp4, mxfp4_w4a8 and nvfp4: rows are quantized once before the first product,
and again, in the launch that applies the activation, before the second. Where the product is one
instruction, and why elsewhere not, is told in `hal.ops.scaled`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.binding import Binding, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer, Updates
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.ops.linear import NVFP4, fixed_scale
from hal.ops.quantize import activation_encoding
from hal.ops.scaled import (
    DOT_SCALED,
    EMITS,
    SUMMING,
    SUMS,
    TENSOR_MEMORY,
    scaled_kind,
    scaled_tile,
    sums_encoding,
    sums_tensors,
    sums_tile,
)
from hal.ops.triton_experts import INVARIANT, TRITON, Bound, enter_and_combine, sorted_sizes
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.tiles import Tile
    from hal.quant.tensor import QTensor

_WHOLE = "rows of codes begin at 16 bytes, else loads spill"
ROWS = (
    Needs.package("torch"),
    *TRITON,
    *(
        need
        for size in ("hidden", "intermediate")
        for need in (Needs.between(size, 1, 32768), Needs.multiple_of(size, 32, _WHOLE))
    ),
)


@FUSED_MOE.kernel(
    "triton_scaled",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures("mxfp8", "mxfp4"),
    requires=(
        Needs.package("triton", "3.7"),
        *ROWS,
        Needs.exactly(*TENSOR_MEMORY, "sm_120", "gfx950"),
    ),
    claimed=True,
    not_interpreted=DOT_SCALED,
    **INVARIANT,
)
@FUSED_MOE.kernel(
    "triton_scaled_mixed",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures("mxfp4_w4a8"),
    requires=(EMITS, *ROWS, Needs.exactly(*TENSOR_MEMORY, "gfx950")),
    claimed=True,
    not_interpreted=DOT_SCALED,
    **INVARIANT,
)
@FUSED_MOE.kernel(
    "triton_scaled_nvfp4",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(*NVFP4),
    requires=(EMITS, *ROWS, Needs.exactly(*TENSOR_MEMORY, "sm_120")),
    claimed=True,
    not_interpreted=DOT_SCALED,
    **INVARIANT,
)
@FUSED_MOE.kernel(
    "triton_scaled_emulated",
    level=Level.EMULATED,
    band="tuned",
    signatures=moe_signatures("mxfp8", "mxfp4", "mxfp4_w4a8"),
    requires=(Needs.package("triton", "3.6"), *ROWS, Needs.exactly("sm_90")),
    not_interpreted=DOT_SCALED,
    **INVARIANT,
)
def bind_scaled_experts(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert, quantize in groups, multiply codes and scales in Triton."""
    return _bind(binding, w13, w2, layer, sums=False)


@FUSED_MOE.kernel(
    "triton_scaled_fp8",
    level=Level.NATIVE,
    band="tuned",
    signatures=moe_signatures(*SUMS),
    requires=(*ROWS, SUMMING, Needs.triton_math("e4m3fn", "e4m3fnuz")),
    **INVARIANT,
)
def bind_sums_experts(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort tokens by expert, multiply 8-bit floats and scale the sum of each group, in Triton."""
    return _bind(binding, w13, w2, layer, sums=True)


def _bind(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer, *, sums: bool) -> Bound:
    from hal.ops.align import align_triton
    from hal.ops.kernels.scaled_experts import scaled_experts
    from hal.ops.kernels.swiglu import silu_and_mul
    from hal.ops.quantize import launch_triton

    experts, columns, hidden = w13.shape
    intermediate = w2.shape[2]
    scheme, how = w13.scheme, w13.scheme.activation
    encoding, packed = activation_encoding(scheme, w13.encoding), scheme.weight.packed
    arch, units = binding.spec.arch.name, binding.spec.compute_units or 64
    # Neither product reads what calibration fixed.
    each = 3 if w13.global_scale is not None else 2
    read13, read2 = w13.tensors[:each], w2.tensors[:each]
    of_x, of_h = fixed_scale(w13), fixed_scale(w2)
    if sums:
        encoding = sums_encoding(binding, w13)
        read13, read2 = sums_tensors(w13), sums_tensors(w2)
    width, both, kind = len(read13), len(read13) + len(read2), scaled_kind(scheme)
    activation = layer.activation
    invariant = binding.selection.options.batch_invariant

    def tile_of(rows: int, n: int) -> Tile:
        return sums_tile(rows, packed, arch) if sums else scaled_tile(rows, n, packed, arch, units)

    def product(
        coded: tuple[torch.Tensor, ...],
        weight: Tensors,
        out: torch.Tensor,
        places: tuple[torch.Tensor, ...],
        top_k: int,
        k: int,
        rows: int,
        bias: torch.Tensor | None,
    ) -> None:
        a, a_scales, *a_second = coded
        b, b_scales, *b_second = weight
        scaled_experts(
            a,
            a_scales,
            b,
            b_scales,
            out,
            *places,
            top_k_divisor=top_k,
            k=k,
            kind=kind,
            tile=tile_of(rows, out.shape[1]),
            bias=bias,
            a_second=a_second[0] if a_second else None,
            b_second=b_second[0] if b_second else None,
            sums=sums,
        )

    def products(
        x: torch.Tensor,
        ids: torch.Tensor,
        tensors: Tensors,
        counts: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> tuple[torch.Tensor, bool]:
        """Return `[slots, hidden]`; rows of absent slots hold anything. See `enter_and_combine`."""
        top_k, slots = ids.shape[1], ids.numel()
        rows, _ = sorted_sizes(slots, experts, invariant=invariant)
        # The rows of a tile depend on the rows alone: both products read one alignment.
        block = tile_of(rows, columns).block_m
        places = align_triton(ids, experts, block)
        bias13, bias2 = layer.biases(tensors)
        fixed_x, fixed_h = tensors[both : both + 2] if of_x else (None, None)
        how_x: dict[str, Any] = {"words": sums, "fixed": fixed_x}
        how_h: dict[str, Any] = {"words": sums, "fixed": fixed_h}
        coded = launch_triton(x, encoding, how, hidden, counts=counts, **how_x)
        gate_up, y = x.new_empty(slots, columns), x.new_empty(slots, hidden)
        product(coded, tensors[:width], gate_up, places, top_k, hidden, rows, bias13)
        wide = None
        if updates is None:
            coded = launch_triton(
                gate_up, encoding, how, intermediate, gate=activation, counts=counts, **how_h
            )
        else:
            updates.first(x, gate_up, None)
            wide = x.new_empty(slots, intermediate)
            silu_and_mul(gate_up, wide, activation, counts)
            coded = launch_triton(wide, encoding, how, intermediate, **how_h)
        product(coded, tensors[width:both], y, places, 1, intermediate, rows, bias2)
        if updates is not None and wide is not None:
            updates.second(wide, y, None)
        return y, False

    launch = enter_and_combine(layer, experts, hidden, products)
    return launch, (*read13, *read2, *of_x, *of_h)
