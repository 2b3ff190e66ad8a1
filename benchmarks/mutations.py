"""Break hal on purpose, one way at a time in a copy, and see that the right check finds it.

Each mutation replaces one text of one file, runs the check that is named for it, and must make it
fail; the same check passes without it. The table of what caught what goes to docs/matrix.md.

With `--only` the rows of the others stay as they are.

Usage: python benchmarks/mutations.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- mutations: benchmarks/mutations.py -->\n", "<!-- end of mutations -->\n"
PACKAGES = ("ops", "quant", "platforms")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Mutation:
    """A fault, and the check that must find it.

    Attributes:
        name: What it breaks, in words.
        path: File that is changed.
        old: Text that is replaced where it first occurs.
        new: What stands there instead.
        check: Test, or file of tests.
        interpreted: Whether the check runs in Triton's interpreter.
    """

    name: str
    path: str
    old: str
    new: str
    check: str
    interpreted: bool = False


GOLDEN = "tests/core/test_golden.py"
MUTATIONS = (
    Mutation(
        "requirement: columns in multiples of 64", "ops/adapters/vllm_xpu.py",
        'Needs.multiple_of("in_features", 128)', 'Needs.multiple_of("in_features", 64)',
        "tests/ops/test_adapters_page.py",
    ),
    Mutation(
        "requirement: an earlier torch", "ops/adapters/grouped_mm.py",
        'Needs.torch("2.9", "grouped_mm"', 'Needs.torch("2.6", "grouped_mm"', GOLDEN,
    ),
    Mutation(
        "level: emulated called native", "ops/scaled.py",
        "level=Level.EMULATED", "level=Level.NATIVE", GOLDEN,
    ),
    Mutation(
        "priority: a tuned kernel becomes portable", "ops/linear.py",
        'band="tuned"', 'band="portable"', GOLDEN,
    ),
    Mutation(
        "tile: shared memory not looked at", "ops/tiles.py",
        "    return fit(tile, kind, shared_memory_bytes, platform=platform)\n", "    return tile\n",
        "tests/kernels/test_tiles.py",
    ),
    Mutation(
        "limit: shared memory of a multiprocessor given to a block", "platforms/archs.toml",
        "shared_memory_per_block_bytes = 101376", "shared_memory_per_block_bytes = 102400",
        "tests/kernels/test_limits.py",
    ),
    Mutation(
        "level: conversion taken for the format's own instruction", "ops/cells.py",
        'if product in ("gemm", "grouped_gemm"):', "if product in ():", "tests/core/test_cells.py",
    ),
    Mutation(
        "layout: nibbles exchanged", "quant/nibbles.py",
        "codes[..., 0::2] & MASK, codes[..., 1::2] << 4",
        "codes[..., 1::2] & MASK, codes[..., 0::2] << 4", "tests/quant/test_nibbles.py",
    ),
    Mutation(
        "encoding: ties of e2m1", "quant/e2m1.py",
        "(size * 0.5).round() + 4", "(size * 0.5).floor() + 4", "tests/quant/test_mx.py",
    ),
    Mutation(
        "scales: not transposed", "ops/adapters/flashinfer.py",
        "turned = weight.scales.t().contiguous()", "turned = weight.scales.contiguous()",
        "tests/ops/test_adapters_of_packages.py",
    ),
    Mutation(
        "dot: operands exchanged", "ops/kernels/accumulate.py",
        "            acc = dot(a, b, acc)", "            acc = dot(b, a, acc)",
        "tests/kernels/test_gemm.py", interpreted=True,
    ),
    Mutation(
        "dot: bf16 as the interpreter has it", "ops/kernels/common.py",
        "tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=\"ieee\")",
        "tl.dot(a, b, acc, input_precision=\"ieee\")", "tests/kernels/test_gemm.py",
        interpreted=True,
    ),
    Mutation(
        "activation: gate and up exchanged", "ops/activations.py",
        "else rows.chunk(2, -1)", "else rows.chunk(2, -1)[::-1]",
        "tests/ops/test_expert_options.py",
    ),
    Mutation(
        "evidence: an earlier row replaces a later one", "hal/evidence.py",
        "        if other is None or _weight(row) > _weight(other):",
        "        if other is None or _weight(row) < _weight(other):", "tests/core/test_evidence.py",
    ),
    Mutation(
        "evidence: every source is the present one", "hal/evidence_book.py",
        "return bool(row.source) and row.source == source_hash(kernel.entry)",
        "return bool(row.source)", "tests/core/test_evidence.py",
    ),
    Mutation(
        "hash: what a binder calls does not count", "hal/sources.py",
        "todo += [use for use in uses if _within(use[0], followed)]", "todo += []",
        "tests/core/test_sources.py",
    ),
    Mutation(
        "kernel: changed and not compiled anew", "ops/kernels/encode.py",
        "scale = tl.div_rn(amax,", "scale = 2 * tl.div_rn(amax,",
        "tests/core/test_cells.py",
    ),
    Mutation(
        "order: the body waits for nobody", "platforms/streams.py",
        "                body.wait_stream(outer)\n", "                pass\n",
        "tests/platforms/test_ordering.py",
    ),
    Mutation(
        "XPU: a call that torch does not have", "platforms/streams.py",
        "stream.record_event()", "stream.mark_event()", "tests/platforms/test_xpu_calls.py",
    ),
    Mutation(
        "page: a number typed by hand", "docs/adapters.md", "in_features a multiple of 128",
        "in_features a multiple of 256", "tests/ops/test_adapters_page.py",
    ),
)  # fmt: skip


def mutate(root: Path, mutation: Mutation) -> str:
    """Change the file of a mutation; return what it was.

    Raises:
        ValueError: If the text to replace is not there: the mutation must be written anew.
    """
    path = root / mutation.path
    text = path.read_text(encoding="utf-8")
    if mutation.old not in text:
        raise ValueError(f"{mutation.path}: found no {mutation.old!r} ({mutation.name})")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    return text


def copy_of(folder: Path) -> Path:
    """Copy the checkout, and put the copy's folders where they are imported from; return it."""
    root = folder / "tree"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT, symlinks=True)
    shutil.copytree(ROOT / ".ci", root / ".ci")
    shutil.copytree(ROOT / ".github", root / ".github")
    for name in PACKAGES:  # else an editable install gives those of the checkout
        (root / "hal" / name).symlink_to(root / name)
    return root


def check(root: Path, mutation: Mutation) -> tuple[int, str]:
    """Run the check of a mutation in a copy; return its status and the first test that failed."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["HAL_CACHE"] = str(root.parent / "cache")
    mark = ["-m", "interpreter"] if mutation.interpreted else []
    if mutation.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mark]
    done = subprocess.run(
        [*command, mutation.check], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{mutation.name}: {mutation.check} did not run\n{done.stdout[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].split(" ")[1].partition("[")[0] if failed else ""


def table(caught: Sequence[tuple[Mutation, str]]) -> str:
    """Return what caught each mutation, in Markdown."""
    lines = ["| broken on purpose | in | caught by |", "|---|---|---|"]
    lines += [f"| {m.name} | `{m.path}` | `{test}` |" for m, test in caught]
    return "\n".join(lines) + "\n"


def caught_before(text: str) -> dict[str, str]:
    """Return by its name what caught each mutation of a page."""
    rows = text.partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {name: test.strip("`") for name, _, test in cells}


def with_table(text: str, caught: Sequence[tuple[Mutation, str]]) -> str:
    """Return a page with what caught the mutations now, and what caught the others before."""
    found = caught_before(text) | {mutation.name: test for mutation, test in caught}
    rows = [(mutation, found[mutation.name]) for mutation in MUTATIONS if mutation.name in found]
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{table(rows)}{END}{rest.partition(END)[2]}"


def main() -> int:
    """Try all mutations; return 0 when each was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="start of a name")
    options = parser.parse_args()
    wanted = [m for m in MUTATIONS if not options.only or m.name.startswith(tuple(options.only))]
    caught, missed, sound = [], [], {}
    with tempfile.TemporaryDirectory(prefix="hal-mutations-") as name:
        root = copy_of(Path(name))
        for mutation in wanted:
            start = time.perf_counter()
            before = mutate(root, mutation)
            status, test = check(root, mutation)
            (root / mutation.path).write_text(before, encoding="utf-8")
            if mutation.check not in sound:  # a check that fails anyhow has caught nothing
                sound[mutation.check] = check(root, mutation)[0] == 0
            if status and test and sound[mutation.check]:
                caught.append((mutation, test))
            else:
                missed.append(mutation.name)
            told = test if sound[mutation.check] else "its check fails without it"
            print(f"{time.perf_counter() - start:4.0f} s  {mutation.name}: {told or 'MISSED'}",
                  flush=True)  # fmt: skip
    if not missed:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), caught), encoding="utf-8")
    print(f"{len(caught)} caught, {len(missed)} missed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
