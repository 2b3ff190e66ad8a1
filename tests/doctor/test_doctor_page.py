"""What docs/doctor.md shows is what `hal doctor` says on those machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_diagnosis import ODD, subject

from hal.doctor import doctor_report, doctor_sections
from hal.findings import Finding
from hal.render import to_text

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = re.findall(r"^### (.*)$", (DOCS / "doctor.md").read_text(), re.MULTILINE)


def test_six_machines_are_shown() -> None:
    assert len(SHOWN) >= 6
    assert set(SHOWN) <= set(ODD)


@pytest.mark.parametrize("name", SHOWN)
def test_shown_output_is_real(name: str, tmp_path: Path) -> None:
    page = (DOCS / "doctor.md").read_text()
    shown = page.partition(f"### {name}\n")[2].split("```\n")[1]
    text = to_text(doctor_sections(doctor_report(subject(name, tmp_path), seconds=None)))
    assert shown == text, f"docs/doctor.md, {name}: put there\n{text}"


def test_every_code_is_explained(tmp_path: Path) -> None:
    page = (DOCS / "doctor.md").read_text()
    root = Path(__file__).parents[2]
    codes: set[str] = set()
    for folder in ("hal", "platforms"):
        for path in (root / folder).glob("*.py"):
            codes |= set(re.findall(r'Finding\(\s*"([a-z-]+)"', path.read_text()))
    assert len(codes) > 30
    assert Finding.__name__
    missing = sorted(code for code in codes if f"`{code}`" not in page)
    assert missing == []


def test_the_readme_shows_real_output(tmp_path: Path) -> None:
    readme = (DOCS.parent / "README.md").read_text()
    report = doctor_report(subject("GPU with a CPU-only torch", tmp_path), seconds=None)
    assert to_text(doctor_sections(report)) in readme
