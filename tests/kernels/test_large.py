"""Reach offsets beyond 2^31 elements: on a GPU for real, in the interpreter in miniature.

In the interpreter the limit is lowered, so that the same 64-bit variants run on small tensors.
"""

from __future__ import annotations

from functools import partial

import packed_weights
import pytest
import torch
from far_apart import far_apart

from hal.ops.activations import Activation
from hal.ops.kernels import common
from hal.ops.kernels.align import align, capacity
from hal.ops.kernels.asymmetric import quantize_asymmetric
from hal.ops.kernels.combine import combine
from hal.ops.kernels.expand import expand
from hal.ops.kernels.fused_rows import quantize_fused
from hal.ops.kernels.gemv import gemv
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import ALL_KINDS, as_weight
from hal.ops.kernels.linear import gemm
from hal.ops.kernels.quantize import Norm, quantize_groups, quantize_matrix, quantize_rows
from hal.ops.kernels.route import route
from hal.ops.kernels.static import quantize_static
from hal.ops.kernels.swiglu import silu_and_mul
from hal.ops.tiles import Tile

TILE = Tile(64, 64, 64, 4, 2)
NEEDED_BYTES = 24 << 30


@pytest.fixture
def big(device, monkeypatch):
    """Return a function that gives the size for a GPU or the one for the interpreter."""
    if common.INTERPRETED.value:
        monkeypatch.setattr(common, "MAX_OFFSET_32", 1000)
        return lambda real, miniature: miniature
    if device == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free GPU memory")
    return lambda real, miniature: real


def is_wide(*tensors):
    """Say whether this case is one: a test of small offsets would prove nothing."""
    assert common.offsets_need_64_bits(*tensors)


def some(count):
    """Return indices at the start, around the middle and at the end."""
    return [*range(3), *range(count // 2 - 2, count // 2 + 2), *range(count - 3, count)]


def random(shape, generator, device):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return x.normal_(generator=generator)


@pytest.mark.parametrize("slots_first", [False, True])
def test_combine(big, device, generator, slots_first):
    tokens, hidden = big(300_000, 20), big(2048, 64)
    shape = (4, tokens, hidden) if slots_first else (tokens, 4, hidden)
    x = random(shape, generator, device)
    x = x.transpose(0, 1) if slots_first else x
    is_wide(x)
    ids = torch.zeros(tokens, 4, dtype=torch.int32, device=device)
    out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
    combine(x, out, ids, 1)
    for token in some(tokens):
        expected = x[token].double().sum(0)
        torch.testing.assert_close(out[token].double(), expected, rtol=2**-7, atol=2**-7)


def test_route_of_logits_with_experts_first(big, device, generator):
    experts, tokens = big(1025, 60), big(2_200_000, 40)
    logits = random((experts, tokens), generator, device).T
    for first in (0, tokens - 3):
        given = logits[first : first + 3]
        assert common.offsets_need_64_bits(given, skip=1)
        found, wanted = (
            (torch.empty(3, 4, device=device), torch.empty(3, 4, dtype=torch.int32, device=device))
            for _ in range(2)
        )
        options = {"expert_groups": 5, "top_k_groups": 2}
        route(given, *found, **options)
        route(given.contiguous(), *wanted, **options)
        assert torch.equal(found[1], wanted[1])
        torch.testing.assert_close(found[0], wanted[0])


def test_quantize_and_gate(big, device, generator):
    rows, columns = big(530_000, 20), big(4096, 256)
    x = random((rows, columns), generator, device)
    is_wide(x)
    values = torch.empty(x.shape, dtype=torch.int8, device=device)
    scales = torch.empty(rows, columns // 128, device=device)
    quantize_groups(x, values, scales, 127.0, 1e-12)
    gated = torch.empty(rows, columns // 2, dtype=torch.bfloat16, device=device)
    silu_and_mul(x, gated)
    for row in some(rows):
        groups = x[row].float().reshape(-1, 128)
        # By a tensor: on CUDA torch divides by a plain number through its reciprocal.
        expected = groups.abs().amax(-1) / torch.tensor(127.0, device=device)
        assert torch.equal(scales[row], expected)
        assert torch.equal(
            values[row], (groups / expected[:, None]).round().to(torch.int8).flatten()
        )
        gate, up = x[row].double().chunk(2)
        product = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(gated[row].double(), product, rtol=2**-6, atol=1e-6)


def test_one_row_and_expansion_with_a_large_weight(big, device, generator):
    n, k = big(2**21 + 70, 70), big(1040, 80)
    dense, a = random((n, k), generator, device), random((1, k), generator, device)
    is_wide(dense)
    out = torch.empty(1, n, dtype=torch.bfloat16, device=device)
    gemv(a, as_weight("bf16", k, dense, None), out, kind="bf16", tile=Tile(1, 4, 256, 1, 1))
    places = some(n)
    expected = a.double() @ dense[places].double().T
    torch.testing.assert_close(out[:, places].double(), expected, rtol=2**-6, atol=0.3)

    codes = torch.randint(-128, 128, (n, k), generator=generator, device=device, dtype=torch.int8)
    scales = torch.rand(n, generator=generator, device=device) + 0.5
    held = as_weight("int8_channel_decode", k, codes, scales)
    expand(held, dense, kind="int8_channel_decode")
    wanted = codes[places].double() * scales[places].double()[:, None]
    torch.testing.assert_close(dense[places].double(), wanted, rtol=2**-7, atol=0)
    gemv(a, held, out, kind="int8_channel_decode", tile=Tile(1, 4, 256, 1, 1))
    size = wanted.abs().max().item() * k**0.5
    torch.testing.assert_close(
        out[:, places].double(), a.double() @ wanted.T, rtol=2**-6, atol=size * 2**-7
    )


def test_gemm_with_a_large_weight(big, device, generator):
    m, n, k = 16, big(2**21 + 70, 70), big(1040, 80)
    weight, a = random((n, k), generator, device), random((m, k), generator, device)
    for b in (weight, weight.T.contiguous().T):
        is_wide(b)
        out = torch.empty(m, n, device=device)
        gemm(a, b, out, kind="bf16", tile=TILE)
        columns = some(n)
        expected = a.double() @ weight[columns].double().T
        torch.testing.assert_close(out[:, columns].double(), expected, rtol=1e-4, atol=1e-3)


def run_grouped(a, b, ids):
    slots, experts = ids.numel(), b.shape[0]
    length = capacity(slots, experts, TILE.block_m)
    options = {"dtype": torch.int32, "device": ids.device}
    places = [torch.empty(size, **options) for size in (length, length // TILE.block_m, 1)]
    align(ids, experts, TILE.block_m, *places)
    out = torch.empty(slots, b.shape[1], dtype=torch.bfloat16, device=ids.device)
    grouped_gemm(a, b, out, *places, top_k_divisor=ids.shape[1], kind="bf16", tile=TILE)
    return out


def check_grouped(a, b, ids, out):
    for slot in some(ids.numel()):
        expected = a[slot // ids.shape[1]].double() @ b[ids.flatten()[slot]].double().T
        torch.testing.assert_close(out[slot].double(), expected, rtol=2**-6, atol=2**-4)


def test_grouped_gemm_with_many_slots(big, device, generator):
    tokens, n = big(2**19 + 50, 40), big(2112, 48)
    ids = torch.randint(3, (tokens, 2), generator=generator, device=device)
    a, b = random((tokens, 64), generator, device), random((3, n, 64), generator, device)
    out = run_grouped(a, b, ids)
    is_wide(out)
    check_grouped(a, b, ids, out)


def test_grouped_gemm_with_many_experts(big, device, generator):
    experts, n, k = big(300, 3), big(2048, 40), big(4096, 64)
    ids = torch.randint(experts, (20, 2), generator=generator, device=device)
    ids[-1] = experts - 1
    a, b = random((20, k), generator, device), random((experts, n, k), generator, device)
    is_wide(b)
    check_grouped(a, b, ids, run_grouped(a, b, ids))


def test_grouped_gemm_with_a_large_expert(big, device, generator):
    n, k = big(2**21 + 70, 70), big(1040, 80)
    ids = torch.tensor([[1], [0], [1], [0]], device=device)
    a, b = random((4, k), generator, device), random((2, n, k), generator, device)
    is_wide(b[0])
    out = run_grouped(a, b, ids)
    columns = some(n)
    for slot, expert in enumerate(ids.flatten().tolist()):
        expected = a[slot].double() @ b[expert, columns].double().T
        torch.testing.assert_close(out[slot, columns].double(), expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("far_along", ["experts", "rows"])
@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind.endswith("_group_decode")
                                  or kind.startswith(("mx", "nv"))])  # fmt: skip
def test_packed_experts_that_lie_far_apart(device, generator, kind, far_along):
    """Beyond 2^31 for real in the interpreter, too: memory that nothing touches costs nothing."""
    experts, n, k, cut = 2, 24, 64, Tile(16, 32, 64, 4, 2)
    b, scales, value = packed_weights.weight(kind, (experts, n, k), generator, device)
    if far_along == "experts":
        codes = far_apart(b)
    else:
        codes = far_apart(b.flatten(0, 1), step=2**31 // 20).unflatten(0, b.shape[:2])
    assert common.offsets_need_64_bits(codes)
    ids = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.int32, device=device)
    a = random((3, k), generator, device)
    length = capacity(ids.numel(), experts, cut.block_m)
    options = {"dtype": torch.int32, "device": device}
    places = [torch.empty(size, **options) for size in (length, length // cut.block_m, 1)]
    align(ids, experts, cut.block_m, *places)
    out = torch.empty(ids.numel(), n, dtype=torch.bfloat16, device=device)
    grouped_gemm(a, codes, out, *places, top_k_divisor=2, kind=kind, tile=cut, **scales)
    for slot, expert in enumerate(ids.flatten().tolist()):
        packed_weights.assert_product(out[slot], a[slot // 2].double() @ value[expert].T)


def norm_of(x, values, scales, **options):
    weight = torch.linspace(0.5, 1.5, values.shape[1], device=x.device).to(x.dtype)
    quantize_matrix(x, values, scales, 127.0, 1e-12, norm=Norm(weight, 1e-6), **options)


QUANTIZERS = {
    "groups of 128": (torch.float16, (2, torch.float32), quantize_groups),
    "rows": (torch.float16, (0, torch.float32), quantize_rows),
    "pairs": (torch.bfloat16, (0, torch.float32), partial(norm_of, group=None)),
    "fixed": (torch.bfloat16, (0, torch.float32), lambda x, values, scales, *_: quantize_static(
        x, values, scales, torch.full((), 0.03, device=x.device), 127.0)),
    "zero points": (torch.bfloat16, (0, torch.float32), lambda x, values, scales, *_:
        quantize_asymmetric(x, values, scales, torch.empty_like(scales).char(), 1e-12)),
    "fixed, gate": (torch.bfloat16, (0, torch.float32), lambda x, values, scales, *_:
        quantize_fused(x, values, scales, 127.0, 1e-12, gate=Activation(),
                       fixed=torch.full((), 0.03, device=x.device))),
    "fours": (torch.bfloat16, (8, torch.uint8), lambda x, values, scales, *_: quantize_matrix(
        x, values, scales, 6.0, 1e-12, group=32)),
}  # fmt: skip
"""dtype of x, groups of a row (0: one scale a row) and dtype of the scales, and what is called."""


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_rows_that_lie_far_apart(device, generator, name):
    dtype, (groups, scale_dtype), quantizer = QUANTIZERS[name]
    x = torch.randn(3, 512 if "gate" in name else 256, generator=generator, device=device)
    x = x.to(dtype)
    packed = scale_dtype is torch.uint8
    values = torch.zeros(3, 128 if packed else 256, device=device)
    values = values.to(torch.uint8 if packed else torch.int8)
    scales = torch.zeros((3, groups) if groups else (3,), dtype=scale_dtype, device=device)
    found = far_apart(x), far_apart(values), scales.clone()
    assert common.offsets_need_64_bits(*found)
    for arguments in ((x, values, scales), found):
        more = (127.0, 1e-12) if quantizer in (quantize_rows, quantize_groups) else ()
        quantizer(*arguments, *more)
    assert values.any(-1).all()
    assert torch.equal(found[1], values)
    assert torch.equal(found[2], scales)


def test_a_residual_that_lies_far_apart(device, generator):
    x, residual = (torch.randn(3, 256, generator=generator, device=device).half() for _ in "ab")
    weight = torch.ones(256, device=device).half()
    fixed = torch.full((), 0.03, device=device)
    found = []
    for place in (lambda tensor: tensor, far_apart):
        values, scales = torch.zeros(3, 256, dtype=torch.int8, device=device), fixed.new_zeros(3)
        total = place(torch.zeros_like(x))
        norm = Norm(weight, 1e-6, place(residual), total)
        quantize_fused(x, values, scales, 127.0, 1e-12, norm=norm, fixed=fixed)
        found.append((values, total))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[1][1], x + residual)
