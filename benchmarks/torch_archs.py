"""Read for which GPUs the libraries of torch's wheels have machine code, and write evidence of it.

Usage: python benchmarks/torch_archs.py [WHEEL ...]

    pip download --no-deps torch==2.12.0 nvidia-cublas==13.1.1.3
    python benchmarks/torch_archs.py torch-*.whl nvidia_cublas-*.whl

Wheels of torch, each followed by that of the cuBLAS it asks for: what `cuobjdump` lists of their
libraries goes to benchmarks/results/torch_archs.json. With or without wheels, kernels of ours that
call nothing but such a library get a row `compiled` on each architecture that it has code for: a
program for sm_7x runs on sm_7y from x up. That says that code is there, and not what it computes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton

from hal.evidence import Row, evidence_folder, read_rows, write_rows, write_text
from hal.matrix import assumed
from hal.platforms.tables import arch_rows, device_spec
from hal.registry import Kernel, find_op, op_names
from hal.selection import Options, choose
from hal.sources import source_hash

RESULTS = Path(__file__).parent / "results" / "torch_archs.json"
TORCH, CUBLAS = "libtorch_cuda.so", "libcublasLt.so"
LIBRARY = {
    ("quantize", "torch"): TORCH,
    ("align", "torch_sort"): TORCH,
    ("route", "torch_topk"): TORCH,
    ("linear", "torch_int_mm"): CUBLAS,
    ("linear", "torch_int_mm_zeros"): CUBLAS,
    ("linear", "torch_scaled_mm_unit"): CUBLAS,
    ("fused_moe", "torch_experts_int_mm"): CUBLAS,
}
"""Where the machine code lies of kernels that no Triton kernel replaces on some GPU."""
WHEEL = re.compile(r"(?P<name>[A-Za-z0-9_]+?)-(?P<version>[^-]+)-")


def cuobjdump() -> Path:
    """Return the program, which Triton brings along."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def architectures(library: Path) -> dict[str, int]:
    """Return how many programs of machine code a library has for each architecture."""
    done = subprocess.run(
        [cuobjdump(), "--list-elf", library], capture_output=True, text=True, check=True
    )
    found = Counter(re.findall(r"\.(sm_\d+[af]?)\.cubin", done.stdout))
    return dict(sorted(found.items()))


def read_wheel(wheel: Path) -> tuple[str, str, dict[str, dict[str, int]]]:
    """Return a wheel's project and version, and the architectures of its libraries that count."""
    match = WHEEL.match(wheel.name)
    if match is None:
        raise SystemExit(f"{wheel}: found a name that is no wheel's, needed NAME-VERSION-....whl")
    found = {}
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for member in archive.namelist():
            for name in (TORCH, CUBLAS):
                if Path(member).name.startswith(name):
                    found[name] = architectures(Path(archive.extract(member, folder)))
    if not found:
        raise SystemExit(f"{wheel}: found neither {TORCH} nor {CUBLAS}, needed a build for CUDA")
    return match["name"], match["version"], found


def serves(code: str, arch: str) -> bool:
    """Tell whether machine code for one architecture runs on another, by CUDA's rule."""
    if not code[-1].isdigit():
        return code[:-1] == arch and code.endswith("a")
    (major, minor), (its_major, its_minor) = (divmod(int(n[3:]), 10) for n in (code, arch))
    return major == its_major and minor <= its_minor


def best_code(codes: Mapping[str, int], arch: str) -> str:
    """Return the architecture with most of the programs that another one runs; empty for none.

    A library has its kernels for few architectures, and single ones for others.
    """
    able = [code for code in codes if serves(code, arch)]
    return max(able, key=lambda code: (codes[code], int(re.sub(r"\D", "", code))), default="")


def rows(builds: list[dict[str, Any]], date: str) -> Iterator[Row]:
    """Yield a row for a kernel, scheme and architecture, of the newest torch with code for it."""
    for kernel, library in kernels():
        for arch in (each.name for each in arch_rows() if each.platform == "cuda"):
            spec = device_spec("cuda", arch, assumed())
            for scheme in kernel.schemes:
                selection = choose(kernel.op, scheme, spec, {}, Options(force=kernel.name))
                if not selection.candidate(kernel.name).can_run:
                    continue
                for build in reversed(builds):
                    code = best_code(build["libraries"][library], arch)
                    if code:
                        yield Row(
                            op=kernel.op, kernel=kernel.name, scheme=scheme, platform="cuda",
                            arch=arch, level="compiled", source=source_hash(kernel.entry),
                            torch=build["torch"], passed=True, date=date,
                            cases=build["libraries"][library][code],
                            facts={"library": library, "code": code}
                            | ({"cublas": build["cublas"]} if library == CUBLAS else {}),
                        )  # fmt: skip
                        break


def kernels() -> Iterator[tuple[Kernel, str]]:
    """Yield each kernel of `LIBRARY`, with its library."""
    for op in map(find_op, op_names()):
        for kernel in op.kernels:
            if (op.name, kernel.name) in LIBRARY:
                yield kernel, LIBRARY[op.name, kernel.name]


def main(arguments: list[str] | None = None) -> int:
    """Read the wheels, and write what they and those read before are evidence of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, default=None, help="folder of evidence")
    options = parser.parse_args(arguments)
    builds = json.loads(options.results.read_text()) if options.results.exists() else []
    build: dict[str, Any] = {}
    for wheel in options.wheels:
        if not zipfile.is_zipfile(wheel):
            parser.error(f"{wheel}: found no wheel, needed a file that pip downloaded")
        name, version, libraries = read_wheel(wheel)
        if name == "torch":
            build = {"torch": version, "cublas": "", "libraries": {TORCH: {}, CUBLAS: {}}}
            builds = [*(each for each in builds if each["torch"] != version), build]
        elif not build:
            parser.error(f"{wheel}: found before any torch, needed after the one that asks for it")
        else:
            build["cublas"] = version
        build["libraries"] |= libraries
    if options.wheels:
        builds.sort(key=lambda each: [int(part) for part in re.findall(r"\d+", each["torch"])])
        write_text(options.results, json.dumps(builds, indent=1) + "\n")
    folder = options.into or evidence_folder()
    found = list(rows(builds, datetime.date.today().isoformat()))
    kept = [
        row
        for op in sorted({row.op for row in found})
        for row in read_rows(folder / f"{op}.jsonl")
        if not _replaced(row)
    ]
    write_rows(folder, [*kept, *found])
    print(f"{len(found)} rows of {len(builds)} builds of torch")
    return 0


def _replaced(row: Row) -> bool:
    """Tell whether a row came from here."""
    return row.level == "compiled" and (row.op, row.kernel) in LIBRARY


if __name__ == "__main__":
    sys.exit(main())
