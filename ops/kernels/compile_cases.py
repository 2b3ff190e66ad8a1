"""Call every launcher of the kernels on meta tensors, as the ops call it on a device.

A case is a cell of the cross-compiler: its name, and what is launched for a target. Nothing here
needs torch or Triton until a case is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from hal.ops.cells import SCALE_ORDERS, specialized_sizes
from hal.ops.few_experts import serves_few
from hal.ops.tiles import SPECIALIZED_KINDS, streams_rows

if TYPE_CHECKING:
    from hal.ops.kernels.crosscompile import Target

__all__ = ["CASES", "OWN_FORMAT"]

OWN_FORMAT = {
    "bf16": "bfloat16",
    "fp8_channel": "fp8",
    "fp8_block128": "fp8",
    "fp8_block128_ue8m0": "fp8",
    "int8_channel": "int8",
    "fp8_channel_decode": "bfloat16",
    "fp8_e5m2_decode": "bfloat16",
    "fp8_block128_decode": "bfloat16",
    "int8_channel_decode": "bfloat16",
    "int4_group_fp8": "fp8",
    "int4_group_decode": "bfloat16",
    "uint4_group_decode": "bfloat16",
    "mxfp8_decode": "bfloat16",
    "mxfp4_decode": "bfloat16",
    "nvfp4_decode": "bfloat16",
}
"""The format that each kind of product multiplies: its matrix instruction proves `native`."""

# The Qwen3-30B-A3B layer, and the tokens of a decode and of a prefill step.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
ODD = 2880
FEW, MANY = 8, 16384

PAYLOADS = ("bf16", "fp8", "fp8_token", "int8", "mxfp8", "mxfp4", "nvfp4")
"""The names of `hal.ops.payload.FORMATS`."""


def _empty(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _product(target: Target, op: str, kind: str, size: str) -> None:
    """Call the launcher of a product as the ops do for this device."""
    from hal.ops.kernels.accumulate import ALL_KINDS
    from hal.ops.kernels.grouped_gemm import grouped_gemm
    from hal.ops.kernels.linear import gemm
    from hal.ops.tiles import choose_tile

    tokens = FEW if size == "few" else MANY
    n, k = (1000, 1000) if size == "ragged" else (2 * INTERMEDIATE, HIDDEN)
    n = 2**21 if size == "wide" else n
    grouped = op == "grouped_gemm"
    rows = max(tokens * TOP_K // EXPERTS, 1) if grouped else tokens
    tile = choose_tile(
        kind, rows, n, k, platform=target.platform, arch=target.arch,
        shared_memory_bytes=target.shared_memory_bytes, compute_units=target.compute_units,
        matrices=min(EXPERTS, tokens * TOP_K) if grouped else 1,
    )  # fmt: skip
    spec = ALL_KINDS[kind]
    low = "int8" if "int8" in kind else f"float8_{target.fp8}"
    experts = (EXPERTS,) if grouped else ()
    blocks = spec.scales == "block128"
    groups = -(-k // 128)
    a = _empty(tokens, k, dtype=low if spec.a_scaled else "bfloat16")
    b = _empty(*experts, n, k, dtype=low if spec.scales else "bfloat16")
    scales: dict[str, Any] = {}
    stored = "float32" if spec.scale_format == "float32" else "uint8"
    if spec.a_scaled:
        scales["a_scales"] = _empty(tokens, *(groups,) * blocks, dtype=stored)
    if spec.packed:
        b, given = _packed_weight(kind, experts, n, k)
        scales |= given
    elif spec.scales:
        shape = (-(-n // 128), groups) if blocks else (n,)
        scales["b_scales"] = _empty(*experts, *shape, dtype=stored)
    if size == "shifted":
        scales |= {
            "a_shifts": _empty(tokens, dtype="float32"),
            "b_sums": _empty(n, dtype="float32"),
        }
    if not grouped:
        gemm(a, b, _empty(tokens, n), **scales, kind=kind, tile=tile)
        return
    slots, m = tokens * TOP_K, tile.block_m
    padded = (slots + min(slots, EXPERTS) * (m - 1)) // m * m
    grouped_gemm(
        a, b, _empty(slots, n),
        _empty(padded, dtype="int32"), _empty(padded // m, dtype="int32"), _empty(1, dtype="int32"),
        top_k_divisor=TOP_K, **scales, kind=kind, tile=tile,
        bias=_empty(EXPERTS, n) if size == "biased" else None,
    )  # fmt: skip


def _specialized(target: Target, *, kind: str) -> None:
    from hal.ops.kernels.kinds import ALL_KINDS
    from hal.ops.kernels.warp_specialized import warp_specialized_gemm
    from hal.ops.tiles import WARP_SPECIALIZED as TILE

    n, k, slots = 2 * INTERMEDIATE, HIDDEN, MANY * TOP_K
    stored = "float32" if ALL_KINDS[kind].scale_format == "float32" else "uint8"
    low = f"float8_{target.fp8}"
    padded = (slots + EXPERTS * (TILE.block_m - 1)) // TILE.block_m * TILE.block_m
    warp_specialized_gemm(
        _empty(MANY, k, dtype=low), _empty(EXPERTS, n, k, dtype=low), _empty(slots, n),
        _empty(padded, dtype="int32"), _empty(padded // TILE.block_m, dtype="int32"),
        _empty(1, dtype="int32"), top_k_divisor=TOP_K, kind=kind, tile=TILE,
        a_scales=_empty(MANY, k // 128, dtype=stored), programs=target.compute_units,
        b_scales=_empty(EXPERTS, n // 128, k // 128, dtype=stored),
    )  # fmt: skip


def _specialized_packed(target: Target, *, kind: str, size: str) -> None:
    from hal.ops.kernels.kinds import ALL_KINDS
    from hal.ops.kernels.warp_specialized_packed import warp_specialized_packed_gemm
    from hal.ops.specialized_experts import ROWS_IN_ORDER
    from hal.ops.tiles import specialized_tile

    spec = ALL_KINDS[kind]
    rows, experts = {"some": (64, EXPERTS), "many": (512, EXPERTS)}.get(size, (2, EXPERTS))
    experts = 2 if size == "narrow" else experts
    n, k, group = 2 * INTERMEDIATE, HIDDEN, spec.groups[0] if spec.groups else 0
    if size == "short":
        # Steps of 64: groups of 64, or no multiple of 128.
        group, k = (64, k) if spec.scale_format == "float32" and group else (group, k + 64)
    coded = _coded(kind, experts, n, k, group)
    tile = specialized_tile(
        kind, rows, n, coded.step, matrices=experts,
        compute_units=target.compute_units, shared_memory_bytes=target.shared_memory_bytes,
    )  # fmt: skip
    slots = rows * experts
    padded = (slots + experts * (tile.block_m - 1)) // tile.block_m * tile.block_m
    low = f"float8_{target.fp8}" if spec.a_scaled else "bfloat16"
    warp_specialized_packed_gemm(
        _empty(slots // TOP_K, k, dtype=low), coded, _empty(slots, n),
        _empty(padded, dtype="int32"), _empty(padded // tile.block_m, dtype="int32"),
        _empty(1, dtype="int32"), top_k_divisor=TOP_K, tile=tile,
        a_scales=_empty(slots // TOP_K, dtype="float32") if spec.a_scaled else None,
        programs=target.compute_units,
        ordered=not spec.a_scaled and (size == "ordered" or tile.block_m >= ROWS_IN_ORDER),
    )  # fmt: skip


def _specialized_rows(target: Target, *, kind: str, rows: int, n: int) -> None:
    from hal.ops.kernels.kinds import ALL_KINDS
    from hal.ops.kernels.warp_specialized_packed import warp_specialized_packed_rows
    from hal.ops.specialized_experts import ROWS_IN_ORDER
    from hal.ops.tiles import specialized_rows_tile

    spec, k = ALL_KINDS[kind], HIDDEN
    coded = _coded(kind, 1, n, k, spec.groups[0] if spec.groups else 0)
    tile = specialized_rows_tile(
        kind, rows, n, k, coded.step,
        compute_units=target.compute_units, shared_memory_bytes=target.shared_memory_bytes,
    )  # fmt: skip
    low = f"float8_{target.fp8}" if spec.a_scaled else "bfloat16"
    warp_specialized_packed_rows(
        _empty(rows, k, dtype=low), coded, _empty(rows, n), tile=tile,
        programs=target.compute_units,
        a_scales=_empty(rows, dtype="float32") if spec.a_scaled else None,
        ordered=not spec.a_scaled and tile.block_m >= ROWS_IN_ORDER,
        dependent=spec.a_scaled or tile.block_m >= ROWS_IN_ORDER,
    )  # fmt: skip


def _coded(kind: str, matrices: int, n: int, k: int, group: int) -> Any:
    from hal.ops.kernels.kinds import ALL_KINDS
    from hal.ops.kernels.warp_specialized_packed import Coded

    spec = ALL_KINDS[kind]
    b = _empty(matrices, n, k // spec.per_byte, dtype="int8" if spec.decode == "int8" else "uint8")
    stored = "float32" if spec.scale_format == "float32" else "uint8"
    if group:
        scales = _empty(matrices, k // group, -(-n // spec.scale_rows), dtype=stored).mT
    else:
        scales = _empty(matrices, n, dtype="float32")
    return Coded(kind, k, b, scales, _empty(matrices, dtype="float32") if spec.second else None)


def _packed_weight(
    kind: str, experts: tuple[int, ...], n: int, k: int
) -> tuple[Any, dict[str, Any]]:
    """Return b and the scales that a packed kind takes, with the largest group."""
    from hal.ops.kernels.accumulate import ALL_KINDS

    spec = ALL_KINDS[kind]
    b = _empty(
        *experts, n, -(-k // 8) * 4 if spec.planes else -(-k // spec.per_byte), dtype="uint8"
    )
    if spec.scales == "tensor":
        return b, {"b_scales": _empty(*experts, dtype="float32")}
    shape = (*experts, -(-n // spec.scale_rows), -(-k // spec.groups[0]))
    stored = "float32" if spec.scale_format == "float32" else "uint8"
    scales = {"b_scales": _empty(*shape, dtype=stored)}
    if spec.decode == "uint4":
        scales["b_zeros"] = _empty(*shape, dtype="uint8")
    if spec.second:
        scales["b_second"] = _empty(*experts, dtype="float32")
    return b, scales


def _decoded(target: Target, *, op: str, kind: str) -> None:
    from hal.ops.kernels.expand import expand
    from hal.ops.kernels.gemv import gemv
    from hal.ops.kernels.kinds import ALL_KINDS, as_weight
    from hal.ops.tiles import gemv_tile

    n, k = 2 * INTERMEDIATE, HIDDEN
    if ALL_KINDS[kind].packed:
        b, scales = _packed_weight(kind, (), n, k)
        weight = as_weight(kind, k, b, **scales)
    else:
        scale = _empty(n, dtype="float32") if ALL_KINDS[kind].decode else None
        dtype = ALL_KINDS[kind].decode or "bfloat16"
        weight = as_weight(kind, k, _empty(n, k, dtype=dtype), scale)
    if op == "expand":
        expand(weight, _empty(n, k), kind=kind)
        return
    tile = gemv_tile(kind, n, k)
    gemv(_empty(1, k), weight, _empty(1, n), kind=kind, tile=tile)
    if ALL_KINDS[kind].decode == "int8":
        held = weight._replace(zeros=_empty(n, dtype="int8"))
        gemv(_empty(1, k), held, _empty(1, n), kind=kind, tile=tile)


def _few(target: Target, *, kind: str) -> None:
    from hal.ops.kernels.few_cells import few_tokens

    sizes = EXPERTS, TOP_K, HIDDEN, INTERMEDIATE
    few_tokens(target, kind, _empty, _packed_weight, sizes)


def _rows(target: Target, *, kind: str, tokens: int) -> None:
    from hal.ops.kernels.kinds import ALL_KINDS, as_weight, by_row
    from hal.ops.kernels.ring_rows import fits, ring_rows
    from hal.ops.tiles import ring_of

    n, k = 2 * INTERMEDIATE, HIDDEN
    given: dict[str, Any] = {}
    if ALL_KINDS[kind].packed:
        b, given = _packed_weight(kind, (), n, k)
    else:
        b, given["b_scales"] = _empty(n, k, dtype="int8"), _empty(n, dtype="float32")
    if ALL_KINDS[kind].scales == "group" and ALL_KINDS[kind].scale_rows == 1:
        # As `linear` binds them: those of neighbouring rows side by side.
        given = {
            name: one.mT.contiguous().mT if one.dim() == 2 else one for name, one in given.items()
        }
    weight, a = by_row(kind, as_weight(kind, k, b, **given)), _empty(tokens, k)
    assert fits(kind, a, weight)
    ring = ring_of(kind, n, k, tokens, target.compute_units, group=weight.group)
    ring_rows(a, weight, _empty(tokens, n), kind=kind, ring=ring)


def _ring_experts(target: Target, *, kind: str) -> None:
    from hal.ops.few_experts import DECODED
    from hal.ops.few_tiles import ring_tiles
    from hal.ops.kernels.common import starts_dependent
    from hal.ops.kernels.few_launch import rounding
    from hal.ops.kernels.kinds import ALL_KINDS, as_weight
    from hal.ops.kernels.ring_experts import ring_experts, ring_weight

    spec, how = ALL_KINDS[kind], None
    grouped = spec.scales == "block128"
    if spec.a_scaled:
        codec = "int8" if spec.integer else target.fp8
        how = rounding("group" if grouped else "row", codec, 1e-12)
    kind = {**DECODED, "int4_group_fp8": "int4_group_decode"}.get(kind, kind)
    held = []
    for n, k in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        given: dict[str, Any] = {}
        if ALL_KINDS[kind].packed:
            b, given = _packed_weight(kind, (EXPERTS,), n, k)
        else:
            b = _empty(EXPERTS, n, k, dtype="int8")
            given["b_scales"] = _empty(EXPERTS, n, dtype="float32")
        if ALL_KINDS[kind].scales == "group" and ALL_KINDS[kind].scale_rows == 1:
            given = {
                name: one.mT.contiguous().mT if one.dim() == 3 else one
                for name, one in given.items()
            }
        held.append(ring_weight(kind, as_weight(kind, k, b, **given), planes=spec.planes))
    ring_experts(
        _empty(1, HIDDEN), held[0], held[1], _empty(1, HIDDEN), _empty(1, TOP_K, dtype="int32"),
        _empty(1, TOP_K, dtype="float32"),
        rings=ring_tiles((kind, kind), HIDDEN, INTERMEDIATE, TOP_K, grouped=grouped),
        rounding=how,
        dependent=starts_dependent(target.platform, target.arch),
    )  # fmt: skip


def _step_order(target: Target, *, gate: bool) -> None:
    from hal.ops.kernels.common import starts_dependent
    from hal.ops.kernels.step_order import order_rows
    from hal.ops.kernels.swiglu import silu_and_mul

    if gate:
        silu_and_mul(
            _empty(FEW, 2 * INTERMEDIATE), _empty(FEW, INTERMEDIATE), step=128,
            dependent=starts_dependent(target.platform, target.arch),
        )  # fmt: skip
    else:
        order_rows(_empty(FEW, HIDDEN), 128)


def _scaled(
    target: Target, *, kind: str, tokens: int, n: int, k: int, grouped: bool, sums: bool
) -> None:
    from hal.ops.kernels.scaled import SCALED_KINDS, scaled_gemm
    from hal.ops.kernels.scaled_experts import scaled_experts
    from hal.ops.scaled import scaled_tile, sums_tile

    spec = SCALED_KINDS[kind]
    low = f"float8_{target.fp8}" if sums else "float8_e4m3fn"
    experts = (EXPERTS,) if grouped else ()
    slots = tokens * TOP_K if grouped else tokens
    given: dict[str, Any] = {"out": _empty(slots, n), "bias": _empty(*experts, n)}
    for name, shape, fmt in (("a", (tokens,), spec.a), ("b", (*experts, n), spec.b)):
        packed = fmt == "e2m1"
        stored = "uint8" if packed else low
        given[name] = _empty(*shape, -(-k // 2) if packed else k, dtype=stored)
        stored = "uint8" if spec.group == 32 else "float8_e4m3fn"
        groups = -(-k // spec.group)
        room = -(-groups // 4) * 4 if sums else groups
        given[f"{name}_scales"] = _empty(*shape, room, dtype=stored)[..., :groups]
    if spec.group == 16:
        given["a_second"] = _empty(tokens, dtype="float32")
        given["b_second"] = _empty(*experts, dtype="float32")
    rows = -(-slots // EXPERTS) if grouped else tokens
    tile = scaled_tile(rows, n, spec.b == "e2m1", target.arch, target.compute_units)
    if sums:
        tile = sums_tile(rows, spec.b == "e2m1", target.arch)
    if not grouped:
        scaled_gemm(**given, k=k, kind=kind, tile=tile, sums=sums)
        return
    blocks = -(-slots // tile.block_m) + min(slots, EXPERTS)
    scaled_experts(
        **given, k=k, kind=kind, tile=tile, top_k_divisor=TOP_K, sums=sums,
        sorted_slots=_empty(blocks * tile.block_m, dtype="int32"),
        block_experts=_empty(blocks, dtype="int32"), n_padded=_empty(1, dtype="int32"),
    )  # fmt: skip


def _align(tokens: int, experts: int = EXPERTS) -> None:
    from hal.ops.kernels.align import align, capacity

    length = capacity(tokens * TOP_K, experts, 16)
    places = _empty(length, dtype="int32"), _empty(length // 16, dtype="int32")
    align(_empty(tokens, TOP_K, dtype="int32"), experts, 16, *places, _empty(1, dtype="int32"))


def _combine(target: Target, weights: str, *, shared: bool = False) -> None:
    from hal.ops.kernels.combine import combine
    from hal.ops.kernels.common import starts_dependent

    ids, given = _empty(FEW, TOP_K, dtype="int32"), _empty(FEW, TOP_K, dtype=weights)
    dense = _empty(FEW, HIDDEN) if shared else None
    combine(
        _empty(FEW, TOP_K, HIDDEN), _empty(FEW, HIDDEN), ids, EXPERTS, given, dense,
        dependent=starts_dependent(target.platform, target.arch),
    )  # fmt: skip


def _route(experts: int, scoring: str, bias: bool, groups: int = 1, chosen: int = 1) -> None:
    from hal.ops.kernels.route import route

    weights, ids = _empty(FEW, TOP_K, dtype="float32"), _empty(FEW, TOP_K, dtype="int32")
    route(
        _empty(FEW, experts), weights, ids, scoring=scoring,
        bias=_empty(experts, dtype="float32") if bias else None,
        expert_map=_empty(experts, dtype="int32") if groups > 1 else None,
        expert_groups=groups, top_k_groups=chosen,
    )  # fmt: skip


def _quantize(target: Target, fmt: str, grouped: bool, gated: bool) -> None:
    from hal.ops.kernels import quantize, swiglu

    width = INTERMEDIATE if gated else HIDDEN
    values = _empty(FEW, width, dtype="int8" if fmt == "int8" else f"float8_{target.fp8}")
    scales = _empty(FEW, *(-(-width // 128),) * grouped, dtype="float32")
    launchers: dict[tuple[bool, bool], Callable[..., None]] = {
        (False, False): quantize.quantize_rows,
        (False, True): quantize.quantize_groups,
        (True, False): swiglu.silu_and_mul_quantize_rows,
        (True, True): swiglu.silu_and_mul_quantize_groups,
    }
    # The two numbers play no part in compiling.
    x = _empty(FEW, 2 * width if gated else width)
    launchers[gated, grouped](x, values, scales, 127.0, 1e-12)


def _shift(target: Target) -> None:
    from hal.ops.kernels.shift import shift_rows

    n, k = 2 * INTERMEDIATE, HIDDEN
    product = _empty(FEW, n, dtype="float32")
    shift_rows(product, _empty(FEW, k), _empty(n, dtype="float32"), _empty(FEW, n), _empty(n))


def _planes(target: Target) -> None:
    from hal.ops.kernels.planes import write_planes

    write_planes(*(_empty(FEW * HIDDEN // 8, dtype="int32") for _ in range(2)))


def _by_column(target: Target, *, name: str) -> None:
    from hal.ops.kernels.by_column import launch_by_column

    n, groups, product = 2 * INTERMEDIATE, HIDDEN // 128, name == "product"
    stored = "float32" if name == "float32" else "uint8"
    factors = _empty(EXPERTS, n, dtype="float32") if product else None
    launch_by_column(
        _empty(EXPERTS, n, groups, dtype=stored), factors,
        _empty(EXPERTS, groups, n, dtype="float32" if product else stored),
        unit=256.0 if product else 1.0,
    )  # fmt: skip


def _gate(target: Target, activation: str, *, batched: bool = False, **options: Any) -> None:
    from hal.ops.activations import activation_of
    from hal.ops.kernels.common import starts_dependent
    from hal.ops.kernels.swiglu import silu_and_mul

    how = activation_of("swiglu", activation, **options)
    counts = _empty(FEW, dtype="int32") if batched else None
    x, out = _empty(FEW, how.products * INTERMEDIATE), _empty(FEW, INTERMEDIATE)
    silu_and_mul(x, out, how, counts, dependent=starts_dependent(target.platform, target.arch))


def _store(target: Target, scheme: str, before: str = "plain", layout: str = "canonical") -> None:
    """Call the launcher of a quantizing op as its binder does."""
    from hal.ops.activations import Activation
    from hal.ops.kernels.quantize import Norm
    from hal.ops.quantize import launch_triton, quantize_triton
    from hal.ops.quantize_fused import FIXED, rms_norm_fixed, swiglu_fixed
    from hal.quant.scheme import find_scheme

    how = find_scheme(scheme).activation
    encoding = target.fp8 if how.format == "e4m3fn" else str(how.format)
    x = _empty(FEW, HIDDEN)
    fixed = None if how.dynamic else _empty(*(() if how.symmetric else (2,)), dtype="float32")
    if before == "plain":
        quantize_triton(x, encoding, how, fixed, layout)
    elif scheme in FIXED:
        if fixed is not None and not how.symmetric:
            fixed = _empty(dtype="float32"), _empty(dtype="int8")  # as the ops are given them
        for rows, columns in ((FEW, HIDDEN), (MANY, ODD)):
            x, weight = _empty(rows, columns), _empty(columns)
            if before == "norm":
                residual = x if rows == FEW else None
                rms_norm_fixed(x, weight, 1e-6, residual, encoding, how, fixed=fixed)
            else:
                # Both kernels: words need halves that lie apart.
                gate_up, gate = _empty(rows, 2 * columns), Activation(interleaved=rows == FEW)
                swiglu_fixed(gate_up, gate, encoding, how, fixed=fixed)
    elif before == "gate":
        many = _empty(MANY, 2 * INTERMEDIATE)
        launch_triton(many, encoding, how, INTERMEDIATE, gate=Activation())
    else:
        launch_triton(x, encoding, how, HIDDEN, norm=Norm(_empty(HIDDEN), 1e-6, x, x))
        # Rows that are taken part by part, many of them and alone.
        launch_triton(_empty(MANY, ODD), encoding, how, ODD, norm=Norm(_empty(ODD), 1e-6))


def _exchange(target: Target, format: str, size: str) -> None:
    """Call the launchers of a one-sided exchange between two ranks; `plain` is their second one."""
    from hal.ops.kernels.combine_rows import combine_rows
    from hal.ops.kernels.dispatch_rows import Places, dispatch_rows
    from hal.ops.kernels.row_codec import Codec
    from hal.ops.payload import PROGRAMS, Payload
    from hal.ops.transports.one_sided import codec_of, units_of
    from hal.quant.represent import encoding_of

    ranks, room = 2, FEW if size == "few" else MANY
    places = dict.fromkeys(Places.__dataclass_fields__, 256)
    common: dict[str, Any] = {
        "peers": _empty(ranks + 1, dtype="int64"),
        "state": _empty(4 * PROGRAMS, dtype="int64"),
        "places": Places(**places), "me": 0, "room": room, "limit": 2**40,
    }  # fmt: skip
    hits, rows = _empty(room, dtype="int64"), _empty(ranks * room, HIDDEN)
    if format == "plain":
        units = units_of(Codec("raw", HIDDEN), room, PROGRAMS, back=True)._asdict()
        del units["registers"]
        shared = _empty(room, HIDDEN) if size == "few" else None
        combine_rows(
            rows, _empty(room, HIDDEN), hits, shared, top_k=TOP_K, block=units.pop("groups"),
            **common, **units,
        )  # fmt: skip
        return
    payload = Payload(format, HIDDEN, TOP_K)
    codec = codec_of(payload, encoding_of(payload.how.format, target.fp8))
    ids, weights = _empty(room, TOP_K, dtype="int32"), _empty(room, TOP_K, dtype="float32")
    dispatch_rows(
        _empty(room, HIDDEN), ids, weights, hits, None if codec.kind == "raw" else rows,
        table=_empty(EXPERTS, 1, dtype="int32"), copies=_empty(EXPERTS, dtype="int32"),
        codec=codec, **common, **units_of(codec, room, PROGRAMS)._asdict(),
    )  # fmt: skip


CASES: dict[str, Callable[[Target], None]] = {
    **{
        f"{op}/{kind}/{size}": partial(_product, op=op, kind=kind, size=size)
        for op in ("grouped_gemm", "gemm")
        for kind in OWN_FORMAT
        for size in ("few", "many", "ragged", "wide", "biased", "shifted")
    },
    **{
        f"{op}/{kind}": partial(_decoded, op=op, kind=kind)
        for op in ("gemv", "expand")
        for kind in OWN_FORMAT
        if kind.endswith("_decode") or (op, kind) == ("gemv", "bf16")
    },
    **{f"few_experts/{kind}": partial(_few, kind=kind) for kind in OWN_FORMAT if serves_few(kind)},
    **{
        f"ring_rows/{kind}/{size}": partial(_rows, kind=kind, tokens=tokens)
        for kind in OWN_FORMAT
        if kind.endswith("_decode")
        for size, tokens in (("one", 1), ("few", 8), ("sixteen", 16))
        if streams_rows(kind, 2 * INTERMEDIATE, HIDDEN, tokens)
    },
    **{
        f"ring_experts/{kind}": partial(_ring_experts, kind=kind)
        for kind in OWN_FORMAT
        if kind != "bf16" and serves_few(kind)
    },
    "step_order/rows": partial(_step_order, gate=False),
    "step_order/gate": partial(_step_order, gate=True),
    **{
        f"{op}/{kind}/{size}": partial(
            _scaled,
            kind=kind,
            tokens=tokens,
            n=n,
            k=k,
            grouped=op.endswith("_experts"),
            sums=op.startswith("sums"),
        )
        for op in ("scaled", "scaled_experts", "sums", "sums_experts")
        for kind in ("mxfp8", "mxfp4", "mxfp4_w4a8", "nvfp4")
        if op.startswith("scaled") or kind in ("mxfp8", "mxfp4_w4a8")
        for size, tokens, n, k in (
            ("few", FEW, 2 * INTERMEDIATE, HIDDEN),
            ("some", 128, 2 * INTERMEDIATE, HIDDEN),
            ("many", MANY, 2 * INTERMEDIATE, HIDDEN),
            ("ragged", 100, 1000, 1056),
            ("wide", MANY, 2**21, HIDDEN),
        )
    },
    **{
        f"{name}/{size}": partial(_exchange, format=format, size=size)
        for name, format in (
            *((f"dispatch_rows/{format}", format) for format in PAYLOADS),
            ("combine_rows", "plain"),
        )
        for size in ("few", "many")
    },
    **{
        f"warp_specialized/{kind}": partial(_specialized, kind=kind)
        for kind in ("fp8_block128", "fp8_block128_ue8m0")
    },
    **{
        f"warp_specialized_packed/{kind}/{size}": partial(_specialized_packed, kind=kind, size=size)
        for kind in sorted(SPECIALIZED_KINDS)
        for size in specialized_sizes(kind)
    },
    **{
        f"warp_specialized_rows/{kind}/{size}": partial(
            _specialized_rows, kind=kind, rows=rows, n=n
        )
        for kind in sorted(SPECIALIZED_KINDS)
        for size, rows, n in (("parts", 16, HIDDEN), ("ordered", 64, HIDDEN), ("whole", 256, 16384))
    },
    "align/few": lambda _: _align(FEW),
    "align/many": lambda _: _align(MANY),
    "align/one_expert": lambda _: _align(FEW, 1),
    "align/most_experts": lambda _: _align(MANY, 1025),
    "align/few_of_most": lambda _: _align(FEW, 1025),
    "combine": lambda target: _combine(target, "float32"),
    "combine/shared": lambda target: _combine(target, "float32", shared=True),
    "route/softmax": lambda _: _route(EXPERTS, "softmax", False),
    "route/sigmoid_bias": lambda _: _route(1025, "sigmoid", True),
    "route/softmax_after_top_k": lambda _: _route(EXPERTS, "softmax_after_top_k", False),
    "route/groups": lambda _: _route(256, "sigmoid", True, 8, 4),
    "route/most_groups": lambda _: _route(1025, "softmax", True, 41, 4),
    "quantize/fp8_rows": lambda target: _quantize(target, "fp8", False, False),
    "quantize/fp8_groups": lambda target: _quantize(target, "fp8", True, False),
    "quantize/int8_rows": lambda target: _quantize(target, "int8", False, False),
    **{
        f"quantize/{scheme}/{before}": partial(_store, scheme=scheme, before=before)
        for schemes, befores in (
            (("mxfp8", "mxfp4", "nvfp4", "fp8_block128_ue8m0"), ("plain", "norm", "gate")),
            (("fp8_channel", "fp8_block128", "int8_channel"), ("norm", "gate")),
            (("nvfp4_static", "fp8_static", "int8_static"), ("plain", "norm", "gate")),
            (("int8_channel_asymmetric", "int8_static_asymmetric"), ("plain", "norm", "gate")),
        )
        for scheme in schemes
        for before in befores
    },
    **{
        f"quantize/{scheme}/plain/{layout}": partial(_store, scheme=scheme, layout=layout)
        for scheme, layouts in SCALE_ORDERS.items()
        for layout in layouts
    },
    "swiglu/silu": lambda target: _gate(target, "silu"),
    "swiglu/silu_batched": lambda target: _gate(target, "silu", batched=True),
    "swiglu/gelu_interleaved": lambda target: _gate(target, "gelu", interleaved=True),
    "swiglu/oai_interleaved": lambda target: _gate(target, "swiglu_oai", interleaved=True),
    "swiglu/relu2_alone": lambda target: _gate(target, "relu2", gated=False),
    "planes": _planes,
    **{
        f"by_column/{name}": partial(_by_column, name=name)
        for name in ("float32", "bytes", "product")
    },
    "shift": _shift,
    "swiglu/silu_fp8_rows": lambda target: _quantize(target, "fp8", False, True),
    "swiglu/silu_fp8_groups": lambda target: _quantize(target, "fp8", True, True),
    "swiglu/silu_int8_rows": lambda target: _quantize(target, "int8", False, True),
}
