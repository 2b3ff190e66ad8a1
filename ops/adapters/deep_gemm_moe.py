"""Run experts as two grouped products of DeepGEMM: rows sorted by expert, or in batches.

| kernel | product | scales of rows | of the weight, e4m3 `[E, N, K]` |
|---|---|---|---|
| deep_gemm_moe_fp8 | contiguous | float32 `[M, K/128]`, M inside | float32 `[E, N/128, K/128]` |
| deep_gemm_moe_masked | masked | float32 `[E, M, K/128]`, M inside | the same |
| deep_gemm_moe_mxfp8 | contiguous | int32 `[M, K/128]`, M inside: four exponents | int32 \
`[E, N, K/128]`, N inside |

In the contiguous layout the rows of each expert start at a multiple of the alignment that DeepGEMM
names, and `m_indices` says whose each row is. A block asks for that of its first row and does
nothing where it is -1: so are rows of padding, and those of absent ids. The masked product reads as
many rows of each expert as `masked_m` says; `expected_m` only helps it choose a tile.

On sm_100 DeepGEMM rounds float32 scales to powers of two: it is offered MXFP8 there, whose scales
are such, and not `fp8_block128`.

Source: DeepGEMM 2.5.0 as vLLM 0.25.1 brings it (`deep_gemm/__init__.py`, `_C`, scheduler/gemm.cuh);
vllm-project/vllm 0.25.1, vllm/utils/deep_gemm.py, model_executor/layers/fused_moe/experts/
{deep_gemm_moe,batched_deep_gemm_moe}.py (`recipe_a`, `recipe_b` of MXFP8), deep_gemm_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.activations import activate
from hal.ops.adapters.deep_gemm import SCALES_IN_16_BYTES, aligned
from hal.ops.adapters.foreign import attribute
from hal.ops.adapters.grouped_mm import bind_groups
from hal.ops.adapters.groups import Tiles, grouped_layer, quantized_rows, starts, take
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

PACKAGE, MODULE = "deep-gemm", "deep_gemm"
COMMON = (
    Needs.platform("cuda"),
    Needs.package(PACKAGE, "2.5"),
    Needs.math("e4m3fn"),
    Needs.one_of("dtype", "bfloat16", hint="DeepGEMM writes bfloat16"),
)
EXPONENTS = "deep_gemm_ue8m0"
PER_32 = (1, 32)

Bound = tuple[Launch, Tensors]


@FUSED_MOE.kernel(
    "deep_gemm_moe_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("fp8_block128"),
    requires=(*COMMON, Needs.exactly("sm_90"), *grouped_layer(128)),
    claimed=True,
)
@FUSED_MOE.kernel(
    "deep_gemm_moe_mxfp8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("mxfp8", layout=EXPONENTS),
    requires=(*COMMON, Needs.in_family("sm_10x"), *grouped_layer(128)),
    claimed=True,
)
def bind_contiguous(
    binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN
) -> Bound:
    """Sort rows by expert, quantize them and call DeepGEMM's contiguous grouped product."""
    from hal.quant.layout import kernel_arguments

    multiply = attribute(PACKAGE, MODULE, "m_grouped_fp8_gemm_nt_contiguous")
    tile = int(attribute(PACKAGE, MODULE, "get_mk_alignment_for_contiguous_layout")())
    rows_of, experts = quantized_rows(binding, w13, w2), w13.shape[0]
    exponents = w13.layout == EXPONENTS
    recipes = {"recipe_a": PER_32, "recipe_b": PER_32} if exponents else {}
    arrange = _words if exponents else aligned
    read = tuple(kernel_arguments(weight)[:2] for weight in (w13, w2))

    def product(
        codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor, weight: Tensors
    ) -> torch.Tensor:
        import torch

        tiles = Tiles(starts(ends), codes.shape[0], tile)
        owner = torch.where(tiles.expert < experts, tiles.expert, -1).int()
        indices = torch.full((tiles.rows,), -1, dtype=torch.int32, device=codes.device)
        indices.index_copy_(0, tiles.places, owner)
        shape = tiles.rows, weight[0].shape[1]
        out = torch.empty(shape, dtype=torch.bfloat16, device=codes.device)
        left = tiles.put(codes), arrange(tiles.put(scales))
        multiply(left, (weight[0], weight[1]), out, indices, **recipes)
        return out.index_select(0, tiles.places)

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        codes, scales = rows_of(x)
        return product(take(codes, token), take(scales, token), ends, tensors[:2])

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = rows_of(h)
        return product(codes, scales, ends, tensors[2:4])

    tensors = [tensor for pair in read for tensor in pair if tensor is not None]
    return bind_groups(layer, w13, first, second, tensors)


def _words(exponents: torch.Tensor) -> torch.Tensor:
    """Return int32 `[M, K/128]` of bytes `[M, K/32]`, rows inside and at 16-byte steps."""
    from hal.quant.swizzle import SCALE_LAYOUTS

    order = SCALE_LAYOUTS["mn_major_ue8m0"]
    return order.argument(order.forward(exponents), tuple(exponents.shape))


@FUSED_MOE.kernel(
    "deep_gemm_moe_masked",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("fp8_block128"),
    requires=(*COMMON, Needs.exactly("sm_90"), *grouped_layer(128, "batched")),
    claimed=True,
)
def bind_masked(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize batches and call DeepGEMM's masked grouped product."""
    import torch

    multiply = attribute(PACKAGE, MODULE, "m_grouped_fp8_gemm_nt_masked")
    rows_of = quantized_rows(binding, w13, w2)
    experts, _, hidden = w13.shape

    def product(x: torch.Tensor, counts: torch.Tensor, weight: Tensors) -> torch.Tensor:
        capacity = x.shape[1]
        codes, scales = (
            part.unflatten(0, (experts, capacity)) for part in rows_of(x.flatten(0, 1))
        )
        shape = experts, capacity, weight[0].shape[1]
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
        multiply((codes, aligned_batches(scales)), (weight[0], weight[1]), out, counts, capacity)
        return out

    def launch(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        counts = counts.to(torch.int32)
        bias13, bias2 = layer.biases(tensors)
        rows, _ = layer.enter(x, None, hidden)
        gate_up = product(rows.contiguous(), counts, tensors[:2])
        if bias13 is not None:
            gate_up = gate_up.float().add_(bias13.unsqueeze(1))
        y = product(activate(gate_up, layer.activation).to(x.dtype), counts, tensors[2:4])
        if bias2 is not None:
            y = y.float().add_(bias2.unsqueeze(1)).to(x.dtype)
        return y[..., : x.shape[2]].contiguous()

    return launch, (*w13.tensors, *w2.tensors)


def aligned_batches(scales: torch.Tensor) -> torch.Tensor:
    """Return scales `[E, M, groups]` with strides of M inside, at 16-byte steps."""
    _, rows, groups = scales.shape
    step = rows + -rows % SCALES_IN_16_BYTES
    return scales.new_empty_strided(scales.shape, (groups * step, 1, step)).copy_(scales)
