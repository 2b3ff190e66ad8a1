"""Force each mixture-of-experts kernel that calls torch, and compare it with float64."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.errors import ForcedKernelError
from hal.ops.fused_moe import activate
from hal.ops.quantize import fake_quantize
from hal.ops.slots import sort_slots
from hal.quant import quantize
from hal.registry import find_op

CPU_KERNELS = [
    ("torch_experts", "bf16"),
    ("torch_experts_int8", "int8_channel"),
    ("torch_experts_dequant", "int8_channel"),
    ("torch_experts_dequant", "fp8_channel"),
    ("torch_experts_dequant", "fp8_block128"),
    ("torch_experts_decode", "int8_channel"),
    ("torch_experts_decode", "fp8_channel"),
    ("torch_experts_decode", "fp8_block128"),
]
GPU_KERNELS = [
    ("torch_grouped_mm", "bf16"),
    ("torch_scaled_grouped_mm", "fp8_channel"),
    ("torch_experts", "bf16"),
    ("torch_experts_dequant", "fp8_channel"),
    ("torch_experts_decode", "fp8_block128"),
]
EXPERTS = 6


def here(kernel, dtype=torch.bfloat16):
    """Return the form of the kernel that this machine has: it may only convert the dtype."""
    name = str(dtype).removeprefix("torch.")
    math = hal.platform("cpu").device(0).formats.of("math", name)
    return f"{kernel}_emulated" if kernel == "torch_experts" and str(math) != "native" else kernel


def expected(kernel, w13, w2, x, ids, weights, activation="silu"):
    """Return the layer in float64, activations as the kernel's level represents them."""
    native = str(find_op("fused_moe").find(kernel).level) == "native"

    def seen(rows):
        return fake_quantize(rows, w13.scheme, w13.encoding).double() if native else rows.double()

    first, second = w13.dequantize().double(), w2.dequantize().double()
    rows = seen(x)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = activate(rows[token] @ first[expert].T, activation).to(x.dtype)
        y = seen(h) @ second[expert].T
        out.index_add_(0, token, y * weights[token, slot].double().unsqueeze(-1))
    return out


def assert_near(out, want, x):
    assert out.dtype is x.dtype
    assert out.shape == want.shape
    top = want.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    error = ((out.double() - want).abs() / top).amax() if out.numel() else torch.zeros(())
    # h is rounded twice before it is quantized: a code of h may differ by one step.
    assert float(error) < 0.06


def make(scheme, hidden, intermediate, generator, dtype=torch.bfloat16, device="cpu"):
    w13 = torch.randn(EXPERTS, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(EXPERTS, hidden, intermediate, generator=generator) * intermediate**-0.5
    w13[1] = 0
    w2[2, hidden // 2] = 0
    w13, w2 = w13.to(device, dtype), w2.to(device, dtype)
    return quantize(w13, scheme), quantize(w2, scheme)


def routings(tokens, top_k, generator):
    """Yield ids `[tokens, top_k]`: random, one expert for all, some absent, all absent."""
    noise = torch.rand(tokens, EXPERTS, generator=generator)
    random = noise.argsort(-1)[:, :top_k]
    yield random
    yield torch.full_like(random, EXPERTS - 1)
    spoiled = random.clone()
    spoiled[::2, 0] = -1
    spoiled[1::2, -1] = EXPERTS + 3
    yield spoiled.int()
    yield torch.full_like(random, -1)
    yield torch.full_like(random, 1 << 40)


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems: on a busy machine threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20261124)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (40, 24), (33, 9), (200, 136)])
@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_cpu_experts(kernel, scheme, hidden, intermediate, dtype, generator):
    w13, w2 = make(scheme, hidden, intermediate, generator, dtype)
    moe = hal.ops.FusedMoE(w13, w2, dtype=dtype, force=here(kernel, dtype))
    for tokens, top_k in ((1, 1), (1, 4), (7, 3), (40, 2), (200, 4)):
        x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        x[tokens // 2 :: 3] = 0
        for ids in routings(tokens, top_k, generator):
            weights = torch.rand(tokens, top_k, generator=generator)
            out = moe(x, hal.ops.Routing(ids=ids, weights=weights))
            assert_near(out, expected(kernel, w13, w2, x, ids, weights), x)


@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_weights_of_absent_slots_are_not_read(kernel, scheme, generator):
    w13, w2 = make(scheme, 128, 128, generator)
    moe = hal.ops.FusedMoE(w13, w2, force=here(kernel))
    x = torch.randn(3, 128, generator=generator).bfloat16()
    ids = torch.tensor([[0, -1], [EXPERTS, 3], [-7, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, torch.nan], [torch.inf, 0.25], [torch.nan, 1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = moe(x, hal.ops.Routing(ids=ids, weights=weights.to(dtype)))
        finite = weights.nan_to_num(0, 0, 0)
        assert_near(out, expected(kernel, w13, w2, x, ids, finite), x)
        assert not out[2].any()


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_a_nan_stays_in_its_token(kernel, scheme, tokens, generator):
    w13, w2 = make(scheme, 128, 128, generator)
    moe = hal.ops.FusedMoE(w13, w2, force=here(kernel))
    x = torch.randn(tokens, 128, generator=generator).bfloat16()
    ids = torch.randint(0, EXPERTS, (tokens, 4), generator=generator)
    ids[2, 0] = 0
    weights = torch.rand(tokens, 4, generator=generator)
    clean = moe(x, hal.ops.Routing(ids=ids, weights=weights))
    x[2, 5] = torch.nan
    out = moe(x, hal.ops.Routing(ids=ids, weights=weights))
    assert bool(out[2].isnan().any())
    rest = torch.arange(tokens) != 2
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_activations(kernel, scheme, activation, generator):
    w13, w2 = make(scheme, 128, 128, generator)
    moe = hal.ops.FusedMoE(w13, w2, activation=activation, force=here(kernel))
    x = torch.randn(9, 128, generator=generator).bfloat16() * 3
    ids = torch.randint(0, EXPERTS, (9, 2), generator=generator)
    weights = torch.rand(9, 2, generator=generator)
    out = moe(x, hal.ops.Routing(ids=ids, weights=weights))
    assert_near(out, expected(kernel, w13, w2, x, ids, weights, activation), x)


@pytest.mark.parametrize(("kernel", "scheme"), CPU_KERNELS)
def test_no_tokens(kernel, scheme, generator):
    w13, w2 = make(scheme, 128, 128, generator)
    moe = hal.ops.FusedMoE(w13, w2, force=here(kernel))
    routing = hal.ops.Routing(ids=torch.empty(0, 2, dtype=torch.int32), weights=torch.empty(0, 2))
    assert moe(torch.empty(0, 128, dtype=torch.bfloat16), routing).shape == (0, 128)


@pytest.mark.parametrize("slots", [1, 12, 64, 65, 300])
def test_slots_are_sorted_stably(slots, generator):
    ids = torch.randint(-2, EXPERTS + 2, (slots, 1), generator=generator)
    order, runs, complete = sort_slots(ids, EXPERTS)
    present = [slot for slot in range(slots) if 0 <= int(ids[slot]) < EXPERTS]
    assert order.tolist() == sorted(present, key=lambda slot: int(ids[slot]))
    assert complete == (len(present) == slots)
    flat = [int(ids[slot]) for slot in order.tolist()]
    assert flat == [e for e, start, stop in runs for _ in range(start, stop)]
    assert all(start < stop for _, start, stop in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize(("kernel", "scheme"), GPU_KERNELS)
def test_gpu_experts(kernel, scheme, tokens, generator):
    w13, w2 = make(scheme, 256, 128, generator, device="cuda")
    try:
        moe = hal.ops.FusedMoE(w13, w2, force=kernel)
    except ForcedKernelError as error:
        pytest.skip(str(error).splitlines()[0])
    x = torch.randn(tokens, 256, generator=generator).bfloat16().cuda()
    for ids in routings(tokens, 4, generator):
        weights = torch.rand(tokens, 4, generator=generator).cuda()
        out = moe(x, hal.ops.Routing(ids=ids.cuda(), weights=weights))
        assert_near(out, expected(kernel, w13, w2, x, ids.cuda(), weights), x)
