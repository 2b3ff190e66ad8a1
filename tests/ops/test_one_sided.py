"""The kernels of one-sided exchange, ranks of one process one after the other, interpreted."""

from __future__ import annotations

import parallel_overlap_worker as overlap
import pytest
import torch
import triton
import triton.language as tl
from one_sided_group import EXPERTS, Group, calls, check, made, partials_of, sums

from hal.errors import ArgumentError, RankError
from hal.ops import FusedMoE, Placement, Workspace
from hal.ops.kernels.row_codec import Codec, decoded_own
from hal.ops.payload import FORMATS
from hal.ops.transports import one_sided

pytestmark = [
    pytest.mark.interpreter,
    # numpy warns of infinities, which GPUs compute with.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("ranks", "tokens"), [(2, (7, 3)), (3, (0, 8, 1)), (1, (5,))])
def test_what_arrives_and_what_comes_back(format, ranks, tokens):
    # The interpreter truncates to bf16 where devices round, so that what is rounded is fp16 here.
    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    calls(Group(ranks, format, dtype=dtype), tokens)


@triton.jit
def _keep(x_ptr, scales_ptr, out_ptr, CODEC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, ROWS)
    place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x, scales = tl.load(x_ptr + place), tl.load(scales_ptr + row)
    out = decoded_own(x, x, scales, scales, CODEC, 1, False, "", False)
    tl.store(out_ptr + place, out)


def test_own_rows_where_the_hardware_encodes():
    """Every e4m3 number, what lies halfway to the next, and beside that: as torch rounds them."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, half, half.nextafter(codes[1:]), half.nextafter(codes[:-1])])
    x = torch.cat([x, -x, torch.full((1024 - 2 * len(x),), 1e-30)]).reshape(8, 128)
    out = torch.empty_like(x)
    scales = torch.tensor([1.0, 0.5, 2.0, 4.0, 1.0, 0.25, 8.0, 1.0])
    _keep[(1,)](x * scales[:, None], scales, out, "scaled", 8, 128)
    wanted = x.to(torch.float8_e4m3fn).float() * scales[:, None]
    assert torch.equal(out.view(torch.int32), wanted.view(torch.int32))  # signs of zeros, too
    bytes_ = torch.tensor([127, 126, 120, 135, 127, 127, 0, 253], dtype=torch.uint8)
    powers = torch.exp2(bytes_.double() - 127)[:, None]
    _keep[(1,)]((x * powers).float(), bytes_, out, "mx", 8, 128)
    # Row 6 lies below float32's normal numbers.
    wanted = (x.to(torch.float8_e4m3fn).double() * powers).float()
    assert torch.equal(out[:6], wanted[:6])
    assert torch.equal(out[7], wanted[7])
    broken = torch.full_like(bytes_, 255)
    _keep[(1,)](x, broken, out, "mx", 8, 128)
    assert out.isnan().all()


def test_ids_of_no_expert_and_tokens_of_none():
    def absent(x, routing):
        routing.ids[::2, 1] = -1
        routing.ids[1::3, 0] = EXPERTS + 3
        routing.ids[2] = -1

    calls(Group(2), (7, 8), change=absent)


def test_all_tokens_to_one_expert():
    def to_the_last(x, routing):
        routing.ids[:, 0] = EXPERTS - 1
        routing.ids[:, 1] = -1

    calls(Group(3), (4, 0, 8), change=to_the_last, shared=True)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "mxfp8", "nvfp4"])
def test_numbers_that_are_not_finite(format):
    def broken(x, routing):
        x[0, 3], x[2, 0], x[3, 159] = torch.nan, torch.inf, -torch.inf

    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    group = Group(2, format, dtype=dtype)
    inputs = made(2, 160, (5, 5), dtype=dtype)
    for x, routing in inputs:
        broken(x, routing)
    check(group, inputs, group.dispatch(inputs), group.room)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_copies_of_experts_take_turns(format):
    placement = Placement.balanced([9.0, 1.0, 2.0, 1.0, 5.0], 2, 4)
    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    calls(Group(2, format, placement=placement, dtype=dtype), (6, 8), times=2)


@pytest.mark.parametrize(
    ("format", "hidden"),
    [("bf16", 1), ("bf16", 1100), ("fp8", 130), ("fp8_token", 33), ("mxfp8", 72), ("mxfp4", 34),
     ("mxfp4", 96), ("nvfp4", 40), ("nvfp4", 21)],
)  # fmt: skip
def test_ragged_columns(format, hidden):
    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    calls(Group(2, format, hidden, dtype=dtype), (3, 1), times=1)


def test_scales_of_padding_are_zero():
    group = Group(2, "mxfp8", 160, dtype=torch.float16, alignment=256)
    inputs = made(2, 160, (5, 3), dtype=torch.float16)
    received = group.dispatch(inputs)
    check(group, inputs, received, group.room)
    window, places = group.windows[0], received[0].state.places
    scales = window.view(places.scales, (2 * group.room, 8), torch.uint8)
    here = received[0].ids.max(1).values >= 0
    # Of this rank's own rows none are stored.
    here[: group.room] = False
    assert here.any()
    assert (scales[here][:, 5:] == 0).all()


@pytest.mark.parametrize("room", [1, 5])
def test_fewer_rows_than_the_most(room):
    calls(Group(2, max_tokens=8), (room, 0), room=room)


def test_units_of_many_rows(monkeypatch):
    """Several flags a call, as for thousands of tokens."""
    monkeypatch.setattr(one_sided, "SMALL_ROOM", 0)
    for steps in ("STEPS", "RAW_STEPS", "COMBINE_STEPS"):
        monkeypatch.setattr(one_sided, steps, 1)
    monkeypatch.setattr(one_sided, "LARGE_UNIT", 64)
    assert one_sided.units_of(Codec("raw", 160), 8, 3) == (3, 64, 1, 8, 4, 0)
    calls(Group(2), (8, 2))
    monkeypatch.setattr(one_sided, "LARGE_UNIT", 128)
    monkeypatch.setattr(one_sided, "FEW_PROGRAMS", 2)
    coded = Codec("scaled", 160, 2, 128)
    assert one_sided.units_of(coded, 8, 3)[:4] == (3, 1, 1, 6), "of more programs than a combine"
    assert one_sided.units_of(Codec("raw", 160), 8, 3, back=True) == (2, 128, 1, 8, 4, 0)
    calls(Group(2, "fp8", dtype=torch.float16), (8, 2))


def test_two_dispatches_may_be_open_and_no_more():
    group = Group(2)
    one, two = made(2, 160, (3, 8)), made(2, 160, (8, 2), seed=9)
    first, second = group.dispatch(one), group.dispatch(two)
    check(group, one, first, group.room)
    check(group, two, second, group.room)
    with pytest.raises(ArgumentError, match="while two others have not been combined"):
        group.dispatch(one)
    partials = partials_of(group, group.room, 1)
    for inputs, received in ((one, first), (two, second)):
        wanted = sums(group, inputs, partials, group.room)
        for mine, sum_ in zip(
            group.combine(partials, received, dtype=torch.float32), wanted, strict=True
        ):
            assert torch.equal(mine, sum_)
    with pytest.raises(ArgumentError, match="combined before"):
        group.exchanges[0].combine(partials[0], first[0].state, None, torch.float32)


def test_a_rank_that_does_not_come_is_named_and_leaves_nothing_finite():
    group = Group(3)
    inputs = made(3, 160, (4, 4, 4))
    opened = [e.open(x, group.room) for e, (x, _) in zip(group.exchanges, inputs, strict=True)]
    for rank in (0, 1):  # rank 2 sends nothing
        group.exchanges[rank].launch_dispatch(*inputs[rank], *opened[rank], receive=False)
    for rank in (0, 1):
        group.exchanges[rank].launch_dispatch(*inputs[rank], *opened[rank], send=False)
        assert [bool(told) for told in group.windows[rank].failures] == [False, False, True]
    out = torch.zeros(4, 160)
    mine, other = group.exchanges[:2]
    other.launch_combine(opened[1][0].x, out, opened[1][1], receive=False)
    mine.launch_combine(opened[0][0].x, out, opened[0][1])
    assert out.isnan().all()
    with pytest.raises(RankError, match=r"\[2\]"):
        mine.combine(opened[0][0].x, opened[0][1], None, torch.bfloat16)
    with pytest.raises(RankError, match="a call after"):
        mine.dispatch(*inputs[0], None)


@pytest.fixture
def process_group():
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("format", ["bf16", "fp8_token"])
def test_a_layer_in_pieces_has_two_slots_open(format, process_group, monkeypatch):
    """The next piece is sent before the experts of one run, and takes the other slot."""
    layer = overlap.layer_of("all_gather", Workspace(), host_sync=False, dispatch=format)
    x, routing = overlap.inputs(0, 11)
    wanted = layer(x, routing, shared=overlap.shared_of(x))
    group = Group(1, format, max_tokens=overlap.PIECE)
    exchange, log = group.exchanges[0], []
    run = FusedMoE.__call__

    def experts(self, *arguments, **named):
        log.append(list(group.windows[0]._taken))
        return run(self, *arguments, **named)

    for name in ("send", "receive"):
        call = getattr(exchange, name)
        monkeypatch.setattr(exchange, name, lambda *a, n=name, c=call: (log.append(n), c(*a))[1])
    monkeypatch.setattr(layer.group, "_exchange", exchange)
    monkeypatch.setattr(FusedMoE, "__call__", experts)

    def shared():
        log.append("shared")
        return overlap.shared_of(x)

    y = layer(x, routing, shared=shared)
    both, one = [True, True], [[True, False], [False, True]]
    assert log[:3] == ["send", "shared", "receive"]
    assert log[3:8] == ["send", both, "receive", "send", both]
    assert log[8] == "receive"
    assert log[9] in one
    assert len(log) == 10
    assert group.windows[0]._taken == [False, False]
    # The interpreter truncates where devices round.
    assert float((y.float() - wanted.float()).norm() / wanted.float().norm()) < 0.01
