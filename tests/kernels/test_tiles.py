"""Check tiles for every architecture in the tables: pure arithmetic, nothing is compiled."""

from __future__ import annotations

import pytest

from hal.ops.tiles import (
    FEW,
    MANY,
    OPERAND_BYTES,
    SOME,
    Tile,
    choose_tile,
    few_rows,
    fit,
    ring_of,
    runs_ptx,
    some_rows,
    streams_rows,
    way_of,
)
from hal.platforms.tables import device_rows

DEVICES = {
    f"{platform}:{row.name}": row
    for platform in ("cuda", "rocm", "xpu")
    for row in device_rows(platform)
}


def spec_of(name):
    from hal.platforms.tables import device_spec

    platform, _, key = name.partition(":")
    return device_spec(platform, key)


@pytest.mark.parametrize("name", list(DEVICES))
def test_tiles_fit_the_device(name):
    spec = spec_of(name)
    for kind in OPERAND_BYTES:
        for rows in (1, 16, 17, 64, 128, 4096):
            for n, k in ((1, 1), (1000, 1000), (1536, 2048), (7168, 18432)):
                for matrices in (1, 256):
                    tile = choose_tile(
                        kind, rows, n, k, platform=spec.platform, arch=spec.arch.name,
                        shared_memory_bytes=spec.shared_memory_bytes,
                        compute_units=spec.compute_units or 64, matrices=matrices,
                    )  # fmt: skip
                    needed = tile.shared_memory_bytes(kind, platform=spec.platform)
                    assert needed <= spec.shared_memory_bytes
                    assert tile.block_m * tile.warps >= 16
                    if "block128" in kind:
                        assert 128 % tile.block_k == 0


@pytest.mark.parametrize("kind", list(OPERAND_BYTES))
@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu"])
def test_stages_are_given_up_before_tiles(platform, kind):
    """Down to two, which is what loads and products need to overlap; the last one goes last."""
    wide = before = Tile(128, 256, 128, 8, 4)
    least = Tile(32, 64, 64, 8, 1).shared_memory_bytes(kind, platform=platform)
    for limit in range(wide.shared_memory_bytes(kind, platform=platform), least, -4096):
        tile = fit(wide, kind, limit, platform=platform)
        assert tile.shared_memory_bytes(kind, platform=platform) <= limit
        if tile.stages > 2:
            assert (tile.block_m, tile.block_n, tile.block_k) == (128, 256, 128)
        if tile.stages < 2:
            assert (tile.block_m, tile.block_n, tile.block_k) == (32, 64, 64)
        assert tile.stages <= before.stages
        before = tile
    assert before.block_k == 64
    assert before.stages <= 2


def h200(rows, **options):
    return choose_tile(
        "fp8_channel", rows, 4096, 4096, platform="cuda", arch="sm_90",
        shared_memory_bytes=232448, compute_units=132, **options,
    )  # fmt: skip


def test_few_rows_become_the_short_side():
    assert h200(4).swap
    assert h200(4).block_m == 16
    assert not h200(4096).swap


def test_many_experts_need_no_small_tiles():
    """One expert of 128 rows leaves most of the device idle, 128 experts do not."""
    assert h200(512, matrices=128).block_n > h200(512).block_n


def test_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="block_m is 24, must be a power of two"):
        Tile(24, 64, 64, 4, 2)
    with pytest.raises(ValueError, match="stages 0"):
        Tile(16, 64, 64, 4, 0)
    with pytest.raises(ValueError, match="no tile of bf16 fits 2048 bytes"):
        fit(Tile(128, 128, 64, 8, 4), "bf16", 2048, platform="cuda")


def test_the_way_of_a_decoded_product_depends_on_rows_and_size():
    def few(kind, n, k=4096, ptx=True):
        return few_rows(kind, n, k, ptx=ptx)

    most = few("mxfp4_decode", 4096, ptx=False), some_rows("mxfp4_decode", 4096)
    ways = [way_of(rows, *most) for rows in (1, 2, 3, 128, 129, 10**6)]
    assert ways == [FEW, FEW, SOME, SOME, MANY, MANY]
    assert [some_rows("mxfp4_decode", 2048), some_rows("mxfp8_decode", 4096)] == [64, 64]
    assert [few("int4_group_decode", 14336, ptx=ptx) for ptx in (True, False)] == [16, 1]
    assert few("uint4_group_decode", 4096, 4000) == 16
    assert few("uint4_group_decode", 4096, 4008) == 2  # rows are no multiple of 16 bytes
    assert [few(kind, 4096) for kind in ("bf16", "fp8_block128_decode")] == [2, 8]


def test_where_rows_stream_through_shared_memory():
    def rows(kind, n=4096):
        return [m for m in range(20) if streams_rows(kind, n, 4096, m)]

    assert rows("nvfp4_decode") == list(range(1, 17))
    assert rows("mxfp8_decode") == list(range(3, 9))
    assert rows("mxfp8_decode", 14336) == list(range(2, 9))
    assert rows("bf16") == rows("int4_group_fp8") == []
    assert [runs_ptx("cuda", arch) for arch in ("sm_75", "sm_80", "sm_121")] == [False, True, True]
    assert not runs_ptx("rocm", "gfx942")
    shapes = (2112, 7168), (4096, 4096), (14336, 4096)
    assert [ring_of("mxfp4_decode", *shape, 1, 132).splits for shape in shapes] == [8, 4, 4]
    assert [ring_of("mxfp4_decode", *shape, 4, 132).stages for shape in shapes] == [4, 4, 2]
    # What two tiles share pays under many rows, unless scales fill the shared memory.
    rings = [ring_of("int4_group_decode", 14336, 4096, 16, 132, group=group) for group in (128, 32)]
    assert [ring.tiles for ring in rings] == [2, 1]
    kinds = "int8_channel_decode", "fp8_channel_decode"
    assert [ring_of(kind, 14336, 4096, 8, 132).tiles for kind in kinds] == [2, 1]
    assert {ring_of(kind, 7168, 2048, 8, 132).tiles for kind in kinds} == {2}
