"""Compare the product whose warps specialize with float64, and bit by bit with the ordinary one.

Gluon has no interpreter: these run on sm_90 alone, and cells of the cross-compiler elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from test_gemm import operands, run_grouped

from hal.ops.align import align_triton
from hal.ops.tiles import WARP_SPECIALIZED, Tile

KINDS = ("fp8_block128", "fp8_block128_ue8m0")
ORDINARY = Tile(64, 128, 128, 4, 4)
UNWRITTEN = 12345.0


def multiply(a, b, ids, kind, divisor, *, bias=None, programs=132, a_scales=None):
    from hal.ops.kernels.warp_specialized import warp_specialized_gemm

    experts, n, _ = b[0].shape
    out = torch.full((ids.numel(), n), UNWRITTEN, dtype=torch.bfloat16, device=ids.device)
    warp_specialized_gemm(
        a[0], b[0], out, *align_triton(ids, experts, WARP_SPECIALIZED.block_m),
        top_k_divisor=divisor, a_scales=a[1] if a_scales is None else a_scales, b_scales=b[1],
        bias=bias, kind=kind, tile=WARP_SPECIALIZED, programs=programs,
    )  # fmt: skip
    return out


def check(out, a, b, ids, divisor, bias=None):
    """Compare each expert's rows with float64; rows of absent slots hold what they held."""
    flat, experts = ids.flatten(), b[0].shape[0]
    absent = (flat < 0) | (flat >= experts)
    assert (out[absent] == UNWRITTEN).all()
    for expert in range(experts):
        slots = (flat == expert).nonzero().flatten()
        expected = a[2][slots // divisor] @ b[2][expert].T
        if bias is not None:
            expected = expected + bias[expert].double()
        largest = expected.abs().max().item() if len(slots) else 0.0
        # bf16 keeps 8 bits, and the matrix instruction some 14 of what it adds up.
        torch.testing.assert_close(out[slots].double(), expected, rtol=1e-2, atol=5e-3 * largest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "n", "k"),
    [
        *((0, 2, 4, 256, 128), (1, 1, 1, 256, 128), (300, 3, 5, 256, 128), (77, 2, 3, 8, 256)),
        *((500, 4, 7, 1000, 384), (900, 2, 3, 128, 2048), (4000, 2, 4, 640, 1024)),
    ],
)
def test_product(hopper, generator, tokens, top_k, experts, n, k, kind):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, device=hopper)
    a, b = operands(kind, (tokens, k), (experts, n, k), torch.bfloat16, generator, hopper)
    out = multiply(a, b, ids, kind, top_k)
    check(out, a, b, ids, top_k)
    same = run_grouped(a, b, ids, experts, kind, ORDINARY, divisor=top_k, out_dtype=torch.bfloat16)
    assert torch.equal(out, same.where(same != UNWRITTEN, out))


@pytest.mark.parametrize("chosen", [0, 3, -1, 4])
@pytest.mark.parametrize("programs", [1, 3, 132])
def test_one_expert_takes_all(hopper, generator, chosen, programs):
    """And few programs take many tiles each."""
    ids = torch.full((333, 1), chosen, dtype=torch.int32, device=hopper)
    kind = "fp8_block128"
    a, b = operands(kind, (333, 256), (4, 520, 256), torch.bfloat16, generator, hopper)
    out = multiply(a, b, ids, kind, 1, programs=programs)
    check(out, a, b, ids, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row_and_bias_and_strides_are_heeded(hopper, generator, kind):
    ids = torch.randint(0, 3, (400, 2), generator=generator, device=hopper)
    a, b = operands(kind, (800, 512), (3, 384, 512), torch.bfloat16, generator, hopper)
    bias = torch.randn(3, 384, generator=generator, device=hopper).bfloat16()
    columns = a[1].mT.contiguous().mT
    out = multiply(a, b, ids, kind, 1, bias=bias, a_scales=columns)
    check(out, a, b, ids, 1, bias)
    columns[7, 1] = 255 if kind.endswith("ue8m0") else float("nan")
    spoiled = multiply(a, b, ids, kind, 1, bias=bias, a_scales=columns)
    assert spoiled[7].isnan().all()
    kept = torch.arange(800, device=hopper) != 7
    assert torch.equal(spoiled[kept], out[kept])


def test_what_it_cannot_read_is_refused(hopper, generator):
    kind = "fp8_block128"
    ids = torch.zeros((4, 1), dtype=torch.int32, device=hopper)
    a, b = operands(kind, (4, 256), (2, 256, 256), torch.bfloat16, generator, hopper)
    with pytest.raises(ValueError, match="contiguous experts"):
        multiply(a, (b[0].mT.contiguous().mT, b[1]), ids, kind, 1)
    wide = torch.zeros(4, 257, device=hopper).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="whole 16 bytes apart"):
        multiply((wide[:, :256], a[1]), b, ids, kind, 1)


def test_many_rows_of_a_layer_take_it(hopper, generator, monkeypatch):
    """More rows an expert than it begins at, through `FusedMoE`, against the ordinary product."""
    import hal
    from hal.ops import FusedMoE, Routing
    from hal.ops import specialized_experts as module

    hidden, intermediate, experts = 512, 256, 2
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator, device=hopper)
    w2 = torch.randn(experts, hidden, intermediate, generator=generator, device=hopper)
    layer = [hal.quant.quantize(w.bfloat16() / 16, "fp8_block128") for w in (w13, w2)]
    x = torch.randn(700, hidden, generator=generator, device=hopper).bfloat16()
    ids = torch.randint(0, experts, (700, 1), generator=generator, device=hopper)
    routing = Routing(ids=ids, weights=torch.ones(700, 1, device=hopper))
    special = FusedMoE(*layer, force="triton_fp8")(x, routing)
    monkeypatch.setattr(module, "specialized_products", lambda *_: None)
    plain = FusedMoE(*layer, force="triton_fp8")(x, routing)
    assert torch.equal(special, plain)
