"""Binding experts in place: the memory that it takes, and what becomes of the weights given."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from calibrated import quantize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hal.errors import ValueRangeError
from hal.matrix import assumed
from hal.needs import Needs
from hal.ops import FusedMoE, Routing
from hal.ops.warmup import even_routing
from hal.platforms.base import DeviceRecord
from hal.platforms.cpu import CpuPlatform
from hal.platforms.ordering import HostOrdering
from hal.platforms.tables import device_spec
from hal.quant import SCHEMES
from hal.quant import layout as layout_module
from hal.quant.layout import LAYOUTS, PARTS, keeps_memory, to_layout
from hal.registry import Level, find_op, restore, snapshot

SCHEME, KERNEL, LAYOUT = "int4_w4a8_fp8", "triton_w4a8", "int4_planes"
EXPERTS, HIDDEN, INTERMEDIATE = 32, 256, 128


class Peak(TorchDispatchMode):
    """Counts the bytes of memory that lives at once, of tensors made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, call, types, arguments=(), keywords=None):
        found = call(*arguments, **(keywords or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((arguments, keywords))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._count(leaf, given)
        return found

    def _count(self, tensor, given):
        place = tensor.untyped_storage().data_ptr()
        if place in given and place not in self.alive:
            return
        held = self.alive.setdefault(place, [0, tensor.untyped_storage().nbytes()])
        if not held[0]:
            self.now += held[1]
            self.most = max(self.most, self.now)
        held[0] += 1
        weakref.finalize(tensor, self._drop, place)

    def _drop(self, place):
        held = self.alive[place]
        held[0] -= 1
        if not held[0]:
            self.now -= held[1]
            del self.alive[place]


def weights(scheme=SCHEME):
    generator = torch.Generator().manual_seed(5)
    shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
    return [quantize(torch.randn(s, generator=generator).bfloat16(), scheme) for s in shapes]


def matrices(weight):
    """Return each expert's weight as one of its own."""
    state = weight.state_of()
    for index in range(len(weight.values)):
        own = {name: tensor[index].contiguous() for name, tensor in state.items()}
        yield replace(weight, logical_shape=weight.shape[1:], **own)


@pytest.fixture(autouse=True)
def _target(monkeypatch):
    """Binders of Triton kernels ask Triton's driver what the device converts."""
    common = pytest.importorskip("hal.ops.kernels.common", reason="needs the package triton")
    GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
    monkeypatch.setattr(common, "current_target", lambda: GPUTarget("cuda", 90, 32))


def bind(w13, w2, force=KERNEL, **options):
    """Bind for an H100 whose tensors lie on the CPU; nothing is launched."""
    record = DeviceRecord(device_spec("cuda", "h100", assumed()), 0)
    platform = CpuPlatform([record], HostOrdering())
    return FusedMoE(w13, w2, platform=platform, force=force, **options)


def test_the_memory_is_that_of_the_weights():
    w13, w2 = weights()
    wanted = [to_layout(weight, LAYOUT, "cpu").values for weight in (w13, w2)]
    own = {weight.values.data_ptr() for weight in (w13, w2)}
    bound = bind(w13, w2, inplace=True)
    assert own <= {tensor.data_ptr() for tensor in bound.tensors}
    assert (w13.layout, w2.layout) == (LAYOUT, LAYOUT)
    assert torch.equal(w13.values, wanted[0])
    assert torch.equal(w2.values, wanted[1])


def test_weights_so_bound_can_be_bound_again():
    w13, w2 = weights()
    first = bind(w13, w2, inplace=True)
    before = w13.values.clone()
    second = bind(w13, w2, inplace=True)
    assert torch.equal(w13.values, before)
    assert first.tensors[0].data_ptr() == second.tensors[0].data_ptr()


@pytest.mark.parametrize(("inplace", "most"), [(True, 0.3), (False, 1.3)])
def test_peak_of_memory(inplace, most):
    w13, w2 = weights()
    whole = w13.nbytes + w2.nbytes
    with Peak() as peak:
        bound = bind(w13, w2, inplace=inplace)
    assert bound.kernel == KERNEL
    assert inplace or peak.most >= w13.values.nbytes + w2.values.nbytes
    assert peak.most <= most * whole, peak.most / whole


@pytest.mark.parametrize("scheme", ["int4_w4a16_g32", "mxfp8", "mxfp4_w4a16", "nvfp4_w4a16"])
def test_small_groups_take_no_more(scheme):
    """Their scales are many, and are looked through and reordered."""
    w13, w2 = weights(scheme)
    with Peak() as peak:
        bind(w13, w2, force="triton_packed")
    assert peak.most <= 0.3 * (w13.nbytes + w2.nbytes), peak.most / (w13.nbytes + w2.nbytes)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_what_a_cpu_takes_beside_what_it_keeps(scheme):
    """Of its own kernels: those that expand weights keep bf16, and make it an expert at a time."""
    w13, w2 = weights(scheme)
    whole = w13.nbytes + w2.nbytes
    given = {tensor.untyped_storage().data_ptr() for tensor in (*w13.tensors, *w2.tensors)}
    with Peak() as peak:
        bound = FusedMoE(w13, w2)
    kept = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in bound.tensors}
    kept = sum(size for place, size in kept.items() if place not in given)
    wide = 2 * EXPERTS * 3 * INTERMEDIATE * HIDDEN
    assert kept <= (1.01 * wide if bound.selection.level is Level.DEQUANT else 0.1 * whole)
    # NaN codes are looked for in 4096 rows at a time, much of these small weights.
    looks = bound.kernel in ("torch_experts_decode", "torch_experts_unpack")
    rows = 2 * 4096 * HIDDEN if looks and w13.encoding == "e4m3fn" else 0
    assert peak.most <= kept + max(0.3 * max(whole, kept), rows), (peak.most - kept) / whole


# These are expanded where that was measured to be faster than decoding them at each call.
EXPANDED = {"bf16", "fp8_channel", "fp8_block128"}


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"bf16"}))
def test_weights_and_all_that_binding_takes_on_a_cpu(scheme):
    """At most 1.3 times the weights, what they had before among it."""
    w13, w2 = weights(scheme)
    whole = w13.nbytes + w2.nbytes
    least = "weight_only" if scheme in EXPANDED else None
    with Peak() as peak:
        bound = FusedMoE(w13, w2, minimum=least)
    assert bound.selection.level >= Level.WEIGHT_ONLY
    rows = 2 * 4096 * HIDDEN if w13.encoding == "e4m3fn" else 0
    assert peak.most <= max(0.3 * whole, rows), peak.most / whole
    # Nor does a call that hits them all widen more than one at a time, from 4 bits to float32.
    x = torch.ones(EXPERTS, HIDDEN, dtype=torch.bfloat16)
    ids, shares = even_routing(EXPERTS, 1, EXPERTS, x.device)
    with Peak() as peak:
        out = bound(x, Routing(ids=ids, weights=shares))
    assert peak.now == out.nbytes
    assert peak.most <= 0.6 * whole, peak.most / whole


def test_a_padded_weight_takes_its_own_memory_and_little_more():
    """It is reordered where it lies, and the weights that were given are left alone."""
    op, kept = find_op("fused_moe"), snapshot()
    kernel = op.find(KERNEL)
    op.declare(
        "padded", level=kernel.level, band="tuned", signatures=kernel.signatures,
        requires=(Needs.multiple_of("hidden", 288),), entry=kernel.entry,
    )  # fmt: skip
    try:
        w13, w2 = weights()
        before = w13.values.clone()
        with Peak() as peak:
            bound = bind(w13, w2, force="padded", inplace=True)
    finally:
        restore(kept)
    assert [row.to for row in bound.selection.padded] == [288]
    assert torch.equal(w13.values, before)
    assert w13.layout == "canonical"
    larger = 288 / HIDDEN
    whole = w13.nbytes + w2.nbytes
    assert whole <= peak.most <= (larger + 0.3) * whole, peak.most / whole


def test_a_weight_that_cannot_be_bound_leaves_the_other_as_it_was():
    w13, w2 = weights()
    kept = w13.values.clone()
    w2.global_scale[3] = float("nan")
    with pytest.raises(ValueRangeError, match="w2"):
        bind(w13, w2, inplace=True)
    assert (w13.layout, w2.layout) == ("canonical", "canonical")
    assert torch.equal(w13.values, kept)


@pytest.mark.parametrize("fails_at", [1, 2, PARTS, PARTS + 3])
def test_what_fails_halfway_leaves_the_weights_as_they_were(monkeypatch, fails_at):
    """As when memory runs out: from the call on, once."""
    w13, w2 = weights()
    kept = [part.values.clone() for part in (w13, w2)]
    calls, stored = [], layout_module._stored

    def failing(*arguments):
        calls.append(None)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("as if")
        return stored(*arguments)

    monkeypatch.setattr(layout_module, "_stored", failing)
    with pytest.raises(torch.OutOfMemoryError):
        bind(w13, w2, inplace=True)
    assert (w13.layout, w2.layout) == ("canonical", "canonical")
    assert torch.equal(w13.values, kept[0])
    assert torch.equal(w2.values, kept[1])


@pytest.mark.parametrize("experts", [1, 2, PARTS - 1, PARTS, PARTS + 1, 3 * PARTS + 5])
@pytest.mark.parametrize("inplace", [False, True])
def test_parts_of_any_number_of_experts(experts, inplace):
    weight = quantize(torch.randn(experts, 32, 64).bfloat16(), SCHEME)
    each = [to_layout(part, LAYOUT, "cpu").values for part in matrices(weight)]
    kept = weight.values.clone()
    there = to_layout(weight, LAYOUT, "cpu", inplace=inplace)
    assert torch.equal(there.values, torch.stack(each))
    back = to_layout(there, "canonical", "cpu")
    assert torch.equal(back.values, kept)


def test_a_layout_of_another_size_is_told_beforehand():
    weight = quantize(torch.randn(4, 32, 64).bfloat16(), "bf16")
    names = {name for name in ("k_major", "up_gate") if keeps_memory(weight, name)}
    assert names == {"up_gate"}
    assert names < LAYOUTS.keys()
