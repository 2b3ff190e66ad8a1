"""Layouts: exact inverses, one application, refusals without change, ordered work."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.device import DeviceSpec
from hal.errors import LayoutError, RegistrationError, ShapeError, UnknownNameError
from hal.platforms.tables import device_spec
from hal.quant import LAYOUTS, SCHEMES, Layout, QTensor, quantize, register_layout, to_layout


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


def weight_of(scheme: str, *shape: int, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(shape, generator=generator), scheme, platform="cpu")


def admits(layout: str, scheme: str, rows: int) -> bool:
    row = LAYOUTS[layout]
    return SCHEMES[scheme].weight.granularity in row.granularities and rows % row.row_multiple == 0


CASES = [
    (scheme, layout)
    for scheme in SCHEMES
    for layout in LAYOUTS
    if layout != "canonical" and admits(layout, scheme, 4)
]


@settings(max_examples=30)
@given(
    st.sampled_from(CASES),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(0, 9),
)
def test_there_and_back_is_the_same_bits(case, lead, rows, columns, seed) -> None:
    scheme, layout = case
    rows *= LAYOUTS[layout].row_multiple
    weight = weight_of(scheme, *lead, rows, columns, seed=seed)
    before = bits(weight)
    there = to_layout(weight, layout, "cpu")
    back = to_layout(there, "canonical", "cpu")
    assert bits(back) == before == bits(weight)
    assert back.metadata == weight.metadata
    assert there.layout == layout
    assert there.shape == weight.shape
    memory = {tensor.data_ptr() for tensor in weight.tensors}
    assert not memory & {tensor.data_ptr() for tensor in there.tensors}


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_all_bytes_pass_through_unchanged(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, 4, 256)
    codes = raw(weight.values)
    codes.copy_(torch.arange(codes.numel()).remainder(256).to(torch.uint8).view_as(codes))
    there = to_layout(weight, layout, "cpu")
    assert sorted(raw(there.values).flatten().tolist()) == sorted(codes.flatten().tolist())
    assert torch.equal(raw(to_layout(there, "canonical", "cpu").values), codes)


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_twice_is_the_same_object(scheme: str, layout: str) -> None:
    weight = weight_of(scheme, 4, 6)
    platform = RecordingPlatform()
    there = to_layout(weight, layout, platform)
    assert there is not weight
    before = len(platform.calls)
    assert to_layout(there, layout, platform) is there
    assert to_layout(weight, "canonical", platform) is weight
    assert len(platform.calls) == before > 0


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
    assert platform.calls == []


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

    monkeypatch.setitem(LAYOUTS, "watched", Layout("watched", look, look, keeps_shape=True))
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
        register_layout(Layout("k_major", torch.clone, torch.clone))
    assert before == LAYOUTS
