"""Selection under every kind of torch version, and under a torch that lacks a kernel's dtypes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from core_fakes import attach, make_op, make_spec

from hal.device import DeviceSpec, Software, version_at_least
from hal.errors import RegistrationError
from hal.formats import FORMATS
from hal.needs import Code
from hal.platforms.tables import device_spec
from hal.registry import Op, Operand, find_op, op_names
from hal.selection import choose
from hal.software import read_software

# How builds of torch call themselves -> the release that each counts as; None: none can be told.
VERSIONS = {
    "2.9": "2.9",
    "2.9.0": "2.9",
    "2.9.0+cpu": "2.9",
    "2.9.0+cu130": "2.9",
    "2.9.0+rocm6.4": "2.9",
    "2.9.0+xpu": "2.9",
    "2.9.0.post1": "2.9",
    "2.9.0.post1+cu130": "2.9",
    "2.9.0rc2": "2.9",
    "2.9.0rc2+cu130": "2.9",
    "2.9.0a0": "2.9",
    "2.9.0a0+git1f2e3d4": "2.9",
    "2.9.0a0+ecf3bae40a.nv25.09": "2.9",
    "2.9.0a0+50eac811a6.nv25.9": "2.9",
    "2.9.0.dev20250820": "2.9",
    "2.9.0.dev20250820+cu129": "2.9",
    "2.9.0+git1f2e3d4": "2.9",
    "v2.9.0": "2.9",
    "2.10.0.dev20251101+cu130": "2.10",
    "1f2e3d4": None,
    "git1f2e3d4": None,
    "+git1f2e3d4": None,
    "2.9.0-unknown-build?": None,
    "unknown": None,
    "": None,
}
RELEASES = ("2.0", "2.5", "2.6", "2.8", "2.9", "2.10", "2.11")
H100 = ("cuda", "h100")


def counts_as(release: str, needed: str) -> bool:
    return tuple(map(int, release.split("."))) >= tuple(map(int, needed.split(".")))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("needed", RELEASES)
def test_every_build_counts_as_its_release(version: str, needed: str) -> None:
    release = VERSIONS[version]
    wanted = release is not None and counts_as(release, needed)
    assert version_at_least(version, needed) is wanted


@pytest.mark.parametrize("version", [version for version in VERSIONS if version])
def test_kernels_follow_the_release_of_every_build(version: str, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = {version!r}\ncuda = '13.0'\n")
    software = read_software([], tmp_path, None)
    assert software.torch == version
    spec = device_spec(*H100, software)
    release = VERSIONS[version]
    for op, scheme, kernel, needed in [
        ("fused_moe", "bf16", "torch_grouped_mm", "2.8"),
        ("linear", "fp8_channel", "torch_scaled_mm", "2.6"),
        ("linear", "fp8_block128", "torch_scaled_mm_block128", "2.10"),
        ("linear", "fp8_channel", "torch_dequant", "2.1"),
        ("linear", "bf16", "torch_dense", None),
    ]:
        candidate = choose(op, scheme, spec, {}).candidate(kernel)
        too_old = [failure for failure in candidate.failures if failure.code is Code.TORCH_VERSION]
        enough = needed is None or (release is not None and counts_as(release, needed))
        assert candidate.can_run == enough == (not too_old), (kernel, too_old)
        assert all(failure.found == version for failure in too_old)


# ------------------------------------------------------------------------- dtypes of the real ops
DEVICES = ("cuda:h100", "cuda:t4", "rocm:mi300x", "rocm:mi250x", "xpu:b580", "cpu:x86-amx")
OLD = ("2.0.1", "2.1.2", "2.5.1+cu124", "2.6.0a0+ecf3bae40a.nv25.01", "2.7.0", "2.8.0", None)
CELLS = [
    (name, scheme)
    for name in op_names()
    for scheme in sorted({s for kernel in find_op(name).kernels for s in kernel.schemes})
]


def held(operand: Operand, spec: DeviceSpec) -> list[str]:
    """Return the formats that a kernel must hold as such, by the rules for binding weights."""
    encoding = spec.formats.fp8_encoding or "e4m3fn"
    formats = set(operand.formats)
    if formats == {"e4m3fn", "e4m3fnuz"}:
        formats = {encoding}
    if operand.scale_format:
        formats.add(operand.scale_format)
    return [name for name in formats if name not in operand.as_bytes and FORMATS[name].torch_name]


@pytest.mark.parametrize("torch", OLD)
@pytest.mark.parametrize("where", DEVICES)
def test_nothing_that_can_run_needs_a_dtype_that_is_absent(where: str, torch: str | None) -> None:
    spec = device_spec(*where.split(":"), Software(torch=torch, triton="3.7.1"))
    for name, scheme in CELLS:
        for candidate in choose(name, scheme, spec, {}).candidates:
            operands = candidate.kernel.signatures.get(scheme, ())
            formats = [name for operand in operands for name in held(operand, spec)]
            absent = {
                name
                for name in formats
                if torch is None
                or ((since := FORMATS[name].since_torch) and not version_at_least(torch, since))
            }
            codes = {failure.code for failure in candidate.failures}
            if absent:
                assert Code.TORCH_VERSION in codes, (candidate.kernel, absent)
            if candidate.can_run:
                assert not absent, candidate.kernel


@pytest.mark.parametrize("where", DEVICES)
def test_no_dtype_is_missing_from_a_supported_torch(where: str) -> None:
    spec = device_spec(*where.split(":"), Software(torch="2.6.0", triton="3.7.1"))
    for name, scheme in CELLS:
        selection = choose(name, scheme, spec, {})
        assert selection.kernel is not None
        told = [failure for row in selection.candidates for failure in row.failures]
        assert not any("format e" in failure.hint for failure in told)


def test_what_a_device_binds_decides_between_two_eight_bit_floats() -> None:
    for where, version, runs in [
        ("cuda:h100", "2.0.1", False),
        ("cuda:h100", "2.1.0", True),
        ("rocm:mi300x", "2.1.0", False),
        ("rocm:mi300x", "2.2.0", True),
        ("rocm:mi250x", "2.1.0", True),
    ]:
        spec = device_spec(*where.split(":"), Software(torch=version))
        candidate = choose("linear", "fp8_channel", spec, {}).candidate("reference")
        assert candidate.can_run == runs, (where, version, candidate.failures)


@pytest.mark.parametrize(
    ("arch", "before", "since"),
    [
        ("sm_100", "3.2.0", "3.3.0"),
        ("sm_103", "3.5.0", "3.6.0"),
        ("sm_110", "3.6.0", "3.7.1"),
        ("sm_120", "3.3.0", "3.4.0"),
        ("sm_121", "3.5.0", "3.6.0"),
    ],
)
def test_no_kernel_goes_to_a_triton_that_does_not_compile_for_the_device(
    arch: str, before: str, since: str
) -> None:
    """It would fail at the first call, or end the process: see `hal.ops.triton_since`."""
    for triton, able in ((before, False), (since, True)):
        packages = (("triton", triton),)
        software = Software(torch="2.13.0", triton=triton, packages=packages)
        spec = device_spec("cuda", arch, software)
        found = set()
        for op in map(find_op, op_names()):
            kernels = [kernel for kernel in op.kernels if kernel.name.startswith("triton")]
            for kernel in () if op.collective else kernels:
                for scheme in kernel.schemes:
                    row = choose(op, scheme, spec, {}).candidate(kernel.name)
                    found.add(row.can_run)
                    told = "; ".join(map(str, row.failures))
                    refused = f"found triton {triton}, needs triton >= 3." in told
                    assert able or refused or "arch: found" in told, (kernel, scheme, told)
        assert (True in found) is able


def test_triton_alone_runs_nothing() -> None:
    spec = device_spec(*H100, Software(triton="3.7.1"))
    for name, scheme in CELLS:
        assert choose(name, scheme, spec, {}).kernel is None


# ------------------------------------------------------------------------------------- fake kernels
def microscaling(**weight: object) -> Op:
    """Return an op whose only kernel reads e4m3 activations and e2m1 weights under e8m0 scales."""
    op = make_op()
    values = {"formats": ("e2m1",), "granularity": "group32", "scale_format": "e8m0"} | weight
    signature = (
        Operand("x", ("e4m3fn", "e4m3fnuz"), "token", "float32"),
        Operand("weight", **values),
    )
    attach(op, "mx", signatures={"mxfp4": signature})
    return op


HELD = [
    ({}, {"2.6.0": "2.8", "2.7.1": "2.8", "2.8.0": None, "2.8.0a0+git1": None}),
    ({"as_bytes": ("e2m1",)}, {"2.6.0": "2.7", "2.7.0.dev20250101": None, "2.8.0": None}),
    ({"as_bytes": ("e8m0",)}, {"2.6.0": "2.8", "2.7.1": "2.8", "2.8.0": None}),
    ({"as_bytes": ("e2m1", "e8m0")}, {"2.0.0": "2.1", "2.1.0": None, "2.6.0": None}),
    ({"formats": ("e2m1", "int4")}, {"2.6.0": "2.7", "2.7.0": None}),
    ({"formats": ("e2m1", "e5m2")}, {"2.6.0": "2.7", "2.7.0": None}),
    ({"formats": ("int4",)}, {"2.6.0": "2.7", "2.7.0": None}),
    ({}, {None: "2.8"}),
]
CASES = [(how, torch, needed) for how, rows in HELD for torch, needed in rows.items()]


@pytest.mark.parametrize(("how", "torch", "needed"), CASES)
def test_a_kernel_waits_for_its_dtypes(how, torch, needed) -> None:
    spec = make_spec(software=Software(torch=torch))
    selection = choose(microscaling(**how), "mxfp4", spec, {})
    failures = selection.candidates[0].failures
    if needed is None:
        assert failures == ()
        return
    assert selection.kernel is None
    assert [failure.code for failure in failures] == [Code.TORCH_VERSION]
    assert failures[0].needed == f"torch >= {needed}"
    assert failures[0].found == ("torch not installed" if torch is None else torch)
    assert f"needs torch >= {needed}" in str(selection).replace("\n       ", " ")


def test_all_missing_dtypes_are_named_once() -> None:
    spec = make_spec(software=Software(torch="2.0.1"))
    (failure,) = choose(microscaling(), "mxfp4", spec, {}).candidates[0].failures
    assert str(failure) == (
        "torch_version: found 2.0.1, needs torch >= 2.8 (torch.float8_e4m3fn, format e4m3fn; "
        "torch.float4_e2m1fn_x2, format e2m1; torch.float8_e8m0fnu, format e8m0)"
    )


@pytest.mark.parametrize(
    ("encoding", "formats", "groups"),
    [
        ("e4m3fn", ("e4m3fn", "e4m3fnuz"), (("e4m3fn",), ("float32",))),
        ("e4m3fnuz", ("e4m3fn", "e4m3fnuz"), (("e4m3fnuz",), ("float32",))),
        (None, ("e4m3fn", "e4m3fnuz"), (("e4m3fn",), ("float32",))),
        ("e4m3fn", ("e4m3fnuz",), (("e4m3fnuz",), ("float32",))),
        ("e4m3fnuz", ("e4m3fn", "e4m3fnuz", "int8"), (("e4m3fnuz", "int8"), ("float32",))),
        ("e4m3fn", ("int4",), (("float32",),)),
    ],
)
def test_dtype_groups(encoding, formats, groups) -> None:
    operand = Operand("w", formats, "channel", "float32")
    assert operand.dtype_groups(encoding) == groups


@pytest.mark.parametrize("name", ["e8m0", "int8", "float32", "fp8"])
def test_only_narrow_formats_of_the_operand_can_be_bytes(name: str) -> None:
    with pytest.raises(RegistrationError, match=f"holds no {name} as bytes"):
        Operand("w", ("e4m3fn",), "channel", "float32", as_bytes=(name,))


def test_every_pair_of_old_torch_and_device_was_asked() -> None:
    pairs = list(itertools.product(DEVICES, OLD))
    assert len(pairs) == len(set(pairs)) == 42
