"""Each quirk of torch: its row, its probe, and hal under a torch that has it.

What older releases lack is taken from torch in a child process (old_torch.py), one for all quirks.
`covers` names the quirks that a test is about; a row that no test covers is a failure.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from packaging.version import Version

import hal
from hal import torch_compat as compat
from hal.device import DeviceSpec, Software
from hal.errors import DTypeError
from hal.formats import FORMATS
from hal.ops.binding import Binding
from hal.platforms.tables import device_spec
from hal.quirk_facts import Quirk
from hal.quirk_probes import check_quirks
from hal.quirks import QUIRKS, quirks_for, supported_torch
from hal.registry import find_op
from hal.selection import choose

ROWS = {quirk.id: quirk for quirk in QUIRKS}
COVERED: dict[str, str] = {}
HERE = Path(__file__).parent
T = TypeVar("T", bound=Callable[..., Any])


def covers(*ids: str) -> Callable[[T], T]:
    """Say which quirks a test is about."""

    def mark(test: T) -> T:
        COVERED.update(dict.fromkeys(ids, test.__name__))
        return test

    return mark


@functools.cache
def under_old_torch() -> dict[str, Any]:
    """Return what old_torch.py prints; it runs once."""
    done = subprocess.run(
        [sys.executable, str(HERE / "old_torch.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def device(name: str, torch_version: str = "2.13.0") -> DeviceSpec:
    return device_spec(*name.split(":"), Software(torch=torch_version))


def failures(op: str, scheme: str, spec: DeviceSpec, kernel: str, **problem: Any) -> str:
    """Return in one line why a kernel cannot run; nothing where it can."""
    return "; ".join(map(str, choose(op, scheme, spec, problem).candidate(kernel).failures))


# ----------------------------------------------------------------------------------------- table
def test_every_quirk_is_covered_by_a_test() -> None:
    assert COVERED.keys() == ROWS.keys(), "name the quirk in @covers(...) of a test that shows it"


def test_every_probe_exists_and_looks_at_this_torch() -> None:
    if Version(torch.__version__).is_prerelease:
        pytest.skip("a development build of torch may not yet have what its release has")
    for name in ("cpu", "cuda", "rocm", "xpu"):
        checked = check_quirks(name)
        assert {row.quirk.id for row in checked} >= {
            row.id for row in quirks_for(torch.__version__, name)
        }
        for quirk, expected, seen, error in checked:
            assert error == "", quirk.id
            assert seen is None or seen == expected, quirk.id
            assert quirk.probe is not None or seen is None


def test_a_probe_that_fails_is_an_error_and_not_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    row = next(row for row in check_quirks(hal.platform("cpu:amx")) if "int-mm" in row.quirk.id)
    assert (row.expected, row.seen) == (True, None)
    assert "_int_mm" in row.error


def test_without_torch_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hal.software.find_software", Software)
    assert check_quirks("cpu") == ()


@pytest.mark.parametrize(
    "change",
    [
        {"since": "2.7", "fixed": "2.6"},
        {"since": "2.7", "fixed": "2.7"},
        {"source": ""},
        {"probe": "hal.quirk_probes"},
    ],
)
def test_a_wrong_row_is_refused(change: dict[str, str]) -> None:
    values = {"since": None, "fixed": None, "symptom": "s", "handling": "h", "source": "s"}
    assert Quirk(id="fine", platforms=(), **values)
    with pytest.raises(ValueError, match="quirk bad"):
        Quirk(id="bad", platforms=(), **(values | change))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2.6.0", None),
        ("2.6.0a0+ecf3bae40a.nv25.01", None),
        ("2.14.0.dev20261101+cu130", None),
        ("2.10.0rc2", None),
        ("3.0.0", None),
        ("2.5.1+cu124", "torch 2.5.1+cu124 is older than 2.6"),
        ("2.5.0.post1", "older than 2.6"),
        ("1.13.1", "older than 2.6"),
        ("gitabcdef", "'gitabcdef', cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_supported_torch(version: str, words: str | None) -> None:
    sentence = supported_torch(version)
    assert (sentence is None) == (words is None)
    assert words is None or words in str(sentence)


# ---------------------------------------------------------------------------------------- dtypes
DTYPES = {
    "no-fp8-dtypes": ("e4m3fn", "e5m2"),
    "no-fnuz-dtypes": ("e4m3fnuz", "e5m2fnuz"),
    "no-e8m0-dtype": ("e8m0",),
    "no-e2m1-dtype": ("e2m1",),
}


@covers(*DTYPES)
@pytest.mark.parametrize("name", DTYPES)
def test_a_torch_without_a_dtype(name: str) -> None:
    answer, row = under_old_torch(), ROWS[name]
    assert answer["seen"][name] is True
    for number_format in DTYPES[name]:
        assert FORMATS[number_format].since_torch == row.fixed
        said = answer["errors"][number_format]
        assert f"format {number_format}" in said
        assert f"found torch 2.0.0a0+vendor, needed torch >= {row.fixed};" in said


@covers("no-accelerator", "xpu-graphs", "scaled-mm-private", "no-grouped-mm")
def test_hal_runs_where_all_of_it_is_missing() -> None:
    answer = under_old_torch()
    for name in ("no-accelerator", "xpu-graphs", "scaled-mm-private", "no-grouped-mm"):
        assert answer["seen"][name] is True
    used = answer["use"]
    assert used["platform"] in ("cpu", "cuda", "rocm", "xpu")
    assert used["bf16"] < 2**-7
    assert used["int8"] <= 2**-3  # a step of bf16 of values up to 32
    assert "torch.float8_e4m3fn (format e4m3fn)" in used["fp8"]
    assert "needed torch >= 2.1" in used["fp8"]
    built_for = torch.version.cuda or torch.version.hip
    assert answer["accelerator"] == ("cuda" if built_for else "xpu" if torch.version.xpu else None)


MISSING = {
    "scaled_mm_rowwise": "2.10",
    "scaled_mm_block128": "2.10",
    "grouped_mm": "2.8",
    "scaled_grouped_mm": "2.7",
    "xpu graphs": "2.11",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_names_the_release(name: str) -> None:
    said = under_old_torch()["errors"][name]
    assert said.startswith("PlatformError: torch.")
    assert f"needed torch >= {MISSING[name]};" in said


@covers("e4m3fn-cast-nan", "e4m3fnuz-cast-nan")
def test_the_codec_never_casts_beyond_the_maximum() -> None:
    from hal.quant.codec import encode

    old = under_old_torch()["old"]
    assert old["cast_probe"] is True
    assert old["cast_finite"] is True
    for number_format in ("e4m3fn", "e4m3fnuz"):
        codes, scales = encode(torch.tensor([[3e38, -1000.0, 248.0]]), number_format, "token")
        assert codes.float().isfinite().all()
        assert scales.isfinite().all()


@covers("e8m0-bytes-copied-as-numbers")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_scales_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    from dataclasses import replace

    weight = hal.quant.quantize(torch.ones(2, 4), "int8_channel", platform="cpu")
    with pytest.raises(DTypeError, match="decode them first"):
        replace(weight, scales=torch.full((2,), 120, dtype=dtype))


# ------------------------------------------------------------------------------------- interface
@covers("view-mixed-sizes")
def test_view_under_both_faults() -> None:
    old = under_old_torch()["old"]
    assert old["view_dropped"] == [12]
    assert old["view"] == [3, 2, 2]


@covers("pad-of-nothing")
def test_pad_of_nothing() -> None:
    old = under_old_torch()["old"]
    assert old["pad_probe"] is True
    assert old["pad"] == [[0, 8], [2, 8]]


@covers("infer-schema-pep585")
def test_schemas_where_torch_refuses_builtin_lists() -> None:
    old = under_old_torch()["old"]
    assert old["schema_probe"] is True
    assert old["schema"] == "(Tensor x, SymInt[] sizes, SymInt? rows) -> Tensor[]"


@covers("register-fake-name", "is-compiling-name")
def test_older_names() -> None:
    names = under_old_torch()["names"]
    assert names["probes"] == [True, True]
    assert names["is_compiling"] is False
    assert names["is_compiling_is_old"] is True
    assert names["fake"] == [3]


@covers("accelerator-partial")
def test_accelerator_that_raises_or_lacks_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from hal.torch_compat import accelerator_type, device_memory

    def raising() -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(current_accelerator=raising))
    row = next(row for row in check_quirks("cpu") if row.quirk.id == "accelerator-partial")
    assert row.seen is True
    assert accelerator_type() is None
    fake = SimpleNamespace(mem_get_info=lambda device: (1, 2))
    monkeypatch.setattr(torch, "cuda", fake)
    assert device_memory(torch.device("cuda:0")) == (1, 2)


@covers("cuda-available-starts-driver")
def test_torch_is_not_asked_whether_there_is_cuda() -> None:
    # In the child, torch.cuda.is_available and its like raise AssertionError.
    assert under_old_torch()["use"]["platform"]


class Declares:
    __slots__ = ("dtype",)


class Inherits(Declares):
    __slots__ = ()


@covers("compile-inherited-slots")
def test_slots_in_compiled_code() -> None:
    owner, x = Inherits(), torch.ones(2)
    owner.dtype = x.dtype
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x * 2 if x.dtype is not owner.dtype else x, fullgraph=True, backend="eager"
    )
    row = ROWS["compile-inherited-slots"]
    assert torch.equal(compiled(x), x) != row.applies(torch.__version__, "cpu")


# -------------------------------------------------------------------------------------- products
def bind(kernel: str, scheme: str, shape: tuple[int, int]) -> Any:
    """Return a weight on the CPU, and what a kernel for an H100 makes of it."""
    weight = hal.quant.quantize(torch.ones(shape), scheme, platform="cuda:h100")
    selection = choose("linear", scheme, device("cuda:h100"), {"dtype": "bfloat16"})
    binding = Binding(selection, hal.platform("cuda:h100"), weight.scheme, weight.device)
    return weight, find_op("linear").find(kernel).load()(binding, weight, None)


@covers("scaled-mm-2d-scales", "rowwise-bf16", "scaled-mm-sm120-layout")
def test_the_contract_of_rowwise_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.torch_compat import scaled_mm_rowwise_function

    calls: list[Any] = []

    def scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, *, bias: Any, out_dtype: Any) -> Any:
        calls.append((a, b, scale_a, scale_b, bias, out_dtype))
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    scaled_mm_rowwise_function.cache_clear()
    try:
        weight, (launch, tensors) = bind("torch_scaled_mm", "fp8_channel", (32, 64))
        assert launch(torch.ones(3, 64).bfloat16(), tensors).shape == (3, 32)
    finally:
        scaled_mm_rowwise_function.cache_clear()
    a, b, scale_a, scale_b, bias, out_dtype = calls[0]
    assert (a.shape, a.stride()) == ((3, 64), (64, 1))
    assert (b.shape, b.stride()) == ((64, 32), (1, 64))
    assert b.data_ptr() == weight.values.data_ptr()
    assert (scale_a.shape, scale_b.shape) == ((3, 1), (1, 32))
    assert (bias, out_dtype) == (None, torch.bfloat16)
    said = failures(
        "linear", "fp8_channel", device("cuda:h100"), "torch_scaled_mm", dtype="float16"
    )
    assert "found dtype=float16, needs dtype bfloat16" in said


@covers("scaled-mm-block-orientation")
@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="needs torch 2.10")
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 256), (4, 256), (3, 192), (4, 130)])
def test_the_contract_of_block_products(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hal.torch_compat import block128_weight_scales, scaled_mm_block128_function

    calls: list[Any] = []

    def scaled_mm(*arguments: Any, output_dtype: Any) -> Any:
        calls.append(arguments)
        return torch.zeros(arguments[0].shape[0], arguments[1].shape[1], dtype=output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    # Scales are left alone on the CPU: arranged as on CUDA, they are what cuBLAS is given.
    monkeypatch.setattr(
        "hal.torch_compat.block128_weight_scales",
        lambda scales, kind: block128_weight_scales(scales, "cuda"),
    )
    scaled_mm_block128_function.cache_clear()
    try:
        _, (launch, tensors) = bind("torch_scaled_mm_block128", "fp8_block128", (columns, 384))
        out = launch(torch.ones(rows, 384).bfloat16(), tensors)
        assert (out.shape, out.is_contiguous()) == ((rows, columns), True)
    finally:
        scaled_mm_block128_function.cache_clear()
    a, b, scale_a, kind_a, scale_b, kind_b = calls[0]
    assert (a.shape, b.shape) == ((4, 384), (384, 256))
    assert (scale_a.shape, kind_a.name) == ((4, 3), "BlockWise1x128")
    assert (scale_b.shape, scale_b.stride(), kind_b.name) == ((4, 2), (1, 4), "BlockWise128x128")


@covers("scaled-mm-block-compile")
def test_compiled_graphs_see_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.ops import library

    schema = torch.ops.hal.linear.default._schema
    assert str(schema) == "hal::linear(Tensor x, Tensor[] tensors, int key) -> Tensor"
    weight = hal.ops.Linear(torch.ones(4, 8).bfloat16())
    monkeypatch.setattr("hal.ops.bound_linear.is_compiling", lambda: True)
    seen: list[int] = []
    found = library._find
    monkeypatch.setattr(library, "_find", lambda key: seen.append(key) or found(key))
    assert weight(torch.ones(2, 8).bfloat16()).shape == (2, 4)
    assert seen == [weight.key]


RELEASES = [
    ("scaled-mm-two-results", "cuda:h100", "2.4.0", "fp8_channel", "torch_scaled_mm", "2.6"),
    ("scaled-mm-two-results", "rocm:mi300x", "2.4.0", "fp8_channel", "torch_scaled_mm", "2.7"),
    ("rowwise-sm89-stream", "cuda:l40s", "2.11.0", "fp8_channel", "torch_scaled_mm", "2.12"),
    ("scaled-mm-private", "cuda:h100", "2.9.1", "fp8_block128", "torch_scaled_mm_block128", "2.10"),
]


@covers("scaled-mm-two-results", "rowwise-sm89-stream")
@pytest.mark.parametrize(("name", "where", "version", "scheme", "kernel", "needed"), RELEASES)
def test_kernels_wait_for_the_release(
    name: str, where: str, version: str, scheme: str, kernel: str, needed: str
) -> None:
    assert ROWS[name].applies(version, where.partition(":")[0])
    said = failures("linear", scheme, device(where, version), kernel, dtype="bfloat16")
    assert f"torch_version: found {version}, needs torch >= {needed}" in said
    newest = failures("linear", scheme, device(where, f"{needed}.0.dev1"), kernel, dtype="bfloat16")
    assert newest == ""


@covers("grouped-mm-private")
def test_the_private_grouped_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.torch_compat import grouped_mm_function

    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.setattr(torch, "_grouped_mm", max, raising=False)
    grouped_mm_function.cache_clear()
    try:
        assert grouped_mm_function() is max
    finally:
        grouped_mm_function.cache_clear()
    assert next(r.seen for r in check_quirks("cpu") if r.quirk.id == "grouped-mm-private")


@covers("scaled-mm-cpu-no-rows", "scaled-mm-cpu-per-tensor", "scaled-mm-cpu-no-blocks")
@pytest.mark.parametrize("version", ["2.6.0", "2.10.0", "2.13.0"])
def test_a_cpu_never_gets_scaled_mm(version: str) -> None:
    for scheme, kernel in [
        ("fp8_channel", "torch_scaled_mm"),
        ("fp8_block128", "torch_scaled_mm_block128"),
    ]:
        said = failures("linear", scheme, device("cpu:x86-amx", version), kernel)
        assert "platform: found cpu" in said


@covers("cpu-converted-products")
@pytest.mark.parametrize(
    ("cpu", "name", "converts"),
    [
        ("cpu:x86-avx2", "bfloat16", True),
        ("cpu:x86-avx2", "float16", True),
        ("cpu:x86-amx", "bfloat16", False),
        ("cuda:t4", "bfloat16", False),
    ],
)
def test_products_of_a_dtype_that_the_cpu_converts(cpu: str, name: str, converts: bool) -> None:
    """They are summed in float32 and rounded once, whatever CPU runs the test."""
    spec, dtype = device(cpu), compat.dtype(name)
    multiply, dense = compat.mm_function(spec, name), compat.dense_function(spec, name)
    assert (multiply is torch.mm) == (dense is torch.nn.functional.linear) == (not converts)
    bias = torch.randn(1037).to(dtype)
    # More numbers than are widened at a time, and a last piece that is not whole.
    for rows, columns, inner in ((0, 8, 8), (1, 5, 3), (5, 1, 1), (5, 0, 8), (7, 1037, 1100)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        exact, step = a.double() @ b.double().T, torch.finfo(dtype).eps
        added = bias[:columns]
        target = torch.full((rows, columns + 2), 7.0, dtype=dtype)[:, :columns]
        multiply(a, b.t(), out=target)
        for found, wanted in (
            (multiply(a, b.t()), exact),
            (target, exact),
            (multiply(a.t().contiguous().t(), b.t()), exact),
            (dense(a, b), exact),
            (dense(a, b, added), exact + added.double()),
        ):
            assert (found.dtype, found.shape) == (dtype, (rows, columns))
            # Half a step, and a little of float32's own.
            nearness = 0.51 if converts and rows > 4 else 2.0
            assert torch.allclose(found.double(), wanted, rtol=nearness * step, atol=1e-4)
    a = torch.ones(6, 4, dtype=dtype)
    a[2, 1], a[4, 0] = torch.nan, torch.inf
    found = multiply(a, torch.ones(4, 3, dtype=dtype))
    assert bool(found[2].isnan().all())
    assert bool(found[4].isinf().all())
    assert found[[0, 1, 3, 5]].unique().tolist() == [4.0]


@covers("int-mm-one-column")
def test_one_column_in_int8() -> None:
    assert (
        under_old_torch()["use"]["int8_one_column"] < 2**-4
    )  # of values up to 4, in bf16 and int8
    said = failures(
        "linear", "int8_channel", device("cpu:x86-amx"), "torch_int_mm_cpu", in_features=1
    )
    assert "wrong for one column" in said


INTERPRETED = """
import torch
from hal.ops.kernels.linear import gemm
from hal.ops.tiles import Tile
a, b = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 32))
out = torch.empty(16, 32, dtype=torch.bfloat16)
gemm(a, b, out, a_scales=None, b_scales=None, bias=None, kind="bf16",
     tile=Tile(16, 32, 64, 4, 2), fnuz=False)
print(float((out.float() - a.float() @ b.float().T).abs().max()))
"""


@covers("interpreter-bf16-dot")
def test_bf16_products_in_tritons_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton before 3.7 cannot interpret with numpy 2.4 and later")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25  # of values up to 30, in bf16
