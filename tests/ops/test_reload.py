"""New weights in a bound op: the same memory, the results of a new binding, refusals by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from calibrated import quantize, scale_for

import hal.nn
from hal.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    EncodingError,
    ForcedKernelError,
    ShapeError,
    ValueRangeError,
)
from hal.ops import FusedMoE, Linear, Routing, fused_moe
from hal.ops.reload import overwrite, require_reloadable
from hal.quant import SCHEMES, QTensor, input_scale, scale_shape, to_layout
from hal.registry import find_op
from hal.runtime import platform_of


def kernels(op):
    """Return (kernel, scheme) of an op, but kernels whose library may keep weights."""
    own = [k for k in find_op(op).kernels if not (k.claimed and k.band == "specialised")]
    return [(kernel, scheme) for kernel in own for scheme in kernel.schemes[:2]]


LINEAR, EXPERTS = kernels("linear"), kernels("fused_moe")


def weight(seed: int, *shape: int, scheme: str, device="cpu") -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(*shape, generator=generator) * (0.05 + seed)).bfloat16().to(device)
    return quantize(values, scheme, amax=4.0 + seed)


def bind(op, kernel, *arguments, **biases):
    """Return the bound op, or skip with the reasons for which the kernel cannot run here."""
    try:
        return op(*arguments, **biases, force=kernel.name)
    except ForcedKernelError as error:
        failures = error.selection.candidate(kernel.name).failures
        pytest.skip(f"{kernel}: " + "; ".join(map(str, failures)))


def addresses(bound) -> list[int]:
    return [tensor.data_ptr() for tensor in bound.tensors]


def rows(count: int, columns: int, device) -> torch.Tensor:
    return (
        torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
        .bfloat16()
        .to(device)
    )


def route(tokens: int, device) -> Routing:
    ids = torch.arange(tokens * 2, device=device).view(tokens, 2).int() % 4
    return Routing(ids=ids, weights=torch.full((tokens, 2), 0.5, device=device))


@pytest.mark.parametrize(
    ("kernel", "scheme"), LINEAR, ids=lambda given: getattr(given, "name", given)
)
def test_linear_computes_as_if_bound_anew(device, kernel, scheme):
    old, new = (weight(seed, 128, 256, scheme=scheme, device=device) for seed in (0, 1))
    biases = [torch.full((128,), value, device=device).bfloat16() for value in (1.0, 2.0)]
    bound = bind(Linear, kernel, old, biases[0])
    x, before = rows(9, 256, device), addresses(bound)
    first = bound(x)
    held = [tensor.clone() for tensor in new.tensors]
    bound.reload(new, biases[1])
    wanted = Linear(new, biases[1], force=kernel.name)(x)
    assert addresses(bound) == before
    assert torch.equal(bound(x), wanted)
    assert not torch.equal(first, wanted)
    same = (torch.equal(a.float(), b.float()) for a, b in zip(held, new.tensors, strict=True))
    assert all(same), "the new weight stays the caller's"


@pytest.mark.parametrize(
    ("kernel", "scheme"), EXPERTS, ids=lambda given: getattr(given, "name", given)
)
def test_experts_compute_as_if_bound_anew(device, kernel, scheme):
    shapes = (4, 128, 128), (4, 128, 64)
    old, new = (
        [weight(seed, *shape, scheme=scheme, device=device) for shape in shapes] for seed in (0, 1)
    )
    biases = [
        {"w13_bias": torch.full((4, 128), value, device=device), "w2_bias": None}
        for value in (1.0, 2.0)
    ]
    bound = bind(FusedMoE, kernel, *old, **biases[0])
    x, routing, before = rows(9, 128, device), route(9, device), addresses(bound)
    first = bound(x, routing)
    bound.reload(*new, **biases[1])
    wanted = FusedMoE(*new, **biases[1], force=kernel.name)(x, routing)
    assert addresses(bound) == before
    assert torch.equal(bound(x, routing), wanted)
    assert not torch.equal(first, wanted)


@pytest.mark.gpu
def test_a_captured_graph_computes_with_the_new_weights():
    old, new = (
        [
            weight(seed, *shape, scheme="fp8_channel", device="cuda")
            for shape in ((4, 128, 128), (4, 128, 64))
        ]
        for seed in (0, 1)
    )
    bound, x, routing = FusedMoE(*old), rows(9, 128, "cuda"), route(9, "cuda")
    bound(x, routing)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bound(x, routing)
    bound.reload(*new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, FusedMoE(*new)(x, routing))


def test_a_compiled_graph_computes_with_the_new_weight():
    old, new = (weight(seed, 64, 128, scheme="int8_channel") for seed in (0, 1))
    bound, x = Linear(old), rows(5, 128, "cpu")
    compiled = torch.compile(bound.__call__, fullgraph=True, backend="aot_eager")
    compiled(x)
    bound.reload(new)
    assert torch.equal(compiled(x), Linear(new)(x))


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        bound = Linear(weight(0, 64, 128, scheme="fp8_channel"))
    new = weight(1, 64, 128, scheme="fp8_channel")
    bound.reload(new)
    assert torch.equal(bound(rows(3, 128, "cpu")), Linear(new)(rows(3, 128, "cpu")))


def test_two_weights_change_places():
    w13, w2 = (weight(seed, 4, 64, 64, scheme="bf16") for seed in (0, 1))
    x, routing = rows(5, 64, "cpu"), route(5, "cpu")
    bound, wanted = FusedMoE(w13, w2, gated=False), FusedMoE(w2, w13, gated=False)(x, routing)
    bound.reload(w2, w13)
    assert torch.equal(bound(x, routing), wanted)


def test_the_function_sees_that_its_weights_were_written():
    w13, w2 = (torch.eye(16).expand(4, 16, 16).contiguous().bfloat16() for _ in range(2))
    x, routing = rows(3, 16, "cpu"), route(3, "cpu")
    fused_moe(x, w13, w2, routing, gated=False)
    FusedMoE(w13, w2, gated=False).reload(
        w13 * 2,
        w2,
    )
    wanted = FusedMoE(w13.clone(), w2.clone(), gated=False)(x, routing)
    assert torch.equal(fused_moe(x, w13, w2, routing, gated=False), wanted)


def test_a_weight_in_another_layout_is_brought_back():
    old, new = (weight(seed, 64, 128, scheme="int8_channel") for seed in (0, 1))
    bound = Linear(old)
    bound.reload(to_layout(new, "k_major"))
    assert torch.equal(bound(rows(3, 128, "cpu")), Linear(new)(rows(3, 128, "cpu")))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "int4_w4a16", "mxfp4"])
class TestModules:
    """The binding and its memory stay, and buffers hold the new weights."""

    def test_linear(self, scheme):
        old, new = (weight(seed, 64, 128, scheme=scheme) for seed in (0, 1))
        biases = [torch.full((64,), value).bfloat16() for value in (1.0, 2.0)]
        module, fresh = hal.nn.Linear(old, biases[0]), hal.nn.Linear(new, biases[1])
        x, bound = rows(5, 128, "cpu"), module.bound
        module(x)
        before = addresses(bound)
        module.reload(new, biases[1])
        assert torch.equal(module(x), fresh(x))
        assert module.bound is bound
        assert addresses(bound) == before
        found, wanted = module.state_dict(), fresh.state_dict()
        assert all(torch.equal(found[name].float(), wanted[name].float()) for name in wanted)

    def test_experts(self, scheme):
        shapes = (4, 128, 128), (4, 128, 64)
        old, new = ([weight(seed, *shape, scheme=scheme) for shape in shapes] for seed in (0, 1))
        module, fresh = hal.nn.FusedMoE(*old), hal.nn.FusedMoE(*new)
        x, routing, bound = rows(5, 128, "cpu"), route(5, "cpu"), module.bound
        module.reload(*new)
        assert torch.equal(module(x, routing), fresh(x, routing))
        assert module.bound is bound
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        other = weight(1, 4, 128, 128, scheme="int8_channel")
        with pytest.raises(ArgumentError, match=r"reload: w13: found .*int8_channel"):
            module.reload(other, new[1])
        with pytest.raises(ArgumentError, match="w2_bias: found given one, needed none"):
            module.reload(*new, w2_bias=torch.ones(4, 128))
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor.float(), saved[name].float())


class TestRefuses:
    @pytest.fixture
    def bound(self):
        shapes = (4, 64, 128), (4, 128, 32)
        w13, w2 = (weight(0, *shape, scheme="fp8_channel") for shape in shapes)
        bound = FusedMoE(w13, w2, w2_bias=torch.ones(4, 128))
        before = [tensor.clone().view(torch.uint8) for tensor in bound.tensors]
        yield bound
        for tensor, copy in zip(bound.tensors, before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), copy), "something was written"

    def new(self, scheme="fp8_channel", rows=64, columns=32):
        return weight(1, 4, rows, 128, scheme=scheme), weight(1, 4, 128, columns, scheme=scheme)

    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ({"rows": 128}, ShapeError, r"w13: found shape \[4, 128, 128\], needed \[4, 64, 128\]"),
            ({"columns": 64}, ShapeError, r"reload: w2: found shape \[4, 128, 64\], needed"),
            ({"scheme": "int8_channel"}, EncodingError, "found scheme int8_channel, needed fp8"),
            ({"scheme": "fp8_w8a16"}, EncodingError, "bind the new weights anew"),
        ],
    )
    def test_other_weights(self, bound, given, error, words):
        with pytest.raises(error, match=words):
            bound.reload(*self.new(**given), w2_bias=torch.ones(4, 128))

    def test_a_weight_elsewhere(self, bound):
        w13, w2 = self.new()
        with pytest.raises(DeviceMismatchError, match="w2: found device meta, needed cpu"):
            bound.reload(w13, w2.to("meta"), w2_bias=torch.ones(4, 128))

    def test_biases(self, bound):
        with pytest.raises(ArgumentError, match="w2_bias: found given none, needed one"):
            bound.reload(*self.new())
        both = {"w13_bias": torch.ones(4, 64), "w2_bias": torch.ones(4, 128)}
        with pytest.raises(ArgumentError, match="w13_bias: found given one, needed none"):
            bound.reload(*self.new(), **both)
        with pytest.raises(
            DTypeError, match=r"w2_bias: found dtype torch.bfloat16, needed torch.f"
        ):
            bound.reload(*self.new(), w2_bias=torch.ones(4, 128).bfloat16())
        with pytest.raises(ShapeError, match="w2_bias: found shape"):
            bound.reload(*self.new(), w2_bias=torch.ones(4, 64))

    def test_scales_that_are_not_finite(self, bound):
        w13, w2 = self.new()
        w2.scales[1, 5] = torch.nan
        with pytest.raises(ValueRangeError, match=r"w2 scales: found nan at \[1, 5\]"):
            bound.reload(w13, w2, w2_bias=torch.ones(4, 128))

    def test_another_dtype(self):
        plain = torch.eye(64).bfloat16()
        bound = Linear(plain)
        with pytest.raises(EncodingError, match="found encoding float16, needed bfloat16"):
            bound.reload(torch.ones(64, 64).half())
        assert torch.equal(plain, torch.eye(64).bfloat16())

    def test_zero_points_where_there_were_none(self):
        bound = Linear(weight(0, 64, 128, scheme="int4_w4a16"))
        plain = weight(1, 64, 128, scheme="int4_w4a16")
        zeros = torch.full(scale_shape("group128", (64, 128)), 7, dtype=torch.uint8)
        with pytest.raises(EncodingError, match="found encoding uint4, needed int4"):
            bound.reload(replace(plain, encoding="uint4", zeros=zeros))

    def test_kernels_whose_library_may_keep_weights(self):
        kernel = find_op("linear").find("ipex_fp8")
        with pytest.raises(ArgumentError, match="linear/ipex_fp8, whose library may keep weights"):
            require_reloadable("test", kernel)

    def test_tensors_that_do_not_fit(self):
        here, two = (
            platform_of(torch.device("cpu"), None),
            [torch.zeros(4), torch.zeros(1).expand(4)],
        )
        before = SimpleNamespace(first=two[0].clone())
        with pytest.raises(ArgumentError, match="found 1 tensors, needed 2"):
            overwrite("test", two, [torch.ones(4)], here)
        with pytest.raises(ArgumentError, match="elements of tensor 1 that share memory"):
            overwrite("test", two, [torch.ones(4), torch.ones(4)], here)
        assert torch.equal(two[0], before.first)


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row.static])
def test_the_scale_of_static_activations_is_new_too(scheme):
    old = weight(0, 64, 128, scheme=scheme)
    new = replace(weight(1, 64, 128, scheme=scheme), input_scale=input_scale(40.0, scheme))
    assert scale_for(scheme)["input_scale"] != new.input_scale
    bound, x = Linear(old), rows(3, 128, "cpu") * 8
    bound.reload(new)
    assert torch.equal(bound(x), Linear(new)(x))
