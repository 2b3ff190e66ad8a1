"""Compile the kernels for a device that is not here, as their launchers would on it.

A cell is one call of a launcher on meta tensors: `grouped_gemm/fp8_channel/few`. Compiling runs in
a child process, because a failing compiler pass may print a thousand lines or abort: that is a
result too. Without the device it finds what would fail there, registers, spilled bytes, shared
memory, and the matrix instructions in the machine code.

    python -m hal.ops.kernels.crosscompile --target cuda:sm_90 --shared-memory 232448 \
        --compute-units 132

Nothing here needs torch or Triton until a cell is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hal import config
from hal.ops.kernels.compile_cases import CASES, OWN_FORMAT
from hal.ops.kernels.machine_code import Memory, facts_of, specialization_of

__all__ = ["OWN_FORMAT", "Cell", "Target", "cell_names", "compile_cell", "compile_cells"]

_FORMATS = {
    "fp8": re.compile(r"e4m3|e5m2|f8f6f4|fp8|bf8"),
    "int8": re.compile(r"\.s8|kind::i8|_i32_\w*i8|_i32_\w*iu8"),
    "bfloat16": re.compile(r"bf16|kind::f16"),
}


@dataclass(frozen=True)
class Target:
    """Name a device by what decides how kernels are compiled for it.

    fp8: the 8-bit encoding of the device, "e4m3fn" or "e4m3fnuz".
    """

    platform: str
    arch: str
    shared_memory_bytes: int
    compute_units: int
    lanes: int = 32
    fp8: str = "e4m3fn"

    def __str__(self) -> str:
        return f"{self.platform}:{self.arch}"


@dataclass(frozen=True)
class Cell:
    """Record how one cell compiled; the worst of its kernels where it launches several.

    registers: of a thread; on AMD vector registers of both sorts.
    spilled_bytes: of a thread, stack included.
    instructions: the matrix instructions found, sorted.
    specialization: a hash of the types, alignment, constants and options of its kernels.
    """

    name: str
    target: str
    error: str = ""
    seconds: float = 0.0
    shared_memory_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    instructions: tuple[str, ...] = ()
    triton: str = ""
    specialization: str = ""

    @property
    def formats(self) -> frozenset[str]:
        """Return the formats that the matrix instructions work on."""
        return frozenset(
            name
            for name, pattern in _FORMATS.items()
            if any(pattern.search(found) for found in self.instructions)
        )


def cell_names(
    triton_math: Iterable[str], *, ptx: bool = False, specialized: bool = False
) -> list[str]:
    """Return the cells that a device with matrix math on these formats may come to run.

    ptx: Those written in PTX among them.
    specialized: Those whose warps specialize, too.
    """
    formats = {"fp8" if name.startswith("e4m3") else name for name in triton_math}
    kinds = [kind for kind, own in OWN_FORMAT.items() if own in formats]
    names = [
        f"{op}/{kind}/{size}"
        for op in ("grouped_gemm", "gemm")
        for kind in kinds
        for size in ("few", "many")
    ]
    names += [f"grouped_gemm/{kind}/ragged" for kind in ("bf16", "fp8_block128") if kind in kinds]
    names += [f"gemm/{kind}/shifted" for kind in kinds if kind.startswith("int8")]
    if "bf16" in kinds:
        names += ["grouped_gemm/bf16/wide", "grouped_gemm/bf16/biased"]
    few = ("few_experts", "ring_experts") if ptx else ("few_experts",)
    names += [f"{op}/{kind}" for op in few for kind in kinds if f"{op}/{kind}" in CASES]
    ring = () if ptx else ("ring_rows",)
    special = () if specialized else ("warp_specialized", "step_order")
    others = (
        "grouped_gemm",
        "gemm",
        "scaled",
        "sums",
        "few_experts",
        "ring_experts",
        *ring,
        *special,
    )
    return names + [name for name in CASES if not name.startswith(others)]


def compile_cells(
    target: Target,
    names: Iterable[str],
    *,
    timeout_s: float = 600.0,
    cache: Path | None = None,
    memory: Path | None = None,
) -> list[Cell]:
    """Compile cells in child processes; return one `Cell` each, in order.

    A child that dies or takes longer than `timeout_s` costs the cell that it was at; the next
    child goes on after it.

    Args:
        target: What to compile for.
        names: From `cell_names`.
        timeout_s: Longest time of one child.
        cache: Triton's cache, if not the user's.
        memory: File of what kernels compiled to, so that the same ones need not be compiled again.
    """
    left, cells = list(names), []
    environment = dict(config.environment())
    environment.pop("TRITON_INTERPRET", None)
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    while left:
        lines, end = _run_child(target, left, environment, timeout_s, memory)
        finished = [Cell(**{**line, "instructions": tuple(line["instructions"])}) for line in lines]
        cells += finished
        left = left[len(finished) :]
        if left and end is not None:
            cells.append(Cell(left.pop(0), str(target), error=end))
    return cells


def _run_child(
    target: Target,
    names: list[str],
    environment: dict[str, str],
    timeout_s: float,
    memory: Path | None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Return what a child has finished, and how it ended if not well."""
    command = [
        sys.executable, "-m", "hal.ops.kernels.crosscompile", "--target", str(target),
        "--shared-memory", str(target.shared_memory_bytes),
        "--compute-units", str(target.compute_units),
        "--lanes", str(target.lanes), "--fp8", target.fp8,
        *(() if memory is None else ("--memory", str(memory))), *names,
    ]  # fmt: skip
    end: str | None = None
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            output, _ = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            end = f"took longer than {timeout_s:g} s"
        if end is None and child.returncode:
            errors.seek(0)
            end = _first_error(errors.read()) or "the child died"
            if child.returncode < 0:
                end = f"{signal.Signals(-child.returncode).name}: {end}"
    lines = [line for line in output.split("\n") if line.endswith("}")]
    finished = [json.loads(line) for line in lines]
    if end is None and len(finished) < len(names):
        end = "the child ended early"
    return finished, end


def _first_error(text: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^")]
    for line in lines:
        if "error:" in line or "LLVM ERROR" in line:
            return line[:300]
    return lines[-1][:300] if lines else ""


# ------------------------------------------------------------------------------- in the child


def compile_cell(name: str, target: Target, memory: Memory | None = None) -> Cell:
    """Compile one cell in this process."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hal.ops.kernels.common import compile_for

    if target.platform == "cuda":
        gpu = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), target.lanes)
    else:
        gpu = GPUTarget("hip", target.arch, target.lanes)
    error = ""
    start = time.perf_counter()
    remembering = contextlib.nullcontext() if memory is None else memory.used()
    with _captured() as output, compile_for(gpu) as compiled, remembering:
        try:
            CASES[name](target)
        except Exception as problem:
            cause = problem.__cause__ or problem
            error = _first_error(f"{output()}\n{type(cause).__name__}: {cause}")
    seconds = round(time.perf_counter() - start, 2)
    if error:
        return Cell(name, str(target), error, seconds, triton=triton.__version__)
    found = [facts_of(entry.kernel) for entry in compiled]
    return Cell(
        name,
        str(target),
        seconds=seconds if memory is None else round(sum(each.seconds for each in found), 2),
        shared_memory_bytes=max(each.shared_memory_bytes for each in found),
        registers=max(each.registers for each in found),
        spilled_bytes=max(each.spilled_bytes for each in found),
        instructions=tuple(sorted({name for each in found for name in each.instructions})),
        triton=triton.__version__,
        specialization=specialization_of(compiled),
    )


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Keep what C++ writes to file descriptor 2; yield a function that returns it."""
    saved = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)

        def output() -> str:
            file.seek(0)
            return file.read()

        try:
            yield output
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="such as cuda:sm_90 or rocm:gfx942")
    parser.add_argument("--shared-memory", type=int, required=True, help="bytes of one block")
    parser.add_argument("--compute-units", type=int, required=True, help="SMs or CUs")
    parser.add_argument("--lanes", type=int, help="threads of a warp")
    parser.add_argument("--fp8", default="e4m3fn", help="the device's 8-bit encoding")
    parser.add_argument("--memory", type=Path, help="file of what kernels compiled to before")
    parser.add_argument("cells", nargs="*", metavar="CELL", help="all by default")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Compile cells; print one JSON object a line."""
    from hal.ops.tiles import special_kernels

    options = _arguments(argv)
    platform, _, arch = options.target.partition(":")
    lanes = options.lanes or (64 if arch.startswith("gfx9") else 32)
    target = Target(
        platform, arch, options.shared_memory, options.compute_units, lanes, options.fp8
    )
    memory = None if options.memory is None else Memory(options.memory)
    for name in options.cells or cell_names(OWN_FORMAT.values(), **special_kernels(platform, arch)):
        print(json.dumps(asdict(compile_cell(name, target, memory))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
