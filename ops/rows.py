"""Write tokens into the rows of bytes of a payload, and read them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hal.ops.payload import Part, Payload
from hal.ops.row_codes import RowCodes

if TYPE_CHECKING:
    from hal.ops.quantize import QuantizeFunction

__all__ = ["RowParts", "Rows"]


class RowParts(NamedTuple):
    """Rows of a payload, and their parts seen in their own dtypes.

    Attributes:
        rows: uint8 `[rows, row_bytes]`.
        ids: int32 `[rows, top_k]`.
        weights: float32 `[rows, top_k]`.
        codes: uint8 `[rows, bytes]`, the activations themselves where nothing quantizes them.
        scales: uint8 `[rows, bytes]`, those of padding included, or None.
        second: float32 `[rows, 1]`, or None.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor | None
    second: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, payload: Payload) -> RowParts:
        """Take rows `[rows, row_bytes]` apart."""

        def section(part: Part | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if part is None else rows[:, part.start : part.stop].view(dtype)

        parts = payload.parts
        ids, weights = section(parts["ids"], torch.int32), section(parts["weights"], torch.float32)
        codes = section(parts["codes"], torch.uint8)
        assert ids is not None
        assert weights is not None
        assert codes is not None
        scales = section(parts.get("scales"), torch.uint8)
        return cls(rows, ids, weights, codes, scales, section(parts.get("second"), torch.float32))


class Rows:
    """A payload with the quantization that was selected for it on a device.

    Args:
        payload: What travels.
        encoding: Number format of the codes.
        quantize: What makes the codes, None for activations as given.
        device: Where rows are that are read.
    """

    def __init__(
        self,
        payload: Payload,
        encoding: str,
        quantize: QuantizeFunction | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.payload, self.encoding, self._quantize = payload, encoding, quantize
        self._codes = None
        if quantize is not None:
            self._codes = RowCodes(payload.how, encoding, payload.hidden, device)

    def pack(self, parts: RowParts, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Write tokens into rows, all but their ids.

        Args:
            parts: Where to, `[tokens, ...]`.
            x: `[tokens, hidden]` bf16 or fp16.
            weights: `[tokens, top_k]`.
        """
        parts.weights.copy_(weights)
        if self._quantize is None:
            parts.codes.view(x.dtype).copy_(x)
            return
        values, scales, *second = self._quantize(x, self.encoding, self.payload.how, None)
        parts.codes.copy_(values.view(torch.uint8))
        scales = scales.view(x.shape[0], -1).view(torch.uint8)
        target = parts.scales
        assert target is not None
        if target.shape[1] > scales.shape[1]:
            target[:, scales.shape[1] :].zero_()
            target = target[:, : scales.shape[1]]
        target.copy_(scales)
        if parts.second is not None:
            parts.second.copy_(second[0].unsqueeze(-1))

    def unpack(self, parts: RowParts, wanted: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations in the dtype wanted, and weights; no views of the rows."""
        weights = parts.weights.clone()
        codes = self._codes
        if codes is None:
            return parts.codes.view(wanted).clone(), weights
        assert parts.scales is not None
        scales = parts.scales.view(codes.scale_dtype)
        if scales.shape[1] > codes.scales:
            scales = scales[:, : codes.scales]
        values = parts.codes.view(codes.stored)
        return codes.decode(values, scales, parts.second, wanted), weights
