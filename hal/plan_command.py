"""Answer `hal plan-ep`: what expert parallelism costs on a machine, by transport and format."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hal.render import Section

__all__ = ["add_plan", "plan_answer"]

_EPILOG = """\
  hal plan-ep --platform cuda:h200 --ranks 8 --hidden 7168 --experts 256 --top-k 8
  hal plan-ep --platform cuda:h100 --ranks 16 --nodes 2 --network 50e9 \\
      --hidden 2048 --experts 128 --top-k 8 --tokens 64
docs/expert-parallel.md says how it is computed and how far it can be believed.
"""
_RATE = "bytes a second one way"


def add_plan(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command and its options to a parser."""
    command = commands.add_parser(
        "plan-ep",
        parents=parents,
        help="bytes, time and workspace of expert parallelism, by transport and format",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("ranks", "hidden", "experts", "top-k"):
        command.add_argument(f"--{name}", type=int, metavar="N", required=True)
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    command.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="of each rank in a call (default: 128)"
    )
    command.add_argument(
        "--max-tokens", type=int, metavar="N", help="most of a call, for buffers (default: tokens)"
    )
    command.add_argument(
        "--link", type=float, metavar="RATE", help=f"{_RATE} between GPUs, instead of the product's"
    )
    command.add_argument(
        "--network", type=float, metavar="RATE", help=f"{_RATE} of each GPU between nodes"
    )
    command.add_argument(
        "--format", action="append", default=[], metavar="F", help="this alone; may be repeated"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def plan_answer(options: argparse.Namespace) -> dict[str, Any] | list[Section]:
    """Return what to print, as an object if JSON is asked for.

    Raises:
        HalError: For an unknown name, or sizes that do not fit together.
    """
    from hal.ops.parallel_plan import WAYS, Machine, predict
    from hal.ops.payload import FORMATS, Payload
    from hal.runtime import resolve_platform

    spec = resolve_platform(options.platform).device(0)
    peak = spec.interconnect_bytes_per_second  # both directions together
    link = options.link if options.link is not None else peak and peak / 2
    machine = Machine(options.ranks, options.nodes, link, options.network)
    most = options.tokens if options.max_tokens is None else options.max_tokens
    found = [
        predict(
            transport,
            Payload(format, options.hidden, options.top_k),
            machine,
            experts=options.experts,
            tokens=options.tokens,
            most=most,
        )
        for format in options.format or FORMATS
        for transport in WAYS
    ]
    if options.json:
        return {
            "device": spec.key,
            "machine": dataclasses.asdict(machine),
            "tokens": options.tokens,
            "layers": [dataclasses.asdict(row) for row in found],
        }
    return _sections(found, spec.name, machine, options)


def _sections(
    found: list[Any], product: str, machine: Any, options: argparse.Namespace
) -> list[Section]:
    from hal.render import Paragraph, Section, Table

    def us(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1f}"

    rows = tuple(
        (
            row.format,
            row.transport,
            f"{row.dispatch_bytes / 1e6:.2f}",
            f"{row.combine_bytes / 1e6:.2f}",
            us(row.dispatch_us),
            us(row.combine_us),
            f"{row.workspace_bytes / 1e6:.1f}",
        )
        for row in found
    )
    head = ("format", "transport", "MB there", "back", "us there", "back", "buffers MB")
    rates = [
        f"{name} {'unknown' if rate is None else f'{rate / 1e9:g} GB/s'}"
        for name, rate in (("links", machine.link), ("network", machine.network))
        if name == "links" or machine.nodes > 1
    ]
    title = f"{machine.ranks} x {product}, {options.tokens} tokens each, one layer"
    note = (
        f"One way: {', '.join(rates)}. Experts are chosen at random, all alike. Times follow "
        "from NCCL's on two H200, under CUDA graphs, and for symmetric_memory from the rate of "
        "peer writes there; on other machines they are guesses."
    )
    return [Section(title, (Table(head, rows), Paragraph(note)))]
