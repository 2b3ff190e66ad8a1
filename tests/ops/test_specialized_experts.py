"""Which products of experts run with warps that specialize: on any machine, of weights that lie."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hal.ops.kernels.common import has_gluon
from hal.ops.kernels.kinds import ALL_KINDS
from hal.ops.linear import scale_names
from hal.ops.specialized_experts import specialized_products
from hal.ops.tiles import (
    ROWS_BEFORE_SPECIALIZING,
    SPECIALIZED_KINDS,
    WARP_SPECIALIZED,
    Tile,
    rows_before_expanding,
)
from hal.platforms.tables import device_spec

pytestmark = pytest.mark.skipif(not has_gluon(), reason="needs Triton 3.6, uninterpreted")
HIDDEN, INTERMEDIATE, EXPERTS = 256, 128, 4
FEW, MANY = Tile(16, 256, 128, 4, 3), Tile(64, 256, 128, 4, 3)


def weight(kind, n, k):
    """Return codes and scales of experts, as layers hold them."""
    spec = ALL_KINDS[kind]
    if kind == "fp8_block128":
        codes = torch.zeros(EXPERTS, n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return codes, torch.ones(EXPERTS, n // 128, k // 128)
    stored = torch.int8 if spec.decode == "int8" else torch.uint8
    codes = torch.zeros(EXPERTS, n, k // spec.per_byte, dtype=stored)
    if spec.scales in ("tensor", "channel"):
        return codes, torch.ones(EXPERTS, n)
    size = EXPERTS, k // spec.groups[0], -(-n // spec.scale_rows)
    stored = torch.float32 if spec.scale_format == "float32" else torch.uint8
    further = (torch.ones(EXPERTS),) if spec.second else ()
    return codes, torch.ones(size, dtype=stored).mT, *further


def ask(kind, device="h200", dtype="bfloat16", second=None):
    binding = SimpleNamespace(
        spec=device_spec("cuda", device),
        problem=lambda name, default: dtype if name == "dtype" else default,
    )
    weights = weight(kind, 2 * INTERMEDIATE, HIDDEN), weight(kind, HIDDEN, INTERMEDIATE)
    kinds = kind, second or kind
    return specialized_products(binding, kinds, (HIDDEN, INTERMEDIATE), *weights)


@pytest.mark.parametrize("kind", sorted(SPECIALIZED_KINDS))
def test_weights_that_are_decoded(kind):
    found = ask(kind)
    assert found is not None
    assert found.decodes == kind.endswith("_decode")
    first, second = found.tiles(3, EXPERTS, 1 << 40)
    assert first.block_m == second.block_m == 16
    assert found.tiles(60, EXPERTS, 0)[0].block_m == 64
    assert len(scale_names(kind)) == len(weight(kind, 128, 128)) - 1
    # Codes beside rows of 8 bits do not ask for the dtype of those.
    assert (ask(kind, dtype="float16") is None) == found.decodes
    assert ask(kind, "a100") is None
    assert ask(kind, "b200") is None
    assert ask(kind, second="uint4_group_decode") is None


def test_blocks_of_scales_beside_rows_of_8_bits_want_many_rows():
    found = ask("fp8_block128")
    assert found is not None
    assert found.tiles(ROWS_BEFORE_SPECIALIZING, 4, 0) is None
    assert found.tiles(ROWS_BEFORE_SPECIALIZING + 1, 4, 0) == (WARP_SPECIALIZED, WARP_SPECIALIZED)
    assert found.tiles(ROWS_BEFORE_SPECIALIZING + 1, 4, 1 << 31) is None


@pytest.mark.parametrize("kind", ["bf16", "fp8_channel", "int8_channel"])
def test_others_are_left_to_the_ordinary_product(kind):
    codes = torch.zeros(EXPERTS, HIDDEN, HIDDEN)
    binding = SimpleNamespace(spec=device_spec("cuda", "h200"), problem=lambda _, default: default)
    given = [codes], [codes]
    assert specialized_products(binding, (kind, kind), (HIDDEN, HIDDEN), *given) is None


def test_rows_are_copied_where_the_kernel_could_not_read_them():
    found = ask("int4_group_decode")
    held = torch.arange(6.0 * 72).view(6, 72).bfloat16()
    for x, same in (
        (held, True),
        (held[1:, :64], True),
        (held[:, 8:], True),
        (held[:, 1:65], False),
        (held[:, ::2], False),
        (held.view(-1)[:6].view(2, 3), False),
    ):
        rows, options = found.arranged(x, FEW)
        assert torch.equal(rows, x)
        assert (rows is x) == same
        assert rows.data_ptr() % 16 == 0
        assert not options
    quantized = replace(found, decodes=False)
    for tile in (FEW, MANY):
        rows, options = quantized.arranged(held[:, 1:65], tile)
        assert rows.data_ptr() == held[:, 1:65].data_ptr()
        assert not options
        assert not quantized.step_of_gate(tile)
    assert found.step_of_gate(FEW) == FEW.block_k


@pytest.mark.parametrize("x", [torch.arange(6.0 * 64).view(6, 64), torch.rand(64, 6).mT])
def test_many_rows_are_brought_into_the_order_of_codes(monkeypatch, x):
    from hal.ops.kernels import step_order

    def order(given, step):
        assert given.stride(1) == 1
        return given.flip(1), step

    monkeypatch.setattr(step_order, "order_rows", order)
    (rows, step), options = ask("int4_group_decode").arranged(x, MANY)
    assert torch.equal(rows, x.flip(1))
    assert (step, options) == (MANY.block_k, {"ordered": True})


def test_weights_are_expanded_later_beside_it():
    for kind in SPECIALIZED_KINDS - {"int4_group_fp8"}:
        later, before = rows_before_expanding(kind, specialized=True), rows_before_expanding(kind)
        assert later > before


def test_weights_are_described_once(monkeypatch):
    """As long as calls bring the same tensors: others may lie anywhere."""
    from hal.ops.kernels import warp_specialized_packed as kernels

    launched = []
    monkeypatch.setattr(
        kernels,
        "warp_specialized_packed_gemm",
        lambda a, coded, out, *places, **options: launched.append((coded, options)),
    )
    multiply = ask("mxfp4_decode").multiply
    x = torch.zeros(3, HIDDEN).bfloat16()
    codes, scales = weight("mxfp4_decode", 128, HIDDEN)
    options = {"kind": "mxfp4_decode", "tile": None, "top_k_divisor": 2}
    for b, own in (
        (codes, scales),
        (codes, scales),
        (codes.clone(), scales),
        (codes, scales.mT.mT),
    ):
        multiply(x, b, x, b_scales=own, fnuz=False, **options)
    first, again, moved, rescaled = (coded for coded, _ in launched)
    assert first is again
    assert len({first, moved, rescaled}) == 3
    assert moved.codes.data_ptr() != first.codes.data_ptr()
    assert first.described(128) is first.described(128)
    assert first.described(128)[0].block_shape == [128, 64]
    assert first.described(256)[1].block_shape == [1, 4, 256]
    assert all(kept["programs"] == 132 for _, kept in launched)
