"""Pad the weights of experts to the sizes that a kernel takes, once, when they are bound.

Zeros that are added change no result: gate and up rows of zeros activate to 0 under every
activation (`act(0) * 0`, and `0 * sigmoid(0) * (0 + 1)` of swiglu_oai), x is filled up with zeros
at each call (`ExpertLayer.enter`), and columns of the output beyond those of x are dropped. Scales
of activations are those of the unpadded rows, since zeros raise no largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.errors import ShapeError
from hal.ops.shards import block_of
from hal.quant.padding import pad_rows, pad_weight
from hal.quant.scheme import SCHEMES

if TYPE_CHECKING:
    import torch

    from hal.protocol import Platform
    from hal.quant.tensor import QTensor
    from hal.selection import Selection

__all__ = ["ExpertPadding", "padding_of", "why_unpadded"]


def why_unpadded(scheme: str, problem: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Return why the weights of a problem are not padded to `sizes`; an empty text if they are."""
    if problem.get("padding") is False:
        return "padding=False"
    if problem.get("lora"):
        return "low-rank updates have the sizes of the weights"
    halves = problem.get("gated") is not False and not problem.get("interleaved")
    block = block_of(SCHEMES[scheme].weight, "rows")
    if halves and "intermediate" in sizes and problem["intermediate"] % block:
        return f"gate and up rows share a block of {block} under one scale"
    return ""


@dataclass(frozen=True, slots=True)
class ExpertPadding:
    """What the weights of a layer are padded from and to.

    Attributes:
        shapes: Of w13 and w2 as they are given, by name.
        hidden: Padded columns of w13, and rows of w2.
        intermediate: Padded columns of w2.
        gated: Whether w13 has gate and up.
        interleaved: Whether their rows alternate.
        platform: Whose order of streams to keep.
    """

    shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    intermediate: int
    gated: bool
    interleaved: bool
    platform: Platform

    def weights(self, where: str, given: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """Return padded weights, by name; each has memory of its own.

        Raises:
            ShapeError: For weights of other sizes than those that were bound.
        """
        found = {}
        for name, weight in given.items():
            self._require(f"{where}: {name}", weight.shape, self.shapes[name])
        for name, weight in given.items():
            rows, halves = self._rows_of(name)
            columns = self.hidden if name == "w13" else self.intermediate
            found[name] = pad_weight(weight, rows, columns, halves=halves, platform=self.platform)
        return found

    def biases(
        self, given: Mapping[str, torch.Tensor | None], where: str = "fused_moe"
    ) -> dict[str, torch.Tensor | None]:
        """Return padded biases, by the name of the weight that each belongs to.

        Raises:
            ShapeError: For a bias of another size than that which was bound.
        """
        found: dict[str, torch.Tensor | None] = dict(given)
        for name, bias in given.items():
            if bias is not None:
                self._require(f"{where}: {name}_bias", bias.shape, self.shapes[name][:-1])
                rows, halves = self._rows_of(name)
                found[name] = pad_rows(bias, rows, halves=halves)
        return found

    def _require(self, where: str, found: Sequence[int], needed: Sequence[int]) -> None:
        if tuple(found) != tuple(needed):
            raise ShapeError(
                where, found=f"shape {list(found)}", needed=f"{list(needed)}, as it was bound"
            )

    def _rows_of(self, name: str) -> tuple[int, int]:
        """Return how many rows a weight is padded to, and in how many parts."""
        if name == "w2":
            return self.hidden, 1
        rows = self.intermediate * (2 if self.gated else 1)
        return rows, 2 if self.gated and not self.interleaved else 1


def padding_of(
    selection: Selection, w13: QTensor, w2: QTensor, platform: Platform
) -> ExpertPadding | None:
    """Return how the weights are padded for the kernel that was chosen, or None."""
    sizes = {row.size: row.to for row in selection.padded}
    if not sizes:
        return None
    _, hidden, intermediate = w2.shape
    return ExpertPadding(
        {"w13": w13.shape, "w2": w2.shape},
        sizes.get("hidden", hidden),
        sizes.get("intermediate", intermediate),
        bool(selection.problem["gated"]),
        bool(selection.problem["interleaved"]),
        platform,
    )
