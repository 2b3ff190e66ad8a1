"""`hal matrix`: its cells are those of selection and of the evidence, in every form."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hal.errors import UnknownNameError
from hal.evidence import Row
from hal.evidence_book import Book
from hal.matrix import TYPICAL, assumed, build_matrix, columns, schemes_of
from hal.matrix_page import matrix_page
from hal.matrix_text import matrix_text, used_letters
from hal.platforms.tables import arch_rows, device_spec
from hal.quant import SCHEMES
from hal.registry import find_op, op_names
from hal.selection import choose
from hal.sources import source_hash

KERNEL = find_op("route").find("triton")
ROW = Row("route", "triton", "none", "cuda", "sm_90", "ran", source_hash(KERNEL.entry), True,
          "2026-11-29", device="H200", torch="2.13.0", triton="3.7.1", cases=25)  # fmt: skip
COMPILED = replace(ROW, level="compiled", arch="gfx942", platform="rocm", device="", torch="",
                   facts={"cells": {"route/softmax": [40, 0, 0]}, "instructions": []})  # fmt: skip


def small(*rows: Row, platforms=("cuda:h100", "rocm:gfx942", "cpu:x86-avx2")):
    return build_matrix(["route"], platforms=platforms, book=Book(rows))


class TestCells:
    def test_all_of_them_are_there(self) -> None:
        matrix = build_matrix(["quantize", "route"], book=Book([]))
        assert len(matrix.columns) == len(arch_rows())
        assert [key[0] for key in matrix.rows] == ["quantize"] * 17 + ["route"]
        assert all(len(cells) == len(matrix.columns) for cells in matrix.rows.values())

    def test_the_choice_is_that_of_selection(self) -> None:
        matrix = build_matrix(["linear"], ["fp8_channel"], book=Book([]))
        for cell in matrix.rows["linear", "fp8_channel"]:
            spec = device_spec(cell.column.platform, cell.column.arch, assumed())
            wanted = choose("linear", "fp8_channel", spec, TYPICAL["linear"]).kernel
            assert cell.kernel == (wanted.name if wanted else None)

    def test_letters_come_from_the_evidence(self) -> None:
        letters = [cell.letter for cell in small(ROW, COMPILED).rows["route", "none"]]
        assert letters == ["R", "C", "S"]
        earlier = replace(ROW, source="abc")
        failed = replace(COMPILED, passed=False, fault="spills")
        letters = [cell.letter for cell in small(earlier, failed).rows["route", "none"]]
        assert letters == ["r", "X", "S"]

    def test_every_problem_is_one_of_its_op(self) -> None:
        assert set(TYPICAL) == set(op_names())
        for op, problem in TYPICAL.items():
            find_op(op).check(problem)
            assert set(problem) == set(find_op(op).sizes)

    def test_schemes_keep_the_order_of_the_reference(self) -> None:
        assert schemes_of(find_op("linear"))[:3] == ("bf16", "fp8_tensor", "fp8_channel")

    def test_older_versions_change_what_runs(self) -> None:
        now = build_matrix(["linear"], ["mxfp8"], ["rocm:mi355x"], book=Book([]))
        old = build_matrix(
            ["linear"],
            ["mxfp8"],
            ["rocm:mi355x"],
            software=assumed("2.6.0", "3.2.0"),
            book=Book([]),
        )
        able = [
            {c.kernel.name for c in m.rows["linear", "mxfp8"][0].selection.candidates if c.can_run}
            for m in (now, old)
        ]
        assert "triton_scaled" in able[0] - able[1]

    def test_filters(self) -> None:
        assert {c.platform for c in columns(["rocm"])} == {"rocm"}
        assert [c.name for c in columns(["cuda:h200", "cuda:sm_90"])] == ["cuda:sm_90"]
        for bad in ("cuda:h1000", "cdua"):
            with pytest.raises(UnknownNameError):
                columns([bad])
        with pytest.raises(UnknownNameError):
            build_matrix(["route"], ["fp8_channel"])


class TestText:
    def test_it_fits_a_terminal_and_lines_up(self) -> None:
        lines = matrix_text(build_matrix(["linear", "route"], book=Book([ROW]))).splitlines()
        assert max(map(len, lines)) <= 80
        assert all(ord(c) < 128 for line in lines for c in line)
        heads = lines[: lines.index("linear")]
        row = next(line for line in lines if line.startswith("  none"))
        place = row.index("R ")
        assert "".join(line.ljust(80)[place] for line in heads[1:]).strip() == "90"

    def test_the_command(self, hal) -> None:
        answer = hal("matrix", "--op", "route", "--platform", "cuda")
        assert (answer.status, answer.err) == (0, "")
        assert "route" in answer.out
        assert "Cells:" in answer.out
        assert "rocm" not in answer.out

    def test_unknown_names(self, hal) -> None:
        for arguments in (["--op", "rout"], ["--scheme", "fp9"], ["--platform", "cuda:h1000"]):
            answer = hal("matrix", *arguments)
            assert answer.status == 2
            assert "unknown" in answer.err

    def test_corrupt_evidence_is_named(self, hal, tmp_path: Path) -> None:
        (tmp_path / "route.jsonl").write_text("{}\n")
        answer = hal("matrix", "--op", "route", "--evidence", str(tmp_path))
        assert answer.status == 2
        assert "route.jsonl: found line 1" in answer.err

    def test_a_folder_without_evidence_is_no_empty_matrix(self, hal, tmp_path: Path) -> None:
        answer = hal("matrix", "--op", "route", "--evidence", str(tmp_path / "nowhere"))
        assert answer.status == 2
        assert "a folder of evidence" in answer.err

    def test_the_summary_counts_every_cell_once(self, hal) -> None:
        lines = hal("matrix", "--summary", "--op", "linear").out.splitlines()
        full = build_matrix(["linear"])
        cells = [cell for row in full.rows.values() for cell in row]
        rows = [line.split() for line in lines[1:] if not line.startswith(" ")]
        assert sum(int(row[2]) for row in rows if row[1] == "all") == len(cells)
        native = sum(str(cell.selection.level) == "native" for cell in cells)
        assert sum(int(row[2]) for row in rows if row[1] == "native") == native
        assert max(map(len, lines)) <= 80

    def test_json_tells_the_reasons(self, hal) -> None:
        found = hal("matrix", "--op", "linear", "--scheme", "fp8_channel", "--platform",
                    "rocm:gfx90a", "--json").json  # fmt: skip
        (row,) = found["rows"]
        (cell,) = row["cells"]
        assert (cell["kernel"], cell["level"]) == ("triton_decode", "weight_only")
        (lacks,) = [one for one in cell["unable"] if one["kernel"] == "triton_fp8"]
        assert "e4m3fn" in " ".join(lacks["failures"])
        assert sum(found["counts"].values()) == 1

    def test_markdown(self, hal) -> None:
        out = hal("matrix", "--op", "route", "--platform", "cuda:h100", "--markdown").out
        assert "| scheme | cuda:sm_90 |" in out
        assert "| `none` | `triton` native" in out


class _Page(HTMLParser):
    """Collect what a browser would build, and refuse what does not nest."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if self.open and self.open[-1] == tag:
            key = str(attributes.get("id") or tag)
            self.text[key] = self.text.get(key, "") + data


@pytest.fixture(scope="module")
def page() -> _Page:
    parsed = _Page()
    parsed.source = matrix_page(build_matrix(["linear", "route"], book=Book([ROW, COMPILED])))
    parsed.feed(parsed.source)
    parsed.close()
    return parsed


class TestPage:
    def test_it_nests_and_needs_nothing_else(self, page) -> None:
        assert page.open == []
        assert not any(tag in ("link", "img", "iframe", "object") for tag, _ in page.tags)
        assert not any("src" in attrs or "href" in attrs for _, attrs in page.tags)
        assert "http:" not in page.source
        assert "https:" not in page.source
        policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
        assert policy.startswith("default-src 'none'")

    def test_every_cell_is_a_button_that_says_what_it_is(self, page) -> None:
        buttons = [a for t, a in page.tags if t == "button"]
        assert len(buttons) == (len(SCHEMES) + 1) * len(arch_rows())
        assert all(button["aria-label"] and button["type"] == "button" for button in buttons)
        label = next(
            b["aria-label"] for b in buttons if "route none on cuda:sm_90" in b["aria-label"]
        )
        assert label == "route none on cuda:sm_90: triton native, ran"

    def test_the_details_of_every_cell_are_there(self, page) -> None:
        data = json.loads(page.text["data"])
        assert len(data["columns"]) == len(arch_rows())
        assert len(data["rows"]) == len(SCHEMES) + 1
        for row in data["rows"]:
            for place in row["cells"]:
                cell = data["items"][place]
                for name in ("rows", "able", "unable"):
                    assert all(0 <= item < len(data["items"]) for item in cell[name])
        row = data["rows"][-1]
        place = [c["arch"] for c in data["columns"]].index("gfx942")
        (evidence,) = [data["items"][i] for i in data["items"][row["cells"][place]]["rows"]]
        assert evidence["facts"]["cells"] == {"route/softmax": [40, 0, 0]}

    def test_no_text_ends_the_script(self) -> None:
        evil = replace(COMPILED, passed=False, fault="</script><script>alert(1)</script><!--")
        source = matrix_page(small(evil))
        assert "</script><script>alert" not in source
        parsed = _Page()
        parsed.feed(source)
        data = json.loads(parsed.text["data"])
        assert any("<!--" in item.get("fault", "") for item in data["items"])

    def test_colors_for_light_and_dark(self, page) -> None:
        style = page.text["style"]
        assert "prefers-color-scheme: dark" in style
        for letter in "RCISLX":
            assert f"td.{letter} " in style

    def test_the_command_writes_it_whole(self, hal, tmp_path: Path) -> None:
        path = tmp_path / "matrix.html"
        answer = hal("matrix", "--op", "route", "--html", "--output", str(path))
        assert answer.status == 0
        assert path.read_text(encoding="utf-8").endswith("</html>\n")


def test_letters_in_use() -> None:
    assert used_letters(small(ROW, COMPILED)) == ["R", "C", "S"]
    assert used_letters(small(replace(ROW, source=""))) == ["r", "S"]


def test_the_matrix_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hal.cli import main\n"
        "status = main(['matrix', '--op', 'route', '--platform', 'cuda'])\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'triton', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)
