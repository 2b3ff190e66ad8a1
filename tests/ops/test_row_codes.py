"""Rows of codes mean what `hal.quant` says, bit for bit, and numbers of copies are looked up."""

from __future__ import annotations

import pytest
import torch

from hal.ops import Placement
from hal.ops.payload import FORMATS, Payload
from hal.ops.row_codes import RowCodes
from hal.ops.transports.by_rows import finished
from hal.ops.transports.numbering import Numbering, SlotIds
from hal.quant.represent import Coded, encoding_of, numbers

CODED = [name for name in FORMATS if name != "bf16"]
CPU = torch.device("cpu")
PLACEMENTS = [
    Placement.linear(5, 2),
    Placement.round_robin(7, 3),
    Placement.balanced([9.0, 1.0, 2.0, 1.0, 5.0], 2, 4),
]


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("format", CODED)
def test_any_bytes_are_the_numbers_of_their_definition(format, fp8, wanted):
    generator = torch.Generator().manual_seed(3)
    for hidden in (1, 21, 33, 96, 128, 160, 256):  # under 128 to a scale, and with ragged groups
        payload = Payload(format, hidden, 2)
        how, encoding = payload.how, encoding_of(payload.how.format, fp8)
        read = RowCodes(how, encoding, hidden, CPU)
        assert read.scales == payload.scales
        for rows in (0, 1, 70):
            # Parts of wider rows, as they lie in a buffer; every byte of a scale occurs, NaN too.
            wide = [
                torch.randint(0, 256, (rows, 16 * 40), generator=generator, dtype=torch.uint8)
                for _ in range(2)
            ]
            codes = wide[0][:, : payload.parts["codes"].size].view(read.stored)
            scales = wide[1][:, : payload.parts["scales"].size].view(read.scale_dtype)
            second = None
            if how.second != "none":
                second = torch.rand(rows, 3, generator=generator)[:, 1:2]
            found = read.decode(codes, scales, second, wanted)
            one = scales.squeeze(-1) if how.granularity == "token" else scales
            more = None if second is None else second.squeeze(-1)
            coded = Coded(codes.contiguous(), one.contiguous(), more)
            defined = numbers(coded, how, encoding, hidden).to(wanted)
            assert found.shape == (rows, hidden)
            assert found.is_contiguous()
            assert torch.equal(found.isnan(), defined.isnan())
            known = ~found.isnan()
            assert torch.equal(found[known].view(torch.int16), defined[known].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_numbers_of_any_ids(placement, even, dtype):
    ends = torch.iinfo(dtype)
    strange = [ends.min, -7, -1, placement.experts, placement.experts + 1, ends.max]
    ids = torch.tensor([*range(placement.experts), *strange], dtype=dtype)
    ids = torch.stack((ids, ids.flip(0)), 1)
    each = max(map(len, placement.held))
    for rank in range(placement.ranks):
        numbering = Numbering(placement, rank, CPU, even=even)
        found = numbering.of(ids)
        assert found.dtype == torch.int64
        for token, row in enumerate(ids.tolist()):
            for slot, expert in enumerate(row):
                wanted = -1
                if 0 <= expert < placement.experts:
                    copies = placement.copies()[expert]
                    wanted = copies[(token + rank) % len(copies)]
                    if even:
                        holder = placement.rank_of[wanted]
                        wanted += holder * each - placement.offsets[holder]
                assert int(found[token, slot]) == wanted
        given = torch.cat((found.to(dtype), ids))
        local = numbering.local(given)
        assert local.dtype == dtype
        held = len(placement.held[rank])
        for number, mine in zip(given.flatten().tolist(), local.flatten().tolist(), strict=True):
            here = 0 <= number - numbering.first < held
            assert mine == (number - numbering.first if here else -1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ids_that_travel_say_where_a_slot_goes(placement, dtype):
    ends = torch.iinfo(dtype)
    strange = [ends.min, -7, -1, placement.experts, placement.experts + 1, ends.max]
    ids = torch.tensor([*range(placement.experts), *strange], dtype=dtype)
    ids = torch.stack((ids, ids.flip(0)), 1)
    sender = placement.ranks - 1
    rows = torch.zeros(len(ids), 9, dtype=torch.int32)
    sent = rows[:, 3:5]
    SlotIds(placement, sender, CPU).write(ids, sent)
    assert not rows[:, :3].any()
    assert not rows[:, 5:].any()
    physical = Numbering(placement, sender, CPU).of(ids)
    every = [SlotIds(placement, rank, CPU) for rank in range(placement.ranks)]
    local = [each.local(sent) for each in every]
    for token, row in enumerate(physical.tolist()):
        for slot, place in enumerate(row):
            holder = placement.rank_of[place] if place >= 0 else placement.ranks
            assert int(every[0].rank_of[sent[token, slot]]) == holder
            for rank, mine in enumerate(local):
                wanted = place - placement.offsets[rank] if rank == holder else -1
                assert int(mine[token, slot]) == wanted
    assert {each.dtype for each in local} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_rounded_once(dtype):
    sums, shared = torch.randn(2, 9, 33).mul_(3).unbind()
    shared = shared.bfloat16()
    assert torch.equal(finished(sums, None, dtype), sums.to(dtype))
    assert torch.equal(finished(sums, shared, dtype), (sums + shared.float()).to(dtype))
