"""Answer `hal quantize`: quantize a model folder, and say what was done to each module.

Progress goes to stderr (`hal.progress`).
"""

from __future__ import annotations

import argparse
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hal.progress import shown_progress

if TYPE_CHECKING:
    from hal.quant.checkpoint import FolderPlan
    from hal.quant.checkpoint.quantize_folder import Progress
    from hal.render import Section, Table

__all__ = ["add_quantize", "quantize_answer"]

_EPILOG = """\
Linears are quantized; embeddings, heads, routers and norms are kept.
  hal quantize Qwen3-30B-A3B Qwen3-30B-A3B-int4 --scheme int4_w4a16
  hal quantize model model-fp8 --scheme fp8_channel --ignore '*.o_proj' --dry-run
"""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_quantize(commands: Any) -> None:
    """Add the command and its options to a parser."""
    command = commands.add_parser(
        "quantize",
        help="write a quantized copy of a model folder, as compressed-tensors",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="SRC", help="folder of config.json and safetensors")
    command.add_argument("target", metavar="DST", help="folder to make")
    command.add_argument("--scheme", metavar="S", required=True, help="such as int4_w4a16")
    command.add_argument(
        "--ignore",
        metavar="GLOB",
        action="append",
        default=[],
        help="keep modules of this name, too, such as '*.o_proj'; may be repeated",
    )
    command.add_argument(
        "--shard-size",
        metavar="BYTES",
        type=_bytes,
        help="most bytes of a file, such as 500M or 5G (default: 2G)",
    )
    command.add_argument(
        "--device",
        metavar="D",
        default="cpu",
        help="where to compute, such as cuda or xpu:1; the bits are the same (default: cpu)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    command.add_argument(
        "--dry-run", action="store_true", help="say what becomes of each module, and write nothing"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def quantize_answer(options: argparse.Namespace) -> dict[str, Any] | list[Section]:
    """Run the command; return what to print, as an object if JSON is asked for.

    Raises:
        HalError: If nothing was written.
    """
    from hal.quant.checkpoint import plan_folder, quantize_folder
    from hal.quant.checkpoint.write import SHARD_BYTES

    if options.dry_run:
        plan = plan_folder(options.source, options.scheme, ignore=options.ignore)
    else:
        with shown_progress() as shown, _interrupts(shown) as progress:
            plan = quantize_folder(
                options.source,
                options.target,
                options.scheme,
                ignore=options.ignore,
                shard_bytes=options.shard_size or SHARD_BYTES,
                overwrite=options.overwrite,
                progress=progress,
                device=options.device,
            )
    if options.json:
        return _object(plan, options)
    return _sections(plan, options)


def _object(plan: FolderPlan, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": options.source,
        "target": options.target,
        "scheme": plan.scheme,
        "written": not options.dry_run,
        "quantized": len(plan.quantized),
        "kept": len(plan.kept),
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "kept": tensor.kept,
                "bytes_before": tensor.bytes_before,
                "bytes_after": tensor.bytes_after,
            }
            for tensor in plan.tensors
        ],
    }


def _sections(plan: FolderPlan, options: argparse.Namespace) -> list[Section]:
    from hal.render import Paragraph, Section

    title = f"{options.target}: {plan.scheme}" + (", not written" if options.dry_run else "")
    notes = tuple(Paragraph(note) for note in plan.notes)
    sections = [Section(title, (_totals(plan), *notes))]
    if options.dry_run:
        sections.append(Section("Each module", (_modules(plan),)))
    return sections


def _totals(plan: FolderPlan) -> Table:
    """Return the table of what was done: a row for the linears, one for each reason to keep."""
    from hal.render import Table

    groups = Counter(tensor.kept for tensor in plan.tensors)
    rows = []
    for kept, count in sorted(groups.items(), key=lambda group: (group[0] is not None, -group[1])):
        found = [tensor for tensor in plan.tensors if tensor.kept == kept]
        before = sum(tensor.bytes_before for tensor in found)
        after = sum(tensor.bytes_after for tensor in found)
        what = plan.scheme if kept is None else f"kept: {kept}"
        rows.append((what, f"{count:,}", f"{before:,}", f"{after:,}"))
    share = f"{plan.bytes_after:,} ({plan.bytes_after / max(plan.bytes_before, 1):.1%})"
    rows.append(("all", f"{len(plan.tensors):,}", f"{plan.bytes_before:,}", share))
    return Table(("weights", "tensors", "bytes before", "bytes after"), tuple(rows))


def _modules(plan: FolderPlan) -> Table:
    """Return the table of what becomes of each module; those that differ in numbers share a row."""
    from hal.render import Table

    alike: dict[tuple[Any, ...], list[list[int]]] = {}
    for tensor in plan.tensors:
        name = tensor.name.removesuffix(".weight")
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        key = re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", name), tensor.shape, tensor.kept
        alike.setdefault(key, []).append(numbers)
    rows = []
    for (name, shape, kept), found in alike.items():
        for column in zip(*found, strict=True):
            name = name.replace("#", _ranges(column), 1)
        becomes = plan.scheme if kept is None else f"kept: {kept}"
        rows.append((name, "x".join(map(str, shape)), f"{len(found):,}", becomes))
    return Table(("module", "shape", "times", "becomes"), tuple(rows))


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text, such as `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _bytes(text: str) -> int:
    """Return the number of bytes that a size says, such as `5G` or `500MiB`."""
    parts = re.fullmatch(r"([0-9]{1,18})([KMG]?)(?:i?B)?", text)
    if parts is None or int(parts[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 5G")
    return int(parts[1]) * _UNITS[parts[2]]


@contextmanager
def _interrupts(progress: Progress | None) -> Iterator[Progress]:
    """Let the first Ctrl-C take effect between two tensors, and only there.

    torch asks objects for their sizes in ways that swallow an interrupt and report another error.
    """
    interrupted = False
    previous = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)

    def checked(done: int, total: int, name: str) -> None:
        if interrupted:
            raise KeyboardInterrupt
        if progress is not None:
            progress(done, total, name)

    if threading.current_thread() is not threading.main_thread():
        yield checked  # signals are not delivered here
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield checked
    finally:
        signal.signal(signal.SIGINT, previous)
