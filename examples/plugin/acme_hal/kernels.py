"""Attach a kernel to hal's op `linear`: y = x @ (codes * scales).T + bias, a block at a time.

It decodes int8 weights for 256 output rows at once, so the wide copy stays small. It is plain
PyTorch and also runs on CPUs, where this example can be tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.linear import WEIGHT_ONLY
from hal.plugins import KernelRegistrar
from hal.registry import Level

if TYPE_CHECKING:
    import torch

ROWS = 256


def register(hal: KernelRegistrar) -> None:
    """Declare the package's kernels; hal calls this once, before an op is first looked up."""
    hal.kernel(
        "linear",
        "acme_int8_blocks",
        level=Level.WEIGHT_ONLY,
        signatures={"int8_channel": WEIGHT_ONLY["int8_channel"]},
        requires=(
            Needs.platform("acme", "cpu"),
            Needs.package("torch"),
            Needs.multiple_of("in_features", 16, "A1 reads 16 codes at once"),
        ),
    )(bind_blocks)


def bind_blocks(binding: Any, weight: Any, bias: torch.Tensor | None) -> Any:
    """Decode int8 weights block by block, and multiply in the activations' format."""
    rows_out = weight.shape[0]

    def launch(x: torch.Tensor, tensors: Any) -> torch.Tensor:
        codes, scales = tensors[0], tensors[1]
        out = x.new_empty(x.shape[0], rows_out)
        for start in range(0, rows_out, ROWS):
            wide = codes[start : start + ROWS].float() * scales[start : start + ROWS, None]
            out[:, start : start + ROWS] = x @ wide.to(x.dtype).T
        return out if bias is None else out + tensors[-1]

    return launch, (weight.values, weight.scales, *(() if bias is None else (bias,)))
