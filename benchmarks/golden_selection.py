"""Write tests/golden/selection: what selection answers, as text that is read in a diff.

For every op, scheme, product of the tables and a few versions of torch: which kernels can run, in
order. Architectures that answer alike share a line, and so do versions and sizes, so that a changed
priority is a changed line.

Usage: python benchmarks/golden_selection.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hal.device import Software
from hal.evidence import write_text
from hal.matrix import TYPICAL, assumed, schemes_of
from hal.platforms.tables import arch_rows, device_rows, device_spec
from hal.registry import find_op, op_names
from hal.selection import Selection, choose

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "selection"

VERSIONS: tuple[tuple[str, str], ...] = (("2.6", "3.2.0"), ("2.9", "3.5.0"), ("2.13", "3.7.1"))
"""(torch, Triton): the oldest that is supported, one between, and what hal is developed with."""
TOKENS = (16, 4096)
"""A decode and a prefill step, where an op has tokens."""
_MARKS = {"weight_only": "-", "dequant": "=", "emulated": "~", "reference": "_", "native": ""}

_HEAD = """\
# {op}: what can run, best first. Written by `make golden`; a test compares.
# After a kernel: nothing for native, - weight_only, = dequant, ~ emulated, _ reference,
# ! claimed. In front: versions of torch (with Triton {triton}), where they differ.
# Problem: {problem}.
"""


def golden_text(op: str) -> str:
    """Return the table of one op."""
    found = find_op(op)
    typical = TYPICAL.get(op, {})
    problems = _problems(typical)
    told = " ".join(f"{name}={value}" for name, value in typical.items() if name != "tokens")
    if len(problems) > 1:
        told += " tokens=" + " or ".join(str(problem["tokens"]) for problem in problems)
    lines = [_HEAD.format(op=op, problem=told, triton=", ".join(triton for _, triton in VERSIONS))]
    tables: dict[tuple[str, ...], list[str]] = {}
    for scheme in schemes_of(found):
        tables.setdefault(tuple(_lines(op, scheme, problems)), []).append(scheme)
    for table, schemes in tables.items():
        lines += ["## " + " ".join(schemes), *table, ""]
    return "\n".join(lines)


def _problems(typical: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "tokens" not in typical:
        return [dict(typical)]
    return [{**typical, "tokens": tokens} for tokens in TOKENS]


def _lines(op: str, scheme: str, problems: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each answer and the architectures that give it."""
    problems = list(problems)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, specs in _devices():
        answers = tuple(
            _answer(choose(op, scheme, device_spec(*key, software), problem))
            for software in map(_software, VERSIONS)
            for problem in problems
            for key in specs
        )
        groups.setdefault(_merged(answers, len(problems), len(specs)), []).append(name)
    lines = []
    for answers, names in groups.items():
        lines.append(" ".join(names))
        lines += [f"  {answer}" for answer in answers]
    return lines


def _devices() -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every architecture with its products, or with itself where it has none."""
    found = []
    for arch in arch_rows():
        products = [r.name for r in device_rows(arch.platform) if r.arch == arch] or [arch.name]
        found.append((f"{arch.platform}:{arch.name}", [(arch.platform, key) for key in products]))
    return found


def _software(versions: tuple[str, str]) -> Software:
    return assumed(*versions)


def _answer(selection: Selection) -> str:
    able = [candidate for candidate in selection.candidates if candidate.can_run]
    names = [
        candidate.kernel.name + _MARKS[str(candidate.kernel.level)] + "!" * candidate.claimed
        for candidate in able
    ]
    return " > ".join(names) if names else "none"


def _merged(answers: tuple[str, ...], problems: int, products: int) -> tuple[str, ...]:
    """Return one line for each answer, after the versions, sizes and products that give it.

    Answers come by version, then by problem, then by product.
    """
    by_answer: dict[str, list[tuple[int, int, int]]] = {}
    for place, answer in enumerate(answers):
        version, rest = divmod(place, problems * products)
        by_answer.setdefault(answer, []).append((version, *divmod(rest, products)))
    lines = []
    for answer, places in by_answer.items():
        parts = []
        versions = sorted({version for version, _, _ in places})
        sizes = sorted({problem for _, problem, _ in places})
        kinds = sorted({product for _, _, product in places})
        if len(versions) < len(VERSIONS):
            parts += [VERSIONS[version][0] for version in versions]
        if len(sizes) < problems:
            parts += [f"tokens={TOKENS[size]}" for size in sizes]
        if len(kinds) < products:
            parts.append("products " + ",".join(map(str, kinds)))
        if len(places) < len(versions) * len(sizes) * len(kinds):
            parts.append("in part")
        lines.append(f"[{' '.join(parts)}] {answer}" if parts else answer)
    return tuple(lines)


def main() -> None:
    """Write all tables, and remove those of ops that are no more."""
    for path in FOLDER.glob("*.txt"):
        if path.stem not in op_names():
            path.unlink()
    for op in op_names():
        path = FOLDER / f"{op}.txt"
        write_text(path, golden_text(op))
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")


if __name__ == "__main__":
    main()
