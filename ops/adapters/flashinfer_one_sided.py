"""Exchange tokens through FlashInfer's one-sided kernels over NVLink.

Every rank has room for `max_tokens` rows of each other one, or fewer where the host knows better.
Codes travel as bytes beside scales (and second scales) as bytes, so that all formats of hal do; ids
and weights are payloads of the same call. Rows that nobody sent have ids of -1. One dispatch may be
open at a time. Memory is FlashInfer's own, shared by its instances of one layout.

FlashInfer has no format of 8 bits with one scale a token: its `FP8PerTensor` sizes the codes of
such rows, and the scale is asked for as further bytes. So is the second scale of hal's NVFP4.

Source: FlashInfer 0.7.4, flashinfer/moe_ep/backends/split/comm/nvlink_one_sided/communication.py
(`NVLinkOneSidedAlltoAll`, `_SUPPORTED_TOP_K`), moe_ep/core/comm/communication.py
(`MoEEpCommParams`), moeAlltoAllKernels.{h,cu} (`kMaxRanks`; ids below 0 go nowhere). Releases
before it have `MoeAlltoAll` instead, which is gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.arch import CudaArch
from hal.errors import ArgumentError
from hal.needs import Code, Needs
from hal.ops.adapters.exchanges import ForeignExchange
from hal.ops.adapters.foreign import attribute, named
from hal.ops.transports import EXPERT_PARALLEL, SIGNATURES, Received, Setup, rows_of_each
from hal.ops.transports.by_rows import finished
from hal.ops.transports.domain import LinkedBy
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.routing import Routing

PACKAGE, MODULE = "flashinfer-python", "flashinfer.moe_ep"
FORMATS = {
    "bf16": None,
    "fp8": "DeepSeekFp8",
    "fp8_token": "FP8PerTensor",
    "int8": "FP8PerTensor",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}
"""Formats of payloads as FlashInfer's `QuantFormat` sizes them."""
FURTHER_BYTES = {"fp8_token": 4, "int8": 4, "nvfp4": 4}
"""Of a row, beyond those: a float32 scale of the token."""
TOP_K = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 22)


class _State(NamedTuple):
    tokens: int
    room: int


class _OneSided(ForeignExchange):
    open_dispatches = 1

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        import torch

        payload, ranks = setup.payload, setup.ranks
        form = FORMATS[payload.format]
        if form is not None:
            form = attribute(PACKAGE, "flashinfer.fused_moe", f"QuantFormat.{form}")
        self._coded = form is not None
        part = {name: attribute(PACKAGE, MODULE, name) for name in _PARTS}
        place = ("world_size", "rank", "device", "process_group")
        boot = named(PACKAGE, part["BootstrapConfig"], *place)
        sizes = named(
            PACKAGE, part["MoEEpCommParams"], "num_experts", "top_k", "max_tokens_per_rank",
            "hidden_size", "dtype", "dispatch_format", "invalid_expert_id",
        )  # fmt: skip
        options: dict[str, Any] = {
            "extra_payload_bytes_per_token": FURTHER_BYTES.get(payload.format, 0),
            # A limit of FlashInfer's is in whole seconds.
            "timeout_sec": max(1, math.ceil(ranks.timeout)),
        }
        if self._coded:
            options["lamport"] = False  # it rewrites words that look like its sentinel
        config = named(PACKAGE, part["NVLinkOneSidedConfig"], *options)
        self.exchange = part["NVLinkOneSidedAlltoAll"](
            boot(
                world_size=ranks.size, rank=ranks.rank, device=setup.device.index,
                process_group=ranks.group,
            ),
            sizes(
                num_experts=self.numbers, top_k=payload.top_k, max_tokens_per_rank=setup.max_tokens,
                hidden_size=payload.hidden, dtype=setup.dtype, dispatch_format=form,
                invalid_expert_id=-1,
            ),
            config(**options),
        )  # fmt: skip
        self._dispatch = named(
            PACKAGE, self.exchange.dispatch, "hidden_states", "topk_ids", "topk_weights",
            "hidden_states_scale", "runtime_max_tokens_per_rank",
        )  # fmt: skip
        self._combine = named(PACKAGE, self.exchange.combine, "expert_output")
        self._open = False
        self._bytes = torch.uint8

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        import torch

        if self._open:
            raise ArgumentError(
                "expert_parallel: flashinfer_one_sided",
                found="a dispatch while another has not been combined",
                needed="one at a time",
                cure="combine it first; other transports have room for two",
            )
        payload = self.payload
        room = rows_of_each(self.setup, x.shape[0], counts)
        if not room:  # no rank has a token
            ids = torch.empty(0, payload.top_k, dtype=torch.int64, device=x.device)
            return Received(x, ids, ids.float(), _State(0, 0))
        codes, scales, second = self.codes.of(x)
        beside = None
        if scales is not None:
            codes = codes.view(self._bytes)
            parts = [scales] if second is None else [scales, second]
            beside = torch.cat([part.view(self._bytes) for part in parts], 1)
            self._scales = scales.dtype, scales.shape[1] * scales.element_size()
        found = self._dispatch(
            hidden_states=codes, topk_ids=self.numbering.of(routing.ids).int(),
            topk_weights=routing.weights.float().contiguous(), hidden_states_scale=beside,
            runtime_max_tokens_per_rank=room,
        )  # fmt: skip
        self._open = True
        rows = self._read(found.hidden_states, found.hidden_states_scale)
        # Ids and weights are where the next dispatch writes.
        ids = self.numbering.local(found.topk_ids.long())
        return Received(rows, ids, found.topk_weights.clone(), _State(x.shape[0], room))

    def _read(self, codes: torch.Tensor, beside: torch.Tensor | None) -> torch.Tensor:
        from hal.torch_compat import dtype

        if beside is None:
            return codes
        stored, size = self._scales
        scales = beside[:, :size].contiguous().view(stored)
        second = (
            beside[:, size:].contiguous().view(dtype("float32")) if size < beside.shape[1] else None
        )
        if not self.codes.how.packed:
            codes = codes.view(dtype(self.codes.encoding))
        return self.codes.read(codes, scales, second, self.setup.dtype)

    def combine(
        self, partial: torch.Tensor, state: _State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        if not state.room:
            return finished(torch.zeros_like(partial, dtype=torch.float32), shared, dtype)
        self._open = False
        sums = self._combine(expert_output=partial.contiguous())
        return finished(sums.float(), shared, dtype)


_PARTS = ("BootstrapConfig", "MoEEpCommParams", "NVLinkOneSidedConfig", "NVLinkOneSidedAlltoAll")


@EXPERT_PARALLEL.kernel(
    "flashinfer_one_sided",
    level=Level.NATIVE,
    band="specialised",
    signatures={name: SIGNATURES[name] for name in FORMATS},
    requires=(
        Needs.platform("cuda"),
        Needs.package(PACKAGE, "0.7.4"),
        Needs.at_least(CudaArch(9, 0)),
        Needs.one_of("backend", "nccl", code=Code.RANK),
        LinkedBy(("nvlink",)),
        Needs.between("hosts", 1, 1, "ranks of one host: hal cannot tell what others reach"),
        Needs.between("ranks", 1, 256),
        Needs.one_of("top_k", *TOP_K, hint="numbers that its kernels are made for"),
    ),
    claimed=True,
)
def bind_flashinfer_one_sided(setup: Setup) -> Any:
    """Put tokens into the other ranks' memory by FlashInfer's kernels, and get results from it."""
    return _OneSided(setup)
