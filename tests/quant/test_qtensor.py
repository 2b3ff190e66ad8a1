"""QTensor: wrong tags are refused, and a weight survives moving, copying and files."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from hal.errors import (
    DTypeError,
    EncodingError,
    LayoutError,
    ShapeError,
    UnknownNameError,
)
from hal.quant import SCHEMES, QTensor, find_scheme, quantize, scale_shape, to_layout

SHAPE = (130, 140)


def weight_of(scheme: str, *lead: int, layout: str = "canonical") -> QTensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((*lead, *SHAPE), generator=generator, dtype=torch.float32)
    return to_layout(quantize(weight, scheme, platform="cpu"), layout, "cpu")


def fields_of(scheme: str) -> dict:
    made = weight_of(scheme)
    return {
        "values": made.values, "scales": made.scales, "scheme": made.scheme,
        "encoding": made.encoding, "layout": made.layout, "logical_shape": made.logical_shape,
        "global_scale": made.global_scale, "zeros": made.zeros,
    }  # fmt: skip


def same(one: QTensor, other: QTensor) -> bool:
    return (
        one.metadata == other.metadata
        and one.values.dtype is other.values.dtype
        and one.values.shape == other.values.shape
        and all(
            torch.equal(mine.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
            for mine, theirs in zip(one.tensors, other.tensors, strict=True)
        )
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_right_weight_is_accepted_and_described(scheme: str) -> None:
    made = QTensor(**fields_of(scheme))
    assert made.shape == made.logical_shape == SHAPE
    assert made.device == torch.device("cpu")
    how, (rows, columns) = SCHEMES[scheme].weight, SHAPE
    bits = {"bf16": 16, "e2m1": 4, "int4": 4}.get(how.format or "bf16", 8)
    scales = 0 if how.format is None else math.prod(scale_shape(how.granularity, SHAPE))
    width = {"float32": 4, "e8m0": 1, "e4m3fn": 1, None: 0}[how.scale_format]
    second = {"none": 0, "tensor": 4, "channel": 4 * rows}[how.second]
    zeros = 0 if how.symmetric else scales  # a byte each
    assert made.nbytes == rows * columns * bits // 8 + scales * width + second + zeros
    assert repr(made) == (
        f"QTensor(130x140, {scheme}, {made.encoding}, layout=canonical, cpu, {made.nbytes} bytes)"
    )
    assert len(made.tensors) == (1 if scheme == "bf16" else 2 + (second > 0) + (zeros > 0))


@pytest.mark.parametrize(
    ("scheme", "change", "error", "match"),
    [
        ("fp8_channel", {"encoding": "e4m3fnuz"}, EncodingError, "float8_e4m3fn, needed e4m3fnuz"),
        ("fp8_channel", {"encoding": "int8"}, EncodingError, "found int8, needed e4m3fn or e4m3f"),
        ("fp8_channel", {"encoding": "fp8"}, EncodingError, "found fp8"),
        ("int8_channel", {"encoding": "e4m3fn"}, EncodingError, "needed int8"),
        ("bf16", {"encoding": "float16"}, EncodingError, "found values of torch.bfloat16"),
        ("bf16", {"encoding": "float32"}, EncodingError, "needed bfloat16 or float16"),
        ("bf16", {"scales": torch.ones(130)}, EncodingError, "found scales, needed none"),
        ("fp8_channel", {"scales": None}, EncodingError, "found no scales"),
        ("fp8_channel", {"scales": torch.ones(130).bfloat16()}, DTypeError, "needed float32"),
        ("fp8_channel", {"scales": torch.ones(130).to(torch.uint8)}, DTypeError, "e8m0 bytes"),
        ("fp8_channel", {"scales": torch.ones(140)}, ShapeError, r"\[140\], needed \[130\]"),
        ("fp8_channel", {"scales": torch.ones(130, 1)}, ShapeError, r"needed \[130\]"),
        ("fp8_block128", {"scales": torch.ones(1, 2)}, ShapeError, r"needed \[2, 2\]"),
        ("fp8_channel", {"scheme": find_scheme("int8_channel")}, EncodingError, "needed int8"),
        ("fp8_channel", {"layout": "kmajor"}, UnknownNameError, "did you mean 'k_major'"),
        ("fp8_channel", {"layout": "k_major", "logical_shape": ()}, ShapeError, r"needed \[..."),
        ("fp8_channel", {"logical_shape": (140, 130)}, ShapeError, r"needed \[140, 130\]"),
        ("fp8_channel", {"logical_shape": (18200,)}, ShapeError, r"needed \[..."),
        ("bf16", {"values": torch.ones(8).bfloat16(), "logical_shape": ()}, ShapeError, r"\[8\]"),
    ],
)
def test_a_wrong_tag_is_refused(scheme: str, change, error, match: str) -> None:
    with pytest.raises(error, match=match):
        QTensor(**(fields_of(scheme) | change))


def test_values_and_scales_live_on_one_device() -> None:
    fields = fields_of("fp8_channel")
    with pytest.raises(ValueError, match="values on cpu and scales on meta"):
        QTensor(**(fields | {"scales": fields["scales"].to("meta")}))


def test_require_names_the_cure() -> None:
    made = weight_of("fp8_channel")
    made.require("linear", layout="canonical", encodings=("e4m3fn",))
    with pytest.raises(LayoutError, match=r"linear: .*call hal\.quant\.to_layout\(weight, 'k_maj"):
        made.require("linear", layout="k_major", encodings=("e4m3fn",))
    with pytest.raises(EncodingError, match="found e4m3fn bytes, needed e4m3fnuz"):
        made.require("linear", layout="canonical", encodings=("e4m3fnuz",))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_moves_both_tensors_and_keeps_the_tags(scheme: str) -> None:
    made = weight_of(scheme)
    moved = made.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert moved.metadata == made.metadata
    assert {tensor.device.type for tensor in made.tensors} == {"cpu"}
    assert same(made.to(torch.device("cpu")), made)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_a_dtype_is_refused_because_it_would_decode(scheme: str) -> None:
    with pytest.raises(EncodingError):
        weight_of(scheme).to(torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["canonical", "k_major"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_ignores_the_layout(scheme: str, layout: str, dtype) -> None:
    wide = weight_of(scheme, 2, layout=layout).dequantize(dtype)
    assert wide.dtype is (dtype or torch.float32)
    assert torch.equal(wide, weight_of(scheme, 2).dequantize(dtype))
    assert tuple(wide.shape) == (2, *SHAPE)


CASES = [
    (scheme, layout)
    for scheme in SCHEMES
    for layout in ("canonical", "k_major", "interleaved")
    if SCHEMES[scheme].weight.granularity != "block128" or layout != "interleaved"
]


@pytest.mark.parametrize("platform", ["cpu", "rocm:gfx942"])
@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_files_of_torch_give_it_back(scheme: str, layout: str, platform: str) -> None:
    made = quantize(torch.randn(3, *SHAPE), scheme, platform=platform)
    made = to_layout(made, layout, "cpu")
    file = io.BytesIO()
    torch.save({"weight": made.state_dict(), "tags": made.metadata}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(QTensor.from_state_dict(loaded["weight"], loaded["tags"]), made)


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_safetensors_gives_it_back(scheme: str, layout: str, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="needs the package safetensors")
    from safetensors.torch import save_file

    made = weight_of(scheme, 2, layout=layout)
    path = tmp_path / "weight.safetensors"
    save_file(made.state_dict(), path, metadata=made.metadata)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        loaded = QTensor.from_state_dict(tensors, file.metadata())
    assert same(loaded, made)


def test_strided_values_can_be_saved() -> None:
    made = weight_of("fp8_channel")
    strided = QTensor(**(fields_of("fp8_channel") | {"values": made.values.t().contiguous().t()}))
    assert not strided.values.is_contiguous()
    assert strided.state_dict()["values"].is_contiguous()
    assert same(QTensor.from_state_dict(strided.state_dict(), strided.metadata), made)


@pytest.mark.parametrize(
    ("scheme", "tensors", "tags", "error"),
    [
        ("bf16", {"values": torch.zeros(SHAPE, dtype=torch.float16)}, {}, EncodingError),
        ("bf16", {"values": torch.zeros(SHAPE, dtype=torch.uint8)}, {}, EncodingError),
        ("fp8_channel", {"values": torch.zeros(SHAPE, dtype=torch.int8)}, {}, EncodingError),
        ("fp8_channel", {"values": torch.zeros(SHAPE).to(torch.float8_e5m2)}, {}, EncodingError),
        ("fp8_channel", {"scales": torch.zeros(130, dtype=torch.uint8)}, {}, DTypeError),
        ("fp8_channel", {"scales": None}, {}, EncodingError),
        ("fp8_channel", {}, {"encoding": "int8"}, EncodingError),
        ("fp8_channel", {}, {"encoding": "fp8"}, UnknownNameError),
        ("fp8_channel", {}, {"scheme": "fp8"}, UnknownNameError),
        ("fp8_channel", {}, {"scheme": "int8_channel"}, EncodingError),
        ("fp8_channel", {}, {"layout": "other"}, UnknownNameError),
        ("fp8_channel", {}, {"logical_shape": "140,130"}, ShapeError),
    ],
)
def test_tensors_and_tags_that_do_not_fit_are_refused(scheme, tensors, tags, error) -> None:
    made = weight_of(scheme)
    with pytest.raises(error):
        QTensor.from_state_dict(made.state_dict() | tensors, made.metadata | tags)


@pytest.mark.parametrize("missing", ["scheme", "encoding", "layout", "logical_shape"])
def test_a_missing_tag_is_an_error(missing: str) -> None:
    made = weight_of("fp8_channel")
    tags = {name: value for name, value in made.metadata.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        QTensor.from_state_dict(made.state_dict(), tags)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_are_equal_and_apart(scheme: str) -> None:
    made = weight_of(scheme)
    other = copy.deepcopy(made)
    assert same(other, made)
    assert other.values.data_ptr() != made.values.data_ptr()
    assert other != made  # identity: comparing tensors is no yes or no
    assert len({made, made, other}) == 2
    with pytest.raises(AttributeError):
        made.layout = "k_major"
