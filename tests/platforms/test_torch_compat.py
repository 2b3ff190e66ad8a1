"""The calls that differ between torch releases, against plain arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hal import torch_compat as compat
from hal.device import version_at_least
from hal.errors import PlatformError, UnknownNameError
from hal.formats import FORMATS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
F8 = torch.float8_e4m3fn


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no torch.cuda device")
    return name


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1.6e-2, atol=1e-2 * 4)


def rows_and_scales(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    wide = torch.randn(rows, columns, generator=generator)
    scales = wide.abs().amax(1) / 448.0
    return (wide / scales[:, None]).to(F8).to(device), scales.to(device)


def test_dtypes_of_the_format_table() -> None:
    for row in FORMATS.values():
        if row.torch_name is None:
            with pytest.raises(PlatformError, match="packed"):
                compat.dtype(row.name)
            assert not compat.has_dtype(row.name)
        elif hasattr(torch, row.torch_name):
            assert compat.dtype(row.name) is getattr(torch, row.torch_name)
            assert compat.has_dtype(row.name)
    assert compat.dtype("uint8") is torch.uint8
    with pytest.raises(UnknownNameError, match="e4m3fn"):
        compat.dtype("e4m3")


def test_a_missing_dtype_names_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.dtype.cache_clear()
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    try:
        with pytest.raises(PlatformError, match=r"torch\.float8_e8m0fnu .* needed torch >= 2\.7"):
            compat.dtype("e8m0")
    finally:
        compat.dtype.cache_clear()


def needs_rowwise(device: str) -> None:
    if device == "cpu" and not version_at_least(torch.__version__, "2.13"):
        pytest.skip("torch before 2.13 has no row-wise scaled_mm on the CPU")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matrix math before sm_89")


@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_mm_rowwise(device: str, rows: int, has_bias: bool) -> None:
    needs_rowwise(device)
    a, a_scales = rows_and_scales(rows, 512, device)
    b, b_scales = rows_and_scales(256, 512, device)
    bias = torch.randn(256, device=device).bfloat16() if has_bias else None
    wanted = (a.float() * a_scales[:, None]) @ (b.float() * b_scales[:, None]).t()
    wanted = wanted if bias is None else wanted + bias.float()
    close(compat.scaled_mm_rowwise(a, b.t(), a_scales, b_scales, torch.bfloat16, bias), wanted)
    call = compat.scaled_mm_rowwise_function()
    assert call is compat.scaled_mm_rowwise_function()
    close(call(a, b.t(), a_scales[:, None], b_scales[None], torch.bfloat16, bias), wanted)


@pytest.mark.skipif(not compat.has_scaled_mm_block128(), reason="needs torch 2.10")
def test_rowwise_by_the_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_rowwise("cpu")
    a, a_scales = rows_and_scales(8, 64, "cpu")
    b, b_scales = rows_and_scales(32, 64, "cpu")
    wanted = compat.scaled_mm_rowwise(a, b.t(), a_scales, b_scales, torch.bfloat16)
    compat.scaled_mm_rowwise_function.cache_clear()
    monkeypatch.delattr(torch, "_scaled_mm")
    try:
        found = compat.scaled_mm_rowwise(a, b.t(), a_scales, b_scales, torch.bfloat16)
    finally:
        compat.scaled_mm_rowwise_function.cache_clear()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("blocks", [1, 3, 4, 5])
def test_weight_scales_are_arranged_once(blocks: int) -> None:
    scales = torch.rand(2, blocks)
    plain = compat.block128_weight_scales(scales, "cpu")
    assert torch.equal(plain, scales.t())
    arranged = compat.block128_weight_scales(scales, "cuda")
    padded = -(-blocks // 4) * 4
    assert (arranged.shape, arranged.stride()) == ((padded, 2), (1, padded))
    assert torch.equal(arranged[:blocks], scales.t())
    assert not arranged[blocks:].any()
    activations = torch.rand(7, blocks)
    turned = compat.block128_activation_scales(activations, "cuda")
    assert turned.stride(0) == 1
    assert torch.equal(turned, activations)
    assert compat.block128_activation_scales(turned, "cuda") is turned
    assert compat.block128_activation_scales(activations, "cpu") is activations


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "k"), [(1, 384), (3, 512), (17, 128), (20, 128), (64, 512), (256, 640)]
)
def test_scaled_mm_block128(rows: int, k: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no sm_90: torch has this product nowhere else")
    if not compat.has_scaled_mm_block128():
        pytest.skip("torch is older than 2.10")
    n = 256
    a = torch.randn(rows, k // 128, 128, device="cuda")
    a_scales = a.abs().amax(-1) / 448.0
    a8 = (a / a_scales[..., None]).to(F8)
    b = torch.randn(n // 128, 128, k // 128, 128, device="cuda")
    b_scales = b.abs().amax((1, 3)) / 448.0
    b8 = (b / b_scales[:, None, :, None]).to(F8)
    wanted = (a8.float() * a_scales[..., None]).view(rows, k) @ (
        b8.float() * b_scales[:, None, :, None]
    ).view(n, k).t()
    a8, b8 = a8.view(rows, k), b8.view(n, k)
    close(compat.scaled_mm_block128(a8, b8.t(), a_scales, b_scales, torch.bfloat16), wanted)


@pytest.mark.parametrize("ends", [[5, 5, 8, 16], [0, 16, 16, 16], [4, 8, 12, 16]])
def test_grouped_mm(device: str, ends: list[int]) -> None:
    assert compat.has_grouped_mm()
    a = torch.randn(16, 64, device=device).bfloat16()
    b = torch.randn(4, 32, 64, device=device).bfloat16()
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    starts = [0, *ends[:-1]]
    wanted = torch.cat(
        [
            a[i:j].float() @ b[g].float().t()
            for g, (i, j) in enumerate(zip(starts, ends, strict=True))
        ]
    )
    close(compat.grouped_mm(a, b.transpose(1, 2), offs), wanted)


@pytest.mark.gpu
def test_scaled_grouped_mm() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no sm_90")
    assert compat.has_scaled_grouped_mm()
    ends = [16, 16, 40, 64]
    a, a_scales = rows_and_scales(64, 128, "cuda")
    flat, b_scales = rows_and_scales(4 * 64, 128, "cuda")
    b, b_scales = flat.view(4, 64, 128), b_scales.view(4, 64)
    offs = torch.tensor(ends, dtype=torch.int32, device="cuda")
    wide_a, wide_b = a.float() * a_scales[:, None], b.float() * b_scales[..., None]
    parts = [
        wide_a[i:j] @ wide_b[g].t()
        for g, (i, j) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    found = compat.scaled_grouped_mm(a, b.transpose(1, 2), a_scales, b_scales, offs, torch.bfloat16)
    close(found, torch.cat(parts))


def test_int_mm(device: str) -> None:
    a = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (48, 64), dtype=torch.int8)
    wanted = a.int() @ b.int().t()
    found = compat.int_mm(a.to(device), b.to(device).t())
    assert found.dtype is torch.int32
    assert torch.equal(found.cpu(), wanted)


def test_weight_int8pack_mm() -> None:
    x = torch.randn(4, 64).bfloat16()
    w = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    scales = torch.rand(32).bfloat16() / 64
    wanted = x.float() @ (w.float() * scales.float()[:, None]).t()
    close(compat.weight_int8pack_mm(x, w, scales), wanted)


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grouped_mm", "scaled_grouped_mm", "scaled_mm"):
        monkeypatch.delattr(torch.nn.functional, name, raising=False)
    for name in ("_grouped_mm", "_scaled_grouped_mm", "_int_mm"):
        monkeypatch.delattr(torch, name, raising=False)
    getters = {
        compat.grouped_mm_function: "2.8",
        compat.scaled_grouped_mm_function: "2.8",
        compat.scaled_mm_block128_function: "2.10",
        compat.int_mm_function: "no longer",
    }
    for getter, words in getters.items():
        getter.cache_clear()  # type: ignore[attr-defined]
        with pytest.raises(PlatformError, match=words):
            getter()
        getter.cache_clear()  # type: ignore[attr-defined]
    assert not compat.has_grouped_mm()
    assert not compat.has_scaled_grouped_mm()
    assert not compat.has_scaled_mm_block128()


def test_is_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compat.is_compiling()
    fake = SimpleNamespace(is_compiling=lambda: True)
    monkeypatch.setattr(torch, "compiler", fake)
    assert compat.is_compiling()
    assert compat.is_compiling_function() is fake.is_compiling
