"""Compile every kernel for every target that Triton knows here.

Writes docs/kernels-compiled.md, and rows of evidence (hal.evidence) for every kernel and scheme
that selection offers on a target.

What a kernel compiled to is remembered, so that only those are compiled again that have changed.

Usage: python benchmarks/compile_matrix.py [--jobs N] [--evidence-only] [--anew] [--only TARGET ...]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hal.config import cache_folder
from hal.device import DeviceSpec
from hal.evidence import Row, evidence_folder, read_rows, write_rows
from hal.evidence_book import is_current
from hal.ops.cells import cells_of, facts_of, fault_of, specialization_of
from hal.ops.kernels.crosscompile import OWN_FORMAT, Cell, Target, cell_names, compile_cells
from hal.ops.tiles import special_kernels
from hal.platforms.tables import device_spec
from hal.registry import Kernel, find_op, op_names
from hal.selection import Options, choose
from hal.software import find_software
from hal.sources import source_hash

TARGETS = (
    *(
        ("cuda", arch)
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
    ),
    *(("rocm", arch) for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
)
FURTHER = (
    *(("cuda", arch) for arch in ("sm_87", "sm_103", "sm_110")),
    *(("rocm", arch) for arch in ("gfx1151", "gfx1200")),
)
"""Targets of which the page says nothing, since they differ little from one that is on it."""
OUTPUT = Path(__file__).parents[1] / "docs" / "kernels-compiled.md"
HEAD = """# What the kernels compile to

Written by `benchmarks/compile_matrix.py` with Triton {triton}; nothing here ran on a device. Each
cell is compiled with the tile, the alignment and the options that the launcher gives it on that
device. Numbers are for 8 / 16384 tokens of a Qwen3-30B-A3B layer (128 experts, 2048 x 1536).
*own*: the matrix instruction works on the kind's own format (decoding kinds: bf16), which is what
`native` means. *spilled*: bytes of a thread, stack included.

| target | grouped_gemm of kind | instruction | own | shared KiB | registers | spilled | seconds |
|---|---|---|---|---|---|---|---|
"""
DENSE = """
## Dense products

One matrix of 1536 x 2048 by 8 / 16384 tokens. *gemv*: the kernel for one token, without matrix
instruction; *expand*: the one that writes a whole weight as bf16, for many tokens. Of these two the
registers are given, and in brackets what they spill.

| target | kind | instruction | own | shared KiB | registers | spilled | gemv | expand |
|---|---|---|---|---|---|---|---|---|
"""
SPILLS = """
## Cells that spill

| target | cell | bytes of a thread |
|---|---|--:|
"""
OTHERS = """
## All other cells: the worst of each number

Products with ragged sizes and 64-bit offsets, routing, alignment, combination, quantization (also
fused with a norm or a gate), gated activations.

| target | cells | failed | shared KiB (limit) | registers | spilled | seconds |
|---|--:|---|--:|--:|---|--:|
"""


def compile_target(platform: str, arch: str, memory: Path | None) -> list[Cell]:
    """Compile all cells of one target.

    memory: Folder of what kernels compiled to before, or None.
    """
    spec = device_spec(platform, arch)
    target = Target(
        platform,
        arch,
        spec.shared_memory_bytes,
        spec.compute_units or 64,
        spec.lanes,
        spec.formats.fp8_encoding or "e4m3fn",
    )
    special = special_kernels(platform, arch)
    names = cell_names(spec.formats.triton_math, **special)
    wanted = {
        name for kernel, scheme in offered(spec) for name in cells_of(kernel, scheme, **special)
    }
    with tempfile.TemporaryDirectory() as cache:
        further = sorted(wanted.difference(names))
        file = memory and memory / f"{platform}-{arch}.jsonl"
        return compile_cells(target, [*names, *further], cache=Path(cache), memory=file)


def offered(spec: DeviceSpec) -> Iterator[tuple[Kernel, str]]:
    """Yield every Triton kernel that can run on a device, with each scheme that it can serve."""
    spec = spec.replace(software=find_software())
    for op in map(find_op, op_names()):
        for kernel in op.kernels:
            for scheme in kernel.schemes:
                selection = choose(op, scheme, spec, {}, Options(force=kernel.name))
                if cells_of(kernel, scheme) and selection.candidate(kernel.name).can_run:
                    yield kernel, scheme


def evidence(platform: str, arch: str, cells: list[Cell], date: str) -> Iterator[Row]:
    """Yield a row for every kernel and scheme that is offered on a target."""
    spec = device_spec(platform, arch)
    by_name = {cell.name: cell for cell in cells}
    for kernel, scheme in offered(spec):
        names = cells_of(kernel, scheme, **special_kernels(platform, arch))
        mine = [by_name[name] for name in names]
        fault = fault_of(kernel, scheme, mine, spec.shared_memory_bytes)
        yield Row(
            op=kernel.op,
            kernel=kernel.name,
            scheme=scheme,
            platform=platform,
            arch=arch,
            level="compiled",
            source=source_hash(kernel.entry),
            triton=mine[0].triton,
            specialization=specialization_of(mine),
            passed=not fault,
            fault=" ".join(fault.split())[:400],
            cases=len(mine),
            date=date,
            facts=facts_of(mine),
        )


def cell_of(row: Row) -> tuple[str, ...]:
    """Return what a row is about, however the kernel was specialized."""
    return row.level, row.op, row.kernel, row.scheme, row.platform, row.arch


def superseded(row: Row, found: list[Row]) -> bool:
    """Say whether a row tells what a kernel compiled to that is no longer there, or compiled anew.

    What ran is kept whatever became of its source: another machine may not be at hand.
    """
    kernels = {kernel.name: kernel for kernel in find_op(row.op).kernels}
    kernel = kernels.get(row.kernel)
    anew = any(cell_of(other) == cell_of(row) for other in found)
    return row.level == "compiled" and (anew or kernel is None or not is_current(row, kernel))


def product_row(kind: str, few: Cell, many: Cell) -> str:
    """Return the row of one kind of grouped product: few / many tokens."""
    columns = (*product_columns(kind, few, many), f"{few.seconds:.1f} / {many.seconds:.1f}")
    return f"| {' | '.join(columns)} |"


def dense_row(kind: str, few: Cell, many: Cell, gemv: Cell | None, expand: Cell | None) -> str:
    """Return the row of one kind of dense product: few / many tokens, one token, the expansion."""
    columns = (*product_columns(kind, few, many), used(gemv), used(expand))
    return f"| {' | '.join(columns)} |"


def used(cell: Cell | None) -> str:
    """Return the registers that a cell takes, and what it spills."""
    if cell is None:
        return ""
    spilled = f" ({cell.spilled_bytes})" if cell.spilled_bytes else ""
    return cell.error or f"{cell.registers}{spilled}"


def product_columns(kind: str, few: Cell, many: Cell) -> tuple[str, ...]:
    """Return what is said of every product: few / many tokens."""
    own = "yes" if all(OWN_FORMAT[kind] in cell.formats for cell in (few, many)) else "**no**"
    found = " ".join(f"`{_short(name)}`" for name in many.instructions)
    return (
        few.target,
        kind,
        few.error or many.error or found,
        own,
        f"{few.shared_memory_bytes / 1024:.0f} / {many.shared_memory_bytes / 1024:.0f}",
        f"{few.registers} / {many.registers}",
        f"{few.spilled_bytes} / {many.spilled_bytes}",
    )


def _short(instruction: str) -> str:
    return instruction.replace(".sync.aligned", "").replace(".row.col", "")


def other_row(limit_bytes: int, cells: list[Cell]) -> str:
    """Return one row for all other cells of a target."""
    failed = ", ".join(cell.name for cell in cells if cell.error) or "none"
    spilled = max(cells, key=lambda cell: cell.spilled_bytes)
    shared = max(cell.shared_memory_bytes for cell in cells)
    columns = (
        cells[0].target,
        str(len(cells)),
        failed,
        f"{shared / 1024:.0f} ({limit_bytes / 1024:.0f})",
        str(max(cell.registers for cell in cells)),
        f"{spilled.spilled_bytes} ({spilled.name})" if spilled.spilled_bytes else "0",
        f"{sum(cell.seconds for cell in cells):.1f}",
    )
    return f"| {' | '.join(columns)} |"


def main() -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="children at a time")
    parser.add_argument("--evidence-only", action="store_true", help="leave the page as it is")
    parser.add_argument("--only", metavar="TARGET", nargs="+", help="such as cuda:sm_90; no page")
    parser.add_argument("--anew", action="store_true", help="compile what is known, too")
    options = parser.parse_args()
    memory = None if options.anew else cache_folder() / "compiled"
    targets = [
        target
        for target in (*TARGETS, *FURTHER)
        if not options.only or ":".join(target) in options.only
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda target: compile_target(*target, memory), targets))
    date = datetime.date.today().isoformat()
    rows = [
        row
        for (platform, arch), cells in zip(targets, results, strict=True)
        for row in evidence(platform, arch, cells, date)
    ]
    folder = evidence_folder()
    kept = [
        row
        for path in sorted(folder.glob("*.jsonl"))
        for row in read_rows(path)
        if not superseded(row, rows)
    ]
    written = write_rows(folder, [*kept, *rows])
    print(f"{sum(map(len, results))} cells, {len(rows)} rows in {len(written)} files of {folder}")
    for row in rows:
        if not row.passed:
            print(
                f"FAILED {row.platform}:{row.arch} {row.op}/{row.kernel} {row.scheme}: {row.fault}"
            )
    if not options.evidence_only and not options.only:
        OUTPUT.write_text(page(results[: len(TARGETS)]), encoding="utf-8")
        print(OUTPUT)


def page(results: list[list[Cell]]) -> str:
    """Return the page: the cells of each of `TARGETS`."""
    triton = next(cell.triton for cells in results for cell in cells if cell.triton)
    grouped, dense, others = [], [], []
    for (platform, arch), cells in zip(TARGETS, results, strict=True):
        formats = device_spec(platform, arch).formats.triton_math
        listed = set(cell_names(formats, **special_kernels(platform, arch)))
        by_name = {cell.name: cell for cell in cells if cell.name in listed}
        for kind in OWN_FORMAT:
            if f"gemm/{kind}/few" not in by_name:
                continue
            pair = [by_name.pop(f"grouped_gemm/{kind}/{size}") for size in ("few", "many")]
            grouped.append(product_row(kind, *pair))
            pair = [by_name.pop(f"gemm/{kind}/{size}") for size in ("few", "many")]
            single = [by_name.pop(f"{op}/{kind}", None) for op in ("gemv", "expand")]
            dense.append(dense_row(kind, *pair, *single))
        limit = device_spec(platform, arch).shared_memory_bytes
        others.append(other_row(limit, list(by_name.values())))
    head = HEAD.format(triton=triton)
    spills = [
        f"| {cell.target} | {cell.name} | {cell.spilled_bytes} |"
        for cell in itertools.chain(*results)
        if cell.spilled_bytes
    ]
    rows = (head, *grouped, DENSE, *dense, SPILLS, *spills, OTHERS, *others)
    return "\n".join(row.removesuffix("\n") for row in rows) + "\n"


if __name__ == "__main__":
    main()
