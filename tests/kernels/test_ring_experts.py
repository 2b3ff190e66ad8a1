"""Compare experts of few tokens, whose weights stream through shared memory, with float64.

The kernels are PTX: a GPU runs them, and elsewhere `ptx_interpreter` beside Triton's interpreter.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from far_apart import far_apart
from packed_weights import BF16, weight

from hal.ops.activations import Activation, activate
from hal.ops.few_tiles import ring_tiles
from hal.ops.kernels import ring_experts as module
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.few_launch import Rounding
from hal.ops.kernels.kinds import ALL_KINDS, FP8_UNITS, as_weight
from hal.ops.kernels.ring_experts import reads, ring_weight
from hal.ops.kernels.ring_rows import MOST_BYTES, ring_room
from hal.ops.tiles import Ring
from hal.quant.repack import CODE_LAYOUTS

KINDS = [
    ("int4_group_decode", 128), ("int4_group_decode", 32), ("uint4_group_decode", 64),
    ("mxfp4_decode", 32), ("nvfp4_decode", 16), ("int8_channel_decode", 0),
    ("fp8_channel_decode", 0), ("fp8_e5m2_decode", 0), ("fp8_block128_decode", 128),
    ("mxfp8_decode", 32),
]  # fmt: skip
SILU, PLAIN = Activation(), Activation("relu2", gated=False)
PAIRS = Activation("swiglu_oai", alpha=1.7, limit=2.0, interleaved=True)
RINGS = Ring(2, 2, 64), Ring(1, 1, 64)


@pytest.fixture(autouse=True)
def _only_nvidia(request):
    if "device" in request.fixturenames and torch.cuda.is_available() and torch.version.hip:
        pytest.skip("PTX: needs an NVIDIA GPU")


def ring_experts(*args, **options):
    if INTERPRETED.value:
        from ptx_interpreter import ptx

        context = ptx()
    else:
        context = nullcontext()
    with context:
        module.ring_experts(*args, **options)


def stored(kind, group, shape, generator, device):
    """Return a weight of experts, scales of neighbouring rows side by side, and its value."""
    experts, n, _ = shape
    if kind == "int8_channel_decode":
        b = torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
        scales = torch.rand(experts, n, generator=generator, device=device) / 50 + 1e-3
        given, value = {"b_scales": scales}, b.double() * scales.double()[..., None]
    else:
        options = {"group": group} if "int4" in kind else {}
        b, given, value = weight(kind, shape, generator, device, **options)
    if ALL_KINDS[kind].scales == "group" and ALL_KINDS[kind].scale_rows == 1:
        given = {
            name: one.mT.contiguous().mT if one.dim() == 3 else one for name, one in given.items()
        }
    return as_weight(kind, shape[-1], b, **given), value


class Layer:
    """Hold random experts whose sums stay near one, and compute them in float64."""

    def __init__(
        self, kinds, sizes, generator, device, activation=SILU, *, biased=False, planes=False
    ):
        experts, hidden, intermediate = sizes
        shapes = (
            (experts, intermediate * (2 if activation.gated else 1), hidden),
            (experts, hidden, intermediate),
        )
        self.activation, self.held, self.values = activation, [], []
        for (kind, group), shape in zip(kinds, shapes, strict=True):
            held, value = stored(kind, group, shape, generator, device)
            assert reads(kind, held)
            if planes:
                codes = CODE_LAYOUTS["int4_planes"].forward(held.codes.view(torch.uint8))
                scales = held.scales * FP8_UNITS["e4m3fn"]
                held = held._replace(codes=codes.view(torch.int32), scales=scales)
            self.held.append(ring_weight(kind, held, planes=planes))
            self.values.append(value)
        self.biases = (None, None)
        if biased:
            self.biases = tuple(
                torch.randn(shape[:2], generator=generator, device=device) for shape in shapes
            )

    def expected(self, x, ids, weights=None, shared=None, seen=lambda rows, _: rows.double()):
        out = torch.zeros(x.shape[0], self.values[1].shape[1], dtype=torch.float64)
        wide13, wide2 = (value.cpu() for value in self.values)
        bias13, bias2 = (None if one is None else one.cpu().double() for one in self.biases)
        for token, experts in enumerate(ids.tolist()):
            for slot, expert in enumerate(experts):
                if 0 <= expert < wide13.shape[0]:
                    made = wide13[expert] @ seen(x[token].cpu(), 0)
                    made += 0 if bias13 is None else bias13[expert]
                    h = rounded(activate(made[None], self.activation)[0], x.dtype)
                    y = wide2[expert] @ seen(h, 1)
                    y += 0 if bias2 is None else bias2[expert]
                    y *= 1 if weights is None else weights[token, slot].cpu().double()
                    out[token] += y
        return out if shared is None else out + shared.cpu().double()

    def run(
        self, x, ids, weights=None, *, rings=RINGS, shared=None, columns=None, dependent=False,
        rounding=None,
    ):  # fmt: skip
        columns = columns or self.values[1].shape[1]
        out = torch.full((x.shape[0], columns), float("nan"), dtype=x.dtype, device=x.device)
        ring_experts(
            x, *self.held, out, ids, weights, rings=rings, activation=self.activation,
            biases=self.biases, shared=shared, dependent=dependent, rounding=rounding,
        )  # fmt: skip
        return out


def rounded(rows, dtype):
    """Return rows as the kernel stores them; the interpreter rounds bf16 towards zero."""
    if INTERPRETED.value and dtype == BF16:
        return (rows.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return rows.to(dtype)


def some_ids(tokens, top_k, experts, generator, device):
    return (
        torch.rand(tokens, experts, generator=generator, device=device).argsort(-1)[:, :top_k].int()
    )


def error_of(found, wanted):
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def limit_of(dtype):
    """Return the relative error that rounding h and the output may make."""
    return 2**-7 if dtype == BF16 else 2**-9


WHOLE = (3, 256, 128), (Ring(2, 2, 64), Ring(1, 1, 64)), BF16
RAGGED = [
    ((3, 160, 96), (Ring(4, 2, 64), Ring(2, 2, 64)), torch.float16),  # tiles that are not there
    ((2, 384, 32), (Ring(2, 1, 128, 2), Ring(1, 2, 64, 2)), BF16),
]
SOME = KINDS[1], KINDS[3], KINDS[6], KINDS[8]


@pytest.mark.parametrize(
    ("kind", "group", "sizes", "rings", "dtype"),
    [
        *((*kind, *WHOLE) for kind in KINDS),
        *((*kind, *ragged) for kind in SOME for ragged in RAGGED),
    ],
)
def test_layer(device, generator, kind, group, sizes, rings, dtype):
    layer = Layer([(kind, group)] * 2, sizes, generator, device)
    x = torch.randn(2, sizes[1], generator=generator, device=device)
    # So that nothing is subnormal, or infinite, in fp16.
    x = (x / (layer.values[0].square().mean() * sizes[1]).sqrt()).to(dtype)
    ids = some_ids(2, 2, sizes[0], generator, device)
    weights = torch.rand(2, 2, generator=generator, device=device)
    ids[1, 0], weights[1, 0] = -1, float("nan")
    found = layer.run(x, ids, weights, rings=rings)
    weights[1, 0] = 0
    assert error_of(found, layer.expected(x, ids, weights)) < limit_of(dtype)


@pytest.mark.parametrize(
    ("activation", "top_k"), [(PLAIN, 1), (PAIRS, 3), (Activation("gelu", limit=1.0), 6)]
)
def test_activations_biases_and_what_is_added(device, generator, activation, top_k):
    kinds = ("int4_group_decode", 32), ("mxfp4_decode", 32)
    layer = Layer(kinds, (7, 128, 64), generator, device, activation, biased=True)
    x = torch.randn(3, 128, generator=generator, device=device).bfloat16() / 8
    ids = some_ids(3, top_k, 7, generator, device).long()
    ids[2] = -1
    weights = torch.rand(3, top_k, generator=generator, device=device).bfloat16()
    shared = torch.randn(3, 128, generator=generator, device=device)
    found = layer.run(x, ids, weights, shared=shared)
    assert error_of(found, layer.expected(x, ids, weights, shared)) < limit_of(BF16)
    torch.testing.assert_close(found[2], shared[2].to(BF16), rtol=2**-7, atol=0)
    alone = layer.run(x, ids)
    assert error_of(alone[:2], layer.expected(x, ids)[:2]) < limit_of(BF16)
    assert (alone[2] == 0).all()


def seen_as(codec, granularity, given):
    """Return what turns rows into the numbers that their codes stand for, in float64."""

    def seen(rows, which):
        rows = rows.float()
        parts = rows.view(-1, 128) if granularity == "group" else rows[None]
        top = MAXIMA[codec]
        scale = (parts.abs().amax(1) / top).clamp(min=1e-12)
        scale = scale if given is None else given[which].cpu().expand_as(scale)
        parts = (parts / scale[:, None]).clamp(-top, top)
        codes = parts.round() if codec == "int8" else parts.to(torch.float8_e4m3fn).float()
        return (codes.double() * scale.double()[:, None]).flatten()

    return seen


MAXIMA = {"e4m3fn": 448.0, "int8": 127.0}
QUANTIZED = [
    ("fp8_channel_decode", "e4m3fn", "row", False), ("fp8_channel_decode", "e4m3fn", "row", True),
    ("int8_channel_decode", "int8", "row", False), ("int8_channel_decode", "int8", "row", True),
    ("fp8_block128_decode", "e4m3fn", "group", False), ("int4_planes", "e4m3fn", "row", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "codec", "granularity", "static"), QUANTIZED)
@pytest.mark.parametrize(
    ("converts", "sizes", "tiles", "dtype"),
    [(False, (3, 256, 128), 4, BF16), (True, (2, 384, 128), 2, torch.float16)],
)
def test_rows_that_are_quantized(
    device, generator, kind, codec, granularity, static, converts, sizes, tiles, dtype
):
    """To the codes that the scheme has for them, with or without an instruction for those."""
    if converts and codec == "int8":
        pytest.skip("there is no such instruction")
    planes = kind == "int4_planes"
    kinds = [("int4_group_decode" if planes else kind, 128 if "int4" in kind else 0)] * 2
    layer = Layer(kinds, sizes, generator, device, planes=planes)
    x = torch.randn(2, sizes[1], generator=generator, device=device)
    x = (x / (layer.values[0].square().mean() * sizes[1]).sqrt()).to(dtype)
    ids = some_ids(2, 2, sizes[0], generator, device)
    ids[1, 0] = -1
    given = None
    if static:
        # Some rows pass the largest code.
        given = torch.tensor([0.8, 0.5], device=device) * (x.abs().max() / MAXIMA[codec])
    how = Rounding(
        granularity, codec, MAXIMA[codec], 1e-12, *((None, None) if given is None else given),
        unit=1 / FP8_UNITS["e4m3fn"] if planes else 1.0, converts=converts,
    )  # fmt: skip
    width = 128 if granularity == "group" else 64
    rings = Ring(tiles, 2, width, 2), Ring(1, 1, width, 2)
    found = layer.run(x, ids, rings=rings, rounding=how)
    wanted = layer.expected(x, ids, seen=seen_as(codec, granularity, given))
    assert error_of(found, wanted) < limit_of(dtype)
    x[0, 3] = float("inf")
    spoiled = layer.run(x, ids, rings=rings, rounding=how)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1], found[1])


def test_ids_of_absent_experts_are_not_read(device, generator):
    layer = Layer([("fp8_channel_decode", 0)] * 2, (2, 64, 32), generator, device)
    x = torch.randn(1, 64, generator=generator, device=device).bfloat16()
    ids = torch.tensor([[2**31 - 1, 1]], dtype=torch.int32, device=device)
    found = layer.run(x, ids)
    assert error_of(found, layer.expected(x, ids)) < limit_of(BF16)


def test_fewer_columns_than_the_weight_has_rows(device, generator):
    layer = Layer([("int4_group_decode", 32)] * 2, (2, 96, 64), generator, device)
    x = torch.randn(1, 96, generator=generator, device=device).bfloat16() / 8
    ids = torch.tensor([[1, 0]], device=device)
    found = layer.run(x, ids, columns=83, rings=(Ring(2, 2, 64), Ring(2, 1, 64)))
    assert error_of(found, layer.expected(x, ids)[:, :83]) < limit_of(BF16)


def test_experts_lie_far_apart(device, generator):
    """More than 2^31 elements from each other, and scales of groups likewise."""
    layer = Layer([("int4_group_decode", 32)] * 2, (2, 64, 32), generator, device)
    x = torch.randn(1, 64, generator=generator, device=device).bfloat16() / 8
    ids = torch.tensor([[1, 0]], device=device)
    near = layer.run(x, ids)
    placed = []
    for held in layer.held:
        far = held.weight._replace(
            codes=far_apart(held.weight.codes), scales=far_apart(held.weight.scales.mT).mT
        )
        assert min(far.codes.stride(0), far.scales.stride(0)) > 2**31
        placed.append(ring_weight(held.kind, far))
        assert reads(held.kind, placed[-1].weight)
    layer.held = placed
    assert torch.equal(layer.run(x, ids), near)


def test_what_is_no_number_stays_with_its_token(device, generator):
    layer = Layer([("mxfp4_decode", 32)] * 2, (2, 64, 32), generator, device)
    x = torch.randn(3, 64, generator=generator, device=device).bfloat16()
    ids = torch.tensor([[1, 0], [0, 1], [1, -1]], device=device)
    clean = layer.run(x, ids)
    x[1, 3] = float("nan")
    found = layer.run(x, ids)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_nothing_to_do(device, generator):
    layer = Layer([("int4_group_decode", 32)] * 2, (2, 64, 32), generator, device)
    x = torch.empty(0, 64, dtype=BF16, device=device)
    assert layer.run(x, torch.empty(0, 2, dtype=torch.int32, device=device)).shape == (0, 64)


def test_second_launch_that_begins_early(device, generator):
    """On a GPU that can: many times, since what is wrong with it is a race."""
    from hal.ops.kernels.common import starts_dependent

    if INTERPRETED.value or not starts_dependent(
        "cuda", "sm_{}{}".format(*torch.cuda.get_device_capability())
    ):
        pytest.skip("needs sm_90")
    layer = Layer([("int4_group_decode", 128)] * 2, (16, 1024, 512), generator, device)
    ids = some_ids(4, 4, 16, generator, device)
    for _ in range(50):
        x = torch.randn(4, 1024, generator=generator, device=device).bfloat16() / 8
        wanted = layer.run(x, ids)
        assert torch.equal(layer.run(x, ids, dependent=True), wanted)


def test_what_is_not_read(device, generator):
    kind = "int4_group_decode"
    held, _ = stored(kind, 32, (2, 64, 64), generator, device)
    assert reads(kind, held)
    assert not reads("int4_group_fp8", held)
    assert not reads("bf16", held)
    assert not reads(kind, held._replace(fnuz=True))
    assert not reads(kind, held._replace(scales=held.scales.contiguous()))
    assert not reads(kind, stored(kind, 32, (2, 48, 64), generator, device)[0])
    assert not reads(kind, stored(kind, 32, (2, 64, 72), generator, device)[0])


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8, 16])
def test_rings_fit_every_kind(kind, group, top_k):
    for sizes in ((4096, 14336), (2048, 768), (7168, 256), (2880, 2880), (64, 32)):
        first, second = ring_tiles((kind, kind), *sizes, top_k)
        side = 1 << (top_k - 1).bit_length()
        for ring in (first, second._replace(splits=second.splits * side)):
            room = ring_room(kind, group or 128, 1, ring)
            assert room.bytes <= MOST_BYTES
            assert ring.tiles * ring.splits <= 16
