"""Answer `hal verify`: try kernels here, or merge what other machines found."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.progress import shown_progress

if TYPE_CHECKING:
    from hal.evidence import Row
    from hal.render import Section, Table
    from hal.verify import Trials

__all__ = ["add_verify", "verify_answer"]

DEFAULT_OUTPUT = "hal-verify.jsonl"
_EPILOG = """\
Kernels are forced by name and compared with their references, in child processes.
  hal verify                           all that can run here; writes hal-verify.jsonl
  hal verify --op linear --on cuda     one op, on the GPU alone
  hal verify --interpreter             Triton kernels, in its interpreter, on small problems
  hal verify --merge h200.jsonl mi300x.jsonl
Exit status: 0 all passed, 1 a kernel failed, 2 nothing could be tried or merged.
"""


def add_verify(commands: Any) -> None:
    """Add the command and its options to a parser."""
    command = commands.add_parser(
        "verify",
        help="run every kernel that can run here against its reference",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    command.add_argument("--op", help="this op alone; may be repeated, as the next three", **many)
    command.add_argument("--scheme", help="this scheme alone", **many)
    command.add_argument("--kernel", help="this kernel alone", **many)
    command.add_argument("--on", help="this platform of the machine alone, such as cpu", **many)
    command.add_argument(
        "--interpreter", action="store_true", help="run Triton kernels in its interpreter"
    )
    command.add_argument(
        "--seconds", type=_seconds, default=120.0, help="longest time of one trial (default: 120)"
    )
    command.add_argument(
        "--output",
        metavar="FILE",
        help=f"evidence to write, for a bug report (default: {DEFAULT_OUTPUT})",
    )
    command.add_argument(
        "--merge", metavar="FILE", nargs="+", help="try nothing; merge files of evidence instead"
    )
    command.add_argument(
        "--into", metavar="FOLDER", help="folder to merge into (default: hal's own)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def verify_answer(options: argparse.Namespace) -> tuple[dict[str, Any] | list[Section], int]:
    """Run the command; return what to print, an object for JSON, and the exit status.

    Raises:
        HalError: If nothing could be tried, or a file cannot be read or written.
    """
    if options.merge:
        return _merge(options), 0
    from hal.errors import EvidenceError
    from hal.evidence import merge_rows, write_text
    from hal.verify import Question, rows_of, run_trials

    question = Question(
        tuple(options.op),
        tuple(options.scheme),
        tuple(options.kernel),
        tuple(options.on),
        options.interpreter,
        options.seconds,
    )
    output = Path(options.output or DEFAULT_OUTPUT)
    if output.parent.is_dir() and not os.access(output.parent, os.W_OK):
        raise EvidenceError(str(output), found="a folder that is read-only", needed="another one")
    with shown_progress("trials") as progress:
        trials = run_trials(question, progress)
    rows = merge_rows(rows_of(trials, datetime.date.today().isoformat()))
    write_text(output, "".join(row.line() + "\n" for row in rows))
    status = 1 if trials.failed else 0
    if options.json:
        return _object(trials, rows, output), status
    return _sections(trials, rows, output), status


def _merge(options: argparse.Namespace) -> dict[str, Any] | list[Section]:
    from hal.evidence import evidence_folder, read_rows, write_rows
    from hal.render import Paragraph, Section

    folder = Path(options.into) if options.into else evidence_folder()
    # All files are read before any is written: one corrupt line, and nothing changes.
    new = [row for name in options.merge for row in read_rows(Path(name))]
    ops = {row.op for row in new}
    kept = [
        row
        for path in sorted(folder.glob("*.jsonl"))
        if path.stem in ops
        for row in read_rows(path)
    ]
    written = write_rows(folder, [*kept, *new])
    if options.json:
        return {"rows": len(new), "written": [str(path) for path in written]}
    lines = tuple(Paragraph(str(path)) for path in written)
    return [Section(f"{len(new)} rows of {len(options.merge)} files merged into", lines)]


def _object(trials: Trials, rows: list[Row], output: Path) -> dict[str, Any]:
    return {
        "software": trials.software,
        "trials": len(trials.trials),
        "passed": sum(1 for _, result in trials if _passed(result)),
        "failed": [
            {**_named(trial), "faults": result["faults"]} for trial, result in trials.failed
        ],
        "skipped": sum(1 for _, result in trials if "skipped" in result),
        "seconds": round(trials.seconds, 1),
        "evidence": str(output),
        "rows": len(rows),
    }


def _named(trial: Any) -> dict[str, str]:
    return {name: getattr(trial, name) for name in ("op", "kernel", "scheme", "case", "device")}


def _passed(result: Mapping[str, Any]) -> bool:
    return "skipped" not in result and not result.get("faults")


def _sections(trials: Trials, rows: list[Row], output: Path) -> list[Section]:
    from hal.render import Fields, Paragraph, Section

    software = [f"{name} {version}" for name, version in trials.software.items() if version]
    as_if = "as on " if trials.interpreted else ""
    places = dict.fromkeys(f"{as_if}{t.platform}: {t.device} ({t.arch})" for t in trials.trials)
    how = "in Triton's interpreter" if trials.interpreted else "on this machine"
    title = f"{len(trials.trials):,} trials {how}, {trials.seconds:.0f} s"
    sections = [Section(title, (Paragraph(", ".join((*software, *places))), _table(trials)))]
    faults = tuple(
        (f"{trial.op}/{trial.kernel} {trial.scheme}", f"{trial.case}: {'; '.join(r['faults'])}")
        for trial, r in trials.failed
    )
    if faults:
        sections.append(Section("Faults", (Fields(faults),)))
    sections.append(Section(f"{len(rows)} rows of evidence in {output}", ()))
    return sections


def _table(trials: Trials) -> Table:
    """Return a row for each kernel on each device: schemes, trials, and the worst of them."""
    from hal.render import Table

    groups: dict[tuple[str, str, str], list[tuple[Any, dict[str, Any]]]] = {}
    for trial, result in trials:
        groups.setdefault((trial.op, trial.kernel, trial.platform), []).append((trial, result))
    rows = []
    for (op, kernel, platform), found in groups.items():
        ran = [(trial, result) for trial, result in found if "skipped" not in result]
        failed = sum(1 for _, result in ran if result.get("faults"))
        compared = [r for _, r in ran if r.get("error") is not None and r.get("allowed")]
        worst = max((r["error"] / r["allowed"] for r in compared), default=None)
        cells = (
            f"{op}/{kernel}",
            platform,
            str(len({trial.scheme for trial, _ in ran})),
            str(len(ran) - failed),
            str(failed) if failed else "-",
            "exact" if worst is None else f"{worst:.0%}",
        )
        rows.append(cells)
    return Table(("kernel", "on", "schemes", "passed", "failed", "of allowed"), tuple(rows))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
