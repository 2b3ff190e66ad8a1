"""Write tokens straight into the memory of the ranks that have their experts, and results back.

Two kernels a layer, no collectives and no host: `hal.ops.kernels.dispatch_rows` quantizes, sends
each token once to each rank that has one of its experts, and waits for those of others;
`combine_rows` sends results back and sums in float32, in the order of ranks, so that equal input
gives equal bits. Activations as given are read by the experts where they arrived: `Dispatched.x` is
valid until it is combined.

Every rank has `room` rows for each other one, as with a gather: `max_tokens`, or fewer where the
host knows better. Rows that nobody sent have ids of -1 and hold whatever was there before.

A rank that does not come within the time limit leaves NaN in the sums of the others, and is named
by their next call, or by `check`: a kernel cannot raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.errors import ArgumentError
from hal.needs import Code, Needs
from hal.ops.payload import SYMMETRIC, slot_parts
from hal.ops.transports import (
    BACKENDS,
    EXPERT_PARALLEL,
    SIGNATURES,
    Received,
    Setup,
    rows_of_each,
)
from hal.ops.transports.kept import MOST_KEPT, Kept, Sent, State
from hal.ops.triton_since import needs_triton
from hal.ops.window import WHERE
from hal.registry import Level

if TYPE_CHECKING:
    import torch

    from hal.ops.kernels.dispatch_rows import Places
    from hal.ops.kernels.row_codec import Codec
    from hal.ops.payload import Payload
    from hal.ops.routing import Routing
    from hal.ops.window import Window

SMALL_ROOM = 64
"""Rows up to which a unit is a piece of a row, so that all programs have one."""
SMALL_UNIT, LARGE_UNIT = 1024, 8192
"""Columns of a unit of few and of many rows."""
STEPS, RAW_STEPS, COMBINE_STEPS = 8, 32, 2
"""Units of a program between flags: what waits can go on that much later, and a flag waits for all
that was written before. Nothing of rows that arrive as they are is done before all have come; sums
are made of what comes, so that few are left to make in the end."""
FEW_PROGRAMS = 128
"""Programs of a launch that copies, and of any with few rows."""
MANY: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"scaled": (256, 8, 128), "mx": (128, 8, 128), "nvfp4": (384, 4, 0)}
)
"""Programs, warps and most registers of a thread (0: what the compiler wants; on CUDA alone) with
many rows, by how they are coded: on two H200 within 5% of the best of 13 that were tried with 2048
and 8192 rows. Where registers leave room for one program on a compute unit, receivers begin when
senders have ended. All this is in benchmarks/results/h200_expert_parallel.txt."""
MOST_RANKS = 32
LOOKS_PER_SECOND = 1_000_000
"""How often a kernel looks at a flag while it waits: assumed, so that a time limit is one of order.

There is no clock that all threads of a program read alike, and they must leave their loop together.
"""


class Units(NamedTuple):
    """How rows are cut into units, and units dealt to programs.

    programs: Senders, and receivers.
    groups: Of a unit; of activations as given columns.
    steps: Units of a program between flags.
    turns: Flags of a program in a call.
    warps: Of a program.
    registers: See `MANY`.
    """

    programs: int
    groups: int
    steps: int
    turns: int
    warps: int
    registers: int = 0


def units_of(codec: Codec, room: int, most: int, *, back: bool = False) -> Units:
    """Choose how rows are cut up, by what all ranks know alike.

    Args:
        codec: How rows are coded.
        room: Rows that each rank has.
        most: Programs that there may be.
        back: Whether it is for a combine, which never has more programs than a dispatch.
    """
    raw = codec.kind == "raw"
    width, groups = (1, codec.columns) if raw else (codec.width, codec.groups)
    unit = SMALL_UNIT if room <= SMALL_ROOM else LARGE_UNIT
    whole = _power(groups)
    each = whole if codec.whole else min(whole, max(unit // width, 1))
    pieces = -(-groups // each)
    programs, warps, registers = FEW_PROGRAMS, min(max(each * width // 512, 4), 8), 0
    if not raw and room * pieces > 2 * FEW_PROGRAMS:
        programs, warps, registers = MANY[codec.kind]
    programs = min(programs, most)
    units = -(-room * pieces // programs)
    steps = max(min(units, COMBINE_STEPS if back else RAW_STEPS if raw else STEPS), 1)
    return Units(programs, each, steps, max(-(-units // steps), 1), warps, registers)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


class OneSided:
    """The exchange of one rank, through its window.

    Args:
        setup: What it is made of.
        window: See `hal.ops.window`; None is that of the setup's workspace.
    """

    def __init__(self, setup: Setup, window: Window | None = None) -> None:
        import torch

        from hal.ops.kernels.dispatch_rows import LOCAL_BITS
        from hal.ops.kernels.row_codec import Codec

        self.setup, self.ranks, self.payload = setup, setup.ranks, setup.payload
        self._window = window
        placement = setup.placement
        offsets, rank_of = placement.offsets, placement.rank_of
        table = [
            [rank_of[p] << int(LOCAL_BITS) | p - offsets[rank_of[p]] for p in places]
            for places in placement.turns()
        ]
        device = setup.device
        self._table = torch.tensor(table, dtype=torch.int32, device=device)
        counts = [len(places) for places in placement.copies()]
        self._copies = torch.tensor(counts, dtype=torch.int32, device=device)
        self._plain = Codec("raw", setup.payload.hidden)
        self._codec = codec_of(setup.payload, setup.encoding)
        self._kept: dict[tuple[int, int, torch.dtype], Kept] = {}
        self._kept_of: Window | None = None

    @property
    def window(self) -> Window:
        """Return the memory that ranks share."""
        return self.setup.workspace.window if self._window is None else self._window

    def dispatch(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Received:
        sent = self._begin(x, routing, counts)
        self.launch_dispatch(*sent)
        return sent.received

    def send(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Sent:
        sent = self._begin(x, routing, counts)
        self.launch_dispatch(*sent, receive=False)
        return sent

    def receive(self, sent: Sent) -> Received:
        self.ranks.check()
        self.window.check(self.ranks)
        self._check_window(sent.state)
        self.launch_dispatch(*sent, send=False)
        return sent.received

    def _begin(self, x: torch.Tensor, routing: Routing, counts: Sequence[int] | None) -> Sent:
        self.ranks.check()
        self.window.check(self.ranks)
        room = rows_of_each(self.setup, x.shape[0], counts)
        return Sent(x, routing, *self.open(x, room))

    def open(self, x: torch.Tensor, room: int) -> tuple[Received, State]:
        """Take a slot, and return what will lie in it."""
        import torch

        window = self.window
        # Where no rank has a token, nothing is launched and no slot is needed.
        slot = window.take() if room else 0
        kept = self._keep(window, slot, room, x.dtype)
        state = State(kept, x.new_empty(x.shape[0], dtype=torch.int64))
        arrived = kept.arrived
        if arrived is None:
            arrived = x.new_empty(self.ranks.size * room, self.payload.hidden)
        return Received(arrived, kept.ids, kept.weights, state), state

    def _keep(self, window: Window, slot: int, room: int, dtype: torch.dtype) -> Kept:
        """Return what calls have in common, made by the first one."""
        if self._kept_of is not window or len(self._kept) >= MOST_KEPT:
            self._kept.clear()
            self._kept_of = window
        found = self._kept.get((slot, room, dtype))
        if found is not None:
            return found
        import torch

        from hal.ops.kernels.again import Repeats

        payload, codec, places = self.payload, self._codec, self._places(window, slot)
        raw = codec.kind == "raw"
        rows, top_k = self.ranks.size * room, payload.top_k
        back = units_of(self._plain, room, window.programs, back=True)._asdict()
        del back["registers"]
        found = self._kept[slot, room, dtype] = Kept(
            window, slot, room, places,
            window.view(places.codes, (rows, payload.hidden), dtype) if raw else None,
            window.view(places.ids, (rows, top_k), torch.int32),
            window.view(places.weights, (rows, top_k), torch.float32),
            units_of(codec, room, window.programs)._asdict(),
            {"block": back.pop("groups"), **back},
            Repeats(), Repeats(),
        )  # fmt: skip
        return found

    def launch_dispatch(
        self,
        x: torch.Tensor,
        routing: Routing,
        received: Received,
        state: State,
        *,
        send: bool = True,
        receive: bool = True,
    ) -> None:
        """Send, or wait for what was sent, or both."""
        if not state.room:
            return
        from hal.ops.kernels.dispatch_rows import dispatch_rows

        codec, window = self._codec, self.window
        raw = codec.kind == "raw"
        x, ids, weights = _in_rows(x), _in_rows(routing.ids), _in_rows(routing.weights)
        hits, out = state.hits, x if raw else received.x
        like = (
            send, receive, x.dtype, ids.dtype, weights.dtype,
            x.stride(0), ids.stride(0), weights.stride(0),
            x.data_ptr() & 15, ids.data_ptr() & 15, weights.data_ptr() & 15,
            hits.data_ptr() & 15, out.data_ptr() & 15,
        )  # fmt: skip
        repeats = state.kept.dispatches
        if repeats.launch(like, (x, ids, weights, hits, out, x.shape[0])):
            return
        found = dispatch_rows(
            x, ids, weights, state.hits, None if raw else received.x,
            table=self._table, copies=self._copies, peers=window.peers, state=window.state,
            places=state.places, codec=codec, me=self.ranks.rank, room=state.room,
            limit=self._limit(), send=send, receive=receive, **state.kept.out,
        )  # fmt: skip
        repeats.keep(like, found)

    def combine(
        self, partial: torch.Tensor, state: State, shared: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        from hal.ops.transports.by_rows import finished

        self.ranks.check()
        window = self.window
        window.check(self.ranks)
        if not state.room:
            sums = torch.zeros(0, self.payload.hidden, device=partial.device)
            return finished(sums, shared, dtype)
        self._check_window(state)
        if not window.holds(state.slot):
            raise ArgumentError(
                WHERE,
                found="a dispatch that was combined before",
                needed="one combine for each dispatch",
            )
        out = torch.empty(len(state.hits), self.payload.hidden, dtype=dtype, device=partial.device)
        self.launch_combine(partial, out, state, shared)
        window.give(state.slot)
        return out

    def launch_combine(
        self,
        partial: torch.Tensor,
        out: torch.Tensor,
        state: State,
        shared: torch.Tensor | None = None,
        *,
        send: bool = True,
        receive: bool = True,
    ) -> None:
        """Send results, or wait for what was sent and sum, or both."""
        from hal.ops.kernels.combine_rows import combine_rows

        window = self.window
        partial = _in_rows(partial)
        shared = None if shared is None else _in_rows(shared)
        hits, more = state.hits, out if shared is None else shared
        like = (
            send, receive, partial.dtype, out.dtype, more.dtype, shared is None,
            partial.stride(0), more.stride(0),
            partial.data_ptr() & 15, out.data_ptr() & 15, more.data_ptr() & 15,
            hits.data_ptr() & 15,
        )  # fmt: skip
        repeats = state.kept.combines
        if repeats.launch(like, (partial, more, out, hits, out.shape[0])):
            return
        found = combine_rows(
            partial, out, hits, shared,
            peers=window.peers, state=window.state, places=state.places, me=self.ranks.rank,
            room=state.room, top_k=self.payload.top_k,
            limit=self._limit(), send=send, receive=receive, **state.kept.back,
        )  # fmt: skip
        repeats.keep(like, found)

    def check(self) -> None:
        window = self.window
        window.state[-1:].tolist()  # waits for the stream
        window.check(self.ranks)

    def _check_window(self, state: State) -> None:
        """Refuse to go on in other memory than where a dispatch began."""
        if state.room and state.kept.window is not self.window:
            raise ArgumentError(
                WHERE,
                found="a dispatch whose memory a layer that was made since has replaced",
                needed="no layer that needs more memory between a dispatch and its combine",
                cure="make all layers of a workspace before the first call",
            )

    def _limit(self) -> int:
        """Return how often a flag is looked at within the time limit."""
        return int(self.ranks.timeout * LOOKS_PER_SECOND)

    def _places(self, window: Window, slot: int) -> Places:
        from hal.ops.kernels.dispatch_rows import Places

        parts = slot_parts(self.payload, self.ranks.size, self.setup.max_tokens)
        begin = window.begin(slot)
        names = Places.__dataclass_fields__
        return Places(**{n: begin + parts[n].start if n in parts else 0 for n in names})


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def codec_of(payload: Payload, format: str) -> Codec:
    """Return how the codes of a payload, of the number format `format`, are made on this device."""
    from hal.formats import number_format
    from hal.ops.kernels.common import converts_fp8
    from hal.ops.kernels.row_codec import Codec
    from hal.quant.codec import SCALE_FLOOR
    from hal.quant.mx import exponent_rule
    from hal.quant.scheme import group_of
    from hal.torch_compat import dtype

    how, hidden = payload.how, payload.hidden
    if how.format is None:
        return Codec("raw", hidden)
    packed = how.packed
    second = how.second != "none"
    kind = "nvfp4" if second else "mx" if how.scale_format == "e8m0" else "scaled"
    fnuz = format == "e4m3fnuz"
    integer = how.format == "int8"
    if packed:
        # Scales of nvfp4 by integers everywhere: ptxas 12.8 merges conversions, and then errs.
        encoding = "" if kind == "mx" else "e4m3fn"
    elif integer:
        encoding = ""
    elif kind == "mx" and fnuz:
        encoding = "e4m3fn"
    elif fnuz:
        encoding = "e4m3fnuz"
    else:
        encoding = "" if converts_fp8(dtype("e4m3fn")) else "e4m3fn"
    group = group_of(how.granularity)
    addend, top = exponent_rule("e2m1" if packed else "e4m3fn")
    return Codec(
        kind, hidden,
        groups=payload.scales,
        width=max(_power(hidden), 16) if group is None else group,
        whole=group is None or second,
        per_word=1 if not packed else 8 if hidden % 8 == 0 else 2,
        integer=integer, encoding=encoding, fnuz=fnuz, addend=addend, top_exponent=top,
        quant_max=1.0 if packed else float(number_format(format).quantization_maximum),
        scale_floor=SCALE_FLOOR,
    )  # fmt: skip


@EXPERT_PARALLEL.kernel(
    "symmetric_memory",
    level=Level.NATIVE,
    band="specialised",
    signatures=SIGNATURES,
    requires=(
        Needs.platform("cuda", "rocm"),
        Needs.package("torch"),
        Needs.feature("triton"),
        needs_triton(),
        Needs.between("hidden", 1, 32768, "a token may have one scale"),
        Needs.one_of("backend", *BACKENDS, code=Code.RANK),
        Needs.between("ranks", 1, MOST_RANKS, "a bit for each rank, and flags that each one polls"),
        Needs.one_of(
            SYMMETRIC,
            True,
            code=Code.RANK,
            hint="ranks of one host whose devices reach each other's memory, and a torch that has "
            "torch.distributed._symmetric_memory; it was tried on every rank",
        ),
    ),
)
def bind_symmetric_memory(setup: Setup) -> Any:
    """Write tokens into the other ranks' memory, and what was made of them back, by two kernels."""
    return OneSided(setup)
