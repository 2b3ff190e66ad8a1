"""Compile products under scales per group for every architecture that they are registered for.

Triton's interpreter has no `tl.dot_scaled`: it multiplies decoded numbers, which proves which
operands are read (tests/ops/test_expert_binders.py); the instruction's own numbers need a device.
"""

from __future__ import annotations

import pytest
import torch

from hal.device import version_at_least
from hal.needs import Code
from hal.ops.kernels.crosscompile import Target, compile_cells
from hal.ops.kernels.scaled import SCALED_KINDS, scaled_gemm
from hal.ops.scaled import scaled_tile
from hal.ops.tiles import Tile
from hal.platforms.tables import device_spec
from hal.registry import Level, find_op
from hal.selection import choose

DEVICES = ("cuda:sm_100", "cuda:sm_103", "cuda:sm_110", "cuda:sm_120", "rocm:gfx950")
OTHERS = ("cuda:sm_80", "cuda:sm_89", "cuda:sm_90", "cuda:sm_121", "rocm:gfx942", "rocm:gfx1201")
SIZES = ("few", "some", "many", "ragged", "wide")
KERNELS = ("triton_scaled", "triton_scaled_mixed", "triton_scaled_nvfp4")
SCALED_INSTRUCTIONS = ("block_scale", "v_mfma_scale_")


def target_of(name):
    spec = device_spec(*name.split(":"))
    return Target(
        spec.platform, spec.arch.name, spec.shared_memory_bytes, spec.compute_units, spec.lanes,
        spec.formats.fp8_encoding or "e4m3fn",
    )  # fmt: skip


def native_kinds(name):
    """Return the kinds for which a native product is registered on a device.

    A scheme with a fixed second scale is of the kind of the one without.
    """
    spec = device_spec(*name.split(":"))
    found = set()
    for kernel in KERNELS:
        for scheme in find_op("linear").find(kernel).schemes:
            candidate = choose("linear", scheme, spec, {"in_features": 2048}).candidate(kernel)
            if not any(str(failure).startswith("arch") for failure in candidate.failures):
                found.add(scheme.removesuffix("_static"))
    return found


def test_where_products_are_native():
    everything = set(SCALED_KINDS)
    found = {name: native_kinds(name) for name in (*DEVICES, *OTHERS)}
    wanted = {name: everything if name in DEVICES else set() for name in found}
    wanted["cuda:sm_120"] = everything - {"mxfp4_w4a8"}
    wanted["rocm:gfx950"] = everything - {"nvfp4"}
    assert found == wanted


@pytest.mark.matrix
@pytest.mark.parametrize("name", DEVICES)
def test_native_products_have_their_own_instruction(name):
    import triton

    if not version_at_least(triton.__version__, "3.7"):
        pytest.skip(f"Triton {triton.__version__}: the kernels need 3.7")
    target, kinds = target_of(name), sorted(native_kinds(name))
    assert kinds
    names = [f"scaled/{kind}/{size}" for kind in kinds for size in SIZES]
    for cell in compile_cells(target, names, timeout_s=280):
        assert not cell.error, cell
        assert cell.instructions, cell
        for instruction in cell.instructions:
            assert any(own in instruction for own in SCALED_INSTRUCTIONS), cell
            assert "bf16" not in instruction
        if "nvfp4" in cell.name:
            assert "kind::mxf4nvf4.block_scale.scale_vec::4X" in cell.instructions[0]
        assert cell.spilled_bytes == 0, cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell


SUMMING = {
    "cuda:sm_89": "e4m3", "cuda:sm_90": "wgmma", "cuda:sm_120": "e4m3",
    "rocm:gfx942": "fp8_fp8", "rocm:gfx1201": "fp8_fp8",
}  # fmt: skip


def test_where_sums_are_products_of_8_bits():
    problem = {"in_features": 2048}
    for name in (*DEVICES, *OTHERS):
        spec = device_spec(*name.split(":"))
        for scheme in ("mxfp8", "mxfp4_w4a8"):
            candidate = choose("linear", scheme, spec, problem).candidate("triton_scaled_fp8")
            refused = any("sm_89" in failure.needed for failure in candidate.failures)
            assert refused == (name not in SUMMING), name


@pytest.mark.matrix
@pytest.mark.parametrize("name", SUMMING)
def test_sums_have_the_instruction_of_8_bits_and_do_not_spill(name):
    target = target_of(name)
    names = [
        f"{op}/{kind}/{size}"
        for op, sizes in (("sums", SIZES), ("sums_experts", ("few", "many", "ragged")))
        for kind in ("mxfp8", "mxfp4_w4a8")
        for size in sizes
    ]
    for cell in compile_cells(target, names, timeout_s=280):
        assert not cell.error, cell
        assert cell.instructions, cell
        for instruction in cell.instructions:
            assert SUMMING[name] in instruction, cell
            assert "f16" not in instruction
            assert "e4m3" in instruction or "fp8" in instruction
        assert cell.spilled_bytes == 0, cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_native_products_of_experts_have_the_same_instruction(name):
    import triton

    if not version_at_least(triton.__version__, "3.7"):
        pytest.skip(f"Triton {triton.__version__}: the kernels need 3.7")
    target = target_of(name)
    names = [
        f"scaled_experts/{kind}/{size}"
        for kind in sorted(native_kinds(name))
        for size in ("few", "many", "ragged")
    ]
    for cell in compile_cells(target, names, timeout_s=280):
        assert not cell.error, cell
        assert cell.instructions, cell
        for instruction in cell.instructions:
            assert any(own in instruction for own in SCALED_INSTRUCTIONS), cell
        # Rows that are gathered take a register each for their address.
        assert cell.spilled_bytes <= 128, cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell


def test_experts_are_registered_where_the_linear_product_is():
    for kernel in KERNELS:
        linear, experts = (find_op(op).find(kernel) for op in ("linear", "fused_moe"))
        assert set(linear.schemes) == set(experts.schemes)
        assert linear.level is experts.level is Level.NATIVE
        for name in (*DEVICES, *OTHERS):
            spec = device_spec(*name.split(":"))
            able = []
            for op, sizes in (
                ("linear", {"in_features": 2048}),
                ("fused_moe", {"hidden": 2048, "intermediate": 768, "experts": 8}),
            ):
                candidate = choose(op, linear.schemes[0], spec, sizes).candidate(kernel)
                able.append(not any(f.code is Code.ARCH for f in candidate.failures))
            assert able[0] == able[1], (kernel, name)
    odd = choose(
        "fused_moe", "mxfp8", device_spec("cuda", "b200"), {"intermediate": 720, "padding": False}
    )
    assert "multiple of 32" in "; ".join(map(str, odd.candidate("triton_scaled").failures))


@pytest.mark.matrix
@pytest.mark.slow
def test_the_emulated_product_of_experts_compiles_for_sm_90():
    kernel, target = find_op("fused_moe").find("triton_scaled_emulated"), target_of("cuda:sm_90")
    names = [
        f"scaled_experts/{kind}/{size}"
        for kind in kernel.schemes
        for size in ("few", "many", "ragged")
    ]
    for cell in compile_cells(target, names, timeout_s=280):
        assert not cell.error, cell
        assert all("wgmma" in found and "bf16" in found for found in cell.instructions), cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes


def test_conversion_to_bf16_is_seen_where_there_is_no_instruction():
    """Why sm_121, and e4m3 by e2m1 on sm_120, are not registered as native.

    Triton 3.8 has the instruction on sm_121; the tables are of what 3.7 emits.
    """
    import triton

    if not version_at_least(triton.__version__, "3.7"):
        pytest.skip(f"Triton {triton.__version__}: the kernels need 3.7")
    own = version_at_least(triton.__version__, "3.8")
    for name, cell_name, scaled in (
        ("cuda:sm_121", "scaled/mxfp8/few", own),
        ("cuda:sm_120", "scaled/mxfp4_w4a8/few", False),
    ):
        (cell,) = compile_cells(target_of(name), [cell_name])
        assert cell.error == ""
        converted = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        assert any("block_scale" in found for found in cell.instructions) is scaled
        assert (cell.instructions == (converted,)) is not scaled


@pytest.mark.matrix
def test_the_emulated_product_compiles_for_sm_90():
    kernel, target = find_op("linear").find("triton_scaled_emulated"), target_of("cuda:sm_90")
    assert kernel.level is Level.EMULATED
    names = [f"scaled/{kind}/{size}" for kind in kernel.schemes for size in SIZES]
    for cell in compile_cells(target, names, timeout_s=280):
        assert not cell.error, cell
        assert all("wgmma" in found and "bf16" in found for found in cell.instructions), cell
        assert cell.spilled_bytes <= 128
        assert cell.shared_memory_bytes <= target.shared_memory_bytes


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 64, 65, 128, 4096])
def test_tiles_follow_the_instruction(rows):
    for packed in (False, True):
        tile = scaled_tile(rows, 1536, packed, "sm_100", 148)
        # tcgen05 with scales takes 128 rows of its first operand, which is the weight if swapped.
        assert (tile.block_n if tile.swap else tile.block_m) == 128
        assert tile.block_m >= 32
        for arch in ("sm_90", "sm_120", "gfx950"):
            assert scaled_tile(rows, 1536, packed, arch, 148).block_m >= min(max(rows, 16), 128)


TILE = Tile(128, 128, 128, 4, 2)


def operands(kind, m=8, n=16, k=64):
    spec = SCALED_KINDS[kind]
    made = {}
    for name, fmt, rows in (("a", spec.a, m), ("b", spec.b, n)):
        dtype, items = (torch.uint8, k // 2) if fmt == "e2m1" else (torch.float8_e4m3fn, k)
        made[name] = torch.empty(rows, items, dtype=dtype, device="meta")
        dtype = torch.uint8 if spec.group == 32 else torch.float8_e4m3fn
        made[f"{name}_scales"] = torch.empty(rows, k // spec.group, dtype=dtype, device="meta")
    if spec.group == 16:
        made["a_second"] = torch.empty(m, device="meta")
        made["b_second"] = torch.empty((), device="meta")
    made["out"] = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    return made


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mxfp8", {"a": (8, 32, torch.uint8)}, r"a is torch.uint8 \[8, 32\], must be .*\[rows, 64"),
        ("mxfp4", {"b": (16, 64, torch.uint8)}, r"b is .*\[16, 64\], must be .*\[rows, 32\]"),
        ("mxfp8", {"a_scales": (8, 3, torch.uint8)}, r"a_scales is .* must be .*\[8, 2\]"),
        ("nvfp4", {"b_scales": (16, 4, torch.uint8)}, r"b_scales is .* must be torch.float8_e4m3"),
        ("mxfp8", {"out": (8, 15, torch.bfloat16)}, r"out is \[8, 15\], must be \[8, 16\]"),
        ("mxfp8", {"bias": (1, 16, torch.bfloat16)}, r"bias must be \[16\]"),
        ("nvfp4", {"a_second": None}, "needs a_second: True"),
        ("mxfp4", {"a_second": (8, 1, torch.float32)}, "needs a_second: False"),
        ("nvfp4", {"a_second": (8, 1, torch.float32)}, r"a_second must be float32 \[8\]"),
    ],
)
def test_wrong_operands_are_refused(kind, change, message):
    made = operands(kind)
    for name, shape in change.items():
        made[name] = shape and torch.empty(shape[:2], dtype=shape[2], device="meta")
    with pytest.raises(ValueError, match=message):
        scaled_gemm(**made, k=64, kind=kind, tile=TILE)
