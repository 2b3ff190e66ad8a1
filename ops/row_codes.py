"""Give back what rows of codes mean, in few operations of torch.

    x[t, c] = code[t, c] * scale[t, c / group] (* second[t])    in float32, then in the dtype of x

`hal.quant.represent.numbers` is the definition, and these are its bits: each product but the last
is exact, because an e2m1 number has 2 significant bits and an e4m3 scale 4.
Where a scale is not that of whole columns, the definition itself is what runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hal.quant import e2m1
from hal.quant.mx import decode_e8m0
from hal.quant.nibbles import unpack
from hal.quant.represent import Coded, numbers
from hal.quant.scheme import group_of
from hal.torch_compat import dtype

if TYPE_CHECKING:
    from hal.quant.scheme import Quantization

__all__ = ["RowCodes"]


class RowCodes:
    """The codes of rows under one way of storing activations, on a device.

    Args:
        how: How activations are stored, quantized by row or by group.
        encoding: Number format of the codes.
        columns: Of a row.
        device: Where the rows are.

    Attributes:
        stored: Dtype of the codes, uint8 where there are two in a byte.
        scale_dtype: Dtype of the scales, uint8 for e8m0.
        scales: Scales of a row.
    """

    def __init__(
        self, how: Quantization, encoding: str, columns: int, device: torch.device | str
    ) -> None:
        group = group_of(how.granularity) or columns
        self.how, self.encoding, self.columns = how, encoding, columns
        self.stored = torch.uint8 if how.packed else dtype(encoding)
        powers = how.scale_format == "e8m0"
        self.scale_dtype = torch.uint8 if powers else dtype(how.scale_format or "float32")
        self.scales = -(-columns // group)
        self._group, self._whole = group, columns % group == 0
        every = torch.arange(256, dtype=torch.uint8)
        self._powers = decode_e8m0(every).to(device) if powers else None
        self._pairs = _pairs(every).to(device) if how.packed else None

    def decode(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        second: torch.Tensor | None,
        wanted: torch.dtype,
    ) -> torch.Tensor:
        """Return `[rows, columns]` of the dtype wanted.

        Args:
            codes: `[rows, ...]` of `stored`, each row contiguous.
            scales: `[rows, scales]` of `scale_dtype`.
            second: float32 `[rows, 1]`, or None.
            wanted: bf16 or fp16.
        """
        if not self._whole:
            return self._defined(codes, scales, second).to(wanted)
        shape = codes.shape[0], self.scales, self._group
        if self._powers is not None:
            scales = self._powers[scales.long()]
        values = self._values(codes).view(shape)
        factors = scales.unsqueeze(-1)
        if second is not None:
            values = values * factors.to(torch.bfloat16)
            factors = second.unsqueeze(-1)
        found = torch.empty(shape, dtype=wanted, device=codes.device)
        # In float32, which is what both are promoted to, and rounded as it is written.
        return torch.mul(values, factors, out=found).view(shape[0], self.columns)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers of codes, exact, in a dtype that a float32 factor promotes."""
        if self._pairs is not None:
            found = self._pairs.index_select(0, codes.to(torch.int32).view(-1))
            return found.view(torch.bfloat16)
        return codes.float() if codes.dtype.is_floating_point else codes

    def _defined(
        self, codes: torch.Tensor, scales: torch.Tensor, second: torch.Tensor | None
    ) -> torch.Tensor:
        scales = scales.squeeze(-1) if self.how.granularity == "token" else scales
        second = None if second is None else second.squeeze(-1).contiguous()
        coded = Coded(codes.contiguous(), scales.contiguous(), second)
        return numbers(coded, self.how, self.encoding, self.columns)


def _pairs(every: torch.Tensor) -> torch.Tensor:
    """Return for each byte its two e2m1 numbers in bf16, as one int32."""
    both = e2m1.decode(unpack(every.unsqueeze(-1), 2))
    return both.to(torch.bfloat16).view(torch.int32).view(-1)
