"""List what differs between torch releases and matters here, with what hal does about it.

A row is a fact for the report; the code that acts on it is `hal.torch_compat`, which looks at the
installed torch and not at this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from hal.device import version_at_least

__all__ = ["QUIRKS", "Quirk", "quirks_for"]


@dataclass(frozen=True, slots=True)
class Quirk:
    """One peculiarity.

    Attributes:
        id: Short name.
        since: First torch release that has it; None for all.
        fixed: First torch release without it; None for none yet.
        platforms: Platforms that it matters on; empty for all.
        symptom: What a user would see.
        handling: What hal does.
        source: Where it is written, or how it was measured.
    """

    id: str
    since: str | None
    fixed: str | None
    platforms: tuple[str, ...]
    symptom: str
    handling: str
    source: str

    def applies(self, torch_version: str, platform: str) -> bool:
        """Tell whether it is to be expected under a torch release on a platform."""
        if self.platforms and platform not in self.platforms:
            return False
        if self.since is not None and not version_at_least(torch_version, self.since):
            return False
        return self.fixed is None or not version_at_least(torch_version, self.fixed)


QUIRKS = (
    Quirk(
        "no-e8m0-dtype",
        None,
        "2.7",
        (),
        "torch.float8_e8m0fnu does not exist",
        "torch_compat.dtype('e8m0') raises and names the release; scales stay uint8 bytes",
        "torch 2.7 release notes",
    ),
    Quirk(
        "no-e2m1-dtype",
        None,
        "2.8",
        (),
        "torch.float4_e2m1fn_x2 does not exist",
        "torch_compat.dtype('e2m1') raises and names the release; codes stay packed in uint8",
        "torch 2.8 documentation, tensor attributes",
    ),
    Quirk(
        "accelerator-partial",
        None,
        "2.9",
        (),
        "torch.accelerator lacks memory figures and other members",
        "hal never uses it: streams and events come from torch.cuda and torch.xpu",
        "torch.accelerator documentation of 2.6 to 2.9",
    ),
    Quirk(
        "scaled-mm-private",
        None,
        "2.10",
        (),
        "block scales have no torch operator: torch.nn.functional.scaled_mm does not exist",
        "row-wise products go through torch._scaled_mm; kernels on block scales need torch 2.10",
        "torch 2.10 documentation, torch.nn.functional.scaled_mm",
    ),
    Quirk(
        "scaled-mm-cpu-no-rows",
        None,
        "2.13",
        ("cpu",),
        "torch._scaled_mm refuses scales per row and column on the CPU",
        "fp8 schemes use other kernels on the CPU",
        "tried: refused by 2.11.0, taken by 2.13.0+cpu",
    ),
    Quirk(
        "scaled-mm-cpu-per-tensor",
        None,
        None,
        ("cpu",),
        "torch._scaled_mm with one scale per tensor runs 700 times slower than row-wise",
        "hal does not call it on the CPU: fp8 weights are decoded instead",
        "measured with torch 2.13.0+cpu on an AMX processor, November 2026",
    ),
    Quirk(
        "scaled-mm-cpu-no-blocks",
        "2.10",
        None,
        ("cpu",),
        "torch.nn.functional.scaled_mm refuses 1x128 and 128x128 scales on the CPU",
        "block schemes use other kernels on the CPU",
        "tried with torch 2.13.0+cpu: Invalid scaling configuration",
    ),
    Quirk(
        "int-mm-one-column",
        None,
        None,
        ("cpu",),
        "torch._int_mm is wrong for a weight [N, 1] read as its transpose, where N > 1",
        "kernels on it need an inner size of 2 or more",
        "measured with torch 2.13.0+cpu: codes[M, 1] times weight[N, 1].t() for N of 2 to 64",
    ),
    Quirk(
        "rowwise-sm89-stream",
        "2.6",
        "2.12",
        ("cuda",),
        "row-wise torch._scaled_mm on sm_89 launches on the default stream, not the current one",
        "torch_scaled_mm needs torch 2.12 there",
        "aten/src/ATen/native/cuda/RowwiseScaledMM.cu, not tried",
    ),
    Quirk(
        "rowwise-bf16",
        None,
        None,
        ("cuda",),
        "row-wise torch._scaled_mm writes bf16 only, unless cuBLAS 12.9 or later computes it",
        "kernels on it serve bf16 only",
        "https://github.com/pytorch/pytorch/pull/166744 ; https://github.com/pytorch/ao/pull/2431",
    ),
    Quirk(
        "grouped-mm-private",
        None,
        "2.10",
        (),
        "torch.nn.functional.grouped_mm does not exist; torch._grouped_mm is there from 2.8",
        "torch_compat.grouped_mm_function returns whichever there is",
        "torch 2.10 documentation, torch.nn.functional.grouped_mm",
    ),
    Quirk(
        "xpu-graphs",
        None,
        "2.11",
        ("xpu",),
        "torch.xpu has no graphs",
        "graph_capture is False",
        "https://docs.pytorch.org/docs/main/generated/torch.xpu.XPUGraph.html ; release by "
        "the date of https://github.com/pytorch/pytorch/pull/172759, not tried",
    ),
    Quirk(
        "interpreter-bf16-dot",
        None,
        None,
        (),
        "Triton's interpreter returns garbage for a bf16 tl.dot, without an error",
        "kernels upcast before tl.dot when they are interpreted",
        "measured with Triton 3.7.1: errors of 5e10",
    ),
)
"""Every known quirk."""


def quirks_for(torch_version: str | None, platform: str) -> tuple[Quirk, ...]:
    """Return the quirks to expect under a torch release on a platform; none without torch."""
    if torch_version is None:
        return ()
    return tuple(quirk for quirk in QUIRKS if quirk.applies(torch_version, platform))
