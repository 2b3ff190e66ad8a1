"""Time hal beside every rival that is installed, on the same inputs, in one run.

Usage: python benchmarks/rivals.py [--ops fused_moe,linear] [--schemes ...] [--shapes ...]
           [--tokens 1,8,...] [--rivals no] [--jobs 16] [--seconds 220] [--out FOLDER] [--report]

Needs one GPU and torch; vLLM, FlashInfer, DeepGEMM and torchao take part where they are installed,
and what is missing is left out, by name. Each contender runs in a process of its own: all compile
and check their numbers at the same time, then one after the other is timed. Times are medians of
CUDA-graph replays with a cold L2 (`hal.timing`), from bf16 rows to bf16 rows: experts without the
router, activations quantized inside. `--report` makes the table and the chart of an earlier run's
`rivals.csv` again. `rival_cases.py` says what is compared, `rival_kernels.py` who takes part.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from in_turns import Controller, Worker, say, take_turn

OPS = ("fused_moe", "linear", "quantize", "route")
KEEP_BYTES = 40 << 30
"""A worker keeps its weights between check and timing while so much memory is free."""
COLUMNS = (
    "op", "scheme", "shape", "tokens", "contender", "kernel", "us", "floor_us", "error", "right",
    "operations", "moved_bytes",
)  # fmt: skip
SHARE_TO_WARM = 0.62
"""Of the time; whoever compiles longer is timed while others still do."""


# ------------------------------------------------------------------------------------- the worker
def worker(job: dict[str, Any]) -> None:
    """Check, wait for the word, and time."""
    import torch

    torch.set_grad_enabled(False)
    from rival_cases import SUBJECTS

    kept: dict[tuple[str, str], Any] = {}
    wrong: dict[tuple[str, str, int], float] = {}

    def warm() -> None:
        for shape, scheme in _pairs(job):
            subject = make = given = found = None
            torch.cuda.empty_cache()
            try:
                subject = SUBJECTS[job["op"]](shape, scheme)
                make = _contender(job).bind(subject)
                for tokens in job["tokens"]:
                    given = subject.inputs(tokens)
                    found = make(given)()
                    torch.cuda.synchronize()
                    wrong[shape, scheme, tokens] = subject.error(given, found)
                if torch.cuda.mem_get_info()[0] > KEEP_BYTES:
                    kept[shape, scheme] = subject, make
            except Exception as error:
                say("failed", where=f"{shape} {scheme}", message=_line(error))
        subject = make = given = found = None
        torch.cuda.empty_cache()

    def measure() -> None:
        for shape, scheme in _pairs(job):
            if not any(key[:2] == (shape, scheme) for key in wrong):
                continue
            try:
                _time(job, shape, scheme, kept.pop((shape, scheme), None), wrong)
            except Exception as error:
                say("failed", where=f"{shape} {scheme}", message=_line(error))
            torch.cuda.empty_cache()

    take_turn(warm, measure)


def _time(
    job: dict[str, Any], shape: str, scheme: str, kept: Any, errors: dict[Any, float]
) -> None:
    from rival_cases import SUBJECTS, allowed
    from rival_kernels import HAL, own_kernel_of

    from hal.timing import time_graph

    contender = _contender(job)
    if kept is None:
        subject = SUBJECTS[job["op"]](shape, scheme)
        kept = subject, contender.bind(subject)
    subject, make = kept
    for tokens in job["tokens"]:
        error = errors.get((shape, scheme, tokens))
        if error is None:
            continue
        given = subject.inputs(tokens)
        us = time_graph(make(given), replays=21)
        kernel = own_kernel_of(subject, tokens) if contender.name == HAL else contender.name
        say(
            "row", op=job["op"], scheme=scheme, shape=shape, tokens=tokens,
            contender=contender.name, kernel=kernel, us=round(us, 2),
            floor_us=round(given.floor_us, 2), error=round(error, 5),
            right=bool(error <= allowed(scheme)), operations=given.operations,
            moved_bytes=given.moved,
        )  # fmt: skip


def _pairs(job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    return ((shape, scheme) for scheme in job["schemes"] for shape in job["shapes"])


def _contender(job: dict[str, Any]) -> Any:
    from rival_kernels import HAL, adapters, own

    schemes = tuple(job["schemes"])
    if job["contender"] == HAL:
        return own(job["op"], schemes)
    if job["contender"].startswith("vllm") and "_" not in job["contender"].split()[0]:
        from rival_vllm import contenders

        found = contenders(job["op"])
    else:
        found = adapters(job["op"], schemes, {})
    return next(
        each
        for each in found
        if each.name == job["contender"] and set(schemes) <= set(each.schemes)
    )


def _line(error: Exception) -> str:
    # CUDA's errors say what happened first, and last how to find out more.
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# --------------------------------------------------------------------------------- the controller
def name_of(job: dict[str, Any]) -> str:
    """Return who a worker is."""
    shapes = "" if len(job["shapes"]) > 1 else f" {job['shapes'][0]}"
    return f"{job['op']} {job['contender']} {','.join(job['schemes'])}{shapes}"


def jobs_of(options: argparse.Namespace, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Return what each process does: hal's by scheme and shape, which compile longest; rivals'."""
    import importlib.util

    from rival_cases import SCHEMES_OF, SHAPES_OF, tokens_of
    from rival_kernels import HAL, adapters

    vllm = importlib.util.find_spec("vllm") is not None
    jobs: list[dict[str, Any]] = []
    for op in _listed(options.ops, OPS):
        schemes = _listed(options.schemes, SCHEMES_OF[op])
        shapes = _listed(options.shapes, SHAPES_OF[op])
        tokens = [int(n) for n in options.tokens.split(",")] if options.tokens else tokens_of(op)
        told = {"op": op, "tokens": list(tokens)}
        for scheme in schemes:
            parts = [[s] for s in shapes] if op == "fused_moe" else [list(shapes)]
            jobs += [
                {**told, "contender": HAL, "schemes": [scheme], "shapes": part} for part in parts
            ]
        if options.rivals == "no":
            continue
        rivals: list[Any] = []
        if vllm:
            from rival_vllm import contenders

            rivals += [(c.name, list(c.schemes)) for c in contenders(op)]
        else:
            left_out[f"{op} vllm"] = "not installed"
        # vLLM's own entry points stand for its experts: they do not map ids first.
        without = ("vllm",) if op != "linear" else ()
        rivals += [(c.name, list(c.schemes)) for c in adapters(op, schemes, left_out, without)]
        jobs += [
            {**told, "contender": name, "schemes": wanted, "shapes": list(shapes)}
            for name, of in rivals
            if (wanted := [scheme for scheme in of if scheme in schemes])
        ]
    order = {name: place for place, name in enumerate(OPS)}
    return sorted(jobs, key=lambda job: (order[job["op"]], job["schemes"][0], len(job["schemes"])))


def _listed(text: str, known: Sequence[str]) -> list[str]:
    return [name for name in known if not text or name in text.split(",")]


def main() -> None:
    """Run the comparison, or report an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="", help="of " + ", ".join(OPS))
    parser.add_argument("--schemes", default="")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--rivals", choices=("yes", "no"), default="yes")
    parser.add_argument("--jobs", type=int, default=16, help="contenders that compile at a time")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time for all of it")
    parser.add_argument("--out", type=Path, default=Path("rivals"))
    parser.add_argument("--report", action="store_true", help="report the run in --out again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    from rival_report import report

    if options.report:
        report(options.out, {}, {}, "")
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("rivals: found no GPU that torch can use, needed one")
    import hal

    spec = hal.current_platform().device(0)
    title = f"{spec.name}, torch {torch.__version__}, triton {spec.software.triton}"
    left_out: dict[str, str] = {}
    controller = Controller(
        [Worker(name_of(job), job) for job in jobs_of(options, left_out)],
        at_a_time=options.jobs,
        seconds=options.seconds,
        share_to_warm=SHARE_TO_WARM,
        # Rivals take longest to import; they are timed in the order of the list all the same.
        first=lambda worker: not worker.job["contender"].startswith("vllm"),
    )
    print(f"{title}: {len(controller.workers)} processes", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        controller.run()
    finally:
        with open(options.out / "rivals.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(controller.rows)
        report(options.out, controller.failures, left_out, f"{title}; {controller.seconds:.0f} s")


if __name__ == "__main__":
    main()
