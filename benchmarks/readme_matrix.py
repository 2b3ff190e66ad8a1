"""Write the small platform matrix between the markers of README.md.

Usage: python benchmarks/readme_matrix.py
"""

from __future__ import annotations

from pathlib import Path

from hal.evidence import write_text
from hal.matrix import build_matrix
from hal.matrix_text import SMALL_COLUMNS, SMALL_ROWS, small_matrix

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- matrix: written by benchmarks/readme_matrix.py -->"
END = "<!-- end of matrix -->"


def block() -> str:
    """Return what stands between the markers."""
    ops = tuple(dict.fromkeys(op for op, _ in SMALL_ROWS))
    schemes = tuple(dict.fromkeys(scheme for _, scheme in SMALL_ROWS))
    return small_matrix(build_matrix(ops, schemes, SMALL_COLUMNS))


def between(text: str) -> tuple[str, str, str]:
    """Return what stands before, between and after the markers of a page."""
    head, begin, rest = text.partition(BEGIN)
    shown, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return head + begin, shown.strip("\n"), end + tail


def main() -> None:
    """Write the block."""
    head, _, tail = between(PAGE.read_text(encoding="utf-8"))
    write_text(PAGE, f"{head}\n\n{block()}\n\n{tail}")
    print(PAGE)


if __name__ == "__main__":
    main()
