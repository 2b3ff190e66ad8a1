"""Layouts: exact inverses, one application, refusals without change, ordered work."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.device import DeviceSpec
from hal.errors import (
    DTypeError,
    EncodingError,
    LayoutError,
    RegistrationError,
    ShapeError,
    UnknownNameError,
    ValueRangeError,
)
from hal.platforms.tables import device_spec
from hal.quant import (
    LAYOUTS,
    SCHEMES,
    Layout,
    QTensor,
    kernel_arguments,
    quantize,
    register_layout,
    to_layout,
)
from hal.quant.forms import Form
from hal.quant.layout import find_layout
from hal.quant.parts import Part, Plain


class RecordingPlatform:
    """Record how `ordered` is used, and refuse everything else that touches a device."""

    torch_device_type = "cpu"
    simulated = False

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[torch.Tensor, ...], object]] = []
        self.inside = False

    def device(self, index: int = 0) -> DeviceSpec:
        """Return the facts of some CPU."""
        return device_spec("cpu", "x86-avx2")

    @contextmanager
    def ordered(self, tensors, *, stream=None):
        """Note the tensors and that a body is running."""
        self.calls.append((tuple(tensors), stream))
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def bits(weight: QTensor) -> list[bytes]:
    return [raw(tensor.flatten()).numpy().tobytes() for tensor in weight.tensors]


def weight_of(scheme: str, *shape: int, seed: int = 0, layout: str = "") -> QTensor:
    """Return a weight of normal numbers, its scales powers of two if the layout needs it."""
    generator = torch.Generator().manual_seed(seed)
    weight = quantize(torch.randn(shape, generator=generator), scheme, platform="cpu")
    if layout.endswith("deep_gemm_ue8m0") and weight.scales.dtype is torch.float32:
        return replace(weight, scales=torch.exp2(torch.log2(weight.scales).round()))
    return weight


def admits(layout: str, scheme: str, *shape: int) -> bool:
    encoding = SCHEMES[scheme].operands()[1].formats[0]
    return find_layout(layout).admits(SCHEMES[scheme], encoding, shape)


WHOLE = (256, 256)  # rows and columns that every layout takes as they are
# Of schemes that store weights alike, one.
KINDS = {scheme.weight: name for name, scheme in SCHEMES.items()}.values()
BOTH = [
    "interleaved_64+blocked_128x4", "up_gate+blocked_128x4", "interleaved+aiter_16x16",
    "interleaved+hopper_mx_w8", "up_gate+marlin", "interleaved_128+marlin", "up_gate+k_major",
    "interleaved+cutlass_w4a8", "interleaved_128+deep_gemm_ue8m0",
]  # fmt: skip
CASES = [
    (scheme, layout)
    for scheme in KINDS
    for layout in (*LAYOUTS, *BOTH)
    if layout != "canonical" and admits(layout, scheme, *WHOLE)
]


def rows_of(layout: str, scheme: str, rows: int) -> int:
    """Return the next number of rows that a layout takes."""
    return next(n for n in range(rows, rows + 257) if admits(layout, scheme, n, 1))


def test_every_layout_has_cases_and_every_scheme_more_than_one() -> None:
    assert {layout for _, layout in CASES} == {*LAYOUTS, *BOTH} - {"canonical"}
    for scheme in KINDS:
        assert sum(scheme == case[0] for case in CASES) > 1


@settings(max_examples=80)
@given(
    st.sampled_from(CASES),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(0, 9),
)
def test_there_and_back_is_the_same_bits(case, lead, rows, columns, seed) -> None:
    scheme, layout = case
    there_and_back(scheme, layout, (*lead, rows_of(layout, scheme, rows), columns), seed)


@pytest.mark.parametrize("shape", [(1, 1), (2, 66, 131), (131, 257)])
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_odd_sizes_there_and_back(scheme: str, layout: str, shape) -> None:
    *lead, rows, columns = shape
    there_and_back(scheme, layout, (*lead, rows_of(layout, scheme, rows), columns), 0)


def there_and_back(scheme: str, layout: str, shape: tuple[int, ...], seed: int) -> None:
    weight = weight_of(scheme, *shape, seed=seed, layout=layout)
    before = bits(weight)
    there = to_layout(weight, layout, "cpu")
    back = to_layout(there, "canonical", "cpu")
    assert bits(back) == before == bits(weight)
    assert back.metadata == weight.metadata
    assert there.layout == layout
    assert there.shape == weight.shape
    assert all(tensor.is_contiguous() for tensor in (*there.tensors, *back.tensors))
    memory = {tensor.data_ptr() for tensor in weight.tensors}
    assert not memory & {tensor.data_ptr() for tensor in (*there.tensors, *back.tensors)}
    assert torch.equal(there.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_all_bytes_of_codes_pass_through(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, *WHOLE, layout=layout)
    codes = raw(weight.values)
    codes.copy_(torch.arange(codes.numel()).remainder(256).to(torch.uint8).view_as(codes))
    there = to_layout(weight, layout, "cpu")
    back = to_layout(there, "canonical", "cpu")
    assert torch.equal(raw(back.values), codes)
    assert raw(there.values).numel() == codes.numel()


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_twice_is_the_same_object(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, *WHOLE, layout=layout)
    platform = RecordingPlatform()
    there = to_layout(weight, layout, platform)
    assert there is not weight
    before = len(platform.calls)
    assert to_layout(there, layout, platform) is there
    assert to_layout(weight, "canonical", platform) is weight
    assert len(platform.calls) == before > 0


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_tags_files_and_devices_carry_the_layout(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, 2, *WHOLE[:1], 65, layout=layout)
    there = to_layout(weight, layout, "cpu")
    loaded = QTensor.from_state_dict(there.state_dict(), there.metadata)
    assert bits(loaded) == bits(there)
    assert loaded.metadata == there.metadata
    assert bits(to_layout(loaded, "canonical", "cpu")) == bits(weight)
    meta = to_layout(weight.to("meta"), layout, "cpu")
    assert [t.shape for t in meta.tensors] == [t.shape for t in there.tensors]
    assert [t.dtype for t in meta.tensors] == [t.dtype for t in there.tensors]
    assert there.to("meta").metadata == there.metadata
    with pytest.raises(
        LayoutError, match=rf"layout {re.escape(layout)}, needed canonical; call hal"
    ):
        there.require("linear", layout="canonical", encodings=(there.encoding,))
    one = there.matrix(1)
    assert bits(to_layout(one, "canonical", "cpu")) == bits(weight.matrix(1))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_a_wrong_tag_is_refused(scheme: str, layout: str) -> None:
    """Tensors of one layout under the name of another, wherever a size or dtype can tell."""
    weight = weight_of(scheme, 2, *WHOLE[:1], 66, layout=layout)
    there = to_layout(weight, layout, "cpu")
    changed = [
        one.shape != other.shape or one.dtype is not other.dtype
        for one, other in zip(weight.tensors, there.tensors, strict=True)
    ]
    if any(changed):
        with pytest.raises((ShapeError, DTypeError)):
            replace(there, layout="canonical")
        with pytest.raises((ShapeError, DTypeError)):
            replace(weight, layout=layout)
    with pytest.raises((ShapeError, DTypeError)):
        replace(there, logical_shape=(2, 2 * WHOLE[0], 66))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_arguments_are_views(scheme: str, layout: str) -> None:
    there = to_layout(weight_of(scheme, 2, *WHOLE, layout=layout), layout, "cpu")
    found = kernel_arguments(there)
    given = [tensor for tensor in found[:-1] if tensor is not None]
    memory = [tensor.untyped_storage().data_ptr() for tensor in there.tensors]
    assert [tensor.untyped_storage().data_ptr() for tensor in given] == memory
    assert isinstance(found.encoding, str)


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_in_place_where_memory_suffices_and_refused_where_not(scheme: str, layout: str) -> None:
    weight, twin = (weight_of(scheme, *WHOLE, layout=layout) for _ in range(2))
    before, memory = bits(weight), [tensor.data_ptr() for tensor in weight.tensors]
    wanted = to_layout(twin, layout, "cpu")
    same = [
        (one.shape, one.dtype) == (other.shape, other.dtype)
        for one, other in zip(twin.tensors, wanted.tensors, strict=True)
    ]
    moved = "k_major" in layout  # a square is no exception
    if moved or not all(same):
        for source, target in ((weight, layout), (wanted, "canonical")):
            with pytest.raises(LayoutError, match="changes"):
                to_layout(source, target, "cpu", inplace=True)
        assert bits(weight) == before
        return
    there = to_layout(weight, layout, "cpu", inplace=True)
    assert [tensor.data_ptr() for tensor in there.tensors] == memory
    assert bits(there) == bits(wanted)
    back = to_layout(there, "canonical", "cpu", inplace=True)
    assert [tensor.data_ptr() for tensor in back.tensors] == memory
    assert bits(back) == before


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_a_gpu_gives_the_same_bytes(scheme: str, layout: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "xpu"
    weight = weight_of(scheme, 2, rows_of(layout, scheme, 66), 131, layout=layout)
    there = to_layout(weight.to(device), layout)
    assert bits(there.to("cpu")) == bits(to_layout(weight, layout, "cpu"))
    assert bits(to_layout(there, "canonical").to("cpu")) == bits(weight)
    found, wanted = kernel_arguments(there), kernel_arguments(there.to("cpu"))
    for mine, theirs in zip(found[:-1], wanted[:-1], strict=True):
        if theirs is not None:
            assert mine.stride() == theirs.stride()


def test_some_layouts_can_be_had_in_place() -> None:
    for layout in ("interleaved", "interleaved_64", "aiter_16x16"):
        weight = weight_of("fp8_channel", *WHOLE)
        assert to_layout(weight, layout, "cpu", inplace=True).values is weight.values


@pytest.mark.parametrize("scheme", SCHEMES)
def test_k_major_is_the_stored_transpose(scheme: str) -> None:
    weight = weight_of(scheme, 2, 5, 130)
    there = to_layout(weight, "k_major", "cpu")
    assert there.values.shape == (2, weight.values.shape[-1], 5)
    assert there.values.is_contiguous()
    assert torch.equal(there.values.float(), weight.values.float().mT)
    if weight.scales is not None:
        assert torch.equal(there.scales, weight.scales)


@pytest.mark.parametrize(
    "scheme", [name for name in SCHEMES if SCHEMES[name].weight.granularity != "block128"]
)
def test_interleaved_alternates_gate_and_up_with_their_scales(scheme: str) -> None:
    weight = weight_of(scheme, 2, 6, 3)
    there = to_layout(weight, "interleaved", "cpu")
    rows = [0, 3, 1, 4, 2, 5]
    assert torch.equal(there.values.float(), weight.values.float()[:, rows])
    how = SCHEMES[scheme].weight
    granularities = {"scales": how.granularity, "global_scale": how.second}
    for name, granularity in granularities.items():
        mine, theirs = getattr(weight, name), getattr(there, name)
        if mine is not None:
            moved = mine.float() if granularity == "tensor" else mine.float()[:, rows]
            assert torch.equal(theirs.float(), moved)
    assert torch.equal(there.dequantize(), weight.dequantize())


def test_rows_move_first_and_then_the_rest() -> None:
    weight = weight_of("nvfp4", 2, 256, 96)
    moved = replace(to_layout(weight, "interleaved_64", "cpu"), layout="canonical")
    wanted = to_layout(moved, "blocked_128x4", "cpu")
    found = to_layout(weight, "interleaved_64+blocked_128x4", "cpu")
    assert bits(found) == bits(wanted)
    for one, other in zip(kernel_arguments(found)[:2], kernel_arguments(wanted)[:2], strict=True):
        assert one.shape == other.shape
    halves = to_layout(weight_of("fp8_block128", 256, 130), "up_gate", "cpu")
    assert torch.equal(halves.scales, weight_of("fp8_block128", 256, 130).scales.flip(0))


def test_repeated_scales_move_with_their_rows() -> None:
    weight = weight_of("fp8_block128", 512, 300)
    moved = replace(to_layout(weight, "interleaved_128", "cpu"), layout="canonical")
    wanted = kernel_arguments(to_layout(moved, "marlin", "cpu"))
    found = kernel_arguments(to_layout(weight, "interleaved_128+marlin", "cpu"))
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.values, wanted.values)


@pytest.mark.parametrize(
    "name",
    ["marlin+interleaved", "interleaved+up_gate", "interleaved+canonical", "marlin+marlin",
     "interleaved+", "+marlin", "interleaved+up_gate+marlin", "interleaved + marlin"],
)  # fmt: skip
def test_two_names_that_make_no_layout(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown layout"):
        to_layout(weight_of("fp8_channel", 256, 256), name, "cpu")


def test_from_one_layout_to_another_goes_through_canonical() -> None:
    weight = weight_of("fp8_channel", 6, 8)
    around = to_layout(to_layout(weight, "interleaved", "cpu"), "k_major", "cpu")
    straight = to_layout(weight, "k_major", "cpu")
    assert bits(around) == bits(straight)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "int8_channel"])
def test_in_place_uses_the_memory_and_gives_the_same_bits(scheme: str, rows: int) -> None:
    weight, twin = weight_of(scheme, 3, rows, 5), weight_of(scheme, 3, rows, 5)
    memory = [tensor.data_ptr() for tensor in weight.tensors]
    there = to_layout(weight, "interleaved", "cpu", inplace=True)
    assert [tensor.data_ptr() for tensor in there.tensors] == memory
    assert bits(there) == bits(to_layout(twin, "interleaved", "cpu"))
    back = to_layout(there, "canonical", "cpu", inplace=True)
    assert [tensor.data_ptr() for tensor in back.tensors] == memory
    assert bits(back) == bits(twin)


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (5, 1), (6, 4)])
def test_a_step_in_place_does_not_reach_earlier_copies(shape) -> None:
    weight = weight_of("fp8_channel", *shape)
    copy = to_layout(weight, "k_major", "cpu")
    before = bits(copy)
    for tensor in weight.tensors:
        raw(tensor).fill_(1)
    assert bits(copy) == before


@pytest.mark.parametrize(
    ("scheme", "shape", "layout", "inplace", "error", "match"),
    [
        ("fp8_channel", (5, 4), "interleaved", False, ShapeError, "5 rows, needed a multiple of 2"),
        ("fp8_channel", (5, 4), "interleaved", True, ShapeError, "5 rows"),
        ("fp8_block128", (4, 4), "interleaved", False, ShapeError, "scales per block128"),
        ("fp8_channel", (4, 4), "k_major", True, LayoutError, "inplace=True"),
        ("bf16", (4, 4), "k_major", True, LayoutError, "the shape of codes changes"),
        ("mxfp4", (5, 4), "aiter_16x16", True, LayoutError, "the shape of codes changes"),
        ("mxfp4", (16, 64), "aiter_16x16", True, LayoutError, "the shape of scales changes"),
        ("nvfp4", (9, 64), "blocked_128x4", True, LayoutError, "the shape of scales changes"),
        ("int4_w4a16", (9, 64), "cutlass_w4a8", False, ShapeError, "float32 scales per group128"),
        ("bf16", (9, 64), "marlin", False, EncodingError, "bfloat16 codes"),
        ("nvfp4", (9, 64), "cdna4_mx", False, ShapeError, "e4m3fn scales per group16"),
        ("fp8_channel", (9, 64), "deep_gemm", False, ShapeError, "scales per channel"),
        ("fp8_block128", (9, 64), "deep_gemm_ue8m0", False, ValueRangeError, "powers of two as"),
        ("fp8_channel", (4, 4), "kmajor", False, UnknownNameError, "did you mean 'k_major'"),
        ("fp8_channel", (4, 4), "", True, UnknownNameError, "layout"),
    ],
)
def test_refusals_change_nothing(scheme, shape, layout, inplace, error, match) -> None:
    weight, platform = weight_of(scheme, *shape), RecordingPlatform()
    before = bits(weight)
    with pytest.raises(error, match=match):
        to_layout(weight, layout, platform, inplace=inplace)
    assert bits(weight) == before
    assert weight.layout == "canonical"
    # A check of values is work on the device; all others come before any.
    assert len(platform.calls) == (error is ValueRangeError)


def test_leaving_k_major_in_place_is_refused() -> None:
    weight = to_layout(weight_of("fp8_channel", 4, 4), "k_major", "cpu")
    before = bits(weight)
    with pytest.raises(LayoutError, match="layout k_major"):
        to_layout(weight, "canonical", "cpu", inplace=True)
    assert bits(weight) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_work_runs_inside_the_order_of_the_platform(monkeypatch, inplace: bool) -> None:
    platform, seen = RecordingPlatform(), []

    def look(values: torch.Tensor) -> torch.Tensor:
        seen.append(platform.inside)
        return values.clone()

    form = Form(parts={"values": Part(Plain(look, look))})
    monkeypatch.setitem(LAYOUTS, "watched", Layout("watched", (form,)))
    weight, stream = weight_of("fp8_channel", 4, 4), object()
    there = to_layout(weight, "watched", platform, inplace=inplace, stream=stream)
    assert seen == [True]
    assert not platform.inside
    (first, first_stream), *others = platform.calls
    assert [id(tensor) for tensor in first] == [id(tensor) for tensor in weight.tensors]
    assert first_stream is stream
    # What comes after is the caller's: on its stream, and about the result.
    for tensors, other in others:
        assert other is None
        assert [id(tensor) for tensor in tensors] == [id(tensor) for tensor in there.tensors]
    platform.calls.clear()
    to_layout(there, "canonical", platform, inplace=inplace)
    assert seen == [True, True]
    assert [id(tensor) for tensor in platform.calls[0][0]] == [id(t) for t in there.tensors]


def test_quantize_runs_inside_the_order_of_the_platform() -> None:
    platform, weight = RecordingPlatform(), torch.randn(4, 4)
    quantize(weight, "fp8_channel", platform=platform)
    ((tensors, stream),) = platform.calls
    assert [tensor.data_ptr() for tensor in tensors] == [weight.data_ptr()]
    assert stream is None


def test_a_layout_name_is_taken_once() -> None:
    before = dict(LAYOUTS)
    with pytest.raises(RegistrationError, match="'k_major' exists already"):
        register_layout(Layout("k_major", ()))
    assert before == LAYOUTS
