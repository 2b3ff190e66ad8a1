"""What was compiled fits all products of an architecture, and not that alone which it was made for.

The largest block of shared memory belongs to the architecture, so that one limit holds for all of
its products; tiles depend on the number of compute units besides, in which they differ.
"""

from __future__ import annotations

import json

import pytest
import triton
from test_cache_keys import target_of
from triton.backends.compiler import GPUTarget

from hal.evidence import evidence_folder, read_rows
from hal.ops.kernels import common
from hal.ops.kernels.compile_cases import (
    CASES,
    EXPERTS,
    FEW,
    HIDDEN,
    INTERMEDIATE,
    MANY,
    TOP_K,
)
from hal.ops.kernels.crosscompile import cell_names, compile_cells
from hal.ops.tiles import SPECIALIZED_KINDS, choose_tile, special_kernels
from hal.platforms.tables import device_rows, device_spec

KIB = {
    # Compute capabilities 8.6, 8.9 and 12.x have 100 KiB a multiprocessor, of which a block may
    # have all but one. Source: CUDA programming guide, compute capabilities, shared memory.
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99),
    **dict.fromkeys(("sm_80", "sm_87"), 163),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 227),
    # Source: ROCm, GPU hardware specifications, column LDS.
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100", "gfx1151", "gfx1200", "gfx1201"), 64),
    "gfx950": 160,
}
# Tiles of half as many rows keep 132 multiprocessors busy, and are too many for fewer.
ORDERED_ROWS = {f"warp_specialized_rows/{kind}/ordered" for kind in SPECIALIZED_KINDS}
OTHER_TILES = {
    **dict.fromkeys(("cuda:H100 PCIe", "cuda:H20"), ORDERED_ROWS),
    "cuda:L4": {
        *(f"gemm/{kind}_decode/few" for kind in ("fp8_channel", "fp8_e5m2", "mxfp8")),
        *(f"gemm/{kind}_decode/few" for kind in ("mxfp4", "nvfp4")),
        *(f"ring_rows/{kind}_decode/one" for kind in ("int4_group", "uint4_group")),
        *(f"ring_rows/{kind}_decode/one" for kind in ("mxfp4", "nvfp4")),
    },
}
"""Products that launch some cells otherwise than the first product of their architecture."""


def platform_of(arch: str) -> str:
    return "cuda" if arch.startswith("sm_") else "rocm"


def others() -> list[str]:
    """Return the products whose number of compute units is another than the first one's."""
    found = []
    for arch in KIB:
        platform = platform_of(arch)
        taken = {device_spec(platform, arch).compute_units}
        for row in device_rows(platform):
            if row.arch.name == arch and row.compute_units not in taken:
                taken.add(row.compute_units)
                found.append(f"{platform}:{row.name}")
    return found


def compiled() -> dict[tuple[str, str], int]:
    """Return the shared memory of every cell in the evidence, by architecture and cell."""
    return {
        (row.arch, cell): shared
        for path in evidence_folder().glob("*.jsonl")
        for row in read_rows(path)
        if row.level == "compiled"
        for cell, (_, _, shared) in row.facts.get("cells", {}).items()  # torch's own have none
    }


def test_a_block_has_what_the_vendor_says() -> None:
    assert {arch for arch, _ in compiled()} == set(KIB)
    for arch, kib in KIB.items():
        platform = platform_of(arch)
        products = [row.name for row in device_rows(platform) if row.arch.name == arch]
        assert products
        for product in (arch, *products):
            assert device_spec(platform, product).shared_memory_bytes == kib << 10, product


def test_every_compiled_cell_fits_a_block() -> None:
    found = compiled()
    assert len(found) > 2000
    assert {key: n for key, n in found.items() if n > KIB[key[0]] << 10} == {}


def test_the_estimate_of_a_tile_is_no_less_than_what_compiled() -> None:
    """So what `test_tiles.py` shows of every tile by arithmetic holds of the machine code."""
    tried = 0
    for (arch, cell), shared in compiled().items():
        op, _, rest = cell.partition("/")
        kind, _, size = rest.partition("/")
        if op not in ("gemm", "grouped_gemm") or size not in ("few", "many"):
            continue
        tokens, platform = FEW if size == "few" else MANY, platform_of(arch)
        spec, grouped = device_spec(platform, arch), op == "grouped_gemm"
        tile = choose_tile(
            kind, max(tokens * TOP_K // EXPERTS, 1) if grouped else tokens, 2 * INTERMEDIATE,
            HIDDEN, platform=platform, arch=arch, shared_memory_bytes=spec.shared_memory_bytes,
            compute_units=spec.compute_units or 64,
            matrices=min(EXPERTS, tokens * TOP_K) if grouped else 1,
        )  # fmt: skip
        assert shared <= tile.shared_memory_bytes(kind, platform=platform), (arch, cell)
        tried += 1
    assert tried > 800


@pytest.fixture
def launches(monkeypatch):
    """Return what a cell would launch on a device, without compiling it."""
    told = []

    def run(self, *args, grid, warmup, **options):
        kinds = [
            (arg == 1, arg % 16 == 0) if isinstance(arg, int) else str(getattr(arg, "dtype", ""))
            for arg in args
        ]
        told.append((self.__name__, kinds, {name: str(value) for name, value in options.items()}))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)

    def launches(name: str, cell: str) -> str:
        target = target_of(name)
        told.clear()
        number = target.arch.removeprefix("sm_")
        own = ("cuda", int(number)) if target.platform == "cuda" else ("hip", target.arch)
        with common.compile_for(GPUTarget(*own, target.lanes)):
            CASES[cell](target)
        assert told
        return json.dumps(told)

    return launches


def cells_of_arch(name: str) -> list[str]:
    spec = device_spec(*name.split(":"))
    special = special_kernels(spec.platform, spec.arch.name)
    return cell_names(spec.formats.triton_math, **special)


@pytest.mark.skipif(common.INTERPRETED.value, reason="needs a process without TRITON_INTERPRET")
@pytest.mark.parametrize("name", others())
def test_products_launch_what_was_compiled_for_their_architecture(name: str, launches) -> None:
    """All but a few cells of the smallest, which `make matrix` compiles for it besides."""
    spec = device_spec(*name.split(":"))
    first = f"{spec.platform}:{spec.arch.name}"
    differing = {
        cell for cell in cells_of_arch(name) if launches(name, cell) != launches(first, cell)
    }
    assert differing == OTHER_TILES.get(name, set())


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHER_TILES)
def test_what_a_product_launches_otherwise_compiles_and_fits(name: str) -> None:
    target = target_of(name)
    for cell in compile_cells(target, sorted(OTHER_TILES[name])):
        assert cell.error == "", cell
        assert cell.shared_memory_bytes <= target.shared_memory_bytes, cell
