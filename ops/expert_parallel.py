"""Move tokens to the ranks that hold their experts, and add up what comes back.

    received = dispatch(x, routing)        rows of all ranks that concern experts here
    partial  = experts(received.x, received.routing)
    y[t]     = sum over ranks of partial rows of t                      float32, in rank order

Activations travel as they are, or quantized row by row as a scheme's activations are. Where the
experts would quantize them the same way (`dispatch="auto"` takes care of that), their codes are
those that the experts compute themselves: what arrives is decoded into the activations' dtype, and
quantizing that again gives the same codes.

Slots that are not for this rank, and rows that only fill room, have the id -1, which every kernel
of experts skips. A token none of whose slots is present gets zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hal.errors import ForcedKernelError, ValueRangeError
from hal.ops.binding import select_for
from hal.ops.call_checks import WHERE, CallChecks, dtype_name_of
from hal.ops.dispatched import Dispatched, Sent, dispatched_of
from hal.ops.payload import SYMMETRIC, Payload, payload_format, workspace
from hal.ops.placement import Placement, placement_of
from hal.ops.rank_trials import count_hosts, has_collective, has_shared_memory
from hal.ops.ranks import Ranks
from hal.ops.routing import Routing
from hal.ops.transports import COLLECTIVES, EXPERT_PARALLEL, tokens_of_each
from hal.ops.transports.by_rows import finished
from hal.ops.workspace import Abandoning, Workspace
from hal.quant.represent import encoding_of
from hal.runtime import current_platform, platform_of
from hal.selection import choose, options_from

if TYPE_CHECKING:
    from hal.ops.transports import Exchange
    from hal.registry import Operand
    from hal.selection import Selection

__all__ = ["Dispatched", "ExpertParallel", "Sent"]


class ExpertParallel:
    """The exchange of tokens for layers whose experts are spread over a group of ranks.

    Making one is a collective call, in which all ranks compare their arguments. So are `dispatch`
    and `combine`: ranks without tokens take part, too.

    Args:
        group: Process group of torch.distributed; None is the default one.
        experts: Number of experts of the layer on all ranks together.
        top_k: Slots of a token.
        hidden: Columns of the activations.
        max_tokens: Most tokens of a rank in one dispatch.
        batch_tokens: Most tokens of a rank in one call of a layer, which cuts them into dispatches
            of at most `max_tokens`, each of which travels while the one before is computed; None
            is `max_tokens`.
        dispatch: Format in which activations travel, a name of `hal.ops.payload.FORMATS`; `auto`
            is that in which the kernel chosen for experts under `scheme` quantizes them, else bf16.
        scheme: Scheme of the experts.
        dtype: Dtype of the activations.
        placement: `linear`, `round_robin`, or a `Placement`.
        tensor_group: Group of the ranks that have the same tokens and each a part of the same
            experts; `combine` sums over it, too.
        transport: Transport to insist on, else the best that can run.
        host_sync: Whether calls may wait for the device to learn how many tokens others have;
            without that every call takes as long as one of `max_tokens`. Captured graphs need
            False.
        column_alignment: See `Payload`.
        device: Where the tensors are; None is the current platform's device type.
        platform: Platform to select for; None means that of the device.
        workspace: Buffers that are shared with other layers.
        timeout: Seconds that other ranks may let this one wait, where the backend's waiting blocks
            the host (`hal.ops.ranks`); other backends have the time limit of the group.

    Attributes:
        selection: Which transport was chosen, with every candidate and its reasons.
        payload: What travels for a token.
        automatic: Whether hal chose its format.
        placement: Which rank holds which experts.
        rank: Of this process in the group.
        workspace: The buffers.

    Raises:
        ArgumentError: For arguments that do not fit together, or are not equal on all ranks.
        NoKernelError: If no transport can run; carries the table of all candidates.
        ForcedKernelError: If the one insisted on cannot; names the one that can.
        RankError: If a rank does not take part. Nothing has been allocated in any of these cases.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        batch_tokens: int | None = None,
        dispatch: str = "auto",
        scheme: str = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        placement: str | Placement = "linear",
        tensor_group: Any = None,
        transport: str | None = None,
        host_sync: bool = True,
        column_alignment: int = 1,
        device: torch.device | str | None = None,
        platform: Any = None,
        workspace: Workspace | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not 0 < top_k <= experts:
            raise ValueRangeError(WHERE, found=f"top_k={top_k}", needed=f"1 to experts={experts}")
        if max_tokens < 1:
            raise ValueRangeError(WHERE, found=f"max_tokens={max_tokens}", needed="1 or more")
        self.batch_tokens = max_tokens if batch_tokens is None else batch_tokens
        if self.batch_tokens < max_tokens:
            raise ValueRangeError(
                WHERE,
                found=f"batch_tokens={batch_tokens}",
                needed=f"max_tokens={max_tokens} or more",
            )
        self.dtype, self.max_tokens, self.host_sync = dtype, max_tokens, host_sync
        self.device = torch.device(
            current_platform().torch_device_type if device is None else device
        )
        self.automatic = dispatch == "auto"
        read = self._read_by_experts(scheme, hidden, platform) if self.automatic else None
        format = payload_format(scheme, dispatch, read=read)
        self.payload = Payload(format, hidden, top_k, column_alignment)
        self.ranks = Ranks(group, self.device, timeout)
        # Tensors say which device of a type they are on, and are compared with this.
        self.device = torch.empty(0, device=self.device).device
        self.rank = self.ranks.rank
        self.tensor_ranks = None
        if tensor_group is not None:
            self.tensor_ranks = Ranks(tensor_group, self.device, timeout)
        self.placement = placement_of(placement, experts, self.ranks.size)
        for ranks in (self.tensor_ranks, self.ranks):
            if ranks is not None:
                ranks.greet()
        self.selection = self._select(experts, transport, platform)
        self.encoding, self.quantize = self._quantization(platform)
        self._checks = CallChecks(self.payload, dtype, self.device, max_tokens, self.ranks)
        self._agree(scheme)
        self.workspace = Workspace() if workspace is None else workspace
        self._abandoning = Abandoning(self.workspace)
        self.workspace.reserve(self.workspace_bytes(), self.ranks.size, self.device, self.ranks)
        assert self.selection.kernel is not None
        self._exchange: Exchange = self.selection.kernel.load()(self)

    @property
    def experts(self) -> int:
        """Return the number of experts on all ranks together."""
        return self.placement.experts

    @property
    def transport(self) -> str:
        """Return the name of the transport."""
        return str(self.selection.kernel and self.selection.kernel.name)

    @property
    def open_dispatches(self) -> int:
        """Return how many dispatches may have been sent and not combined at once."""
        return int(getattr(self._exchange, "open_dispatches", 2))

    def tokens_of_each(self, tokens: int) -> list[int] | None:
        """Return how many tokens every rank has; None without `host_sync`. A collective call.

        Raises:
            RankError: If another rank does not take part.
        """
        if not self.host_sync:
            return None
        with self._abandoning:
            return tokens_of_each(self.ranks, tokens)

    @property
    def weighs(self) -> bool:
        """Return whether `combine` applies the weights, and experts are given 1 for each slot."""
        return bool(getattr(self._exchange, "weighs", False))

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Return the experts of this rank in the order that its weights have: `w13[list(...)]`."""
        return self.placement.held[self.rank]

    def workspace_bytes(self) -> dict[str, int]:
        """Return the bytes of each buffer that this layer needs."""
        return dict(workspace(self.transport, self.payload, self.ranks.size, self.max_tokens))

    def dispatch(
        self, x: torch.Tensor, routing: Routing, *, tokens: Sequence[int] | None = None
    ) -> Dispatched:
        """Send tokens to their experts and return what this rank's experts are to compute.

        Args:
            x: `[tokens, hidden]`.
            routing: Experts, by the numbers of all ranks together, and weights of each token. Ids
                outside of them are absent slots.
            tokens: Tokens of every rank, in order, where the caller knows them: it spares ranks
                from asking each other, and the host from waiting for the device.

        Raises:
            ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
            ValueRangeError: For more tokens than `max_tokens`. Others wait for this rank then.
            RankError: If another rank does not take part.
        """
        self._checks.dispatch(x, routing, tokens)
        with self._abandoning:
            return dispatched_of(self._exchange.dispatch(x, routing, tokens), x.shape[0])

    def send(
        self, x: torch.Tensor, routing: Routing, *, tokens: Sequence[int] | None = None
    ) -> Sent:
        """Begin what `dispatch` does; `receive` ends it, and there may be work between the two.

        Tokens travel meanwhile. What is waited for here is how many of them: with `host_sync` where
        `tokens` does not say it, and by `all_to_all` always. `flashinfer_one_sided` and `mori` do
        all of it here. Arguments and errors are those of `dispatch`.

        Raises:
            ArgumentError: If tokens sent through the same workspace have not been received.
        """
        self._checks.dispatch(x, routing, tokens)
        with self._abandoning:
            return Sent(x.shape[0], self._exchange.send(x, routing, tokens))

    def receive(self, sent: Sent) -> Dispatched:
        """Return what `dispatch` does, of tokens that `send` has sent.

        Raises:
            RankError: If another rank does not take part.
        """
        with self._abandoning:
            return dispatched_of(self._exchange.receive(sent.state), sent.tokens)

    def combine(
        self,
        partial: torch.Tensor,
        dispatched: Dispatched,
        *,
        shared: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `[tokens, hidden]`: what all ranks' experts made of the tokens sent.

        Args:
            partial: `[rows, hidden]`, what the experts here made of `dispatched.x`: the sum over
                slots, weights applied.
            dispatched: What `dispatch` returned.
            shared: `[tokens, hidden]` bf16, fp16 or float32, the output of shared experts, added in
                float32. Under a tensor group it must be whole, not a part.

        Raises:
            ShapeError, DTypeError, DeviceMismatchError, GradientError: Each for its own fault.
            RankError: If another rank does not take part.
        """
        self._checks.combine(partial, dispatched, shared)
        with self._abandoning:
            if self.tensor_ranks is None:
                return self._exchange.combine(partial, dispatched.state, shared, partial.dtype)
            sums = self._exchange.combine(partial, dispatched.state, None, torch.float32)
            if sums.numel():
                self.tensor_ranks.all_reduce(sums)
        return finished(sums, shared, partial.dtype)

    def _quantization(self, platform: Any) -> tuple[str, Any]:
        """Return the number format of codes, and what makes them; None for activations as given.

        Raises:
            NoKernelError: If nothing can quantize to the format on the device.
        """
        how = self.payload.how
        if how.format is None:
            return "bfloat16", None
        scheme, problem = self.payload.scheme.name, {"features": self.payload.hidden}
        selection, _ = select_for("quantize", scheme, self.device, problem, platform=platform)
        assert selection.kernel is not None
        encoding = encoding_of(how.format, selection.spec.formats.fp8_encoding)
        return encoding, selection.kernel.load()

    def check(self) -> None:
        """Wait for what has been called, and raise if a rank did not take part in it.

        Calls that the host waits for, as with Gloo, raise themselves. With NCCL this waits for the
        last collective, at most `timeout`; of replayed graphs it knows nothing. Under
        `symmetric_memory` it waits for the current stream, whose kernels wait as long as that.

        Raises:
            RankError: Naming the ranks that did not come.
        """
        with self._abandoning:
            for ranks in (self.ranks, self.tensor_ranks):
                if ranks is not None:
                    ranks.settle()
            self._exchange.check()

    def _read_by_experts(self, scheme: str, hidden: int, platform: Any) -> Operand | None:
        """Return what the kernel that experts would run here reads as x."""
        spec = platform_of(self.device, platform).device(self.device.index)
        problem = {"hidden": hidden, "dtype": dtype_name_of(self.dtype)}
        kernel = choose("fused_moe", scheme, spec, problem, options_from("fused_moe")).kernel
        return None if kernel is None else kernel.operand(scheme, "x")

    def _select(self, experts: int, transport: str | None, platform: Any) -> Selection:
        problem = {
            "ranks": self.ranks.size,
            "experts": experts,
            "top_k": self.payload.top_k,
            "hidden": self.payload.hidden,
            "max_tokens": self.max_tokens,
            "dtype": dtype_name_of(self.dtype),
            "backend": self.ranks.backend,
            "host_sync": self.host_sync,
        }
        EXPERT_PARALLEL.check(problem)
        problem |= {name: has_collective(self.ranks, name) for name in COLLECTIVES}
        problem[SYMMETRIC] = has_shared_memory(self.ranks)
        problem["hosts"] = count_hosts(self.ranks)
        try:
            found, _ = select_for(
                "expert_parallel",
                self.payload.format,
                self.device,
                problem,
                platform=platform,
                force=transport,
            )
        except ForcedKernelError as error:
            able = [c.kernel.name for c in error.selection.candidates if c.can_run]
            cure = f"without it {able[0]} is taken" if able else "no other can run either"
            told = str(error).partition("\n")[0]
            raise ForcedKernelError(f"{told}; {cure}", error.selection) from None
        return found

    def _agree(self, scheme: str) -> None:
        payload = self.payload
        settings = {
            "experts": self.experts,
            "top_k": payload.top_k,
            "hidden": payload.hidden,
            "max_tokens": self.max_tokens,
            "batch_tokens": self.batch_tokens,
            "dispatch": payload.format,
            "column_alignment": payload.column_alignment,
            "scheme": scheme,
            "dtype": str(self.dtype),
            "encoding": self.encoding,
            "placement": [list(mine) for mine in self.placement.held],
            "transport": self.transport,
            "host_sync": self.host_sync,
        }
        self.ranks.agree(WHERE, settings)
        if self.tensor_ranks is not None:
            self.tensor_ranks.agree(f"{WHERE}: tensor_group", settings)

    def check_tokens(self, tokens: Sequence[int], mine: int, most: int) -> None:
        """Refuse what is not the number of tokens of every rank, at most `most` each.

        Raises:
            ArgumentError: For another number of ranks, or another number here than `mine`.
            ValueRangeError: For a number that cannot be.
        """
        self._checks.tokens(tokens, mine, most)

    def __reduce__(self) -> Any:
        raise TypeError("ExpertParallel belongs to a process group; make one in each process")

    def __deepcopy__(self, memo: Any) -> ExpertParallel:
        return self

    def __repr__(self) -> str:
        return (
            f"ExpertParallel(rank {self.rank} of {self.ranks.size}, {len(self.local_experts)} of "
            f"{self.experts} experts, {self.payload.format} by {self.transport})"
        )
