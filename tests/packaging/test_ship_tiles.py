"""`benchmarks/tune_shapes.py` and `ship_tiles.py`: from problems to the table that ships."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ship_tiles  # noqa: E402
import tune_shapes  # noqa: E402

import hal  # noqa: E402
from hal.ops import tuned  # noqa: E402
from hal.ops.shapes import read_shapes  # noqa: E402
from hal.ops.tiles import Tile, choose_tile  # noqa: E402
from hal.ops.tuned import ProductSizes, TunedTile  # noqa: E402
from hal.ops.tuning import TUNABLE  # noqa: E402
from hal.platforms.tables import device_spec  # noqa: E402
from hal.tune import merge_table  # noqa: E402
from hal.tune_command import _tuned_kernel  # noqa: E402

SIZES = ProductSizes("fp8_channel", 1536, 2048, 32, 128)
TILE = Tile(64, 128, 128, 4, 2, 1)


def row(device="cuda:h200", arch="sm_90", tile=TILE, sizes=SIZES, us=90.0):
    source = "hal tune on H200, Triton 3.6.0"
    return TunedTile(
        "fused_moe", "fp8_channel", arch, device, sizes, tile, us, 99.0, "3.6.0", source
    )


def test_shapes_are_read_and_every_kernel_has_tiles(tmp_path):
    files = []
    for part in ("0/2", "1/2"):
        files.append(tmp_path / f"{part[0]}.json")
        tune_shapes.main([str(files[-1]), "--part", part])
    found = [each for file in files for each in read_shapes(file)]
    assert len(found) == 4 * (len(tune_shapes.EXPERTS) + len(tune_shapes.LINEARS))
    spec = hal.platform("cuda:h200").device(0)
    for each in found:
        kernel = _tuned_kernel(each.op, each.scheme, each.problem, spec, tiles=True)
        assert kernel in TUNABLE[each.op]


def test_tiles_ship_beside_what_is_there_and_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    target, table = tmp_path / "shipped.json", tmp_path / "measured.json"
    target.write_text(tuned.SHIPPED.read_text())
    before = json.loads(target.read_text())["runs"]
    spec = device_spec("cuda", "h200")
    merge_table(table, [row()], spec)
    told = [str(table), "--target", str(target), "--date", "2026-11-29"]
    assert ship_tiles.main([*told, "--check"]) == 0
    assert json.loads(target.read_text())["runs"] == before
    assert ship_tiles.main(told) == 0
    assert "1 tiles, 1 of them unlike" in capsys.readouterr().out
    after = json.loads(target.read_text())["runs"]
    strip = [{k: v for k, v in run.items() if k != "tiles"} for run in after]
    assert [run for run in strip if run["rows"]] == [
        {k: v for k, v in run.items() if k != "tiles"} for run in before if run["rows"]
    ]
    monkeypatch.setattr(tuned, "SHIPPED", target)
    asked = replace(SIZES, n=1280)
    assert tuned.find_tile("fused_moe", "fp8_channel", spec, asked) == TILE
    small = device_spec("cuda", "rtx-4090")  # another architecture
    assert tuned.find_tile("fused_moe", "fp8_channel", small, asked) is None
    merge_table(table, [row(tile=replace(TILE, stages=4), us=80.0)], spec)
    assert ship_tiles.main(told) == 0
    assert tuned.find_tile("fused_moe", "fp8_channel", spec, asked) == replace(TILE, stages=4)


def test_what_is_hardly_faster_ships_as_the_rules_tile():
    spec = device_spec("cuda", "h200")
    hardly = ship_tiles.settled(row(us=98.0))
    assert hardly.us == hardly.default_us == 99.0
    assert hardly.tile != TILE
    assert hardly.tile == choose_tile(
        SIZES.kind, SIZES.rows, SIZES.n, SIZES.k, matrices=SIZES.matrices, platform="cuda",
        arch="sm_90", compute_units=132, shared_memory_bytes=spec.shared_memory_bytes,
    )  # fmt: skip
    slower = ship_tiles.settled(row(us=101.0))
    assert slower == hardly
    assert ship_tiles.settled(row(us=97.0)).tile == TILE


def test_what_does_not_fit_its_device_does_not_ship(tmp_path, capsys):
    target, table = tmp_path / "shipped.json", tmp_path / "measured.json"
    target.write_text('{"runs": []}')
    spec = device_spec("cuda", "h200")
    wrong = [
        row(tile=Tile(128, 256, 128, 8, 5)),
        row(arch="sm_80", sizes=replace(SIZES, rows=64)),
        row(device="", sizes=replace(SIZES, rows=128)),
    ]
    merge_table(table, wrong, spec)
    assert ship_tiles.main([str(table), "--target", str(target)]) == 1
    text = capsys.readouterr().out
    for reason in ("does not fit H200", "cuda:h200 is sm_90", "no device"):
        assert reason in text
    assert target.read_text() == '{"runs": []}'


def test_the_shipped_table_is_written_as_it_lies():
    text = ship_tiles.SHIPPED.read_text(encoding="utf-8")
    assert ship_tiles.text_of(json.loads(text)["runs"]) == text
    for each in tuned.read_tiles(ship_tiles.SHIPPED):
        assert ship_tiles.refused(each) == ""


@pytest.mark.parametrize("text", [None, '{"runs": []}'])
def test_a_table_without_tiles_is_refused(tmp_path, capsys, text):
    table = tmp_path / "measured.json"
    if text is not None:
        table.write_text(text)
    with pytest.raises(SystemExit):
        ship_tiles.main([str(table), "--target", str(tmp_path / "shipped.json")])
    assert "found no tiles" in capsys.readouterr().err
    assert not (tmp_path / "shipped.json").exists()
