"""Rows of evidence: what they must say, which of two counts, and what they are about."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hal.errors import EvidenceError
from hal.evidence import Row, merge_rows, parse_rows, write_rows, write_text
from hal.evidence_book import Book, is_current
from hal.registry import find_op
from hal.sources import source_hash

KERNEL = find_op("route").find("triton")
NOW = source_hash(KERNEL.entry)
ROW = Row("route", "triton", "none", "cuda", "sm_90", "ran", NOW, True, "2026-11-29",
          device="H200", torch="2.13.0", triton="3.7.1", cases=25, error=0.001, allowed=0.012,
          facts={"registers": 64})  # fmt: skip


def test_a_row_comes_back_from_its_line() -> None:
    assert parse_rows(ROW.line() + "\n", "file") == [ROW]
    assert "\n" not in ROW.line()


@pytest.mark.parametrize(
    "changes",
    [
        {"level": "simulated"},
        {"level": "worked"},
        {"date": "yesterday"},
        {"source": "main"},
        {"op": ""},
        {"arch": "sm 90"},
        {"fault": "passed, and yet"},
        {"passed": False},
    ],
)
def test_rows_that_cannot_be_are_refused(changes) -> None:
    with pytest.raises(ValueError, match=r"needed|no name|hexadecimal|fault"):
        replace(ROW, **changes)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "{}",
        ROW.line()[:-1],
        ROW.line().replace('"passed":true', '"passed":"yes"'),
        ROW.line().replace('"cases":25', '"cases":true'),
        ROW.line().replace('"cases":25', '"cases":2.5'),
        ROW.line().replace('"device"', '"machine"'),
        ROW.line().replace('"ran"', '"claimed"'),
        ROW.line().replace('"facts":{', '"facts":["').replace("64}", '64"]'),
    ],
)
def test_corrupt_lines_are_named(line: str) -> None:
    with pytest.raises(EvidenceError, match=r"^file: found line 2: "):
        parse_rows(f"{ROW.line()}\n{line}\n{ROW.line()}", "file")


def test_ten_corrupt_lines_are_enough() -> None:
    with pytest.raises(EvidenceError, match=r"line 10: .*; and 5 more"):
        parse_rows("{}\n" * 15, "file")


class TestMerge:
    def test_the_later_row_of_a_key_counts(self) -> None:
        later = replace(ROW, date="2026-11-30", cases=26)
        assert merge_rows([later, ROW]) == merge_rows([ROW, later]) == [later]

    def test_of_one_day_the_fault_counts(self) -> None:
        fault = replace(ROW, passed=False, fault="ids differ")
        assert merge_rows([ROW, fault]) == merge_rows([fault, ROW]) == [fault]

    def test_devices_and_versions_are_keys_of_their_own(self) -> None:
        others = [replace(ROW, device="H100"), replace(ROW, torch="2.11.0"), ROW]
        assert len(merge_rows(others)) == 3

    def test_of_earlier_sources_the_newest_is_kept(self) -> None:
        first = replace(ROW, source="aa", date="2026-01-01")
        second = replace(ROW, source="bb", date="2026-02-01")
        assert [row.source for row in merge_rows([ROW, second, first])] == sorted([NOW, "bb"])

    def test_the_order_of_the_rows_plays_no_part(self) -> None:
        rows = [
            *(replace(ROW, source=source) for source in ("aa", "bb", "cc")),
            *(replace(ROW, cases=cases) for cases in (3, 2, 1)),
            replace(ROW, arch="sm_80"),
        ]
        merged = merge_rows(rows)
        assert len(merged) == 3
        for order in (rows[::-1], rows[3:] + rows[:3]):
            assert merge_rows(order) == merged

    def test_files_are_sorted_and_whole(self, tmp_path: Path) -> None:
        rows = [replace(ROW, arch=arch) for arch in ("sm_90", "sm_100", "sm_80")]
        assert write_rows(tmp_path, rows) == [tmp_path / "route.jsonl"]
        text = (tmp_path / "route.jsonl").read_text()
        assert text.splitlines() == sorted(text.splitlines())
        assert os.listdir(tmp_path) == ["route.jsonl"]

    def test_a_write_that_fails_leaves_what_was_there(self, tmp_path: Path, monkeypatch) -> None:
        path = tmp_path / "route.jsonl"
        write_text(path, "before")

        def full(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EvidenceError, match="no space left"):
            write_text(path, "after")
        assert path.read_text() == "before"
        assert os.listdir(tmp_path) == ["route.jsonl"]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_is_written_to_and_a_link_is_followed(self, tmp_path: Path) -> None:
        pipe, link = tmp_path / "pipe", tmp_path / "link"
        os.mkfifo(pipe)
        got: list[str] = []
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        reader.start()
        write_text(pipe, "rows")
        reader.join(10)
        assert got == ["rows"]
        assert pipe.is_fifo(), "what is no file must never be replaced by one"
        link.symlink_to(tmp_path / "file")
        write_text(link, "rows")
        assert link.is_symlink()
        assert (tmp_path / "file").read_text() == "rows"

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(EvidenceError):
            write_text(tmp_path, "rows")


class TestBook:
    def level(self, *rows: Row, arch: str = "sm_90") -> tuple[str, bool, bool]:
        found = Book(rows).standing(KERNEL, "none", arch)
        return found.level, found.passed, found.current

    def test_the_strongest_level_counts(self) -> None:
        compiled = replace(ROW, level="compiled", device="", torch="")
        interpreted = replace(compiled, level="interpreted", platform="interpreter",
                              arch="interpreter")  # fmt: skip
        assert self.level(interpreted) == ("interpreted", True, True)
        assert self.level(interpreted, compiled) == ("compiled", True, True)
        assert self.level(interpreted, compiled, ROW) == ("ran", True, True)
        assert self.level(interpreted, compiled, ROW, arch="gfx942")[0] == "interpreted"

    def test_nothing_known_is_simulated_or_claimed(self) -> None:
        assert self.level() == ("simulated", True, True)
        claimed = find_op("linear").find("aiter_fp8")
        assert Book([]).standing(claimed, "fp8_channel", "gfx942").level == "claimed"

    def test_an_earlier_source_counts_only_where_nothing_else_does(self) -> None:
        earlier = replace(ROW, source="abc")
        compiled = replace(ROW, level="compiled", device="", torch="")
        assert self.level(earlier) == ("ran", True, False)
        assert self.level(earlier, compiled) == ("compiled", True, True)
        assert not is_current(earlier, KERNEL)
        assert not is_current(replace(ROW, source=""), KERNEL)

    def test_what_an_earlier_source_had_reached_is_told(self) -> None:
        earlier = replace(ROW, source="abc")
        compiled = replace(ROW, level="compiled", device="", torch="")
        found = Book([earlier, compiled]).standing(KERNEL, "none", "sm_90")
        assert (found.letter, str(found)) == ("C", "compiled (ran before)")
        found = Book([earlier]).standing(KERNEL, "none", "sm_90")
        assert (found.letter, str(found)) == ("r", "ran, earlier source")

    def test_one_device_that_failed_is_a_failure(self) -> None:
        failed = replace(ROW, device="H100", passed=False, fault="ids differ")
        assert self.level(ROW, failed) == ("ran", False, True)

    def test_the_book_that_hal_brings_can_be_read(self) -> None:
        assert Book.shipped().rows(find_op("linear").find("reference"), "bf16",
                                   "x86_64+avx512_bf16")  # fmt: skip
