"""Run few tokens through experts without sorting them: two launches, for each kind of product.

Weights that are decoded stream through shared memory where kernels are written in PTX and their
scales lie as those read them (`kernels.ring_experts`); `kernels.few_experts` serves the rest.

The weights, and their layout, are those of the sorted products of `hal.ops.triton_experts`, so that
one binding serves every number of tokens. What schemes say of activations holds here too: where
they are quantized, it is to the same codes, in registers. Sums of products are float32 where sorted
rows of int8 have int32 ones; up to 2^24 they are exact, beyond it they round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.ops.few_tiles import few_slots, few_tiles, ring_tiles
from hal.ops.linear import encoding_of_rows, scale_names
from hal.quant.codec import SCALE_FLOOR

if TYPE_CHECKING:
    import torch

    from hal.ops.binding import Binding, Tensors
    from hal.ops.expert_layer import ExpertLayer
    from hal.ops.kernels.kinds import Weight
    from hal.quant.tensor import QTensor

__all__ = ["FewTokens", "bind_few_tokens", "serves_few"]

DECODED = {
    "fp8_channel": "fp8_channel_decode",
    "fp8_block128": "fp8_block128_decode",
    "int8_channel": "int8_channel_decode",
}
"""How the weights of kinds are decoded whose sorted products have matrix instructions for them."""


def serves_few(kind: str) -> bool:
    """Say whether few tokens need no sort: all kinds but the one whose rows have exponents."""
    return kind != "fp8_block128_ue8m0"


class FewTokens(NamedTuple):
    """How a layer runs when it has few slots.

    most: The largest number of slots, tokens times experts of each.
    run: `(x, ids, weights, tensors, out, shared)`, which writes out `[tokens, columns]`.
    """

    most: int
    run: Callable[..., None]


def bind_few_tokens(
    binding: Binding,
    w13: QTensor,
    w2: QTensor,
    layer: ExpertLayer,
    kinds: tuple[str, str],
    widths: tuple[int, int],
    *,
    quantizes: bool,
    specialized: bool = False,
) -> FewTokens | None:
    """Return how the layer runs few tokens, or None where these are sorted too.

    Args:
        binding: Where it runs.
        w13: Weight of the first product.
        w2: Weight of the second.
        layer: What is computed besides.
        kinds: What the sorted products are called.
        widths: How many of the tensors belong to each weight.
        quantizes: Whether activations are quantized.
        specialized: Whether `specialized_experts` has the sorted products of weights decoded.
    """
    if layer.batched or not all(map(serves_few, kinds)):
        return None
    from hal.ops.kernels.common import INTERPRETED, starts_dependent
    from hal.ops.kernels.few_launch import few_experts, operand, rounding
    from hal.ops.kernels.kinds import FP8_UNITS, as_weight
    from hal.ops.kernels.ring_experts import MOST_EXPERTS, reads, ring_experts, ring_weight
    from hal.ops.tiles import runs_ptx

    experts, _, hidden = w13.shape
    intermediate = w2.shape[2]
    planes = kinds[0] == "int4_group_fp8"
    as_they_lie = {"int4_group_fp8": "int4_group_decode"}
    names = [scale_names(kind) for kind in kinds]
    kinds = DECODED.get(kinds[0], kinds[0]), DECODED.get(kinds[1], kinds[1])
    ring_kinds = as_they_lie.get(kinds[0], kinds[0]), as_they_lie.get(kinds[1], kinds[1])
    fnuz = w13.encoding == "e4m3fnuz"
    width, both = widths[0], sum(widths)
    how, static = w13.scheme.activation, quantizes and w13.scheme.static
    encoding = encoding_of_rows(binding, w13)
    plain = None
    if quantizes:
        group = "group" if how.granularity == "group128" else "row"
        plain = rounding(group, encoding, SCALE_FLOOR, 1 / FP8_UNITS[encoding] if planes else 1.0)
    threads = binding.spec.lanes
    dependent = starts_dependent(binding.spec.platform, binding.spec.arch.name)
    ptx = runs_ptx(binding.spec.platform, binding.spec.arch.name) and not INTERPRETED.value
    made: list[Any] = [None, {}]

    def weight_of(which: int, k: int, read: Tensors) -> Weight:
        given = {"b_scales": None, **dict(zip(names[which], read[1:], strict=False))}
        return as_weight(kinds[which], k, read[0], **given, fnuz=fnuz)

    def operands(tensors: Tensors, top_k: int) -> tuple[tuple[Any, ...], bool]:
        """Return both weights as launches take them, and whether they stream through rings.

        Both are kept while calls bring the same tensors.
        """
        streams = ptx and top_k <= MOST_EXPERTS
        if made[0] is not tensors:
            made[:] = tensors, {}
        found: tuple[tuple[Any, ...], bool] | None = made[1].get(streams)
        if found is None:
            weights = (
                weight_of(0, hidden, tensors[:width]),
                weight_of(1, intermediate, tensors[width:both]),
            )
            held = tuple(zip(ring_kinds, weights, strict=True))
            if streams and all(reads(kind, weight) for kind, weight in held):
                found = tuple(ring_weight(*one, planes=planes) for one in held), True
            else:
                held = tuple(zip(kinds, weights, strict=True))
                found = tuple(operand(*one, planes=planes) for one in held), False
            made[1][streams] = found
        return found

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        tensors: Tensors,
        out: torch.Tensor,
        shared: torch.Tensor | None,
    ) -> None:
        used = plain
        if static and used is not None:
            used = used._replace(given13=tensors[width - 1], given2=tensors[both - 1])
        top_k = ids.shape[1]
        (w13, w2), in_rings = operands(tensors, top_k)
        lies: dict[str, Any] = {
            "activation": layer.activation,
            "biases": layer.biases(tensors),
            "shared": shared,
            "rounding": used,
            "dependent": dependent,
        }
        if in_rings:
            whole = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
            rows = x if whole else x.clone(memory_format=torch.contiguous_format)
            grouped = used is not None and used.granularity == "group"
            rings = ring_tiles(ring_kinds, hidden, intermediate, top_k, grouped=grouped)
            ring_experts(rows, w13, w2, out, ids, weights, rings=rings, **lies)
            return
        tiles = few_tiles(kinds, hidden, intermediate, top_k, threads, quantizes=quantizes)
        few_experts(
            x if x.stride(1) == 1 else x.contiguous(),
            w13,
            w2,
            out,
            ids,
            weights,
            tiles=tiles,
            **lies,
        )

    streamed = ptx and hidden % 32 == 0 and intermediate % 32 == 0
    most = few_slots(
        kinds[0], experts, quantizes=quantizes, specialized=specialized, streamed=streamed
    )
    return FewTokens(most, run)
