"""Multiply with every tile that the device here can be given, at sizes that keep it busy.

A compiler may get one tile wrong and no other: Triton 3.6 did, for e2m1 weights on sm_90, and only
where many programs ran side by side for many steps.
"""

from __future__ import annotations

import packed_weights
import pytest
import torch

import hal
from hal.ops.align import align_triton
from hal.ops.kernels.grouped_gemm import grouped_gemm
from hal.ops.kernels.kinds import ALL_KINDS, FP8_UNITS
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import choose_tile
from hal.quant.repack import CODE_LAYOUTS

pytestmark = pytest.mark.gpu

EXPERTS, N, K = 8, 1536, 2048
BF16 = torch.bfloat16


def tiles(kind, matrices):
    """Return (rows, tile) for the first number of rows that takes each tile."""
    spec = hal.current_platform().device(0)
    found = {}
    for bits in range(14):
        for n, k in ((N, K), (K, N), (4096, 14336), (28672, 4096)):
            tile = choose_tile(
                kind, 1 << bits, n, k, platform=spec.platform, arch=spec.arch.name,
                shared_memory_bytes=spec.shared_memory_bytes,
                compute_units=spec.compute_units or 64, matrices=matrices,
            )  # fmt: skip
            found.setdefault(tile, 1 << bits)
    return [(rows, tile) for tile, rows in found.items()]


def random_scales(spec, shape, generator):
    """Return scales as the kind stores them, and in float64."""
    if spec.scale_format == "e8m0":
        scales = torch.randint(124, 128, shape, generator=generator, device="cuda")
        return scales.to(torch.uint8), torch.exp2(scales.double() - 127)
    scales = torch.rand(shape, generator=generator, device="cuda") + 0.1
    return scales, scales.double()


def operands(kind, rows, generator):
    """Return (a, b, scale arguments, a and b in float64) of experts."""
    spec, fp8 = ALL_KINDS[kind], torch.float8_e4m3fn
    a = torch.randn(rows, K, generator=generator, device="cuda")
    scales = {}
    if spec.a_scaled:
        a = (a * 30).to(torch.int8 if spec.integer else fp8)
        groups = (rows, K // 128) if spec.scales == "block128" else (rows,)
        scales["a_scales"], wide = random_scales(spec, groups, generator)
        wide = wide.view(rows, -1)
        wide_a = a.to(torch.float32).double() * wide.repeat_interleave(K // wide.shape[1], 1)
    else:
        a = a.to(BF16)
        wide_a = a.double()
    shape = (EXPERTS, N, K)
    if spec.packed:
        b, given, wide_b = packed_weights.weight(kind, shape, generator, "cuda")
        if spec.planes:
            b = CODE_LAYOUTS["int4_planes"].forward(b)
            given["b_scales"] = given["b_scales"] * FP8_UNITS["e4m3fn"]
        return a, b, scales | given, wide_a, wide_b
    b = torch.randn(shape, generator=generator, device="cuda")
    if not spec.scales:
        b = b.to(BF16)
        return a, b, scales, wide_a, b.double()
    b = (b * 30).to(torch.int8 if spec.integer or spec.decode == "int8" else fp8)
    wide_b = b.to(torch.float32).double()
    if spec.scales == "block128":
        given, wide = random_scales(spec, (EXPERTS, N // 128, K // 128), generator)
        wide_b *= wide.repeat_interleave(128, 1).repeat_interleave(128, 2)
    else:
        given, wide = random_scales(spec, (EXPERTS, N), generator)
        wide_b *= wide[..., None]
    return a, b, scales | {"b_scales": given}, wide_a, wide_b


def assert_near(out, wanted, what):
    error = ((out.double() - wanted).norm() / wanted.norm()).item()
    # Rounding of out to bf16; sums of 8-bit products keep about 13 bits of the largest term.
    assert error < 3e-3, f"{what}: relative error {error}"


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "fp8_e5m2_decode"])
def test_every_tile(kind):
    generator = torch.Generator("cuda").manual_seed(11)
    slots = 4096
    a, b, scales, wide_a, wide_b = operands(kind, slots, generator)
    ids = torch.randint(EXPERTS, (slots, 1), generator=generator, device="cuda")
    wanted = torch.empty(slots, N, dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        chosen = ids[:, 0] == expert
        wanted[chosen] = wide_a[chosen] @ wide_b[expert].T
    for _, tile in tiles(kind, EXPERTS):
        places = align_triton(ids, EXPERTS, tile.block_m)
        out = torch.full((slots, N), float("nan"), device="cuda", dtype=BF16)
        grouped_gemm(a, b, out, *places, top_k_divisor=1, kind=kind, tile=tile, **scales)
        assert_near(out, wanted, f"experts, {tile}")
    first = {name: value if name == "a_scales" else value[0] for name, value in scales.items()}
    for rows, tile in tiles(kind, 1):
        rows = min(max(rows, 3), slots)
        out = torch.full((rows, N), float("nan"), device="cuda", dtype=BF16)
        own = first | {"a_scales": first["a_scales"][:rows]} if "a_scales" in first else first
        gemm(a[:rows], b[0], out, kind=kind, tile=tile, **own)
        assert_near(out, wide_a[:rows] @ wide_b[0].T, f"{rows} rows, {tile}")
