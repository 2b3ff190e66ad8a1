"""Measured tiles: the nearest product's, the user's before those shipped, and only what fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal.ops import tuned
from hal.ops.linear import TileChoice
from hal.ops.tiles import Tile, choose_tile
from hal.ops.tuned import ProductSizes, StaleTilesWarning, find_tile, ignoring_tables
from hal.platforms.tables import device_spec

H200 = device_spec("cuda", "h200").replace(
    software=replace(device_spec("cuda", "h200").software, triton="3.6.0")
)
SIZES = ProductSizes("fp8_channel", 4096, 2048, 16, 64)
TILE = Tile(16, 64, 256, 4, 3, 1, swap=True)
OTHER = Tile(32, 128, 128, 4, 4, 1, swap=True)
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuned, "_warned", set())
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*tiles: Any, shipped: bool = False, **run: Any) -> Path:
        path = tmp_path / "shipped.json" if shipped else tuned.user_table()
        path.parent.mkdir(exist_ok=True)
        told = {"arch": "sm_90", "device": H200.key, "source": "a test", "unit": "us"}
        told |= {"software": {"triton": "3.6.1"}, "rows": [], **run}
        path.write_text(json.dumps({"runs": [{**told, "tiles": list(tiles)}]}))
        return path

    return write


def row(sizes: ProductSizes = SIZES, tile: Tile = TILE, scheme: str = "fp8_channel") -> list[Any]:
    return ["fused_moe", scheme, asdict(sizes), asdict(tile), 10.0, 12.0]


def found(sizes: ProductSizes = SIZES, spec: Any = H200, block_m: int = 0, **at: str) -> Any:
    return find_tile(
        at.get("op", "fused_moe"), at.get("scheme", "fp8_channel"), spec, sizes, block_m
    )


def test_without_tables_there_is_none() -> None:
    assert found() is None


def test_the_same_and_the_nearest_product(write: Write) -> None:
    write(row(), row(replace(SIZES, rows=64), OTHER))
    assert found() == TILE
    assert found(replace(SIZES, rows=8)) == TILE
    assert found(replace(SIZES, rows=128)) == OTHER
    assert found(replace(SIZES, n=6144)) == TILE


@pytest.mark.parametrize(
    "sizes",
    [
        replace(SIZES, rows=64),  # two powers of two
        replace(SIZES, n=4096 * 8),
        replace(SIZES, n=4096 * 2, k=2048 * 3),
        replace(SIZES, matrices=2),
        replace(SIZES, kind="bf16"),
        replace(SIZES, k=2040),  # rows that do not begin at 16 bytes
    ],
)
def test_what_is_too_far_is_left_to_rules(write: Write, sizes: ProductSizes) -> None:
    write(row())
    assert found(sizes) is None


def test_other_ops_schemes_and_architectures_do_not_count(write: Write) -> None:
    write(row())
    assert found(op="linear") is None
    assert found(scheme="fp8_tensor") is None
    assert found(spec=device_spec("cuda", "b200")) is None


def test_the_users_table_comes_before_the_shipped_one(write: Write) -> None:
    write(row(), shipped=True)
    assert found() == TILE
    write(row(replace(SIZES, rows=32), OTHER))
    assert found() == OTHER  # though the shipped one is nearer
    with ignoring_tables():
        assert found() is None


def test_of_one_product_the_own_device_and_then_the_later_row_counts(write: Write) -> None:
    write(row(), row(SIZES, OTHER))
    assert found() == OTHER
    path = write(row())
    table = json.loads(path.read_text())
    table["runs"].append({**table["runs"][0], "device": "cuda:h100", "tiles": [row(SIZES, OTHER)]})
    path.write_text(json.dumps(table))
    assert found() == TILE


def test_rows_that_must_be_kept(write: Write) -> None:
    write(row(), row(SIZES, OTHER))
    assert found(block_m=16) == TILE
    assert found(block_m=32) == OTHER
    assert found(block_m=64) is None


def test_never_a_tile_that_does_not_fit(write: Write) -> None:
    write(row())
    needed = TILE.shared_memory_bytes("fp8_channel")
    assert found(spec=H200.replace(shared_memory_bytes=needed)) == TILE
    assert found(spec=H200.replace(shared_memory_bytes=needed - 1)) is None
    write(row(replace(SIZES, n=64, k=128), Tile(16, 64, 128, 4, 3, 1, swap=True)))
    assert found(replace(SIZES, n=32, k=128)) is None  # half of the tile would be padding
    split = Tile(16, 64, 128, 4, 3, 1, split_k=8)
    write(row(replace(SIZES, matrices=1), split))
    assert found(replace(SIZES, matrices=1)) == split
    assert found(replace(SIZES, matrices=2)) is None  # only one matrix is split
    assert found(replace(SIZES, matrices=1, k=512 + 256)) is None


def test_a_user_is_told_of_another_triton_once(write: Write) -> None:
    write(row(), software={"triton": "3.5.0"})
    with pytest.warns(StaleTilesWarning, match=r"Triton 3\.5\.0, and here is 3\.6\.0"):
        assert found() == TILE
    assert found() == TILE  # warnings are errors in tests


def test_a_shipped_table_of_another_triton_is_no_warning(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(row(), shipped=True, software={"triton": "3.5.0"})
    with caplog.at_level("INFO", logger="hal"):
        assert found() == TILE
    assert "3.5.0" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"runs": [{"tiles": []}, 3]}',
        '{"runs": [{"arch": "sm_90", "source": "x", "tiles": [["linear"]]}]}',
        json.dumps({"runs": [{"arch": "sm_90", "source": "x", "tiles": [[*row()[:3],
                   {**row()[3], "block_m": 24}, 1.0, 1.0]]}]}),
    ],
)  # fmt: skip
def test_a_broken_table_warns_and_is_ignored(write: Write, text: str) -> None:
    write(row(), shipped=True)
    tuned.user_table().parent.mkdir()
    tuned.user_table().write_text(text)
    with pytest.warns(StaleTilesWarning, match="is no table of tiles.*delete it"):
        assert found() == TILE


def test_bound_ops_take_the_table(write: Write) -> None:
    selection = SimpleNamespace(op="fused_moe", scheme="fp8_channel", spec=H200)
    binding: Any = SimpleNamespace(spec=H200, selection=selection)
    rules = TileChoice(binding, "fp8_channel", 4096, 2048)
    assert rules(16, 64) != TILE
    write(row())
    choice = TileChoice(binding, "fp8_channel", 4096, 2048)
    assert choice(16, 64) == TILE
    assert choice(13, 50) == TILE  # of the same power of two
    facts = {"platform": "cuda", "arch": "sm_90", "compute_units": 132}
    shared = H200.shared_memory_bytes
    for rows in (128, 512):
        told = choose_tile(
            "fp8_channel", rows, 4096, 2048, matrices=64, shared_memory_bytes=shared, **facts
        )
        assert choice(rows, 64) == told


def test_the_shipped_table_is_one() -> None:
    shipped = Path(tuned.__file__).with_name("configs") / "measured.json"
    for one in tuned.read_tiles(shipped):
        assert one.us <= one.default_us
        assert one.source
        assert one.triton
