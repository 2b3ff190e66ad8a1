"""Call the launcher of `few_experts` on meta tensors, as a cell of the cross-compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from hal.ops.kernels.crosscompile import Target


def few_tokens(
    target: Target,
    kind: str,
    empty: Callable[..., Any],
    packed: Callable[..., tuple[Any, dict[str, Any]]],
    sizes: tuple[int, int, int, int],
) -> None:
    """Launch both kernels for one token as the op does on this device.

    Args:
        target: What is compiled for.
        kind: What the sorted product is called.
        empty: Makes a meta tensor.
        packed: Makes a packed weight.
        sizes: Experts, top-k, hidden, intermediate.
    """
    from hal.ops.few_experts import DECODED
    from hal.ops.few_tiles import few_tiles
    from hal.ops.kernels.common import starts_dependent
    from hal.ops.kernels.few_launch import few_experts, operand, rounding
    from hal.ops.kernels.kinds import ALL_KINDS, as_weight

    experts, top_k, hidden, intermediate = sizes
    spec, decoded = ALL_KINDS[kind], DECODED.get(kind, kind)
    how = None
    if spec.a_scaled:
        codec = "int8" if spec.integer else target.fp8
        group = "group" if spec.scales == "block128" else "row"
        how = rounding(group, codec, 1e-12)
    held = []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        if ALL_KINDS[decoded].packed:
            codes, scales = packed(decoded, (experts,), n, k)
        else:
            codes = empty(experts, n, k, dtype=ALL_KINDS[decoded].decode or "bfloat16")
            scale = empty(experts, n, dtype="float32") if ALL_KINDS[decoded].decode else None
            scales = {"b_scales": scale}
        weight = as_weight(decoded, k, codes, **scales, fnuz=target.fp8 == "e4m3fnuz")
        held.append(operand(decoded, weight, planes=spec.planes))
    few_experts(
        empty(1, hidden),
        held[0],
        held[1],
        empty(1, hidden),
        empty(1, top_k, dtype="int32"),
        empty(1, top_k, dtype="float32"),
        tiles=few_tiles(
            (decoded, decoded), hidden, intermediate, top_k, target.lanes, quantizes=spec.a_scaled
        ),
        rounding=how,
        dependent=starts_dependent(target.platform, target.arch),
    )
