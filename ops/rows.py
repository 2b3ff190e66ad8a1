"""Write tokens into the rows of bytes of a payload, and read them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hal.ops.payload import Payload
from hal.ops.row_codes import RowCodes
from hal.ops.transports import section

if TYPE_CHECKING:
    from hal.ops.quantize import QuantizeFunction

__all__ = ["Rows"]


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

    def pack(
        self, rows: torch.Tensor, x: torch.Tensor, physical: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Write tokens into `rows` `[tokens, row_bytes]` uint8.

        Args:
            rows: Where to.
            x: `[tokens, hidden]` bf16 or fp16.
            physical: `[tokens, top_k]` physical ids, -1 of absent slots.
            weights: `[tokens, top_k]`.
        """
        parts = self.payload.parts
        section(rows, parts["ids"], torch.int32).copy_(physical)
        section(rows, parts["weights"], torch.float32).copy_(weights)
        if self._quantize is None:
            section(rows, parts["codes"], x.dtype).copy_(x)
            return
        values, scales, *second = self._quantize(x, self.encoding, self.payload.how, None)
        section(rows, parts["codes"], torch.uint8).copy_(values.view(torch.uint8))
        scales = scales.view(x.shape[0], -1)
        target = section(rows, parts["scales"], scales.dtype)
        if target.shape[1] > scales.shape[1]:
            target[:, scales.shape[1] :].zero_()
            target = target[:, : scales.shape[1]]
        target.copy_(scales)
        if second:
            section(rows, parts["second"], torch.float32).copy_(second[0].unsqueeze(-1))

    def unpack(
        self, rows: torch.Tensor, wanted: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return activations in the dtype wanted, physical ids, and weights."""
        parts = self.payload.parts
        physical = section(rows, parts["ids"], torch.int32)
        weights = section(rows, parts["weights"], torch.float32).clone()
        if self._codes is None:
            return section(rows, parts["codes"], wanted).clone(), physical, weights
        values = section(rows, parts["codes"], self._codes.stored)
        scales = section(rows, parts["scales"], self._codes.scale_dtype)
        if scales.shape[1] > self._codes.scales:
            scales = scales[:, : self._codes.scales]
        second = section(rows, parts["second"], torch.float32) if "second" in parts else None
        return self._codes.decode(values, scales, second, wanted), physical, weights
