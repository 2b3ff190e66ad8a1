"""Answer `hal matrix`: what runs where, and how far that is known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_matrix", "matrix_answer"]

_EPILOG = """\
  hal matrix                                  all of it, a letter a cell
  hal matrix --op linear --platform rocm      one op, on AMD's architectures
  hal matrix --summary                        the number of cells by evidence
  hal matrix --html --output matrix.html      one page that needs nothing else
Filters may be repeated. Evidence comes from `hal verify`; docs/matrix.md says what it means.
"""


def add_matrix(commands: Any) -> None:
    """Add the command and its options to a parser."""
    command = commands.add_parser(
        "matrix",
        help="what would run on every platform, and how far that is known",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many: dict[str, Any] = {"action": "append", "default": []}
    command.add_argument("--op", metavar="NAME", help="this op alone", **many)
    command.add_argument("--scheme", metavar="NAME", help="this scheme alone", **many)
    command.add_argument(
        "--platform", metavar="SPEC", help="such as rocm, rocm:gfx942 or cuda:h100", **many
    )
    command.add_argument("--torch", metavar="VERSION", help="assume this version of torch")
    command.add_argument("--triton", metavar="VERSION", help="assume this version of Triton")
    command.add_argument(
        "--evidence", metavar="FOLDER", help="folder of evidence (default: hal's own)"
    )
    command.add_argument("--output", metavar="FILE", help="write there, not to the output")
    form = command.add_mutually_exclusive_group()
    for name in ("json", "markdown", "html"):
        form.add_argument(f"--{name}", action="store_true", help=f"print {name.upper()}")
    form.add_argument(
        "--summary", action="store_true", help="print the number of cells by evidence"
    )


def matrix_answer(options: argparse.Namespace, *, color: bool = False) -> str:
    """Return what to print.

    Raises:
        HalError: For an unknown name, or evidence that cannot be read or a file not written.
    """
    from hal.evidence import write_text
    from hal.evidence_book import Book
    from hal.matrix import assumed, build_matrix

    book = Book.shipped(Path(options.evidence)) if options.evidence else None
    software = assumed(options.torch, options.triton)
    matrix = build_matrix(
        options.op, options.scheme, options.platform, software=software, book=book
    )
    if options.json:
        import json

        text = json.dumps(matrix.to_dict(), indent=1) + "\n"
    elif options.html:
        from hal.matrix_page import matrix_page

        text = matrix_page(matrix)
    elif options.summary:
        from hal.matrix_text import matrix_summary

        text = matrix_summary(matrix)
    else:
        from hal.matrix_text import matrix_markdown, matrix_text

        colored = color and not options.output
        text = matrix_markdown(matrix) if options.markdown else matrix_text(matrix, color=colored)
    if options.output:
        write_text(Path(options.output), text)
        return f"{options.output}: {len(matrix.rows) * len(matrix.columns):,} cells\n"
    return text
