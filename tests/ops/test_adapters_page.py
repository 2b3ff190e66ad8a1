"""The page on adapters lists every claimed kernel of linear and fused_moe as it is declared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from adapter_fakes import spec_of

from hal.arch import PluginArch
from hal.device import Software
from hal.needs import Code, Context
from hal.ops.fused_moe import FUSED_MOE
from hal.ops.linear import LINEAR

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
CLAIMED = [kernel for op in (LINEAR, FUSED_MOE) for kernel in op.kernels if kernel.claimed]
SPEC = spec_of("cpu:x86-avx2")
NOWHERE = replace(SPEC, platform="nowhere", arch=PluginArch("nowhere", "none"), software=Software())
# What every function for whole layers declines (biases, clamps, ...) is said once, in words.
NOTHING_FITS = {
    "in_features": 1, "out_features": 1, "hidden": 1, "intermediate": 1, "experts": 1 << 20,
    "dtype": "float16", "activation": "other",
}  # fmt: skip


def row(kernel) -> str:
    """Return the line of a kernel: what it needs is what it says where it has nothing."""
    context = Context(NOWHERE, kernel.schemes[0], NOTHING_FITS)
    failures = [failure for need in kernel.requires if (failure := need.check(context))]
    told = [failure.needed for failure in failures if failure.code is not Code.FORMAT]
    schemes = ", ".join(kernel.schemes)
    return f"| `{kernel.name}` | {kernel.level} | {schemes} | {'; '.join(told)} |"


@pytest.mark.parametrize("kernel", CLAIMED, ids=lambda kernel: kernel.name)
def test_the_page_has_the_kernel(kernel):
    assert row(kernel) in PAGE.read_text(encoding="utf-8").splitlines(), row(kernel)


def test_the_page_has_no_other():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| `") for line in lines) == len(CLAIMED)
