"""Run experts as two grouped products of the CUTLASS kernels that vLLM brings.

| product | weight | scales | sizes of a problem |
|---|---|---|---|
| cutlass_moe_mm | e4m3 `[E, N, K]` | float32 `[rows, 1]`, `[E, N]` | M, N, K; N, M, K up to 64 \
rows |
| cutlass_w4a8_moe_mm | int4, reordered by vLLM from int32 `[E, N, K/8]` | float32 `[rows, 1]`, \
`[E, N, 1]`; e4m3 per group, packed by vLLM from `[E, K/128, N]` | N, M, K |
| cutlass_fp4_group_mm | e2m1 `[E, N, K/2]` | in tiles of 128 by 4; those of the rows of an expert \
start at a tile | M, N, K |

hal sorts rows by expert, so that absent ids belong to no problem, quantizes them as the scheme
says and computes what is between the products. NVFP4 multiplies by one factor an expert: second
scales of tokens, and the one that is fixed for all of them, are put on after it.

Source: vllm-project/vllm 0.25.1, vllm/_custom_ops.py, the schemas in its `_C`,
model_executor/layers/fused_moe/experts/cutlass_moe.py (`run_cutlass_moe_fp8`, `_fp4`, `_w4a8_fp8`:
strides, offsets of int64 and int32, `swap_ab`); csrc, moe_data.cu (order of sizes, 64 rows) and
nvfp4_blockwise_moe_kernel.cu (scales of an expert at its offset times K/16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.adapters.foreign import operator
from hal.ops.adapters.grouped_mm import bind_groups
from hal.ops.adapters.groups import Tiles, grouped_layer, quantized_rows, starts, take
from hal.ops.adapters.scaled_mm_blocked import TILES, tiled_scales
from hal.ops.adapters.vllm_cutlass import MODULE
from hal.ops.adapters.vllm_experts import VLLM
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer
from hal.ops.fused_moe import FUSED_MOE, moe_signatures
from hal.ops.linear import NVFP4, W4A8, fixed_scale, row_scales
from hal.quant.scheme import SCHEMES, group_of
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

FEW_ROWS = 64
"""Up to so many rows, `cutlass_moe_mm` exchanges its operands."""
TILE_ROWS = 128

Bound = tuple[Launch, Tensors]
Product = Callable[..., "torch.Tensor"]
"""`(codes, scales, ends, weight, out) -> out`."""


@FUSED_MOE.kernel(
    "vllm_cutlass_moe_fp8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures("fp8_tensor", "fp8_channel"),
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly("sm_90", "sm_100", "sm_103"),
        Needs.math("e4m3fn"),
        *grouped_layer(16),
    ),
    claimed=True,
)
@FUSED_MOE.kernel(
    "vllm_cutlass_moe_w4a8",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures(W4A8),
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.exactly("sm_90"),
        Needs.math("e4m3fn"),
        Needs.one_of("dtype", "bfloat16", hint="the product is written in bfloat16"),
        *grouped_layer(128),
    ),
    claimed=True,
)
def bind_fp8(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize rows per token and call vLLM's grouped product of fp8 or int4 weights."""
    packed = w13.scheme.name == W4A8
    product = _w4a8_product() if packed else _fp8_product()
    rows_of = quantized_rows(binding, w13, w2)
    read13, read2 = map(_reordered if packed else row_scales, (w13, w2))
    width, columns13, columns2 = len(read13), w13.shape[1], w2.shape[1]

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        codes, scales = rows_of(x)
        rows = take(codes, token), scales.index_select(0, token).unsqueeze(-1)
        return product(*rows, ends, tensors[:width], x.new_empty(token.shape[0], columns13))

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales = rows_of(h)
        out = h.new_empty(h.shape[0], columns2)
        return product(codes, scales.unsqueeze(-1), ends, tensors[width : 2 * width], out)

    return bind_groups(layer, w13, first, second, (*read13, *read2))


def _fp8_product() -> Product:
    multiply = operator("vllm", MODULE, "_C", "cutlass_moe_mm")

    def product(
        codes: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        weight: Tensors,
        out: torch.Tensor,
    ) -> torch.Tensor:
        offsets = starts(ends)
        sizes = problem_sizes(offsets, out, codes.shape[1], exchanged=codes.shape[0] <= FEW_ROWS)
        inner, outer = strides(ends, codes.shape[1]), strides(ends, out.shape[1])
        around = offsets[:-1], sizes, inner, inner, outer, True, True
        multiply(out, codes, weight[0], scales, weight[1], *around)
        return out

    return product


def _w4a8_product() -> Product:
    multiply = operator("vllm", MODULE, "_C", "cutlass_w4a8_moe_mm")
    group = group_of(SCHEMES[W4A8].weight.granularity)

    def product(
        codes: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        weight: Tensors,
        out: torch.Tensor,
    ) -> torch.Tensor:
        offsets = starts(ends)
        sizes = problem_sizes(offsets, out, codes.shape[1], exchanged=True)
        inner, outer = strides(ends, codes.shape[1]), strides(ends, out.shape[1])
        words, channels, groups, inner_of_words, of_groups = weight
        around = group, offsets[:-1], sizes, inner, inner_of_words, outer, of_groups, None
        multiply(out, codes, words, scales, channels, groups, *around)
        return out

    return product


def problem_sizes(
    offsets: torch.Tensor, out: torch.Tensor, inner: int, *, exchanged: bool
) -> torch.Tensor:
    """Return int32 `[experts, 3]`: rows, columns and K of each product; columns first if so."""
    import torch

    sizes = torch.empty(offsets.shape[0] - 1, 3, dtype=torch.int32, device=offsets.device)
    sizes[:, int(exchanged)] = offsets.diff()
    sizes[:, int(not exchanged)] = out.shape[1]
    sizes[:, 2] = inner
    return sizes


def strides(ends: torch.Tensor, size: int) -> torch.Tensor:
    """Return int64 `[experts]`, all the same."""
    import torch

    return torch.full(ends.shape, size, dtype=torch.int64, device=ends.device)


def _reordered(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return words, channel scales, group scales, strides of words and of group scales."""
    import torch

    reorder = operator("vllm", MODULE, "_C", "cutlass_encode_and_reorder_int4b_grouped")
    pack = operator("vllm", MODULE, "_C", "cutlass_pack_scale_fp8")
    assert weight.scales is not None
    assert weight.global_scale is not None
    words, of_words = reorder(weight.values.view(torch.int32))
    groups = pack(weight.scales.transpose(1, 2).contiguous())
    experts, rows, _ = weight.shape
    of_groups = torch.zeros(experts, 2, dtype=torch.int64, device=weight.device)
    of_groups[:, 0] = rows
    return words, weight.global_scale.unsqueeze(-1), groups, of_words, of_groups


@FUSED_MOE.kernel(
    "vllm_cutlass_moe_nvfp4",
    level=Level.NATIVE,
    band="specialised",
    signatures=moe_signatures(*NVFP4, layout=TILES),
    requires=(
        Needs.platform("cuda"),
        VLLM,
        Needs.in_family("sm_10x", "sm_12x"),
        Needs.math("e2m1"),
        Needs.one_of("dtype", "bfloat16", hint="sums before the second scales exceed fp16"),
        *grouped_layer(128),
    ),
    claimed=True,
)
def bind_nvfp4(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Quantize rows per 16 and call vLLM's grouped NVFP4 product; scales of tokens come after."""
    import torch

    multiply = operator("vllm", MODULE, "_C", "cutlass_fp4_group_mm")
    rows_of = quantized_rows(binding, w13, w2)
    of_x, of_h = fixed_scale(w13), fixed_scale(w2)

    def product(
        codes: torch.Tensor,
        scales: torch.Tensor,
        outer: torch.Tensor,
        ends: torch.Tensor,
        weight: Tensors,
    ) -> torch.Tensor:
        rows, inner = codes.shape[0], codes.shape[1] * 2
        # In bf16, as the kernel writes it.
        out = torch.empty(rows, weight[0].shape[1], dtype=torch.bfloat16, device=codes.device)
        offsets = starts(ends)
        tiles = Tiles(offsets, rows, TILE_ROWS)
        tiled = tiled_scales(tiles.put(scales))
        sizes = problem_sizes(offsets, out, inner, exchanged=False)
        around = sizes, offsets[:-1].int(), tiles.first.int()
        multiply(out, codes, weight[0], tiled, weight[1], weight[2], *around)
        return out.float().mul_(outer.unsqueeze(-1))

    def first(
        x: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, tensors: Tensors
    ) -> torch.Tensor:
        coded = rows_of(x, tensors[6] if of_x else None)
        codes, scales, outer = (take(part, token) for part in coded)
        return product(codes, scales, outer, ends, tensors[:3])

    def second(h: torch.Tensor, ends: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales, outer = rows_of(h, tensors[7] if of_h else None)
        return product(codes, scales, outer, ends, tensors[3:6])

    read = (*w13.tensors[:3], *w2.tensors[:3], *of_x, *of_h)
    return bind_groups(layer, w13, first, second, read)
