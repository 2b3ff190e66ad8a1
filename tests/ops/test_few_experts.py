"""Run few tokens through experts without a sort, in Triton's interpreter, under every scheme."""

from __future__ import annotations

import sys
from dataclasses import replace

import expert_cases
import pytest
import torch
from calibrated import quantize
from far_apart import far_apart

import hal
from hal.errors import ForcedKernelError
from hal.ops import few_experts
from hal.ops.binding import Binding
from hal.ops.expert_layer import ExpertLayer
from hal.ops.few_tiles import FewTile, few_slots, few_tiles, held_elements
from hal.ops.fused_moe import FUSED_MOE, activate
from hal.ops.linear import fixed_scale
from hal.ops.quantize import fake_quantize
from hal.ops.tiles import OPERAND_BYTES, SPECIALIZED_KINDS
from hal.quant import to_layout
from hal.quant.uint4 import encode_uint4
from hal.registry import Level
from hal.selection import choose, options_from

interpreted = [
    pytest.mark.interpreter,
    # Rows of absent slots hold whatever memory held, and NaN is what some tests are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
KERNELS = ("triton", "triton_fp8", "triton_int8", "triton_decode", "triton_packed", "triton_w4a8")
SCHEMES = [
    (name, scheme)
    for name in KERNELS
    for scheme in sorted(FUSED_MOE.find(name).schemes)
    if (name, scheme) != ("triton_fp8", "fp8_block128_ue8m0")
]
PLAIN = [("triton", "bf16")]


def bind(kernel, w13, w2, layer=ExpertLayer(), **problem):  # noqa: B008
    """Return what a binder gives when it was chosen for a device that is not here."""
    platform, scheme = hal.platform("cuda:h100"), w13.scheme
    problem = {
        "dtype": "bfloat16", "tokens": 2, "experts": w13.shape[0], "top_k": 2,
        "hidden": w13.shape[2], "intermediate": w2.shape[2], "activation": layer.activation.name,
        **problem,
    }  # fmt: skip
    options = options_from("fused_moe", force=kernel)
    selection = choose("fused_moe", scheme.name, platform.device(0), problem, options)
    assert selection.kernel is not None, selection
    binding = Binding(selection, platform, scheme, torch.device("cpu"))
    if kernel == "triton_w4a8":
        w13, w2 = (to_layout(weight, "int4_planes", "cpu") for weight in (w13, w2))
    launch, tensors = selection.kernel.load()(binding, w13, w2, layer)
    return launch, tensors, selection.level in (Level.NATIVE, Level.EMULATED)


@pytest.fixture
def only_few(monkeypatch):
    """Never sort; few programs, because the interpreter takes long for each."""
    tiles = FewTile(4, 32, 1), FewTile(8, 16, 1, 2)
    monkeypatch.setattr(few_experts, "few_tiles", lambda *_, **__: tiles)
    monkeypatch.setattr(few_experts, "few_slots", lambda *_, **__: 1 << 30)

    def sort(*_):
        raise AssertionError("slots were sorted")

    # hal.ops.align is the function, not the module.
    monkeypatch.setattr(sys.modules["hal.ops.align"], "align_triton", sort)


def with_zeros(weight):
    like = quantize(weight, "int4_w4a16_g32")
    values, scales, zeros = encode_uint4(weight, 32)
    return replace(like, values=values, scales=scales, zeros=zeros, encoding="uint4")


def weights_of(scheme, experts, hidden, intermediate, generator):
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator).bfloat16() * 0.1
    w2 = torch.randn(experts, hidden, intermediate, generator=generator).bfloat16() * 0.1
    if scheme == "uint4 and int4":
        return with_zeros(w13), quantize(w2, "int4_w4a16_g32")
    return quantize(w13, scheme), quantize(w2, scheme)


def truncated(rows):
    """Return rows in bf16 as the interpreter does, which rounds towards zero."""
    bits = rows.float().view(torch.int32) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()


def expected(x, ids, weights, w13, w2, quantized, to_bf16=truncated):
    """Return the sums in float64; h is rounded once: its codes depend on how."""

    def seen(rows, weight):
        if not quantized:
            return rows.double()
        fixed = (*fixed_scale(weight), None)[0]
        return fake_quantize(rows, weight.scheme, weight.encoding, fixed).double()

    wide13, wide2, rows = w13.dequantize().double(), w2.dequantize().double(), seen(x, w13)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, experts in enumerate(ids.tolist()):
        for slot, expert in enumerate(experts):
            if 0 <= expert < w13.shape[0]:
                h = to_bf16(activate(wide13[expert] @ rows[token], "silu"))
                y = wide2[expert] @ seen(h[None], w2)[0]
                out[token] += weights[token, slot].double() * y
    return out


def error_of(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def compare(kernel, scheme, *, tokens=2, experts=4, top_k=2, hidden=24, intermediate=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w13, w2 = weights_of(scheme, experts, hidden, intermediate, generator)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    ids[0, 0], weights[0, 0] = -1, torch.nan
    launch, tensors, quantizes = bind(kernel, w13, w2, top_k=top_k)
    found = launch(x, ids, weights, tensors)
    weights[0, 0] = 0
    wanted = expected(x, ids, weights, w13, w2, quantizes)
    assert error_of(found, wanted) < 2**-6


class TestKernels:
    pytestmark = interpreted

    @pytest.mark.parametrize(("kernel", "scheme"), [*SCHEMES, ("triton_packed", "uint4 and int4")])
    def test_against_float64(self, only_few, kernel, scheme):
        compare(kernel, scheme)

    @pytest.mark.parametrize(
        ("kernel", "scheme"),
        [("triton_fp8", "fp8_channel"), ("triton_int8", "int8_channel"), *PLAIN,
         ("triton_packed", "int4_w4a16_g32"), ("triton_packed", "nvfp4_w4a16")],
    )  # fmt: skip
    def test_experts_beyond_32_bits(self, only_few, kernel, scheme):
        from hal.ops.kernels.common import offsets_need_64_bits

        generator = torch.Generator().manual_seed(5)
        near = weights_of(scheme, 3, 24, 10, generator)
        far = [replace(weight, values=far_apart(weight.values)) for weight in near]
        x = torch.randn(1, 24, generator=generator).bfloat16()
        ids, weights = torch.tensor([[2, 0]]).int(), torch.ones(1, 2)
        found = []
        for pair in (near, far):
            launch, tensors, _ = bind(kernel, *pair)
            found.append(launch(x, ids, weights, tensors))
        assert any(offsets_need_64_bits(tensor) for tensor in tensors)
        assert torch.equal(*found)
        assert found[0].any()

    @pytest.mark.parametrize(
        ("kernel", "scheme"),
        [("triton_fp8", "fp8_block128"), ("triton_decode", "fp8_block128"),
         ("triton_packed", "mxfp4_w4a16"), ("triton_packed", "nvfp4_w4a16"), *PLAIN],
    )  # fmt: skip
    def test_several_groups_and_ragged_rows(self, only_few, kernel, scheme):
        compare(kernel, scheme, tokens=1, hidden=168, intermediate=7, top_k=3, seed=1)

    @pytest.mark.parametrize(("kernel", "scheme"), [("triton_fp8", "fp8_block128"), *PLAIN])
    def test_several_steps(self, monkeypatch, only_few, kernel, scheme):
        # Two steps are written out, five are a loop.
        for tiles, intermediate in (
            ((FewTile(4, 8, 1), FewTile(16, 8, 1, 2)), 136),
            ((FewTile(8, 8, 1), FewTile(16, 8, 1, 2)), 12),
        ):
            monkeypatch.setattr(few_experts, "few_tiles", lambda *_, tiles=tiles, **__: tiles)
            hidden = 40 if intermediate > 128 else 600
            compare(kernel, scheme, tokens=1, hidden=hidden, intermediate=intermediate, seed=2)

    def test_experts_that_are_hit_by_all_or_none(self, only_few):
        generator = torch.Generator().manual_seed(3)
        w13, w2 = weights_of("bf16", 4, 24, 10, generator)
        x = torch.randn(3, 24, generator=generator).bfloat16()
        ids = torch.tensor([[2, 2], [2, -5], [-1, 4]])
        weights = torch.rand(3, 2, generator=generator).bfloat16()
        launch, tensors, _ = bind("triton", w13, w2)
        found = launch(x, ids, weights, tensors)
        assert (found[2] == 0).all()
        wanted = expected(x, ids, weights, w13, w2, False)
        assert error_of(found[:2], wanted[:2]) < 2**-6

    @pytest.mark.parametrize("kernel", ["triton_fp8", "triton_decode"])
    def test_what_is_no_number_stays_in_its_row(self, only_few, kernel):
        generator = torch.Generator().manual_seed(4)
        w13, w2 = weights_of("fp8_channel", 4, 24, 10, generator)
        x = torch.randn(3, 24, generator=generator).bfloat16()
        ids = torch.tensor([[0, 1], [1, 2], [0, -1]], dtype=torch.int32)
        weights = torch.rand(3, 2, generator=generator)
        launch, tensors, _ = bind(kernel, w13, w2)
        clean = launch(x, ids, weights, tensors)
        x[1, 3] = torch.nan
        found = launch(x, ids, weights, tensors)
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize("case", expert_cases.CASES, ids=lambda case: case.name)
    def test_options(self, only_few, case):
        from hal.ops.activations import activation_of

        layer = expert_cases.make(
            case, lambda weight: quantize(weight, "bf16"), tokens=3, hidden=104, intermediate=6
        )
        told = {"gated", "alpha", "limit", "interleaved", "activation"}
        how = {name: value for name, value in case.options.items() if name in told}
        activation = activation_of("test", how.pop("activation", "silu"), **how)
        single = "apply_router_weight_on_input" in case.options
        told = ExpertLayer(activation, case.first_bias, case.second_bias, single)
        launch, tensors, _ = bind("triton", layer.w13, layer.w2, told, gated=case.gated)
        tensors = (*tensors, *layer.biases.values())
        found = launch(layer.x, layer.ids, layer.weights, tensors, layer.shared)
        assert expert_cases.error(found, layer, False) < 2**-6
        alone = torch.zeros_like(layer.x[-1]) if layer.shared is None else layer.shared[-1]
        assert torch.equal(found[-1], alone)


class TestTiles:
    @pytest.mark.parametrize("kind", sorted(OPERAND_BYTES))
    @pytest.mark.parametrize(
        ("hidden", "intermediate", "top_k"),
        [
            (1, 1, 1),
            (2048, 768, 8),
            (7168, 256, 8),
            (4096, 14336, 2),
            (2880, 2880, 4),
            (100, 33, 16),
        ],
    )
    @pytest.mark.parametrize("threads", [16, 32, 64])
    def test_lanes_are_threads_and_groups_lie_within_experts(
        self, kind, hidden, intermediate, top_k, threads
    ):
        for quantizes in (False, True):
            first, second = few_tiles(
                (kind, kind), hidden, intermediate, top_k, threads, quantizes=quantizes
            )
            assert first.experts == 1
            assert second.experts < 2 * top_k
            for tile in (first, second):
                assert tile.lanes * tile.experts == threads * tile.warps
                # Groups of 128 activations lie within the lanes of an expert.
                assert tile.lanes * held_elements(kind) % 64 == 0
                assert not quantizes or tile.lanes >= 8

    def test_many_slots_are_sorted(self):
        for kind in OPERAND_BYTES:
            for quantizes in (False, True):
                assert 1 <= few_slots(kind, 128, quantizes=quantizes) <= 128
            for experts in (2, 8, 64, 256):
                found = few_slots(kind, experts, quantizes=True, streamed=True)
                assert max(2, experts // 16) <= found <= max(2, experts // 2)

    @pytest.mark.parametrize("experts", [4, 8, 32, 128, 256])
    def test_a_slot_an_expert_at_most_beside_products_whose_warps_specialize(self, experts):
        for kind in SPECIALIZED_KINDS - {"int4_group_fp8"}:
            found = few_slots(kind, experts, quantizes=False, specialized=True)
            assert experts // 2 < found <= experts


# Of 64 experts, so that no scheme sorts them.
@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "scheme"), SCHEMES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_on_a_device(kernel, scheme, tokens):
    """Compare with the reference, in a graph too."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    w13, w2 = (
        quantize(
            torch.randn(64, n, k, generator=generator, device="cuda").bfloat16() * 0.05, scheme
        )
        for n, k in ((640, 512), (512, 320))
    )
    x = torch.randn(tokens, 512, generator=generator, device="cuda").bfloat16()
    ids = torch.rand(tokens, 64, generator=generator, device="cuda").argsort(-1)[:, :2].int()
    ids[0, 1] = 77
    weights = torch.rand(tokens, 2, generator=generator, device="cuda")
    routing = hal.ops.Routing(ids=ids, weights=weights)
    try:
        bound = hal.ops.FusedMoE(w13, w2, force=kernel)
    except ForcedKernelError as error:
        pytest.skip(str(error))
    found = bound(x, routing)
    if bound.selection.level is Level.WEIGHT_ONLY:
        given = (part.cpu() for part in (x, ids, weights))
        wanted = expected(*given, w13.to("cpu"), w2.to("cpu"), False, torch.Tensor.bfloat16)
    else:
        wanted = hal.ops.FusedMoE(w13, w2, force="reference")(x, routing).cpu().double()
    # Quantized activations at the edge of two codes fall to either side, and rows are few here.
    own = bound.selection.level is not Level.WEIGHT_ONLY and w13.scheme.activation.format
    assert error_of(found.cpu(), wanted) < (0.02 if own else 0.012)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = bound(x, routing)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, found)
