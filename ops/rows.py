"""Write tokens into the rows of bytes of a payload, and read them back."""

from __future__ import annotations

from typing import Any

import torch

from hal.ops.binding import select_for
from hal.ops.payload import Payload
from hal.ops.transports import section
from hal.quant.represent import Coded, encoding_of, numbers
from hal.torch_compat import dtype

__all__ = ["Rows"]


class Rows:
    """A payload with the quantization that is selected for it on a device.

    Attributes:
        encoding: Number format of the codes.

    Raises:
        NoKernelError: If nothing can quantize to the format there.
    """

    def __init__(self, payload: Payload, device: torch.device, platform: Any) -> None:
        self.payload, self.encoding = payload, "bfloat16"
        self._quantize: Any = None
        how = payload.how
        if how.format is not None:
            scheme, problem = payload.scheme.name, {"features": payload.hidden}
            selection, _ = select_for("quantize", scheme, device, problem, platform=platform)
            assert selection.kernel is not None
            self.encoding = encoding_of(how.format, selection.spec.formats.fp8_encoding)
            self._quantize = selection.kernel.load()

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
