"""Four-bit experts in numbers that nothing divides: layouts and kernels read them alone."""

from __future__ import annotations

import pytest
import torch

import hal
from hal.errors import EncodingError, ForcedKernelError, ShapeError
from hal.ops import FusedMoE, Routing
from hal.ops.activations import Activation
from hal.ops.binding import Binding
from hal.ops.cases.experts import expected_moe
from hal.ops.cases.trial import error, tolerance
from hal.ops.expert_layer import ExpertLayer
from hal.quant import quantize, to_layout
from hal.quant.layout import LAYOUTS, kernel_arguments
from hal.registry import find_op
from hal.selection import choose, options_from

COUNTS = (1, 3, 5, 17)
SCHEMES = ("nvfp4", "nvfp4_w4a16", "mxfp4_w4a16", "mxfp4_w4a8")
# Rows and columns beside the 128 x 4 of scale tiles.
SHAPES = ((96, 160), (40, 64), (130, 192))
GUARD = 4096


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor between bytes that are NaN in every format of scales, and all memory."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    size = raw.numel() + 2 * GUARD
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device=tensor.device)
    memory[GUARD : GUARD + raw.numel()] = raw
    inside = memory[GUARD : GUARD + raw.numel()].view(tensor.dtype).view(tensor.shape)
    return inside, memory


def require_guards(memories, before):
    for memory, was in zip(memories, before, strict=True):
        assert torch.equal(memory, was)


def within_guards(weight):
    """Return the weight with each of its tensors between guards, and their memory."""
    pairs = [guarded(tensor) for tensor in weight.tensors]
    return weight.with_tensors([inside for inside, _ in pairs]), [memory for _, memory in pairs]


def experts(count, rows, columns, scheme, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(count, rows, columns, generator=generator) * 0.2
    return quantize(plain.bfloat16(), scheme)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_read_their_tensors_alone(layout, scheme, count):
    tried = 0
    for rows, columns in (*SHAPES, (256, 256)):
        weight = experts(count, rows, columns, scheme)
        inside, memories = within_guards(weight)
        before = [memory.clone() for memory in memories]
        try:
            found, wanted = to_layout(inside, layout), to_layout(weight, layout)
        except (EncodingError, ShapeError):
            continue
        tried += 1
        for mine, its in zip(found.tensors, wanted.tensors, strict=True):
            # Bytes: what is padded must be the same, too, and NaN is not equal to itself.
            assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
        require_guards(memories, before)
        if layout != "canonical":
            stored, kept = within_guards(found)
            back = to_layout(stored, "canonical")
            for mine, its in zip(back.tensors, weight.tensors, strict=True):
                assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
            assert len(kept) == len(found.tensors)
        assert torch.equal(found.dequantize(), weight.dequantize())
        kernel_arguments(found)
    if not tried:
        pytest.skip(f"{layout} is not defined for {scheme}")


KERNELS = [
    pytest.param(kernel.name, scheme, id=f"{kernel.name}-{scheme}")
    for kernel in find_op("fused_moe").kernels
    for scheme in SCHEMES
    if scheme in kernel.signatures
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("kernel", "scheme"), KERNELS)
def test_kernels_read_their_tensors_alone(device, kernel, scheme, count):
    hidden, intermediate, tokens = 160, 96, 11
    top_k = min(2, count)
    w13 = experts(count, 2 * intermediate, hidden, scheme, 1).to(device)
    w2 = experts(count, hidden, intermediate, scheme, 2).to(device)
    (inside13, memories13), (inside2, memories2) = within_guards(w13), within_guards(w2)
    memories = [*memories13, *memories2]
    before = [memory.clone() for memory in memories]
    try:
        bound = FusedMoE(inside13, inside2, force=kernel)
    except ForcedKernelError as refusal:
        pytest.skip(f"{kernel}: {refusal.selection.candidate(kernel).failures[0]}")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().to(device)
    ids = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :top_k].int()
    ids[0], ids[1, 0] = -1, count  # absent, and one beyond the last expert
    ids[2] = count - 1
    weights = torch.rand(tokens, top_k, generator=generator)
    route = Routing(ids=ids.to(device), weights=weights.to(device))
    found = bound(x, route)
    level = bound.selection.level
    wanted = [expected_moe(x, w13, w2, route, "silu", level, order) for order in range(3)]
    assert min(error(found, each) for each in wanted) < tolerance(scheme, level)
    assert not found[0].any()
    require_guards(memories, before)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of absent slots hold any memory
@pytest.mark.parametrize(
    ("count", "tokens", "hidden", "intermediate"),
    # The last two of the same experts: rows that are sorted, and few tokens, which are not.
    [
        (1, 5, 160, 96),
        (3, 5, 160, 96),
        (5, 5, 160, 96),
        (17, 11, 160, 96),
        pytest.param(17, 3, 32, 32, id="few"),
    ],
)
@pytest.mark.parametrize(
    ("kernel", "scheme", "device"),
    [
        ("triton_packed", "mxfp4_w4a16", "cuda:h100"),
        ("triton_packed", "nvfp4_w4a16", "cuda:h100"),
        ("triton_scaled_mixed", "mxfp4_w4a8", "cuda:b200"),
        ("triton_scaled_fp8", "mxfp4_w4a8", "cuda:h100"),
        ("triton_scaled_nvfp4", "nvfp4", "cuda:b200"),
    ],
)
def test_triton_reads_its_tensors_alone(
    kernel, scheme, device, count, tokens, hidden, intermediate
):
    w13 = experts(count, 2 * intermediate, hidden, scheme, 1)
    w2 = experts(count, hidden, intermediate, scheme, 2)
    platform = hal.platform(device)
    problem = {"dtype": "bfloat16", "tokens": 16, "hidden": hidden, "intermediate": intermediate}
    selection = choose(
        "fused_moe", scheme, platform.device(0), problem, options_from("fused_moe", force=kernel)
    )
    assert selection.kernel is not None, selection
    binding = Binding(selection, platform, w13.scheme, torch.device("cpu"))
    stored = [
        to_layout(weight, selection.kernel.operand(scheme, name).layout, platform)
        for name, weight in (("w13", w13), ("w2", w2))
    ]
    pairs = [within_guards(weight) for weight in stored]
    memories = [memory for _, kept in pairs for memory in kept]
    before = [memory.clone() for memory in memories]
    layer = ExpertLayer(Activation(), False, False, False, False)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    ids = torch.randint(0, count, (tokens, 2), generator=generator).int()
    ids[0], ids[1, 0], ids[2] = -1, count, count - 1
    route = Routing(ids=ids, weights=torch.rand(tokens, 2, generator=generator))
    found = []
    for weights in (stored, [inside for inside, _ in pairs]):
        launch, tensors = selection.kernel.load()(binding, *weights, layer)
        found.append(launch(x, route.ids, route.weights, tensors))
    wanted = expected_moe(x, w13, w2, route, "silu", selection.kernel.level)
    # The interpreter truncates to bf16 where a device rounds; that moves codes of h by a step.
    steps = 5 if scheme == "mxfp4_w4a8" else 3
    assert error(found[1], wanted) < steps * 0.012 * (5 if scheme == "nvfp4" else 1)
    assert torch.equal(*found)
    assert not found[1][0].any()
    require_guards(memories, before)


def test_a_read_beyond_the_end_would_be_seen():
    weight = experts(3, 96, 160, "nvfp4")
    inside, memories = within_guards(weight)
    place = [tensor.dtype for tensor in inside.tensors].index(torch.float8_e4m3fn)
    scales = memories[place][GUARD:].view(torch.float8_e4m3fn)
    assert scales[: inside.tensors[place].numel()].float().isfinite().all()
    assert scales[inside.tensors[place].numel()].float().isnan()
