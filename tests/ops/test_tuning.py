"""What `hal tune` tries: products as their binders ask for them, and only tiles that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import ArgumentError
from hal.ops.tiles import GROUP_SUMS, OPERAND_BYTES
from hal.ops.tuned import ProductSizes
from hal.ops.tuning import (
    ACCUMULATOR_REGISTERS,
    APART,
    QUICK,
    THOROUGH,
    TUNABLE,
    candidates,
    default_tile,
    products_of,
    runs_specialized,
)
from hal.platforms.tables import device_spec
from hal.registry import find_op

DEVICES = (
    "cuda:h200",
    "cuda:a100",
    "cuda:rtx-3090",
    "cuda:b200",
    "rocm:mi300x",
    "rocm:rx-7900-xtx",
)
EXPERTS = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(OPERAND_BYTES)),
    n=st.sampled_from((32, 96, 768, 1536, 4096, 14336)),
    k=st.sampled_from((64, 200, 256, 2048, 2880, 7168)),
    rows=st.sampled_from((1, 4, 16, 64, 512, 4096)),
    matrices=st.sampled_from((1, 8, 128)),
    device=st.sampled_from(DEVICES),
)
def test_every_candidate_fits(
    kind: str, n: int, k: int, rows: int, matrices: int, device: str
) -> None:
    spec = device_spec(*device.split(":"))
    sizes = ProductSizes(kind, n, k, rows, matrices)
    tiles = candidates(sizes, spec)
    assert len(tiles) == len(set(tiles))
    lanes = 64 if spec.platform == "rocm" else 32
    default = default_tile(sizes, spec)
    for tile in tiles:
        needed = tile.shared_memory_bytes(kind, platform=spec.platform)
        assert needed <= (spec.shared_memory_bytes or 0)
        if tile == default:
            continue
        sums = 2 if kind in GROUP_SUMS or "block128" in kind else 1
        registers = sums * tile.block_m * tile.block_n / (tile.warps * lanes)
        assert registers <= ACCUMULATOR_REGISTERS
        assert tile.block_k <= 128 or "block128" not in kind
        assert tile.split_k == 1 or matrices == 1
    assert set(tiles) <= set(candidates(sizes, spec, apart=THOROUGH))
    quick = candidates(sizes, spec, apart=QUICK)
    assert len(quick) <= len(tiles)
    assert set(quick) <= set(tiles)


def test_the_rules_tile_is_tried_first_and_others_are_near_it() -> None:
    spec = device_spec("cuda", "h200")
    for tokens in (1, 64, 4096):
        for sizes in products_of("fused_moe", "fp8_channel", "triton_fp8", EXPERTS, tokens):
            tiles = candidates(sizes, spec)
            assert tiles[0] == default_tile(sizes, spec)
            assert 20 < len(tiles) < 100
            for tile in tiles[1:]:
                pairs = zip(vars_of(tile), vars_of(tiles[0]), strict=True)
                assert 1 <= sum(one != other for one, other in pairs) <= APART


def vars_of(tile: object) -> list[object]:
    return [getattr(tile, name) for name in tile.__dataclass_fields__]  # type: ignore[attr-defined]


def test_rows_that_are_given_are_kept() -> None:
    spec = device_spec("cuda", "h200")
    sizes = ProductSizes("bf16", 2048, 768, 16, 128)
    assert {tile.block_m for tile in candidates(sizes, spec, 32)} == {32}


@pytest.mark.parametrize("op", TUNABLE)
def test_kernels_with_tiles_exist(op: str) -> None:
    for name in TUNABLE[op]:
        for scheme in find_op(op).find(name).schemes:
            problem = EXPERTS if op == "fused_moe" else {"in_features": 64, "out_features": 32}
            for sizes in products_of(op, scheme, name, problem, 4):
                assert sizes.kind in OPERAND_BYTES, (name, scheme)


def test_what_has_no_tiles_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"kernel torch_dense.*triton"):
        products_of("linear", "bf16", "torch_dense", {"in_features": 8, "out_features": 8}, 1)
    with pytest.raises(ArgumentError, match="kernel triton, needed"):
        products_of("route", "none", "triton", {}, 1)
    with pytest.raises(ArgumentError, match="no top_k, hidden"):
        products_of("fused_moe", "bf16", "triton", {"experts": 8, "intermediate": 8}, 1)


PACKED = {"op": "fused_moe", "scheme": "int4_w4a16", "kernel": "triton_packed"}
BLOCKS = {"op": "fused_moe", "scheme": "fp8_block128", "kernel": "triton_fp8"}


@pytest.mark.parametrize(
    ("how", "problem", "tokens", "runs"),
    [
        (PACKED, EXPERTS, 32, True),
        (PACKED, EXPERTS, 12288, True),
        (PACKED, EXPERTS, 12289, False),  # weights are expanded
        (PACKED, {**EXPERTS, "dtype": "float16"}, 32, False),
        (PACKED, {**EXPERTS, "intermediate": 704}, 32, False),
        ({**PACKED, "scheme": "int4_w4a16_g64"}, {**EXPERTS, "intermediate": 704}, 32, True),
        ({**PACKED, "scheme": "int4_w4a16_g32"}, EXPERTS, 32, False),
        (BLOCKS, EXPERTS, 4096, False),
        (BLOCKS, EXPERTS, 4097, True),
        ({**BLOCKS, "scheme": "fp8_channel"}, EXPERTS, 4097, False),
    ],
)
def test_where_warps_specialize_no_table_sets_tiles(
    how: dict[str, str], problem: dict[str, Any], tokens: int, runs: bool
) -> None:
    for device in DEVICES:
        spec = device_spec(*device.split(":"))
        found = runs_specialized(**how, problem=problem, tokens=tokens, spec=spec)
        assert found == (runs and device == "cuda:h200")
    hopper = device_spec("cuda", "h200")
    first, _ = products_of(**how, problem=problem, tokens=tokens, spec=hopper)
    assert (first.kind == "bf16") == (tokens == 12289)
    old = hopper.replace(software=replace(hopper.software, triton="3.5.1"))
    assert not runs_specialized(**how, problem=problem, tokens=tokens, spec=old)
    of_linear = {"in_features": 2048, "out_features": 768}
    assert not runs_specialized(
        **{**how, "op": "linear"}, problem=of_linear, tokens=64, spec=hopper
    )
