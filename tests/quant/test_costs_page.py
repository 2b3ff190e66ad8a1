"""The table of what schemes cost in docs/quantization.md, and its chart, are what was measured."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hal.quant import SCHEMES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality

PAGE = quality.PAGE.read_text(encoding="utf-8")


def test_the_table_is_current():
    assert quality.between(PAGE)[1] == quality.table(), "run: make golden"


def test_the_chart_shows_the_same_numbers():
    drawn = re.findall(r"[+−-]\d+\.\d\d%", quality.CHART.read_text(encoding="utf-8"))
    found = [quality.scores(place) for place in quality.PLACES]
    wanted = [f"{at[name].change:+.2f}%" for at in found for name in at if name != "bf16"]
    cure = "run: python benchmarks/quality.py --chart"
    assert sorted(text.replace("−", "-") for text in drawn) == sorted(wanted), cure


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("bf16", "unquantized"),
        ("int8_channel", "8-bit weights"),
        ("mxfp4_w4a16", "4-bit weights alone"),
        ("int4_w4a8_fp8", "4-bit weights, 8-bit activations"),
        ("nvfp4", "4-bit weights and activations"),
    ],
)
def test_a_scheme_has_the_limit_of_its_kind(scheme, kind):
    assert quality.kind_of(SCHEMES[scheme]) == kind


def test_a_scheme_that_costs_too_much_is_refused(monkeypatch):
    monkeypatch.setitem(quality.LIMITS, "4-bit weights alone", 0.5)
    with pytest.raises(ValueError, match=r"int4_w4a16 on CPU: \+0.76%, at most \+0.5%"):
        quality.table()


def test_a_scheme_that_was_not_measured_is_refused(monkeypatch):
    found = quality.scores("CPU")
    del found["mxfp8"]
    monkeypatch.setattr(quality, "scores", lambda place: found)
    with pytest.raises(ValueError, match="mxfp8 was not scored on CPU"):
        quality.table()


def test_no_kernel_of_linear_is_worse_than_the_page_says():
    text = (quality.RESULTS / "cpu_errors.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines()]
    worst = max(float(row[4]) for row in rows if row[:1] == ["linear"])
    assert f"at most {worst:.4f}" in " ".join(PAGE.split()), worst
