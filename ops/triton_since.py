"""Say since when Triton compiles for which architecture.

An earlier one does not refuse: 3.2 ends the process on sm_100 (LLVM asserts), others fail in ptxas.

Source: `gemm/bf16/few` of `hal.ops.kernels.crosscompile`, compiled with the wheels of Triton 3.2.0,
3.3.0, 3.4.0, 3.5.0, 3.6.0 and 3.7.1 for each architecture. (For AMD's the wheels before 3.5 bring
no linker, and use that of ROCm.)
"""

from __future__ import annotations

from hal.needs import Need, Needs

__all__ = ["needs_triton"]

COMPILES_SINCE = {
    "sm_100": "3.3",
    "sm_103": "3.6",
    "sm_110": "3.7",
    "sm_120": "3.4",
    "sm_121": "3.6",
}
"""Architectures that the oldest supported Triton, 3.2, does not compile for."""


def needs_triton(at_least: str = "3.2", hint: str = "") -> Need:
    """Need Triton of a release, or of the later one that compiles for the device."""
    return Needs.package("triton", at_least, hint, on=COMPILES_SINCE)
