"""Compare products of few rows, read together by matrix instructions, with float64.

The kernel is PTX: Triton's interpreter cannot run it, so that these tests need an NVIDIA GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton
from packed_weights import BF16, activations, assert_product, weight

from hal.device import version_at_least
from hal.ops.kernels import common
from hal.ops.kernels.common import INTERPRETED
from hal.ops.kernels.crosscompile import Target, compile_cells
from hal.ops.kernels.kinds import as_weight, by_row
from hal.ops.kernels.mma_rows import fits, mma_rows
from hal.platforms.tables import device_spec

KINDS = [
    ("int4_group_decode", 128), ("int4_group_decode", 64), ("int4_group_decode", 32),
    ("uint4_group_decode", 128), ("uint4_group_decode", 32), ("mxfp4_decode", 32),
    ("nvfp4_decode", 16),
]  # fmt: skip
pytestmark = pytest.mark.skipif(INTERPRETED.value, reason="PTX: Triton's interpreter has none")


@pytest.fixture(autouse=True)
def _only_nvidia(request):
    if "device" in request.fixturenames and torch.cuda.is_available() and torch.version.hip:
        pytest.skip("PTX: needs an NVIDIA GPU")


def stored(kind, group, shape, generator, device, **options):
    if "int4" in kind:
        options["group"] = group
    b, scales, value = weight(kind, shape, generator, device, **options)
    return by_row(kind, as_weight(kind, shape[1], b, **scales)), value


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("warps", [1, 8])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 16, 128), (1, 37, 1024), (1, 100, 672), (3, 64, 2048), (8, 40, 384), (2, 1, 32)],
)
def test_product(device, generator, m, n, k, dtype, warps, kind, group):
    held, value = stored(kind, group, (n, k), generator, device)
    a = activations((m, k), dtype, generator, device)
    bias = torch.randn(n, generator=generator, device=device)
    assert fits(kind, a, held) == (m == 1 or held.group >= 128)  # one group alone may be any
    if not fits(kind, a, held):
        return
    out = torch.full((m, n), float("nan"), device=device)
    mma_rows(a, held, out, bias=bias, kind=kind, warps=warps)
    assert_product(out, a.double() @ value.T + bias.double())


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_what_is_no_number_stays_in_its_row(device, generator, kind, group):
    """NaN and infinity as IEEE arithmetic has them; a NaN scale spoils its column alone."""
    held, value = stored(kind, group, (40, 512), generator, device)
    m = 3 if group >= 128 else 1
    a = activations((m, 512), BF16, generator, device)
    a[0, 5] = float("inf")
    if m > 1:
        a[1, 7] = float("nan")
    out = torch.empty(m, 40, device=device)
    mma_rows(a, held, out, kind=kind, warps=4)
    expected = (a.double()[:, None] * value).sum(-1)
    atol = 1e-5 * value.abs().max().item() * 512
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=atol, equal_nan=True)
    a[:] = 1
    held.scales[7, 0] = (
        0x7F if kind == "nvfp4_decode" else 255 if kind == "mxfp4_decode" else torch.nan
    )
    mma_rows(a, held, out, kind=kind, warps=4)
    assert out.isnan().nonzero()[:, 1].tolist() == [7] * m


def test_zero_rows_of_a_and_zero_codes_give_zero(device, generator):
    held, _ = stored("int4_group_decode", 128, (16, 512), generator, device)
    a = activations((4, 512), BF16, generator, device) * 1e4
    a[2] = 0
    out = torch.empty(4, 16, device=device)
    mma_rows(a, held, out, kind="int4_group_decode", warps=4)
    assert (out[2] == 0).all()
    mma_rows(
        a, held._replace(codes=torch.zeros_like(held.codes)), out, kind="int4_group_decode", warps=4
    )
    assert (out == 0).all()


def test_rows_of_a_and_of_the_weight_may_lie_apart(device, generator, monkeypatch):
    held, value = stored("int4_group_decode", 128, (20, 256), generator, device)
    monkeypatch.setattr(common, "MAX_OFFSET_32", 1000)  # 64-bit offsets, in miniature
    far = torch.zeros(20, 64, dtype=torch.int32, device=device)[:, :32].copy_(held.codes)
    a = activations((4, 512), BF16, generator, device)[:, 128:384]
    out = torch.full((4, 50), 7.0, device=device)
    mma_rows(a, held._replace(codes=far), out[:, 10:30], kind="int4_group_decode", warps=2)
    assert_product(out[:, 10:30], a.double() @ value.T)
    assert (out[:, :10] == 7).all()
    assert (out[:, 30:] == 7).all()


def test_what_does_not_fit(device, generator):
    held, _ = stored("int4_group_decode", 128, (16, 256), generator, device)
    a = activations((2, 256), BF16, generator, device)
    kind = "int4_group_decode"
    assert fits(kind, a, held)
    assert not fits(kind, activations((9, 256), BF16, generator, device), held)
    assert not fits(kind, activations((2, 300), BF16, generator, device)[:, 1:257], held)
    odd, _ = stored(kind, 128, (16, 264), generator, device)
    assert not fits(kind, activations((2, 264), BF16, generator, device), odd)


@pytest.mark.matrix
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_nothing_spills_and_the_instruction_is_there(arch):
    # Triton before 3.7 was seen to spill elsewhere on sm_120
    spills = 0 if version_at_least(triton.__version__, "3.7") else 32
    spec = device_spec("cuda", arch)
    target = Target("cuda", arch, spec.shared_memory_bytes, spec.compute_units, spec.lanes)
    names = [
        f"mma_rows/{kind}" for kind in ("int4_group_decode", "uint4_group_decode", "nvfp4_decode")
    ]
    for cell in compile_cells(target, names, timeout_s=280):
        assert cell.error == "", cell
        assert any(found.startswith("mma.sync") for found in cell.instructions), cell
        assert cell.spilled_bytes <= spills, cell
