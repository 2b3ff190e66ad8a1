"""Ask selection about every scheme of `linear` on many devices; write docs/linear-matrix.md.

Usage: python benchmarks/linear_matrix.py

Everything comes from data: candidates and reasons from the registry, how far each is known to work
from the rows of evidence (hal.evidence), as in `hal matrix`. Needs neither torch nor a GPU.
"""

from __future__ import annotations

from pathlib import Path

from hal.device import DeviceSpec, Software
from hal.evidence_book import Book
from hal.needs import Code
from hal.ops.linear import LINEAR
from hal.platforms.tables import device_spec
from hal.quant import SCHEMES
from hal.quant.scheme import Scheme
from hal.selection import Candidate, choose

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "linear-matrix.md"
SOFTWARE = Software(torch="2.13.0", triton="3.7.1", packages=(("triton", "3.7.1"),))
PROBLEM = {
    "tokens": 16,
    "in_features": 4096,
    "out_features": 4096,
    "dtype": "bfloat16",
    "bias": False,
}
DEVICES = (
    *("cuda:t4", "cuda:a100-80gb", "cuda:rtx-3090", "cuda:l40s", "cuda:h100", "cuda:h200"),
    *("cuda:b200", "cuda:rtx-5090", "cuda:gb10"),
    *("rocm:mi210", "rocm:mi300x", "rocm:mi355x", "rocm:rx-7900-xtx", "rocm:rx-9070-xt"),
    *("xpu:max-1550", "xpu:arc-b580"),
    *("cpu:x86-avx2", "cpu:x86-avx512", "cpu:x86-amx", "cpu:arm-neon", "cpu:arm-sve"),
)
HEAD = """# linear: every scheme, candidate and platform

Written by `benchmarks/linear_matrix.py`; a test compares. Problem:
{problem}.
Software: torch {software.torch}, Triton {software.triton}, no other library. Schemes whose
candidates fare alike share a table. Candidates stand in the order of their levels.

Where a candidate can run, a cell says how far that is known; **bold** is what selection takes.

| cell | means |
|---|---|
| ran | run on this architecture and compared with its reference |
| compiled | compiled to its machine code ([kernels-compiled](kernels-compiled.md)) |
| interpreted | run in Triton's interpreter and compared, not compiled for it |
| simulated | offered by selection, of which nothing more is known |
| claimed | run against an imitation of its library only: [adapters](adapters.md) |
| (ran before) | an earlier source of the kernel ran there |
| ran, earlier source | it did, and of the source as it is now nothing is known |
| - | made for another platform |
| arch, format, shape, ... | what it lacks first, as in [selection](selection.md) |
| package | it lacks nothing but its library; claimed once that is installed |
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(PAGE.read_text(encoding='utf-8').splitlines())} lines")


def page() -> str:
    """Return the page."""
    specs = [device_spec(*name.split(":")).replace(software=SOFTWARE) for name in DEVICES]
    book = Book.shipped()
    tables: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        tables.setdefault(table(scheme, specs, book), []).append(f"`{scheme}`")
    problem = " ".join(f"{name}={value}" for name, value in PROBLEM.items())
    head = HEAD.format(problem=problem, software=SOFTWARE)
    named = (f"\n## {', '.join(schemes)}\n\n{rows}\n" for rows, schemes in tables.items())
    return head + "".join(named)


def table(scheme: Scheme, specs: list[DeviceSpec], book: Book) -> str:
    """Return a row for each candidate that is made for the scheme, a column for each device."""
    columns = [choose(LINEAR, scheme.name, spec, PROBLEM) for spec in specs]
    short = [name.partition(":")[2] for name in DEVICES]
    lines = [f"| candidate | level | {' | '.join(short)} |", "|---|---|" + "---|" * len(specs)]
    serving = [kernel for kernel in LINEAR.kernels if scheme.name in kernel.schemes]
    for kernel in sorted(serving, key=lambda kernel: (-kernel.level, kernel.name)):
        cells = []
        for selection in columns:
            text = cell(selection.candidate(kernel.name), scheme, selection.spec, book)
            cells.append(f"**{text}**" if selection.kernel is kernel else text)
        lines.append(f"| `{kernel.name}` | {kernel.level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(candidate: Candidate, scheme: Scheme, spec: DeviceSpec, book: Book) -> str:
    """Return how far it is known that a candidate runs, or what it lacks."""
    if candidate.can_run:
        return str(book.standing(candidate.kernel, scheme.name, spec.arch.name))
    codes = [failure.code for failure in candidate.failures]
    if Code.PLATFORM in codes:
        return "-"
    return str(next((code for code in codes if code is not Code.PACKAGE), Code.PACKAGE))


if __name__ == "__main__":
    main()
