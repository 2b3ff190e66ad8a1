"""What adapters to other libraries' exchanges share: codes beside scales, and ids as they number.

A library's exchange is a transport like hal's own (`hal.ops.transports`): tokens go in, rows with
local ids come out, and sums come back. Libraries number experts evenly over ranks, so hal gives
every rank as many numbers as the rank with the most experts has; those that no expert has are used
by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hal.ops.transports import Received, Setup
from hal.ops.transports.numbering import Numbering

if TYPE_CHECKING:
    import torch

    from hal.ops.routing import Routing

__all__ = ["Codes", "ForeignExchange"]


class Codes:
    """Quantize rows as a payload says, and read back what arrives.

    Args:
        setup: What the exchange is made of.
    """

    def __init__(self, setup: Setup) -> None:
        self.how, self.encoding = setup.payload.how, setup.encoding
        self.hidden, self.quantize = setup.payload.hidden, setup.quantize

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return codes, scales `[tokens, groups]` and second scales `[tokens, 1]`.

        Of activations as given, those and nothing else.
        """
        if self.quantize is None:
            return x.contiguous(), None, None
        codes, scales, *second = self.quantize(x, self.encoding, self.how, None)
        return (
            codes.contiguous(),
            scales.reshape(x.shape[0], -1).contiguous(),
            second[0].reshape(-1, 1).contiguous() if second else None,
        )

    def read(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        second: torch.Tensor | None,
        wanted: torch.dtype,
    ) -> torch.Tensor:
        """Return rows in the dtype of activations: of codes and what `of` returned beside them."""
        from hal.quant.represent import Coded, numbers

        if scales is None:
            return codes
        if self.how.granularity == "token":
            scales = scales.squeeze(-1)
        second = None if second is None else second.squeeze(-1).contiguous()
        coded = Coded(codes, scales.contiguous(), second)
        return numbers(coded, self.how, self.encoding, self.hidden).to(wanted)


class ForeignExchange:
    """The part of an exchange that all libraries have in common.

    Args:
        setup: What it is made of.
    """

    open_dispatches = 2
    """How many dispatches may have been sent and not combined at once."""
    weighs = False
    """Whether `combine` applies the weights, and not the experts."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.ranks, self.payload = setup, setup.ranks, setup.payload
        self.codes = Codes(setup)
        self.numbering = Numbering(setup.placement, self.ranks.rank, setup.device, even=True)
        self.numbers = self.numbering.each * self.ranks.size

    def dispatch(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        return self.receive(self.send(x, routing, counts))

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Any:
        """Begin a dispatch."""
        raise NotImplementedError

    def receive(self, sent: Any) -> Received:
        """End a dispatch that was begun; of libraries that cannot be halved, `send` did it all."""
        return sent

    def check(self) -> None:
        """Wait for the current stream: what a library noticed is raised by the device's next use.

        Libraries end the kernel that waited in vain, and with it the process's use of the device:
        no rank is named then, and there is no going on without a new process.
        """
        import torch

        torch.zeros(1, device=self.setup.device).item()
