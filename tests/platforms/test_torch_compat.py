"""The calls that differ between torch releases, against plain arithmetic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
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
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
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
    call = compat.scaled_mm_rowwise_function()
    assert call is compat.scaled_mm_rowwise_function()
    close(call(a, b.t(), a_scales, b_scales, torch.bfloat16, bias), wanted)
    close(call(a, b.t(), a_scales[:, None], b_scales[None], torch.bfloat16, bias), wanted)


HAS_SCALED_MM = hasattr(torch.nn.functional, "scaled_mm")


@pytest.mark.skipif(not HAS_SCALED_MM, reason="needs torch 2.10")
def test_rowwise_by_the_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_rowwise("cpu")
    a, a_scales = rows_and_scales(8, 64, "cpu")
    b, b_scales = rows_and_scales(32, 64, "cpu")
    call = compat.scaled_mm_rowwise_function()
    wanted = call(a, b.t(), a_scales, b_scales, torch.bfloat16)
    compat.scaled_mm_rowwise_function.cache_clear()
    monkeypatch.delattr(torch, "_scaled_mm")
    try:
        call = compat.scaled_mm_rowwise_function()
        found = call(a, b.t(), a_scales, b_scales, torch.bfloat16)
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
    if not HAS_SCALED_MM:
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
    a_scales = compat.block128_activation_scales(a_scales, "cuda")
    b_scales = compat.block128_weight_scales(b_scales, "cuda")
    call = compat.scaled_mm_block128_function()
    close(call(a8, b8.t(), a_scales, b_scales, torch.bfloat16), wanted)


HAS_GROUPED_MM = hasattr(torch, "_grouped_mm") or hasattr(torch.nn.functional, "grouped_mm")
if not torch.cuda.is_available():
    HAS_GROUPED_MM = version_at_least(torch.__version__, "2.9")


@pytest.mark.skipif(not HAS_GROUPED_MM, reason="needs torch 2.8, on a CPU 2.9")
@pytest.mark.parametrize("ends", [[5, 5, 8, 16], [0, 16, 16, 16], [4, 8, 12, 16]])
def test_grouped_mm(device: str, ends: list[int]) -> None:
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
    close(compat.grouped_mm_function()(a, b.transpose(1, 2), offs=offs), wanted)


@pytest.mark.gpu
def test_scaled_grouped_mm() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no sm_90")
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
    call = compat.scaled_grouped_mm_function()
    found = call(a, b.transpose(1, 2), a_scales, b_scales, offs, torch.bfloat16)
    close(found, torch.cat(parts))


def test_int_mm(device: str) -> None:
    a = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (48, 64), dtype=torch.int8)
    wanted = a.int() @ b.int().t()
    found = compat.int_mm_function()(a.to(device), b.to(device).t())
    assert found.dtype is torch.int32
    assert torch.equal(found.cpu(), wanted)


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grouped_mm", "scaled_grouped_mm", "scaled_mm"):
        monkeypatch.delattr(torch.nn.functional, name, raising=False)
    for name in ("_grouped_mm", "_scaled_grouped_mm", "_int_mm"):
        monkeypatch.delattr(torch, name, raising=False)
    getters = {
        compat.grouped_mm_function: r"torch\._grouped_mm: .* needed torch >= 2\.8",
        compat.scaled_grouped_mm_function: r"torch\._scaled_grouped_mm: .* needed torch >= 2\.7",
        compat.scaled_mm_block128_function: r"functional\.scaled_mm: .* needed torch >= 2\.10",
        compat.int_mm_function: r"no longer has torch\._int_mm",
    }
    for getter, words in getters.items():
        getter.cache_clear()  # type: ignore[attr-defined]
        with pytest.raises(PlatformError, match=words):
            getter()
        getter.cache_clear()  # type: ignore[attr-defined]


def test_scaled_grouped_mm_by_the_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def public(a, b, scale_a, kind_a, scale_b, kind_b, *, offs, output_dtype):  # type: ignore[no-untyped-def]
        return a, b, scale_a, kind_a, scale_b, kind_b, offs, output_dtype

    functional = torch.nn.functional
    monkeypatch.delattr(torch, "_scaled_grouped_mm", raising=False)
    monkeypatch.setattr(functional, "scaled_grouped_mm", public, raising=False)
    kinds = SimpleNamespace(RowWise="rows")
    monkeypatch.setattr(functional, "ScalingType", kinds, raising=False)
    compat.scaled_grouped_mm_function.cache_clear()
    try:
        found = compat.scaled_grouped_mm_function()("a", "b", "sa", "sb", "offs", "dtype")
    finally:
        compat.scaled_grouped_mm_function.cache_clear()
    assert found == ("a", "b", "sa", "rows", "sb", "rows", "offs", "dtype")


def test_is_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compat.is_compiling_function()()
    fake = SimpleNamespace(is_compiling=lambda: True)
    monkeypatch.setattr(torch, "compiler", fake)
    assert compat.is_compiling_function() is fake.is_compiling


def test_view_takes_numbers_and_sequences() -> None:
    x = torch.arange(24)
    assert compat.view(x, 2, 3, 4).shape == (2, 3, 4)
    assert compat.view(x, (2, 3), 4).shape == (2, 3, 4)
    assert compat.view(x.view(2, 12), x.view(2, 12).shape[:-1], [3, -1]).shape == (2, 3, 4)
    assert compat.view(x[:1], ()).shape == ()


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("amounts", [(0, 3), (0, 3, 0, 0), (1, 2, 0, 4), (0, 0, 0, 0)])
def test_pad(shape: tuple[int, int], amounts: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.bfloat16)
    found = compat.pad(x, amounts)
    before, after, above, below = (*amounts, 0, 0)[:4]
    assert found.shape == (shape[0] + above + below, shape[1] + before + after)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found[above : above + shape[0], before : before + shape[1]], x)
    assert found.sum() == x.sum()


def test_schemas() -> None:
    def writes(
        x: torch.Tensor,
        out: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        sizes: list[int] | None = None,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        raise NotImplementedError

    def nothing(x: torch.Tensor) -> None: ...
    def wrong(x: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor: ...

    assert compat.schema_of(writes, ["out"]) == (
        "(Tensor x, Tensor(a1!)? out, Tensor[] parts, SymInt[]? sizes=None, float scale=1.0) "
        "-> (Tensor, Tensor[])"
    )
    assert compat.schema_of(nothing) == "(Tensor x) -> ()"
    with pytest.raises((ValueError, AttributeError)):
        compat.schema_of(wrong)


BUILDS = [
    ({"cuda": "13.0", "hip": None, "xpu": None}, "cuda"),
    ({"cuda": None, "hip": "6.4", "xpu": None}, "cuda"),
    ({"cuda": None, "hip": None, "xpu": "20250201"}, "xpu"),
    ({"cuda": None, "hip": None}, None),
]


@pytest.mark.parametrize(("build", "name"), BUILDS)
def test_accelerator_type_without_torch_accelerator(
    build: dict[str, str | None], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "accelerator", raising=False)
    monkeypatch.setattr(torch, "version", SimpleNamespace(**build))
    assert compat.accelerator_type() == name


def test_accelerator_type_by_torch_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((torch.device("xpu"), None))
    fake = SimpleNamespace(current_accelerator=lambda: next(answers))
    monkeypatch.setattr(torch, "accelerator", fake, raising=False)
    assert [compat.accelerator_type(), compat.accelerator_type()] == ["xpu", None]


def test_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlatformError, match="memory of cpu"):
        compat.device_memory(torch.device("cpu"))
    fake = SimpleNamespace(
        current_accelerator=lambda: torch.device("mtia"), get_memory_info=lambda device: (3, 4)
    )
    monkeypatch.setattr(torch, "accelerator", fake, raising=False)
    monkeypatch.delattr(torch, "mtia", raising=False)
    assert compat.device_memory(torch.device("mtia:1")) == (3, 4)


def test_graph_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.graph_type("cuda") is torch.cuda.CUDAGraph
    fake = SimpleNamespace(XPUGraph=object)
    monkeypatch.setattr(torch, "xpu", fake, raising=False)
    assert compat.graph_type("xpu") is object
    del fake.XPUGraph
    with pytest.raises(PlatformError, match=r"torch\.xpu\.XPUGraph: .* needed torch >= 2\.11"):
        compat.graph_type("xpu")
    with pytest.raises(PlatformError, match="devices of type cpu"):
        compat.graph_type("cpu")


def test_importing_the_shim_imports_no_torch(tmp_path: Path) -> None:
    code = "import hal.torch_compat, hal.quirk_probes, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)
