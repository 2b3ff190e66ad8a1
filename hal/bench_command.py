"""Answer `hal bench`: time every kernel that can run a problem on the GPU here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.progress import shown_progress

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.render import Section
    from hal.tune_runner import Problem, Runner

__all__ = ["add_bench", "bench_answer"]

_EPILOG = """\
Times are medians of CUDA-graph replays with a cold L2, in microseconds, in child processes.
  hal bench linear --scheme fp8_channel in_features=4096 out_features=4096 --tokens 1,16,128
  hal bench --from shapes.json           what hal.record_shapes saw
"""


def add_bench(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command and its options to a parser."""
    from hal.tune_command import add_timed_problem

    command = commands.add_parser(
        "bench",
        parents=[shared],
        help="time the kernels of a problem on the GPU here",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_timed_problem(command)
    command.add_argument(
        "--output", metavar="FILE", help="write the times as a run of a table of measurements"
    )


def bench_answer(
    options: argparse.Namespace, runner: Runner | None = None
) -> dict[str, Any] | list[Section]:
    """Run the command; return what to print, an object for JSON.

    Args:
        options: Its options.
        runner: What times; None means child processes, which need a GPU.

    Raises:
        HalError: For a problem that cannot be timed, or where there is no GPU.
    """
    from hal.files import write_text
    from hal.runtime import resolve_platform
    from hal.tune import require_gpu
    from hal.tune_command import problems_of
    from hal.tune_runner import in_children

    platform = resolve_platform(options.platform)
    spec = platform.device(options.device)
    if runner is None:
        require_gpu(spec, platform.simulated)
    problems = problems_of("bench", options, spec, tiles=False)
    children = in_children(f"{platform.torch_device_type}:{options.device}", 1)
    items = [_items(problem, spec) for problem in problems]
    total, done = sum(map(len, items)), 0
    rows: list[dict[str, Any]] = []
    with (
        shown_progress("times") as progress,
        children if runner is None else nullcontext(runner) as run,
    ):
        for problem, of_one in zip(problems, items, strict=True):

            def heard(number: int, result: dict[str, Any]) -> None:
                nonlocal done
                done += 1
                item = of_one[number]  # noqa: B023
                rows.append(_row(problem, item, result))  # noqa: B023
                if progress is not None:
                    progress(done, total, f"{problem.op}/{item['kernel']}")  # noqa: B023

            run("time", problem, of_one, heard)
    if options.output:
        write_text(Path(options.output), json.dumps(_measured(rows, spec), indent=1) + "\n")
    if options.json:
        return {"device": spec.key, "times": rows}
    return _sections(rows, spec)


def _items(problem: Problem, spec: DeviceSpec) -> list[dict[str, Any]]:
    """Return every kernel that can run with every number of tokens, one kernel after the other."""
    from hal.errors import NoKernelError
    from hal.ops.samples import SAMPLED
    from hal.registry import Level
    from hal.selection import choose
    from hal.tune_runner import TuneError

    if problem.op not in SAMPLED:
        raise TuneError(f"bench: found op {problem.op}, needed one of {', '.join(SAMPLED)}")
    selection = choose(problem.op, problem.scheme, spec, problem.sizes)
    able = [
        candidate.kernel.name
        for candidate in selection.candidates
        if candidate.can_run and candidate.kernel.level is not Level.REFERENCE
    ]
    if problem.kernel:
        able = [problem.kernel]
    if not able:
        where = f"bench: {problem.op} with {problem.scheme} on {spec.key}"
        raise NoKernelError(f"{where}: only the reference can run", selection)
    return [{"kernel": kernel, "tokens": tokens} for kernel in able for tokens in problem.tokens]


def _row(problem: Problem, item: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {
        "op": problem.op,
        "scheme": problem.scheme,
        "problem": problem.sizes,
        "kernel": item["kernel"],
        "tokens": item["tokens"],
        "us": result.get("us"),
        "note": result.get("error") or result.get("skipped") or "",
    }


def _measured(rows: Sequence[dict[str, Any]], spec: DeviceSpec) -> dict[str, Any]:
    """Return the times as `ops/configs/measured.json` holds them."""
    cells: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        if row["us"] is None:
            continue
        numbers = {k: v for k, v in row["problem"].items() if type(v) is int}
        sizes = {"tokens": row["tokens"], **numbers}
        key = json.dumps([row["op"], row["scheme"], sizes], sort_keys=True)
        cell = cells.setdefault(key, (row["op"], row["scheme"], sizes, {}))
        cell[3][row["kernel"]] = round(row["us"], 2)
    software = {"torch": spec.software.torch, "triton": spec.software.triton}
    run = {
        "arch": spec.arch.name,
        "device": spec.key,
        "unit": "us",
        "source": f"hal bench on {spec.name}, torch {software['torch']}",
        "software": software,
        "rows": [list(cell) for cell in cells.values()],
    }
    return {"runs": [run]}


def _sections(rows: Sequence[dict[str, Any]], spec: DeviceSpec) -> list[Section]:
    from hal.render import Section, Table

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        sizes = " ".join(f"{k}={v}" for k, v in row["problem"].items() if type(v) is int)
        groups.setdefault((row["op"], row["scheme"], sizes, str(row["tokens"])), []).append(row)
    lines = []
    for (op, scheme, sizes, tokens), found in groups.items():
        times = [row["us"] for row in found if row["us"] is not None]
        best = min(times, default=0.0)
        for row in sorted(found, key=lambda each: (each["us"] is None, each["us"] or 0.0)):
            us = row["us"]
            told = (f"{us:.1f}", f"{us / best:.2f}") if us is not None else ("-", row["note"])
            lines.append((f"{op} {scheme} {sizes}", tokens, row["kernel"], *told))
    head = ("problem", "tokens", "kernel", "us", "x best")
    return [Section(f"Times on {spec.name}", (Table(head, tuple(lines)),))]
