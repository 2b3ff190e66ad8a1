"""Imitate the libraries that adapters call: check every argument and compute in float64.

Each function has the signature of the library's own and takes apart what it is given by rules
written down here a second time, bit by bit, so that a transposed operand, swapped scales or a wrong
order of bytes gives an error or another product.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

import hal
from hal.device import Software
from hal.ops.binding import Binding
from hal.ops.linear import LINEAR, fixed_scale
from hal.ops.prepare import prepare
from hal.ops.quantize import fake_quantize, quantize_reference
from hal.platforms.tables import device_spec
from hal.quant.quantize import bind_encoding
from hal.selection import choose, options_from

TORCH = "2.13.0+cu130"
EVERYTHING = (
    ("amd-aiter", "0.1.13"),
    ("deep-gemm", "2.1.0"),
    ("flashinfer-python", "0.6.9"),
    ("torchao", "0.15.0"),
    ("vllm", "0.20.0"),
    ("vllm-xpu-kernels", "0.1.5"),
)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def spec_of(device: str, packages=EVERYTHING, broken=(), torch_version: str = TORCH):
    """Return the facts of a simulated device with packages around it."""
    software = Software(
        torch=torch_version,
        triton="3.7.1",
        packages=tuple(sorted(packages)),
        broken=tuple(sorted(broken)),
    )
    return device_spec(*device.split(":"), software)


def skip_without_dtypes(scheme: str) -> None:
    """Skip where torch lacks a dtype in which the libraries take 4-bit codes or their scales."""
    names = "float8_e8m0fnu", "float4_e2m1fn_x2"  # since torch 2.7 and 2.8
    lacking = [name for name in names if not hasattr(torch, name)]
    if lacking and scheme.startswith(("mxfp4", "nvfp4")):
        pytest.skip(f"torch {torch.__version__} has no {' nor '.join(lacking)}")


def newest(device: str):
    """Return the facts of a simulated device with torch and Triton as hal is developed with them.

    What a test says of a device must not hang on the releases that it happens to run under.
    """
    return spec_of(device, packages=(("triton", "3.7.1"),))


def select(device: str, scheme: str, kernel: str | None = None, **problem):
    """Return the selection of `linear` on a simulated device that has every package."""
    packages = problem.pop("packages", EVERYTHING)
    spec = spec_of(device, packages, problem.pop("broken", ()))
    return choose(LINEAR, scheme, spec, problem, options_from("linear", force=kernel))


def bind(device: str, kernel: str, weight, bias=None, dtype=torch.bfloat16, **around):
    """Return the bound product of a kernel that was forced for a device that is not here.

    `around` is what `select` takes beside the problem: `packages`, `broken`.
    """
    rows, columns = weight.shape
    problem = {
        "in_features": columns,
        "out_features": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "bias": bias is not None,
    }
    selection = select(device, weight.scheme.name, kernel, **problem, **around)
    assert selection.kernel is not None, selection
    assert selection.kernel.name == kernel
    binding = Binding(selection, hal.platform(device), weight.scheme, torch.device("cpu"))
    weight = prepare(binding, weight, "weight")
    launch, tensors = selection.kernel.load()(binding, weight, bias)
    return lambda x: launch(x, tuple(tensors))


def expected(kernel: str, weight, x, bias=None):
    """Return the product in float64, with activations as the kernel's level represents them."""
    native = str(LINEAR.find(kernel).level) == "native"
    fixed = (*fixed_scale(weight), None)[0]
    rows = fake_quantize(x, weight.scheme, weight.encoding, fixed) if native else x
    rows = rows.double()
    out = rows @ weight.dequantize().double().T
    return out if bias is None else out + bias.double()


def check_rows_apart(linear, columns: int, generator) -> None:
    """Check that a NaN and an infinity stay in their rows."""
    x = torch.randn(6, columns, generator=generator).bfloat16()
    clean = linear(x)
    x[1, 5], x[4, 7] = torch.nan, torch.inf
    out = linear(x)
    assert bool(out[1].isnan().all())
    assert not bool(out[4].isfinite().any())
    keep = [0, 2, 3, 5]
    assert torch.equal(out[keep], clean[keep])


def as_bound(weight, device: str):
    """Return a weight in the encoding in which a device holds it."""
    return bind_encoding(weight, spec_of(device).formats.fp8_encoding, where="test")


def reference_quantizer(binding, features):
    """Stand in for the Triton quantization that is selected for GPUs."""
    return quantize_reference


def columns_of_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return codes `[..., K]` of bytes `[..., K/2]`, the even column in the low half."""
    raw = packed.view(torch.uint8).long()
    return torch.stack((raw % 16, raw // 16), -1).flatten(-2)


def untiled(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return scales `[rows, columns]` of tiles of 128 by 4, by cuBLAS's formula of offsets."""
    wide = -(-columns // 4)
    assert tiled.is_contiguous()
    assert tiled.numel() == -(-rows // 128) * 128 * wide * 4
    flat = tiled.flatten().view(torch.uint8)  # torch before 2.9 indexes no 8-bit float
    assert tiled.element_size() == 1
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = (row // 128 * wide + column // 4) * 512
    return flat[offset + row % 32 * 16 + row % 128 // 32 * 4 + column % 4].view(tiled.dtype)


def block_scaled(codes, scales, group: int) -> torch.Tensor:
    """Return float64 numbers `[rows, K]` of fp8 codes, or of packed e2m1, under tiled scales."""
    if codes.dtype in (torch.uint8, torch.float4_e2m1fn_x2):
        values = E2M1[columns_of_bytes(codes)]
    else:
        assert codes.dtype is torch.float8_e4m3fn
        values = codes.double()
    rows, columns = values.shape
    assert columns % group == 0
    factors = untiled(scales, rows, columns // group)
    if factors.dtype is torch.float8_e8m0fnu:
        factors = torch.exp2(factors.view(torch.uint8).double() - 127)
    return values * factors.double().repeat_interleave(group, 1)


def row_major(tensor: torch.Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.stride(0) == tensor.shape[1]


def column_major(tensor: torch.Tensor) -> bool:
    return tensor.stride(0) == 1 and tensor.stride(1) == tensor.shape[0]


# ------------------------------------------------------------------------------------------ torch
def weight_int4pack_mm(self, mat2, qGroupSize, qScaleAndZeros):
    """Imitate `torch._weight_int4pack_mm` of CUDA, for what `convert_weight_to_int4pack` gives."""
    codes, (tiles, supers, lanes, inner) = mat2.codes, mat2.shape
    assert self.dtype is torch.bfloat16
    assert self.is_contiguous()
    assert qScaleAndZeros.dtype is torch.bfloat16
    assert qScaleAndZeros.is_contiguous()
    rows, columns = codes.shape
    assert (tiles * 8, supers * 128, lanes, inner) == (rows, columns, 32, 4)
    assert qScaleAndZeros.shape == (columns // qGroupSize, rows, 2)
    wide = qScaleAndZeros.double().repeat_interleave(qGroupSize, 0)
    weight = (codes.double().T - 8) * wide[..., 0] + wide[..., 1]
    return (self.double() @ weight).to(self.dtype)


def convert_weight_to_int4pack(self, innerKTiles):
    """Imitate `torch._convert_weight_to_int4pack` of CUDA: the even column is in the high half."""
    assert self.dtype is torch.uint8
    assert self.is_contiguous()
    assert innerKTiles == 8
    high, low = self.long() // 16, self.long() % 16
    rows, columns = self.shape[0], self.shape[1] * 2
    packed = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int32)
    packed.codes = torch.stack((high, low), -1).flatten(-2)  # what the bits of `packed` stand for
    return packed


def weight_int8pack_mm(self, mat2, scales):
    """Imitate `torch._weight_int8pack_mm` of XPU."""
    assert self.dtype in (torch.bfloat16, torch.float16)
    assert self.stride(1) == 1
    assert mat2.dtype is torch.int8
    assert mat2.is_contiguous()
    assert scales.dtype is self.dtype
    assert scales.shape == mat2.shape[:1]
    return (self.double() @ mat2.double().T * scales.double()).to(self.dtype)


def private_scaled_mm(
    self, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False
):
    """Imitate `torch._scaled_mm` with one scale an operand."""
    assert scale_a.dtype is scale_b.dtype is torch.float32
    assert scale_a.numel() == scale_b.numel() == 1
    assert self.stride(1) == 1
    assert column_major(mat2)
    assert all(size % 16 == 0 for size in mat2.shape)
    assert self.dtype is mat2.dtype
    assert self.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    out = (self.double() * scale_a) @ (mat2.double() * scale_b)
    return out.to(out_dtype)


def scaled_mm(
    mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None,
    bias=None, output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False,
):  # fmt: skip
    """Imitate `torch.nn.functional.scaled_mm` for scales in tiles."""
    kinds, swizzles = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    assert swizzle_a == swizzle_b == swizzles.SWIZZLE_32_4_4
    assert scale_recipe_a == scale_recipe_b
    group = {kinds.BlockWise1x16: 16, kinds.BlockWise1x32: 32}[scale_recipe_a]
    wanted = torch.float8_e4m3fn if group == 16 else torch.float8_e8m0fnu
    assert scale_a.dtype is scale_b.dtype is wanted
    assert mat_a.stride(1) == 1
    assert column_major(mat_b)
    assert bias is None
    a, b = block_scaled(mat_a, scale_a, group), block_scaled(mat_b.t(), scale_b, group)
    return (a @ b.T).to(output_dtype)


# ------------------------------------------------------------------------------- other packages
def module(monkeypatch, name: str, **members):
    """Put an importable module with these members into `sys.modules`, and its parents."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


class Operators:
    """Register operators with a library's own schemas, for as long as a test runs."""

    def __init__(self, namespace: str) -> None:
        self._library = torch.library.Library(namespace, "FRAGMENT")

    def add(self, schema: str, function) -> None:
        self._library.define(schema)
        self._library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")

    def close(self) -> None:
        self._library._destroy()


def repeated(scales, shape, sizes):
    """Return block scales as large as the matrix they scale."""
    wide = scales.double().repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    return wide[: shape[0], : shape[1]]


CUTLASS_SCALED_MM = (
    "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, "
    "Tensor? bias) -> ()"
)


def cutlass_scaled_mm(out, a, b, a_scales, b_scales, bias):
    """Imitate vLLM's CUTLASS product of 8-bit operands."""
    assert a.dtype is b.dtype
    assert a.dtype in (torch.float8_e4m3fn, torch.int8)
    assert row_major(a)
    assert row_major(out)
    assert b.stride(0) == 1
    assert b.stride(1) % 16 == 0
    assert all(size % 16 == 0 for size in b.shape)
    assert out.dtype in (torch.bfloat16, torch.float16)
    assert a_scales.dtype is b_scales.dtype is torch.float32
    rows, columns = a.shape[0], b.shape[1]
    if a_scales.numel() == rows and b_scales.numel() in (1, columns):  # one of a matrix will do
        assert a_scales.shape == (rows, 1)
        assert a_scales.is_contiguous()
        assert b_scales.is_contiguous()
        wide = (a.double() @ b.double()) * a_scales.double() * b_scales.double().view(1, -1)
        wide = wide if bias is None else wide + bias.double()
        assert bias is None or (bias.dtype is out.dtype and bias.numel() == columns)
    else:
        assert a.dtype is torch.float8_e4m3fn
        assert rows % 4 == 0
        assert bias is None
        groups = a.shape[1] // 128
        assert a_scales.shape == (rows, groups)
        assert a_scales.stride(0) == 1
        assert groups == 1 or a_scales.stride(1) == rows
        assert b_scales.shape == (groups, columns // 128)
        assert b_scales.t().is_contiguous()
        left = a.double() * repeated(a_scales, a.shape, (1, 128))
        wide = left @ (b.double() * repeated(b_scales, b.shape, (128, 128)))
    out.copy_(wide)


CUTLASS_SCALED_FP4_MM = (
    "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, "
    "Tensor block_scale_b, Tensor alpha) -> ()"
)


def cutlass_scaled_fp4_mm(out, a, b, block_scale_a, block_scale_b, alpha):
    """Imitate vLLM's CUTLASS product of NVFP4 operands."""
    assert a.dtype is b.dtype is torch.uint8
    assert row_major(a)
    assert row_major(b)
    assert block_scale_a.dtype is block_scale_b.dtype is torch.float8_e4m3fn
    assert alpha.dtype is torch.float32
    assert alpha.numel() == 1
    assert b.shape[0] % 32 == 0
    assert a.shape[1] % 16 == 0
    left, right = block_scaled(a, block_scale_a, 16), block_scaled(b, block_scale_b, 16)
    out.copy_(left @ right.T * alpha.double())


def fp8_gemm_nt(a, b, d, c=None, recipe=None, compiled_dims="nk", disable_ue8m0_cast=False):
    """Imitate `deep_gemm.fp8_gemm_nt` on sm_90."""
    (left, left_scales), (right, right_scales) = a, b
    assert left.dtype is right.dtype is torch.float8_e4m3fn
    assert row_major(left)
    assert row_major(right)
    assert row_major(d)
    assert d.dtype is torch.bfloat16
    assert c is None
    (rows, width), columns = left.shape, right.shape[0]
    assert width % 128 == 0
    assert columns % 64 == 0
    assert left_scales.dtype is right_scales.dtype is torch.float32
    assert left_scales.shape == (rows, width // 128)
    assert left_scales.stride() == (1, -(-rows // 4) * 4)
    assert right_scales.shape == (-(-columns // 128), width // 128)
    assert right_scales.is_contiguous()
    wide = left.double() * repeated(left_scales, left.shape, (1, 128))
    d.copy_(wide @ (right.double() * repeated(right_scales, right.shape, (128, 128))).T)


def gemm_fp8_nt_groupwise(
    a, b, a_scale, b_scale, scale_major_mode=None, mma_sm=1, scale_granularity_mnk=(1, 128, 128),
    out=None, out_dtype=None, backend="cutlass",
):  # fmt: skip
    """Imitate `flashinfer.gemm.gemm_fp8_nt_groupwise`."""
    assert (scale_major_mode, scale_granularity_mnk, backend) == ("MN", (1, 128, 128), "cutlass")
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.is_contiguous()
    (rows, width), columns = a.shape, b.shape[0]
    assert rows % 4 == 0
    assert a_scale.dtype is b_scale.dtype is torch.float32
    assert a_scale.shape == (width // 128, rows)
    assert b_scale.shape == (width // 128, columns // 128)
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    wide = a.double() * repeated(a_scale.T, a.shape, (1, 128))
    right = b.double() * repeated(b_scale.T, b.shape, (128, 128))
    return (wide @ right.T).to(out_dtype or torch.bfloat16)


def mm_fp4(
    a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None, block_size=16,
    use_8x4_sf_layout=False, backend="auto", use_nvfp4=True,
):  # fmt: skip
    """Imitate `flashinfer.gemm.mm_fp4` for NVFP4."""
    assert (block_size, use_8x4_sf_layout, backend, use_nvfp4) == (16, False, "cutlass", True)
    assert a.dtype is b.dtype is torch.uint8
    assert row_major(a)
    assert column_major(b)
    assert a.shape[1] == b.shape[0]
    assert a_descale.dtype is b_descale.dtype is torch.float8_e4m3fn
    assert alpha.dtype is torch.float32
    assert alpha.numel() == 1
    left, right = block_scaled(a, a_descale, 16), block_scaled(b.t(), b_descale.t(), 16)
    return (left @ right.T * alpha.double()).to(out_dtype)


def mm_mxfp8(
    a, b, a_descale, b_descale, out=None, out_dtype=torch.bfloat16, use_8x4_sf_layout=False,
    backend="auto",
):  # fmt: skip
    """Imitate `flashinfer.gemm.mm_mxfp8` of 0.6.9."""
    assert (out, use_8x4_sf_layout, backend) == (None, False, "cutlass")
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert row_major(a)
    assert column_major(b)
    width, columns = b.shape
    assert a.shape[1] == width
    assert min(width, columns) >= 128, "its result may be NaN"
    assert width % 32 == columns % 32 == 0
    assert out_dtype in (torch.bfloat16, torch.float16)
    wide = []
    for codes, scales in ((a, a_descale), (b.t(), b_descale)):
        assert scales.dtype is torch.uint8
        assert scales.shape == (-(-codes.shape[0] // 128) * 128 * -(-width // 128) * 4,)
        exponents = untiled(scales, codes.shape[0], width // 32)
        wide.append(codes.double() * per_group(exponents, 32))
    return (wide[0] @ wide[1].T).to(out_dtype)


def per_group(exponents, group: int) -> torch.Tensor:
    """Return float64 factors of e8m0 bytes, one a column of the numbers they belong to."""
    powers = torch.exp2(exponents.double() - 127)
    return powers.masked_fill(exponents == 255, torch.nan).repeat_interleave(group, 1)


def as_long(words):
    """Return int32 words as unsigned numbers."""
    return words.long() & 0xFFFFFFFF
