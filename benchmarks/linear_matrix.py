"""Ask selection about every scheme of `linear` on many devices; write docs/linear-matrix.md.

Usage: python benchmarks/linear_matrix.py

Everything comes from data: candidates and reasons from the registry, what compiled from
docs/kernels-compiled.md, what ran from the tables in benchmarks/results, by the architecture of
the machine that their names begin with. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

from hal.device import DeviceSpec, Software
from hal.needs import Code, Needs
from hal.ops.linear import LINEAR, product_kind
from hal.platforms.tables import device_spec
from hal.quant import SCHEMES
from hal.quant.scheme import Scheme
from hal.registry import Kernel, Level
from hal.selection import Candidate, choose

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "linear-matrix.md"
COMPILED = ROOT / "docs" / "kernels-compiled.md"
RESULTS = ROOT / "benchmarks" / "results"
RAN_ON = {"h200": "sm_90", "cpu": "x86_64+avx512_bf16"}
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
| ran | run on this architecture: {ran} |
| compiled | compiled for it, in no table of results: [kernels-compiled](kernels-compiled.md) |
| interpreted | run in Triton's interpreter by the tests, not compiled for it |
| simulated | made of torch's functions, which should be there; in no table of results |
| claimed | run against an imitation of its library only: [adapters](adapters.md) |
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
    evidence = Evidence()
    tables: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        tables.setdefault(table(scheme, specs, evidence), []).append(f"`{scheme}`")
    problem = " ".join(f"{name}={value}" for name, value in PROBLEM.items())
    head = HEAD.format(problem=problem, software=SOFTWARE, ran=", ".join(evidence.files))
    named = (f"\n## {', '.join(schemes)}\n\n{rows}\n" for rows, schemes in tables.items())
    return head + "".join(named)


def table(scheme: Scheme, specs: list[DeviceSpec], evidence: Evidence) -> str:
    """Return a row for each candidate that is made for the scheme, a column for each device."""
    columns = [choose(LINEAR, scheme.name, spec, PROBLEM) for spec in specs]
    short = [name.partition(":")[2] for name in DEVICES]
    lines = [f"| candidate | level | {' | '.join(short)} |", "|---|---|" + "---|" * len(specs)]
    serving = [kernel for kernel in LINEAR.kernels if scheme.name in kernel.schemes]
    for kernel in sorted(serving, key=lambda kernel: (-kernel.level, kernel.name)):
        cells = []
        for selection in columns:
            text = cell(selection.candidate(kernel.name), scheme, selection.spec, evidence)
            cells.append(f"**{text}**" if selection.kernel is kernel else text)
        lines.append(f"| `{kernel.name}` | {kernel.level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(candidate: Candidate, scheme: Scheme, spec: DeviceSpec, evidence: Evidence) -> str:
    """Return how far it is known that a candidate runs, or what it lacks."""
    if candidate.can_run:
        return evidence.of(candidate, scheme, spec.arch.name)
    codes = [failure.code for failure in candidate.failures]
    if Code.PLATFORM in codes:
        return "-"
    return str(next((code for code in codes if code is not Code.PACKAGE), Code.PACKAGE))


class Evidence:
    """Know what ran and what compiled, and where.

    ran: (architecture, scheme, kernel). compiled: (architecture, kind of product).
    """

    def __init__(self) -> None:
        schemes, kernels = "|".join(SCHEMES), "|".join(kernel.name for kernel in LINEAR.kernels)
        line = re.compile(rf"^ *(?:linear|\d+) +({schemes}) +({kernels}) ", re.MULTILINE)
        self.ran: set[tuple[str, str, str]] = set()
        self.files: list[str] = []
        for path in sorted(RESULTS.glob("*.txt")):
            found = line.findall(path.read_text(encoding="utf-8"))
            arch = RAN_ON.get(path.name.partition("_")[0])
            if found and arch is not None:
                self.files.append(f"`{path.name}` ({arch})")
                self.ran |= {(arch, *pair) for pair in found}
        dense = COMPILED.read_text(encoding="utf-8").partition("\n## Dense products")[2]
        row = re.compile(r"^\| \w+:(\w+) \| (\w+) \| `", re.MULTILINE)
        self.compiled = set(row.findall(dense.partition("\n## ")[0]))

    def of(self, candidate: Candidate, scheme: Scheme, arch: str) -> str:
        """Return the strongest evidence for a candidate that can run."""
        kernel = candidate.kernel
        if (arch, scheme.name, kernel.name) in self.ran:
            return "ran"
        if candidate.claimed:
            return "claimed"
        if Needs.feature("triton") not in kernel.requires:
            return "simulated"
        return "compiled" if (arch, kind_of(kernel, scheme)) in self.compiled else "interpreted"


def kind_of(kernel: Kernel, scheme: Scheme) -> str:
    """Return what `docs/kernels-compiled.md` calls the product of a Triton kernel."""
    how = scheme.weight
    if how.format is None:
        return "bf16"
    if kernel.level is Level.NATIVE:
        return product_kind(scheme)
    if how.bytewise:
        return f"{product_kind(scheme)}_decode"
    if how.format == "int4":
        return "int4_group_decode"
    if how.scale_format == "e4m3fn":
        return "nvfp4_decode"
    return "mxfp4_decode" if how.packed else "mxfp8_decode"


if __name__ == "__main__":
    main()
