"""Time the quantizers beside a copy of the same size and torch.compile of formula and reference.

Usage: python benchmarks/quantize.py [--schemes mxfp8,...] [--before plain,norm,residual,gate]
           [--layouts] [--shapes 20480x7168,...] [--small] [--compile formula,reference]
           [--device cuda] [--jobs 16] [--seconds 80] [--pieces] [--out FILE.json]

`of copy`: what `copy_` of as many bytes in all, rounded down to 2 MB, takes, over what the
quantizer takes. `x formula` and `x reference`: what torch.compile of each (`quantize_cases.py`)
takes, over the same: above 1 hal is faster. `--layouts` adds scales that are stored as a product
reads them. `--small`: 1, 16 and 128 rows of 4096.

On a GPU, processes compile all at once; what inductor tries out on the GPU, it tries out alone, one
process at a time. Then one process after the other is timed, by replays of CUDA graphs with a cold
L2 cache, so that the host's time does not count: the least of three medians, contenders in turns.
On a CPU, calls are timed as they are, in one process at a time, with the same rules.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from in_turns import Controller, Worker, say, take_turn
from quantize_cases import BEFORE, Case, cases, share_equal
from quantize_report import report

from hal.ops.scale_layouts import CANONICAL
from hal.timing import time_graph

SHAPES = {
    "cuda": "20480x7168,49152x2880,32768x4096,65536x2048",
    "cpu": "1x4096,64x4096,512x7168",
}
"""Of 256 MB and up on a GPU."""
SMALL = "1x4096,16x4096,128x4096"
RIVALS = ("formula", "reference")
SHARE_TO_WARM = 0.64
LARGE_BYTES = 256_000_000
"""From so many bytes read on, a share of a copy's rate is asked for."""
ROUND = 1 << 21
ROUNDS = 3
CPU_SECONDS = 0.02
"""What is timed at once on a CPU takes at least so long."""
Call = Callable[[], Any]


def main() -> None:
    """Time all and report, or be one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="", help="default: all that quantize activations")
    parser.add_argument("--before", default=",".join(BEFORE))
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--shapes", default="", help="rows x columns")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", default="formula,reference", help="none: only the copy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--seconds", type=float, default=1800.0, help="time for all of it")
    parser.add_argument("--pieces", action="store_true", help="try other shapes of a program")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_of(options, str(Path(folder) / "lock"))
        controller = Controller(
            [Worker(f"process {number}", job) for number, job in enumerate(jobs)],
            at_a_time=len(jobs),
            seconds=options.seconds,
            share_to_warm=SHARE_TO_WARM,
            alone=True,
        )
        controller.run()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    title = f"{name}, torch {torch.__version__}; {controller.seconds:.0f} s"
    print("\n".join(report(controller.rows, controller.failures, title)))
    if options.out:
        told = {"device": name, "rows": controller.rows, "failures": controller.failures}
        options.out.write_text(json.dumps(told, indent=1))


def jobs_of(options: argparse.Namespace, lock: str) -> list[dict[str, Any]]:
    """Return what each worker does: every `jobs`-th case, so that they take about as long."""
    wanted = list(cases(options.schemes, options.before, options.layouts))
    shapes = options.shapes or (SMALL if options.small else SHAPES[options.device])
    told = {
        "shapes": [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")],
        "rivals": [name for name in RIVALS if name in options.compile.split(",")],
        "device": options.device,
        "pieces": options.pieces,
        "lock": lock,
    }
    found = [wanted[first :: options.jobs] for first in range(options.jobs)]
    return [{**told, "cases": part} for part in found if part]


# ------------------------------------------------------------------------------------- the worker
@torch.no_grad()
def worker(job: dict[str, Any]) -> None:
    """Compile, wait for the word, and time."""
    set_compiler(job["lock"])
    compiled: dict[tuple[Case, tuple[int, int], str], Callable[..., Any]] = {}
    cells = [(Case(*case), tuple(shape)) for case in job["cases"] for shape in job["shapes"]]
    cells.sort(key=lambda cell: cell[0].layout != CANONICAL)

    def warm() -> None:
        # Those that matter most first: time may end.
        for name in ("ours", *job["rivals"]):
            for case, shape in cells:
                if time.time() > job["warm_until"]:
                    return
                plain = getattr(case, name)
                call = plain if name == "ours" else compiled_of(plain)
                inputs = case.inputs(*shape, job["device"])
                try:
                    call(*inputs)
                    compiled[case, shape, name] = call
                    if job["device"] == "cuda":
                        torch.cuda.synchronize()
                        torch.cuda.empty_cache()
                except Exception as error:
                    say("failed", where=f"{case} {shape} {name}", message=first_line(error))

    def measure() -> None:
        for case, shape in cells:
            calls = {n: compiled[case, shape, n] for n in ("ours", *RIVALS)
                     if (case, shape, n) in compiled}  # fmt: skip
            for name in ("ours", *job["rivals"]):
                if name not in calls:
                    say("failed", where=f"{case} {shape} {name}", message="not compiled")
            if time.time() > job["until"]:
                say("failed", where=f"{case} {shape}", message="not timed in time")
            elif "ours" in calls:
                time_cell(job, case, shape, calls)

    take_turn(warm, measure, warm_until=job["warm_until"], stay=True)


def time_cell(
    job: dict[str, Any], case: Case, shape: tuple[int, int], calls: dict[str, Callable[..., Any]]
) -> None:
    """Time all contenders of a case and a copy in turns."""
    inputs = case.inputs(*shape, job["device"])
    found = calls["ours"](*inputs)
    parts = [*inputs[:1], *inputs[2:]] if case.before == "residual" else inputs[:1]
    moved = sum(part.nbytes for part in (*parts, *found))
    # Of a number of bytes that is no round one, a copy may take a third longer.
    step = ROUND if moved > 64 * ROUND else 128
    source = torch.empty(moved // 2 // step * step, dtype=torch.uint8, device=job["device"])
    target = torch.empty_like(source)
    equal = {
        name: round(share_equal(found, call(*inputs)), 4)
        for name, call in calls.items()
        if name != "ours"
    }
    turns: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    turns.update({name: lambda call=call: call(*inputs) for name, call in calls.items()})
    times = least_times(turns, job["device"])
    say(
        "row", case=str(case), rows=shape[0], columns=shape[1], moved=moved, equal=equal,
        asked=job["device"] == "cuda" and inputs[0].nbytes >= LARGE_BYTES,
        **{f"{name}_us": round(us, 2) for name, us in times.items()},
    )  # fmt: skip
    if job["pieces"]:
        for label, us in pieces(lambda: calls["ours"](*inputs)):
            say("row", case=f"{case} {label}", rows=shape[0], columns=shape[1], moved=moved,
                asked=False, equal={}, copy_us=times["copy"], ours_us=round(us, 2))  # fmt: skip


def least_times(turns: dict[str, Call], device: str) -> dict[str, float]:
    """Return the least of several medians of each call in microseconds; calls take turns."""

    def timed(call: Call) -> float:
        return time_graph(call, replays=7) if device == "cuda" else time_here(call)

    found = [{name: timed(call) for name, call in turns.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in found) for name in turns}


def time_here(call: Call) -> float:
    """Return the median time of a call on this CPU in microseconds."""
    call()
    times: list[float] = []
    end = time.perf_counter() + CPU_SECONDS
    while not times or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(times)


def pieces(call: Call) -> Iterator[tuple[str, float]]:
    """Time other numbers of elements for a program and for a lane."""
    from hal.ops.kernels import row_shapes as kernels

    chosen = kernels.PIECE, kernels.PER_LANE
    try:
        for piece in (2048, 4096, 8192):
            for lane in (8, 16, 32, 64):
                kernels.PIECE, kernels.PER_LANE = piece, lane
                yield f"piece {piece} lane {lane}", least_times({"": call}, "cuda")[""]
    finally:
        kernels.PIECE, kernels.PER_LANE = chosen


def compiled_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a contender, all sizes known and without breaks."""
    return torch.compile(lambda *inputs: plain(*inputs), fullgraph=True, dynamic=False)


def set_compiler(lock: str) -> None:
    """Let each case be compiled for its own sizes, by this process alone."""
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 1000
    torch._inductor.config.compile_threads = 1
    tries_alone(lock)


def tries_alone(path: str) -> None:
    """Let inductor choose between its kernels while no other process tries out its own."""
    try:
        import fcntl

        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        original = CachingAutotuner.benchmark_all_configs
    except (ImportError, AttributeError):
        return

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        with open(path, "a", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file gives the lock back

    def alone(self: Any, *arguments: Any, **more: Any) -> Any:
        with held():
            return original(self, *arguments, **more)

    CachingAutotuner.benchmark_all_configs = alone


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


if __name__ == "__main__":
    main()
