"""Run a mixture of experts with plain torch, above all on CPUs: sort slots, multiply run by run.

Slots are sorted by expert, so that each expert that is hit reads its weights once; everything
between the products (quantization, activation, combination) runs once over all slots, because at
few tokens the calls cost more than the arithmetic. Ids come to the host: free on a CPU, a wait for
the device on GPUs, where this serves only those without Triton. How each scheme multiplies, and
why, is measured in docs/cpu.md:

| kernel | weights in memory | product |
|---|---|---|
| torch_experts | as given, bf16 or fp16 | the dtype's own |
| torch_experts_emulated | the same | where the device only converts the dtype: float32 on CPUs |
| torch_experts_int8 | int8 | int8 x int8 in int32 (VNNI, AMX, I8MM) |
| torch_experts_dequant | bf16, twice the bytes | bf16, half the time of decoding at few tokens |
| torch_experts_decode | as given | each expert's weight is decoded at each call |
| torch_experts_unpack | as given, 4 bits, MX or with zero points | the same, on CPUs |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from hal.needs import Needs
from hal.ops.activations import activate
from hal.ops.adapters.decode import Decoder, decoder
from hal.ops.adapters.int_mm import exact_sums, quantize_rows
from hal.ops.binding import Binding, Launch, Tensors
from hal.ops.expert_layer import PLAIN, ExpertLayer, Updates, add_shared, without_experts
from hal.ops.fused_moe import (
    ACTIVATIONS,
    BYTEWISE,
    FUSED_MOE,
    NO_BATCHES_OF_INT8,
    PACKED,
    QUANTIZED,
    SHIFTED,
    moe_signatures,
)
from hal.ops.linear import E5M2, INT8, fixed_scale, row_scales
from hal.ops.slots import Runs, combine, count_runs, sort_slots
from hal.ops.unpacked import parts_of, unpacked
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.quant.tensor import QTensor

TORCH = (Needs.package("torch"), Needs.one_of("activation", *ACTIVATIONS))
ANYWHERE = (Needs.platform("cpu", "cuda", "rocm", "xpu"), *TORCH)
SMALL_WEIGHTS_BYTES = 8 << 20
"""Weights that stay in the last cache; only then is a product over all experts worth while, and
never where the dtype is only converted: that product would be in the dtype (docs/cpu.md)."""
EPILOGUE_ELEMENTS = 1 << 16
"""Above this many products, scales are applied run by run, while the run is in the cache."""

Bound = tuple[Launch, Tensors]
Stage = Callable[["torch.Tensor", "torch.Tensor | None", "Runs", "Tensors"], "torch.Tensor"]
"""`(x, index, runs, tensors) -> out`: rows of x (by index, if any), run by run, times weights."""
Product = Callable[..., "torch.Tensor"]
"""As `torch.mm`: `(a, b, out=None) -> a @ b`."""


def _bind(layer: ExpertLayer, w13: QTensor, first: Stage, second: Stage, tensors: Tensors) -> Bound:
    import torch

    experts, _, hidden = w13.shape
    width, both = len(tensors) // 2, len(tensors)
    activation = layer.activation

    def products(
        x: torch.Tensor,
        token: torch.Tensor,
        runs: Runs,
        expert: torch.Tensor,
        tensors: Tensors,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        """Return the experts' rows, in float32 if biased."""
        bias13, bias2 = layer.biases(tensors)
        gate_up = first(x, token, runs, tensors[:width])
        if bias13 is not None:
            gate_up = gate_up.float().add_(bias13.index_select(0, expert))
        if updates is not None:
            updates.first(x, gate_up, runs.order)
        h = activate(gate_up, activation).to(x.dtype)
        y = second(h, None, runs, tensors[width:both])
        y = y if bias2 is None else y.float().add_(bias2.index_select(0, expert))
        if updates is not None:
            updates.second(h, y, runs.order)
        return y

    def launch(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        shared: torch.Tensor | None = None,
        updates: Updates | None = None,
    ) -> torch.Tensor:
        runs = sort_slots(ids, experts)
        if not runs.runs:
            return without_experts(x, shared)
        rows, weights = layer.enter(x, weights, hidden)
        token = runs.order if ids.shape[1] == 1 else runs.order // ids.shape[1]
        expert = ids.flatten().index_select(0, runs.order) if biased else token
        y = products(rows, token, runs, expert, tensors, updates)
        out = combine(y, runs, ids, weights, experts)
        return add_shared(out[:, : x.shape[1]], shared, x)

    def launch_batched(x: torch.Tensor, counts: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        runs = count_runs(counts, x.shape[1])
        rows, _ = layer.enter(x, None, hidden)
        out = torch.empty_like(rows).flatten(0, 1)
        if runs.runs:
            expert = runs.order // x.shape[1]
            y = products(rows.flatten(0, 1), runs.order, runs, expert, tensors)
            out[runs.order] = y.to(x.dtype)
        return out.view(rows.shape)[..., : x.shape[2]].contiguous()

    biased = layer.first_bias or layer.second_bias
    return launch_batched if layer.batched else launch, tensors


# ------------------------------------------------------------------------------------ bf16, fp16
@FUSED_MOE.kernel(
    "torch_experts",
    level=Level.NATIVE,
    band="portable",
    signatures=moe_signatures("bf16"),
    requires=(*ANYWHERE, Needs.math_of("dtype")),
)
@FUSED_MOE.kernel(
    "torch_experts_emulated",
    level=Level.EMULATED,
    band="portable",
    signatures=moe_signatures("bf16"),
    requires=(*ANYWHERE, Needs.math_of("dtype", "emulated")),
)
def bind_dense(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Sort slots by expert and call torch's own matrix product for each expert."""
    multiply = _product(binding)
    stages = _dense(w13.shape, multiply), _dense(w2.shape, multiply)
    return _bind(layer, w13, *stages, (w13.values, w2.values))


@FUSED_MOE.kernel(
    "torch_experts_dequant",
    level=Level.DEQUANT,
    band="portable",
    signatures=moe_signatures(*QUANTIZED, weight_only=True),
    requires=(*ANYWHERE, Needs.math_of("dtype", "native", "emulated")),
)
def bind_dequant(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Expand the weights when they are bound; takes the memory of bf16."""
    from hal.torch_compat import dtype

    wide = dtype(binding.problem("dtype", "bfloat16"))
    multiply = _product(binding)
    stages = _dense(w13.shape, multiply), _dense(w2.shape, multiply)
    return _bind(layer, w13, *stages, (_expanded(w13, wide), _expanded(w2, wide)))


def _product(binding: Binding) -> Product:
    from hal.torch_compat import mm_function

    return mm_function(binding.spec, binding.problem("dtype", "bfloat16"))


def _expanded(weight: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight in `dtype`, one expert at a time: float32 of all would take four times."""
    import torch

    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for expert in range(weight.shape[0]):
        out[expert] = weight.matrix(expert).dequantize()
    return out


def _dense(shape: tuple[int, ...], multiply: Product) -> Stage:
    import torch

    experts, columns, inner = shape
    small = experts * columns * inner * 2 <= SMALL_WEIGHTS_BYTES and multiply is torch.mm

    def stage(
        x: torch.Tensor, index: torch.Tensor | None, runs: Runs, tensors: Tensors
    ) -> torch.Tensor:
        rows = x if index is None else x.index_select(0, index)
        weight = tensors[0].transpose(1, 2)
        if small and _fits_box(runs, experts):
            return _box(rows, weight, runs)
        out = rows.new_empty(rows.shape[0], columns)
        for expert, part, target in zip(*runs.pieces(rows, out), strict=True):
            multiply(part, weight[expert], out=target)
        return out

    return stage


def _fits_box(runs: Runs, experts: int) -> bool:
    """Tell whether one product padded to the longest run beats a call for each expert."""
    rows, hit = runs.runs[-1][2], len(runs.runs)
    if 2 * hit < experts or hit == 1 or rows > 64 * experts:
        return False
    longest = max(stop - start for _, start, stop in runs.runs)
    return experts * longest <= 4 * rows


def _box(rows: torch.Tensor, weight: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Return the same product as the loop, by one call over `[experts, longest run]` rows."""
    import torch

    longest = max(stop - start for _, start, stop in runs.runs)
    counts = torch.tensor([stop - start for _, start, stop in runs.runs])
    shifts = torch.tensor([expert * longest - start for expert, start, _ in runs.runs])
    place = torch.arange(rows.shape[0]) + shifts.repeat_interleave(counts)
    place = place.to(rows.device)
    box = rows.new_zeros(weight.shape[0] * longest, rows.shape[1])
    box[place] = rows
    out = torch.bmm(box.view(weight.shape[0], longest, -1), weight)
    return out.flatten(0, 1).index_select(0, place)


# ------------------------------------------------------------------------------------------ int8
@FUSED_MOE.kernel(
    "torch_experts_int8",
    level=Level.NATIVE,
    band="portable",
    signatures=moe_signatures(*INT8),
    requires=(
        Needs.platform("cpu"),
        *TORCH,
        NO_BATCHES_OF_INT8,
        Needs.math("int8"),
        *exact_sums("hidden"),
        *exact_sums("intermediate"),
    ),
)
def bind_int8(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Sort slots by expert and multiply int8 codes exactly, in int32."""
    dtype_name = binding.problem("dtype", "bfloat16")
    stages = _int8(dtype_name), _int8(dtype_name)
    read = ((*row_scales(weight), *fixed_scale(weight)) for weight in (w13, w2))
    return _bind(layer, w13, *stages, tuple(itertools.chain(*read)))


def _int8(dtype_name: str) -> Stage:
    import torch

    from hal.torch_compat import dtype, int_mm_function

    multiply, target_dtype = int_mm_function(), dtype(dtype_name)

    def stage(
        x: torch.Tensor, index: torch.Tensor | None, runs: Runs, tensors: Tensors
    ) -> torch.Tensor:
        codes, scales = quantize_rows(x, *tensors[2:])
        if index is not None:
            codes, scales = codes.index_select(0, index), scales.index_select(0, index)
        weight, columns = tensors[0].transpose(1, 2), tensors[1]
        rows, width = codes.shape[0], weight.shape[2]
        if rows * width <= EPILOGUE_ELEMENTS:
            sums = torch.empty(rows, width, dtype=torch.int32)
            for expert, part, target in zip(*runs.pieces(codes, sums), strict=True):
                multiply(part, weight[expert], out=target)
            wide = sums.float().mul_(scales).mul_(columns.index_select(0, runs.experts()))
            return wide.to(target_dtype)
        out = torch.empty(rows, width, dtype=target_dtype)
        for expert, part, scale, target in zip(*runs.pieces(codes, scales, out), strict=True):
            target.copy_(multiply(part, weight[expert]).float().mul_(scale).mul_(columns[expert]))
        return out

    return stage


# ----------------------------------------------------------------------------------- weight-only
@FUSED_MOE.kernel(
    "torch_experts_decode",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures=moe_signatures(*BYTEWISE, *E5M2, weight_only=True),
    requires=(
        # Not ROCm: the shifts read e4m3fn, and gfx942 holds e4m3fnuz.
        Needs.platform("cpu", "cuda", "xpu"),
        *TORCH,
        Needs.math_of("dtype", "native", "emulated"),
    ),
)
def bind_decode(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Decode the weights of the experts that are hit, at each call; keeps them quantized."""
    wide, multiply = binding.problem("dtype", "bfloat16"), _product(binding)
    stages = _decoded(decoder(w13, wide), multiply), _decoded(decoder(w2, wide), multiply)
    return _bind(layer, w13, *stages, (*row_scales(w13), *row_scales(w2)))


def _decoded(decode: Decoder, multiply: Product) -> Stage:
    def stage(
        x: torch.Tensor, index: torch.Tensor | None, runs: Runs, tensors: Tensors
    ) -> torch.Tensor:
        rows = x if index is None else x.index_select(0, index)
        codes, scales = tensors
        out = rows.new_empty(rows.shape[0], codes.shape[1])
        for expert, part, target in zip(*runs.pieces(rows, out), strict=True):
            multiply(part, decode.values(codes[expert], scales[expert]).t(), out=target)
            if decode.scales_after:
                target.copy_(target.float().mul_(scales[expert]))
        return out

    return stage


@FUSED_MOE.kernel(
    "torch_experts_unpack",
    level=Level.WEIGHT_ONLY,
    band="portable",
    signatures=moe_signatures(*PACKED, *SHIFTED, weight_only=True),
    requires=(Needs.platform("cpu"), *TORCH, Needs.math_of("dtype", "native", "emulated")),
)
def bind_unpack(binding: Binding, w13: QTensor, w2: QTensor, layer: ExpertLayer = PLAIN) -> Bound:
    """Unpack the weights of the experts that are hit, at each call; keeps them quantized."""
    dtype_name, multiply = binding.problem("dtype", "bfloat16"), _product(binding)
    stages = unpacked(w13, dtype_name, multiply), unpacked(w2, dtype_name, multiply)
    return _bind(layer, w13, *stages, (*parts_of(w13), *parts_of(w2)))
