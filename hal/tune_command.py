"""Answer `hal tune`: search tiles for a problem or for recorded ones, and keep the best."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.errors import ValueRangeError
from hal.progress import shown_progress

if TYPE_CHECKING:
    from hal.device import DeviceSpec
    from hal.render import Section
    from hal.tune import Found
    from hal.tune_runner import Problem, Runner

__all__ = ["add_timed_problem", "add_tune", "problems_of", "tune_answer"]

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
MOST_JOBS = 16
_EPILOG = """\
Sizes are written name=value, as for `hal explain`.
  hal tune fused_moe --scheme fp8_block128 experts=128 top_k=8 hidden=2048 intermediate=768
  hal tune --from shapes.json            what hal.record_shapes saw, its own numbers of tokens
  hal tune linear --scheme bf16 in_features=4096 out_features=4096 --dry-run --platform cuda:h200
Tiles go to measured.json in the cache folder (HAL_CACHE); every op bound after that takes them.
An interrupted search goes on where it stopped.
"""


def add_timed_problem(command: Any) -> None:
    """Add how a problem is named, which `hal tune` and `hal bench` share."""
    command.add_argument("op", metavar="OP", nargs="?", help="name of an op, such as fused_moe")
    command.add_argument("--scheme", metavar="S", help="such as fp8_channel")
    command.add_argument(
        "sizes", metavar="SIZE=VALUE", nargs="*", default=[], help="such as hidden=4096"
    )
    command.add_argument(
        "--tokens", metavar="N,N", help=f"numbers of tokens (default: {','.join(map(str, TOKENS))})"
    )
    command.add_argument("--from", dest="shapes", metavar="FILE", help="problems of record_shapes")
    command.add_argument("--kernel", metavar="NAME", help="this kernel")
    command.add_argument("--device", metavar="I", type=int, default=0, help="visible device index")
    command.add_argument("--json", action="store_true", help="print JSON")


def add_tune(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command and its options to a parser."""
    command = commands.add_parser(
        "tune",
        parents=[shared],
        help="search the tiles of Triton kernels for a problem on the GPU here",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_timed_problem(command)
    command.add_argument("--jobs", type=int, help="children that compile at a time")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--thorough", action="store_true", help="try every tile that fits")
    size.add_argument("--quick", action="store_true", help="try what differs in one respect alone")
    command.add_argument(
        "--seconds", metavar="S", type=float, help="begin nothing more after S seconds"
    )
    command.add_argument("--dry-run", action="store_true", help="list what would be compiled")
    command.add_argument(
        "--restart", action="store_true", help="forget what an interrupted search has timed"
    )
    command.add_argument("--output", metavar="FILE", help="table to write (default: the user's)")


def tune_answer(
    options: argparse.Namespace, runner: Runner | None = None
) -> dict[str, Any] | list[Section]:
    """Run the command; return what to print, an object for JSON.

    Args:
        options: Its options.
        runner: What compiles and times; None means child processes, which need a GPU.

    Raises:
        HalError: For a problem that cannot be tuned, or where nothing can be timed.
    """
    from hal.config import cache_folder
    from hal.ops.tuned import user_table
    from hal.runtime import resolve_platform
    from hal.tune import merge_table, require_gpu, tune, tuned_tiles
    from hal.tune_runner import Journal, in_children

    if options.jobs is not None and options.jobs < 1:
        raise ValueRangeError("hal tune: --jobs", found=options.jobs, needed="1 or more")
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueRangeError("hal tune: --seconds", found=options.seconds, needed="0 or more")
    platform = resolve_platform(options.platform)
    spec = platform.device(options.device)
    if runner is None and not options.dry_run:
        require_gpu(spec, platform.simulated)
    problems = problems_of("tune", options, spec)
    if options.dry_run:
        return _plan(problems, spec, options)
    table = Path(options.output) if options.output else user_table()
    path = cache_folder() / f"tune-{spec.key.replace(':', '-').replace('/', '-')}.jsonl"
    if options.restart:
        path.unlink(missing_ok=True)
    journal = Journal(path, _head(problems, spec))
    jobs = options.jobs or max(1, min(os.cpu_count() or 1, MOST_JOBS))
    children = in_children(f"{platform.torch_device_type}:{options.device}", jobs)
    source = f"hal tune on {spec.name}, Triton {spec.software.triton}"
    rows = 0

    def finished(found: list[Found]) -> None:
        nonlocal rows
        new = tuned_tiles(found, spec, source)
        rows += len(new)
        if new:
            merge_table(table, new, spec)

    with (
        shown_progress("steps") as progress,
        children if runner is None else nullcontext(runner) as run,
    ):
        found = tune(
            problems,
            spec,
            run,
            journal,
            apart=_apart(options),
            seconds=options.seconds,
            progress=progress,
            finished=finished,
        )
    if not any(each.late for each in found):
        journal.finish()
    if options.json:
        return {"table": str(table), "rows": rows, "found": [_told(each) for each in found]}
    return _sections(found, table, rows)


def problems_of(
    command: str, options: argparse.Namespace, spec: DeviceSpec, *, tiles: bool = True
) -> list[Problem]:
    """Return the problems that the options name.

    Args:
        command: Name of the command, for messages.
        options: Its options.
        spec: Facts of the device.
        tiles: Whether a kernel with tiles is wanted, so that recorded problems without are left.

    Raises:
        HalError: If neither an op nor a file is given, or something in them cannot be used.
    """
    from hal.errors import SettingError
    from hal.registry import find_op
    from hal.size_texts import sizes_of
    from hal.tune_runner import Problem, TuneError

    given = _tokens(command, options.tokens) if options.tokens else ()
    if options.shapes:
        if options.op or options.sizes:
            raise SettingError(command, found="--from and an op", needed="one of them")
        from hal.ops.shapes import read_shapes

        problems = []
        for one in read_shapes(options.shapes):
            if options.scheme and one.scheme != options.scheme:
                continue
            kernel = options.kernel or _tuned_kernel(one.op, one.scheme, one.problem, spec, tiles)
            if kernel is not None:
                tokens = given or tuple(sorted(one.calls))
                problems.append(Problem(one.op, one.scheme, kernel, one.problem, tokens))
        if not problems:
            raise TuneError(f"{command}: found nothing in {options.shapes} that it can time here")
        return problems
    if not options.op:
        raise SettingError(command, found="no op", needed="an op or --from FILE")
    scheme = options.scheme or _only(command, options.op)
    sizes = sizes_of(command, options.op, options.sizes)
    if "tokens" in sizes:
        raise SettingError(command, found="tokens=", needed="--tokens 1,8,32")
    find_op(options.op).check(sizes)
    kernel = options.kernel or _tuned_kernel(options.op, scheme, sizes, spec, tiles)
    if kernel is None:
        raise TuneError(
            f"{command}: found no kernel of {options.op} {scheme} that has tiles and can run on "
            f"{spec.name}; `hal explain {options.op} --scheme {scheme}` says why"
        )
    return [Problem(options.op, scheme, kernel, sizes, given or TOKENS)]


def _only(command: str, op: str) -> str:
    from hal.errors import SettingError
    from hal.registry import find_op

    schemes = sorted({scheme for kernel in find_op(op).kernels for scheme in kernel.schemes})
    if len(schemes) != 1:
        raise SettingError(f"{command} {op}", found="no --scheme", needed=" or ".join(schemes))
    return schemes[0]


def _tuned_kernel(
    op: str, scheme: str, problem: dict[str, Any], spec: DeviceSpec, tiles: bool
) -> str | None:
    """Return the kernel with tiles that selection ranks first; without `tiles` an empty name."""
    from hal.selection import choose

    if not tiles:
        return ""
    from hal.ops.tuning import TUNABLE

    for candidate in choose(op, scheme, spec, problem).candidates:
        if candidate.can_run and candidate.kernel.name in TUNABLE.get(op, ()):
            return candidate.kernel.name
    return None


def _tokens(command: str, text: str) -> tuple[int, ...]:
    from hal.errors import SettingError

    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise SettingError(f"{command} --tokens", found=repr(text), needed="numbers such as 1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))


def _head(problems: Sequence[Problem], spec: DeviceSpec) -> dict[str, Any]:
    """Return what must be the same for a journal to count."""
    from hal.registry import find_op
    from hal.sources import source_hash

    kernels = sorted({(p.op, p.kernel) for p in problems})
    sources = {f"{op}/{name}": source_hash(find_op(op).find(name).entry) for op, name in kernels}
    software = {"torch": spec.software.torch, "triton": spec.software.triton}
    return {"device": spec.key, **software, "sources": sources}


def _apart(options: argparse.Namespace) -> int:
    """Return in how many respects tiles may differ from the rules' ones."""
    from hal.ops.tuning import APART, QUICK, THOROUGH

    return THOROUGH if options.thorough else QUICK if options.quick else APART


def _plan(
    problems: Sequence[Problem], spec: DeviceSpec, options: argparse.Namespace
) -> dict[str, Any] | list[Section]:
    """Return what would be compiled: how many tiles, and the first product's by name."""
    from hal.render import Block, Paragraph, Section, Table
    from hal.tune import planned

    rows = []
    for p in problems:
        for tokens, sizes, tiles, note in planned(p, spec, _apart(options)):
            shape = f"{sizes.matrices} x {sizes.rows} x {sizes.n} x {sizes.k}"
            rows.append(((p.op, p.kernel, str(tokens), sizes.kind, shape), tiles, note))
    if options.json:
        names = ("op", "kernel", "tokens", "kind", "product")
        listed = [
            {
                **dict(zip(names, row, strict=True)),
                "tiles": [_short(tile) for tile in tiles],
                "note": note,
            }
            for row, tiles, note in rows
        ]
        return {"device": spec.key, "plan": listed}
    shown = tuple(
        (*row, str(len(tiles)), _short(tiles[0]) if tiles else "-") for row, tiles, _ in rows
    )
    head = ("op", "kernel", "tokens", "kind", "matrices x rows x n x k", "tiles", "rules take")
    total = sum(len(tiles) for _, tiles, _ in rows)
    title = f"About {total:,} tiles would be compiled and timed on {spec.name}"
    blocks: list[Block] = [Table(head, shown)]
    blocks += [
        Paragraph(f"0 tiles: {note}.") for note in dict.fromkeys(n for *_, n in rows) if note
    ]
    return [Section(title, tuple(blocks))]


def _short(tile: Any) -> str:
    more = [name for name in ("swap", "lanes") if getattr(tile, name)]
    more += [f"split {tile.split_k}"] if tile.split_k > 1 else []
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return " ".join((sizes, f"w{tile.warps} s{tile.stages} g{tile.group_m}", *more))


def _told(each: Found) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "op": each.problem.op,
        "kernel": each.problem.kernel,
        "scheme": each.problem.scheme,
        "problem": each.problem.sizes,
        "tokens": each.tokens,
        "us": each.us,
        "default_us": each.default_us,
        "tried": each.tried,
        "note": each.note,
        "tiles": [asdict(tile) for tile in each.tiles],
    }


def _sections(found: Sequence[Found], table: Path, rows: int) -> list[Section]:
    from hal.render import Section, Table

    lines = []
    for each in found:
        gain = f"{each.default_us / each.us:.2f}x" if each.us else "-"
        times = (f"{each.default_us:.1f}", f"{each.us:.1f}", gain) if each.us else ("-", "-", "-")
        tiles = "; ".join(map(_short, each.tiles)) or each.note
        lines.append((str(each.problem), str(each.tokens), *times, str(each.tried), tiles))
    head = ("problem", "tokens", "rules us", "best us", "faster", "tried", "tiles")
    sections = [Section("Tiles", (Table(head, tuple(lines)),))]
    sections.append(Section(f"{rows} rows written to {table}", ()))
    return sections
