"""`make matrix-torch`: what it reads and writes, and that pages and workflows say the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch_matrix
from torch_matrix import (
    NEWEST,
    PAGE,
    RELEASES,
    Outcome,
    environment,
    keep,
    read_outcomes,
    read_report,
    try_release,
    with_table,
)

from hal.device import version_at_least

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "evidence.yml"
ONE = Outcome("2.6.0+cpu", "3.2.0", "3.11.7", [], 10, 0, 2, [], 30, [], "2026-11-29")
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure/></testcase>
<testcase classname="a" name="breaks"><failure/><error/></testcase>
<testcase classname="a" name="errs"><error/></testcase>
<testcase classname="a" name="skips"><skipped/></testcase>
</testsuite></testsuites>"""


def test_the_page_has_the_table_of_the_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text, read_outcomes()), "run benchmarks/torch_matrix.py --page"


def test_at_most_four_releases_from_the_oldest_to_the_newest() -> None:
    assert len(RELEASES) <= 4
    assert RELEASES[-1].torch == NEWEST
    assert RELEASES[-1].requirement == "torch"
    numbers = [release.torch for release in RELEASES[:-1]]
    assert numbers[0] == "2.6.0"
    assert all(version_at_least(b, a) for a, b in pairwise(numbers))
    (with_ipex,) = [r for r in RELEASES if any("intel" in part for part in r.beside)]
    assert with_ipex.requirement == "torch==2.8.0"


def test_the_workflow_takes_the_same_pairs() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    for release in RELEASES[:-1]:
        assert f'torch: "{release.torch}", triton: "{release.triton}"' in text


def test_every_case_of_a_report_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    counts, names = read_report(path)
    assert counts == {"passed": 1, "failed": 3, "skipped": 1}
    assert names == ["a::breaks", "a::errs", "a::fails"]
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "none.xml")


def test_what_was_run_again_counts_by_its_last_result(tmp_path: Path, monkeypatch) -> None:
    first, again, page = tmp_path / "tests.xml", tmp_path / "again.xml", tmp_path / "page.md"
    first.write_text(REPORT)
    again.write_text(REPORT.replace("<failure/><error/>", "").replace("skips", "further"))
    page.write_text(f"{torch_matrix.BEGIN}{torch_matrix.END}")
    monkeypatch.setattr(torch_matrix, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(torch_matrix, "PAGE", page)
    keep([ONE])
    monkeypatch.setattr(sys, "argv", ["x", "--reports", ONE.torch, str(first), str(again)])
    assert torch_matrix.main() == 1
    (found,) = read_outcomes()
    assert (found.passed, found.failed, found.skipped) == (2, 2, 2)
    assert found.failures == ["a::errs", "a::fails"]
    assert (found.trials, found.triton) == (ONE.trials, ONE.triton)
    monkeypatch.setattr(sys, "argv", ["x", "--reports", "2.7.0", str(first)])
    with pytest.raises(SystemExit):
        torch_matrix.main()


def test_outcomes_are_kept_by_torch_in_order(tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{torch_matrix.BEGIN}{torch_matrix.END}after\n")
    monkeypatch.setattr(torch_matrix, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(torch_matrix, "PAGE", page)
    keep([replace(ONE, torch="2.10.0"), ONE])
    keep([replace(ONE, failed=1, failures=["a::b"])])
    assert [(one.torch, one.failed) for one in read_outcomes()] == [("2.6.0+cpu", 1), ("2.10.0", 0)]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 2.6.0+cpu | 3.2.0 | 3.11.7 | - | 10 | 1 | 2 | 30 passed, none wrong |" in text


def test_settings_of_the_outer_process_are_left_behind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "linear=triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = environment(tmp_path / "venv", RELEASES[0], tmp_path)
    assert "HAL_KERNEL" not in found
    assert "TRITON_INTERPRET" not in found
    assert found["TORCH"] == "torch==2.6.0"
    assert found["HAL_CACHE"].startswith(str(tmp_path))


def test_nothing_is_made_where_the_disk_is_full(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch_matrix, "FREE_BYTES", 1 << 60)
    with pytest.raises(OSError, match=r"GiB free, needed 1073741824"):
        try_release(RELEASES[0], tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
