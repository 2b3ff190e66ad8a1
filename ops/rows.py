"""Write tokens into the rows of bytes of a payload, and read them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hal.ops.payload import Payload
from hal.ops.transports import section
from hal.quant.represent import Coded, numbers
from hal.torch_compat import dtype

if TYPE_CHECKING:
    from hal.ops.quantize import QuantizeFunction

__all__ = ["Rows"]


class Rows:
    """A payload with the quantization that was selected for it on a device.

    Args:
        payload: What travels.
        encoding: Number format of the codes.
        quantize: What makes the codes, None for activations as given.
    """

    def __init__(self, payload: Payload, encoding: str, quantize: QuantizeFunction | None) -> None:
        self.payload, self.encoding, self._quantize = payload, encoding, quantize

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
        codes = section(rows, parts["codes"], torch.uint8)
        if self._quantize is None:
            codes.copy_(x.contiguous().view(torch.uint8))
            return
        values, scales, *second = self._quantize(x, self.encoding, self.payload.how, None)
        codes.copy_(values.view(torch.uint8))
        scales = scales.view(x.shape[0], -1)
        target = section(rows, parts["scales"], scales.dtype)
        target[:, : scales.shape[1]].copy_(scales)
        if target.shape[1] > scales.shape[1]:
            target[:, scales.shape[1] :].zero_()
        if second:
            section(rows, parts["second"], torch.float32).copy_(second[0].unsqueeze(-1))

    def unpack(
        self, rows: torch.Tensor, wanted: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return activations in the dtype wanted, physical ids, and weights."""
        parts = self.payload.parts
        physical = section(rows, parts["ids"], torch.int32)
        weights = section(rows, parts["weights"], torch.float32).clone()
        if self._quantize is None:
            return section(rows, parts["codes"], wanted).clone(), physical, weights
        return self._decode(rows).to(wanted), physical, weights

    def _decode(self, rows: torch.Tensor) -> torch.Tensor:
        payload, parts = self.payload, self.payload.parts
        how = payload.how
        stored = torch.uint8 if how.packed else dtype(self.encoding)
        values = section(rows, parts["codes"], torch.uint8).contiguous().view(stored)
        stored = torch.uint8 if how.scale_format == "e8m0" else dtype(how.scale_format or "float32")
        own = Payload(payload.format, payload.hidden, payload.top_k).scales
        scales = section(rows, parts["scales"], stored)[:, :own].contiguous()
        if how.granularity == "token":
            scales = scales.squeeze(-1)
        second = None
        if "second" in parts:
            second = section(rows, parts["second"], torch.float32).squeeze(-1).contiguous()
        return numbers(Coded(values, scales, second), how, self.encoding, payload.hidden)
