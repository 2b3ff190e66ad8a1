"""Faulty checkpoints: a clear error that names file and tensor, and no other kind of error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.errors import (
    ArgumentError,
    DTypeError,
    HalError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from hal.quant.checkpoint import load

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
NAN, INF = float("nan"), float("inf")
CASES = ("ct_int8_channel", "ct_nvfp4", "gptq_asymmetric", "modelopt_fp8", "awq")


def filled(value):
    def change(tensor):
        wide = tensor.float()
        wide.view(-1)[-1] = value
        return wide.to(tensor.dtype)

    return change


def fails(copy, error, match, module=DOWN) -> None:
    with pytest.raises(error, match=match):
        load(copy.folder).pieces(module)


# (case, suffix of the tensor, value, what follows the sign)
SCALES = [
    ("ct_int8_channel", "down_proj__weight_scale"),
    ("ct_fp8_block", "down_proj__weight_scale"),
    ("ct_fp8_tensor_static", "down_proj__weight_scale"),
    ("ct_fp8_tensor_static", "down_proj__input_scale"),
    ("ct_int4_group32", "down_proj__weight_scale"),
    ("ct_nvfp4", "down_proj__weight_scale"),
    ("ct_nvfp4", "down_proj__weight_global_scale"),
    ("ct_nvfp4", "down_proj__input_global_scale"),
    ("modelopt_nvfp4", "down_proj__weight_scale_2"),
    ("modelopt_nvfp4", "down_proj__input_scale"),
    ("ct_int8_static_asymmetric", "down_proj__input_scale"),
    ("hf_fp8_block", "down_proj__weight_scale_inv"),
    ("gptq_symmetric", "down_proj__scales"),
    ("awq", "down_proj__scales"),
    ("vllm_fp8_dynamic", "down_proj__weight_scale"),
]


@pytest.mark.parametrize("value", [NAN, -1.0, INF])
@pytest.mark.parametrize(("case", "suffix"), SCALES)
def test_values_of_scales(golden, case, suffix, value) -> None:
    copy = golden(case)
    if value == INF and copy.tensors()[f"model.layers.0.mlp.{suffix.replace('__', '.')}"].dtype in (
        torch.float8_e4m3fn,
    ):
        pytest.skip("e4m3fn has no infinity")
    copy.change(**{suffix: filled(value)})
    fails(copy, ValueRangeError, rf"model\.safetensors: {DOWN}.*(nan|NaN|-1.0|inf)")


def test_one_scale_where_the_configuration_has_blocks(golden) -> None:
    copy = golden("vllm_fp8_dynamic")
    copy.settings(weight_block_size=[128, 128])
    fails(copy, ArgumentError, r"weight_scale beside scales per block128, needed weight_scale_inv")


@pytest.mark.parametrize(
    ("case", "second", "match"),
    [
        ("hf_fp8_block", "weight_scale", "a second scale of the weight, beside"),
        ("hf_fp8_tensor", "weight_scale", "a second scale of the weight, beside"),
        ("vllm_fp8_dynamic", "weight_scale_inv", "a second scale of the weight, beside"),
        ("vllm_fp8_static", "weight_scale_inv", "a second scale of the weight, beside"),
        ("ct_fp8_block", "weight_scale_inv", "a tensor of method fp8, needed tensors of compr"),
        ("modelopt_fp8", "weight_scale_inv", "a tensor of method fp8, needed tensors of model"),
    ],
)
def test_a_weight_has_one_scale(golden, case, second, match) -> None:
    """Never `weight_scale` and `weight_scale_inv`: which of them decodes would be a guess."""
    copy = golden(case)
    copy.add(**{f"{DOWN}.{second}": torch.ones(1, 1)})
    fails(copy, ArgumentError, rf"^model\.safetensors: {DOWN}\.weight_scale_inv: found {match}")


@pytest.mark.parametrize("case", ["ct_mxfp4", "ct_mxfp8"])
def test_exponent_that_is_no_number(golden, case) -> None:
    copy = golden(case)
    copy.change(down_proj__weight_scale=filled(255))
    fails(copy, ValueRangeError, rf"{DOWN}\.weight_scale: found e8m0 byte 255")


@pytest.mark.parametrize("case", ["ct_nvfp4", "modelopt_nvfp4"])
def test_second_scale_of_zero(golden, case) -> None:
    copy = golden(case)
    suffix = "weight_global_scale" if case == "ct_nvfp4" else "weight_scale_2"
    copy.change(**{f"down_proj__{suffix}": torch.zeros_like})
    fails(copy, ValueRangeError, rf"{DOWN}\.{suffix}: found 0.0, needed a finite scale above 0")


REMOVED = [
    ("ct_fp8_channel", "down_proj__weight", "no .*down_proj.weight"),
    ("ct_int4_group32", "down_proj__weight_scale", "no .*down_proj.weight_scale"),
    ("ct_int4_group32", "down_proj__weight_shape", "no .*down_proj.weight_shape"),
    ("ct_int4_group64_asymmetric", "down_proj__weight_zero_point", "weight_zero_point"),
    ("ct_nvfp4", "down_proj__weight_global_scale", "no .*weight_global_scale"),
    ("ct_nvfp4", "down_proj__input_global_scale", "no .*input_global_scale"),
    ("modelopt_nvfp4", "down_proj__input_scale", "no .*input_scale"),
    ("ct_int8_static_asymmetric", "down_proj__input_zero_point", "no .*input_zero_point"),
    ("ct_mxfp4", "down_proj__weight_packed", "no .*weight_packed"),
    ("ct_fp8_tensor_static", "down_proj__input_scale", "no .*input_scale"),
    ("ct_int8_static", "down_proj__input_scale", "no .*input_scale"),
    ("hf_fp8_tensor", "down_proj__activation_scale", "no .*activation_scale"),
    ("modelopt_fp8", "down_proj__input_scale", "no .*input_scale"),
    ("vllm_fp8_static", "down_proj__input_scale", "no .*input_scale"),
    ("gpt_oss_mxfp4", "experts__down_proj_scales", "no .*down_proj_scales"),
    ("gpt_oss_mxfp4", "experts__down_proj_blocks", "no .*down_proj_blocks"),
    ("hf_fp8_experts_ue8m0", "experts__gate_up_proj", "no .*gate_up_proj"),
    ("modelopt_nvfp4", "down_proj__weight_scale_2", "no .*weight_scale_2"),
    ("gptq_symmetric", "down_proj__qzeros", "no .*qzeros"),
    ("awq", "down_proj__qzeros", "no .*qzeros"),
]


@pytest.mark.parametrize(("case", "suffix", "match"), REMOVED)
def test_missing_tensors(golden, case, suffix, match) -> None:
    copy = golden(case)
    copy.change(**{suffix: None})
    with pytest.raises(ArgumentError, match=rf"model\.safetensors: .*{match}"):
        load(copy.folder)


@pytest.mark.parametrize("value", [0, 5])
def test_zero_points_of_activations_that_are_symmetric(golden, value) -> None:
    """Zeros are harmless, others contradict the configuration."""
    copy = golden("ct_int8_static_asymmetric")
    copy.settings(config_groups={"group_0": {"input_activations": {"symmetric": True}}})
    copy.change(down_proj__input_zero_point=filled(value), up_proj__input_zero_point=filled(0))
    if value:
        fails(copy, ArgumentError, r"input_zero_point: found 5, needed 0: symmetric is true")
    else:
        assert load(copy.folder)[DOWN].scheme.name == "int8_static"


FIXED = [
    ("ct_int8_static_asymmetric", "input_zero_point"),
    ("ct_int8_static_asymmetric", "input_scale"),
    ("ct_nvfp4", "input_global_scale"),
    ("modelopt_nvfp4", "input_scale"),
]


@pytest.mark.parametrize(("case", "suffix"), FIXED)
def test_shapes_of_what_is_fixed(golden, case, suffix) -> None:
    copy = golden(case)
    copy.change(**{f"down_proj__{suffix}": lambda part: part.new_ones(3)})
    fails(copy, ShapeError, rf"{DOWN}\.{suffix}: found \[3\], needed \[\] or \[1\]")


@pytest.mark.parametrize("case", ["ct_int8_channel", "ct_fp8_channel", "modelopt_fp8"])
def test_codes_without_scales(golden, case) -> None:
    copy = golden(case)
    kept = {name for name in copy.tensors() if name.startswith(UP)}
    if kept:
        copy.change(down_proj__weight_scale=None)
    else:  # the only module
        copy.change(down_proj__weight_scale=None, down_proj__input_scale=None)
        with pytest.raises(ArgumentError, match="no quantized module"):
            load(copy.folder)
        return
    checkpoint = load(copy.folder)
    for ask in (lambda: checkpoint.tensor(f"{DOWN}.weight"), checkpoint.summary):
        with pytest.raises(ArgumentError, match=rf"{DOWN}\.weight: found .* codes without scales"):
            ask()


@pytest.mark.parametrize(
    ("case", "extra", "match"),
    [
        ("ct_int8_channel", "lm_head__weight_scale", "lm_head.weight_scale.* not quantized"),
        ("ct_int8_channel", f"{DOWN}__weight_global_scale", "also .*weight_global_scale"),
        ("ct_int4_group32", f"{DOWN}__weight", "also .*down_proj.weight, needed no such"),
        ("ct_int4_group32", f"{DOWN}__weight_zero_point", "found zero points, needed none"),
        ("ct_int8_w8a16", f"{DOWN}__weight_zero_point", "found zero points, needed none"),
        ("modelopt_nvfp4", "lm_head__weight_scale", "lm_head.weight_scale.* not quantized"),
        ("gptq_symmetric", f"{UP}__weight_packed", "a tensor of method compressed-tensors"),
        ("awq", f"{DOWN}__weight_scale_inv", "a tensor of method fp8"),
    ],
)
def test_tensors_too_many(golden, case, extra, match) -> None:
    copy = golden(case)
    copy.add(**{extra: torch.ones(1)})
    if "zero_point" in extra:
        copy.add(**{extra: torch.ones(1, dtype=torch.int32)})
    fails(copy, ArgumentError, match)


@pytest.mark.parametrize(
    ("case", "suffix", "dtype"),
    [
        ("ct_int8_channel", "down_proj__weight", torch.uint8),
        ("ct_int8_channel", "down_proj__weight_scale", torch.float64),
        ("ct_fp8_channel", "down_proj__weight", torch.float8_e5m2),
        ("ct_int4_group32", "down_proj__weight_packed", torch.int64),
        ("ct_nvfp4", "down_proj__weight_scale", torch.float32),
        ("ct_mxfp4", "down_proj__weight_scale", torch.float32),
        ("gpt_oss_mxfp4", "down_proj_blocks", torch.int8),
        ("gptq_symmetric", "down_proj__qweight", torch.int64),
    ],
)
def test_dtypes(golden, case, suffix, dtype) -> None:
    copy = golden(case)
    copy.change(**{suffix: lambda t: t.float().to(dtype) if t.is_floating_point() else t.to(dtype)})
    module = DOWN if "gpt_oss" not in case else "model.layers.0.mlp.experts.down_proj"
    match = rf"model\.safetensors: {re.escape(module)}.*found [FIU]\w+, needed"
    fails(copy, DTypeError, match, module)
    with pytest.raises(DTypeError, match=match):
        load(copy.folder).summary()


@pytest.mark.parametrize(
    ("case", "suffix"),
    [
        ("ct_int8_channel", "down_proj__weight_scale"),
        ("ct_fp8_block", "down_proj__weight_scale"),
        ("ct_fp8_tensor_static", "down_proj__weight_scale"),
        ("ct_int4_group32", "down_proj__weight_packed"),
        ("ct_int4_group32", "down_proj__weight_scale"),
        ("ct_int4_group64_asymmetric", "down_proj__weight_zero_point"),
        ("ct_nvfp4", "down_proj__weight_scale"),
        ("ct_mxfp4", "down_proj__weight_scale"),
        ("hf_fp8_block", "down_proj__weight_scale_inv"),
        ("gptq_asymmetric", "down_proj__qzeros"),
        ("gptq_asymmetric", "down_proj__scales"),
        ("gptq_asymmetric", "down_proj__g_idx"),
        ("awq", "down_proj__qzeros"),
        ("modelopt_nvfp4", "down_proj__weight_scale_2"),
    ],
)
def test_shapes(golden, case, suffix) -> None:
    copy = golden(case)
    # As bytes: IPEX leaves torch without a `cat` of 8-bit floats.
    longer = lambda t: torch.cat((raw := t.reshape(-1, 1).view(torch.uint8), raw[:1]))  # noqa: E731
    copy.change(**{suffix: lambda t: longer(t).view(t.dtype).reshape(-1)})
    ending = suffix.replace("__", ".")
    fails(copy, ShapeError, rf"model\.safetensors: model.layers.0.mlp.{ending}: found \[")


def test_stated_shape(golden) -> None:
    copy = golden("ct_int4_group32")
    copy.change(down_proj__weight_shape=lambda t: t + 8)
    fails(copy, ShapeError, "weight_packed: found")
    copy.change(down_proj__weight_shape=lambda t: -t)
    fails(copy, ShapeError, "weight_shape: found")


@pytest.mark.parametrize("case", ["gptq_symmetric", "gptq_asymmetric", "gptq_act_order"])
def test_groups_of_other_sizes(golden, case) -> None:
    copy = golden(case)
    copy.change(up_proj__g_idx=lambda index: index.clamp(min=1))
    match = r"up_proj\.g_idx: found 0 columns of group 0, needed \d+, by the group size \d+"
    fails(copy, ArgumentError, match, UP)
    copy.change(up_proj__g_idx=lambda index: index - 5)
    fails(copy, ArgumentError, r"up_proj\.g_idx: found .* of group 0, needed", UP)


def test_symmetric_by_configuration_only(golden) -> None:
    copy = golden("gptq_asymmetric")
    copy.settings(sym=True)
    fails(
        copy, ArgumentError, rf"{DOWN}\.qzeros: found zero points besides 8, needed 8: sym is true"
    )
    copy = golden("awq")
    copy.settings(zero_point=False)
    fails(copy, ArgumentError, r"qzeros: found zero points, needed none")


GROUP = ("config_groups", "group_0", "weights")


def nested(*path):
    *names, value = path
    for name in reversed(names):
        value = {name: value}
    return value


@pytest.mark.parametrize(
    ("case", "changes", "error", "match"),
    [
        ("awq", {"quant_method": "quip"}, UnknownNameError, "quant_method 'quip'; known: awq"),
        ("awq", {"quant_method": "aqw"}, UnknownNameError, "did you mean 'awq'"),
        ("awq", {"quant_method": 3}, UnknownNameError, "unknown quant_method '3'"),
        ("awq", {"bits": 8}, UnsupportedModelError, "bits: found 8, needed 4"),
        ("awq", {"bits": "4"}, ArgumentError, "bits: found '4', needed int"),
        ("awq", {"version": "gemv"}, UnsupportedModelError, "gemv"),
        ("awq", {"group_size": 0}, ArgumentError, "group_size: found 0"),
        ("awq", {"group_size": 64}, ShapeError, "scales: found"),
        ("gptq_symmetric", {"bits": 3}, UnsupportedModelError, "bits: found 3, needed 4"),
        ("gptq_symmetric", {"checkpoint_format": "marlin"}, UnknownNameError, "marlin"),
        ("gptq_symmetric", {"dynamic": {"+:x": {"bits": 8}}}, UnsupportedModelError, "dynamic"),
        ("hf_fp8_block", {"weight_block_size": [64, 64]}, ArgumentError, r"\[64, 64\]"),
        ("hf_fp8_block", {"fmt": "e5m2"}, ArgumentError, "fmt: found e5m2"),
        ("hf_fp8_block", {"scale_fmt": "e8m0"}, ArgumentError, "scale_fmt: found 'e8m0', needed"),
        ("hf_fp8_block", {"scale_fmt": "ue8m0"}, ValueRangeError,
         r"weight_scale_inv: found 0\.\d+ at \[0, 0\], needed powers of two.*without scale_fmt"),
        ("hf_fp8_tensor", {"scale_fmt": "ue8m0"}, ArgumentError, "ue8m0 without blocks"),
        ("hf_fp8_block", {"expert_dtype": "fp4"}, UnsupportedModelError, "fp4 experts"),
        ("hf_fp8_block", {"modules_to_not_convert": ["mlp"]}, ArgumentError, "not quantized"),
        ("ct_int8_channel", nested("config_groups", "group_0", "format", "zip"),
         UnknownNameError, "format 'zip'"),
        ("ct_int8_channel", nested("config_groups", "group_0", "format", "float-quantized"),
         ArgumentError, "int of 8 bits per channel, needed what float-quantized holds"),
        ("ct_int8_channel", nested(*GROUP, "group_size", 32), ArgumentError, "groups or blocks"),
        ("ct_int8_channel", nested(*GROUP, "strategy", "group"),
         ArgumentError, "positive group_size"),
        ("ct_int8_channel", nested(*GROUP, "strategy", "token"), UnknownNameError, "token"),
        ("ct_int8_channel", nested(*GROUP, "symmetric", False),
         ArgumentError, "no .*down_proj.weight_zero_point"),
        ("ct_fp8_channel", nested(*GROUP, "symmetric", False),
         UnsupportedModelError, "zero points of float8 per channel"),
        ("ct_int8_channel", nested(*GROUP, "rotated", True), ArgumentError, "found rotated"),
        ("ct_int8_channel", nested(*GROUP, "num_bits", True),
         ArgumentError, "num_bits: found True"),
        ("ct_int8_channel", nested(*GROUP, "dynamic", True), ArgumentError, "dynamic"),
        ("ct_int8_channel", {"ignore": ["re:("]}, ArgumentError, "a regular expression"),
        ("ct_int8_channel", {"ignore": [DOWN]}, ArgumentError, "not quantized"),
        ("ct_int8_channel", {"ignore": ["re:.*mlp"]}, ArgumentError, "not quantized"),
        ("ct_int8_channel", {"quantization_status": "calibration"},
         ArgumentError, "calibration"),
        ("ct_int8_channel", {"transform_config": {"a": 1}}, UnsupportedModelError, "transform"),
        ("ct_int8_channel", {"sparsity_config": {"format": "24"}},
         UnsupportedModelError, "sparsity"),
        ("ct_int8_channel", {"config_groups": None}, ArgumentError, "config_groups"),
        ("ct_fp8_block", nested(*GROUP, "block_structure", [64, 64]), ArgumentError, "64"),
        ("ct_nvfp4", nested(*GROUP, "group_size", 32), ArgumentError, "nvfp4-pack-quantized holds"),
        ("ct_int4_group32", nested(*GROUP, "group_size", 64), ShapeError, "weight_scale: found"),
        ("modelopt_nvfp4", {"quant_algo": "FP8"}, ArgumentError, "group_size|hf_quant_config"),
        ("modelopt_nvfp4", {"quant_method": "awq"}, ArgumentError, "beside hf_quant_config.json"),
    ],
)  # fmt: skip
def test_configurations(golden, case, changes, error, match) -> None:
    copy = golden(case)
    copy.settings(**changes)
    fails(copy, error, match)


def test_configuration_for_other_tensors(golden) -> None:
    copy = golden("ct_int8_channel")
    (copy.folder / "config.json").write_text("{}")
    fails(copy, ArgumentError, "a tensor of method .*needed a quantization_config for it")
    (copy.folder / "config.json").write_text('{"quantization_config": []}')
    fails(copy, ArgumentError, "quantization_config: found list, needed an object")
    for text in ('{"a": 1, "a": 2}', '{"a": NaN}', "[", "[1]", '"x"', "[" * 100_000, "\xff"):
        (copy.folder / "config.json").write_text(text, encoding="latin-1")
        fails(copy, ArgumentError, "config.json: found")


def test_no_checkpoint(tmp_path, golden) -> None:
    for path, match in [(tmp_path / "none", "found nothing"), (tmp_path, "found neither")]:
        with pytest.raises(ArgumentError, match=match):
            load(path)
    copy = golden("awq")
    with pytest.raises(ArgumentError, match="found a file, needed a model folder"):
        load(copy.file)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ArgumentError, match=r"a pickle.*hal opens no pickle, it can run code"):
            load(path)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", ".safetensors/../x.safetensors", "x\0.safetensors", "x.bin", "", 7, None],
)  # fmt: skip
def test_index_that_leaves_the_folder(golden, file) -> None:
    copy = golden("ct_int8_channel")
    files = copy.shard()
    (copy.folder.parent / "model.safetensors").write_bytes(b"outside")
    copy.index({**files, f"{DOWN}.weight": file})
    fails(copy, ArgumentError, rf"^model\.safetensors\.index\.json: {DOWN}\.weight: found ")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_links_out_of_the_folder(golden) -> None:
    copy = golden("ct_int8_channel")
    for name in ("model.safetensors", "config.json"):
        inside, outside = copy.folder / name, copy.folder.parent / name
        inside.rename(outside)
        inside.symlink_to(outside)
        fails(copy, ArgumentError, rf"{name}: found a link to .*, needed a file of this folder")
        inside.unlink()
        outside.rename(inside)
    copy.file.rename(copy.folder / "other.safetensors")
    copy.file.symlink_to("other.safetensors")
    assert len(load(copy.folder)) == 2


def test_files_that_are_none(golden) -> None:
    copy = golden("ct_int8_channel")
    files = copy.shard()
    shard = copy.folder / files[f"{DOWN}.weight"]
    data = shard.read_bytes()
    shard.unlink()
    fails(copy, ArgumentError, "model-0000.-of-00002.safetensors: found .*No such file")
    shard.mkdir()
    fails(copy, ArgumentError, "found no regular file")
    shard.rmdir()
    shard.write_bytes(data)
    copy.index({**files, f"{DOWN}.bias": shard.name})
    checkpoint = load(copy.folder)
    with pytest.raises(ArgumentError, match=rf"{shard.name}: {DOWN}.bias: found no such tensor"):
        checkpoint.tensor(f"{DOWN}.bias")
    copy.index({})
    fails(copy, ArgumentError, "weight_map")
    copy.index(files)
    (copy.folder / "model.safetensors").write_bytes(data)
    fails(copy, ArgumentError, "model.safetensors beside .*which does not list it")


@pytest.mark.parametrize("end", [0, 4, 8, 9, 200, -1])
def test_truncated(golden, end) -> None:
    copy = golden("ct_int8_channel")
    copy.file.write_bytes(copy.file.read_bytes()[:end])
    fails(copy, ArgumentError, "model.safetensors.*(truncated|copy or download it again)")


def test_a_pointer_of_git_lfs(golden) -> None:
    copy = golden("ct_int8_channel")
    copy.file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(copy, ArgumentError, r"model\.safetensors: found a pointer of Git LFS.*git lfs pull")


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(data: bytes, header) -> bytes:
    old = struct.unpack("<Q", data[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + old :]


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F3"}, {"dtype": ["I8"]}, {"dtype": None}, {"shape": [12, 25]},
        {"shape": [-12, -24]},
        {"shape": "12"}, {"shape": [12.0, 24]}, {"shape": [True, 288]}, {"shape": None},
        {"shape": [10**30, 0]}, {"data_offsets": [0]}, {"data_offsets": [0, 10**12]},
        {"data_offsets": [-288, 0]}, {"data_offsets": "ab"}, {"data_offsets": [8, 296]},
    ],
)  # fmt: skip
def test_headers(golden, fields) -> None:
    copy = golden("ct_int8_channel")
    data = copy.file.read_bytes()
    header = header_of(data)
    header[f"{DOWN}.weight"].update(fields)
    copy.file.write_bytes(with_header(data, header))
    fails(copy, ArgumentError, r"model\.safetensors: ")


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_never_crash(data, golden_bytes, tmp_path_factory) -> None:
    """Flip, cut or insert bytes of header, configuration or index: hal's errors or right shapes."""
    case = data.draw(st.sampled_from(CASES))
    files = dict(golden_bytes[case])
    target = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[target])
    reach = len(content)
    if target == "model.safetensors":
        reach = min(reach, 8 + struct.unpack("<Q", content[:8])[0] + 64)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(reach - 1, 0)))
        kind = data.draw(st.sampled_from(("flip", "set", "cut", "insert")))
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set" and place < len(content):
            content[place] = data.draw(st.sampled_from(list(b'0179-.eE{}[]",: \\n\x00\xffN')))
        elif kind == "cut":
            del content[place:]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    folder = golden_bytes["folder"]
    files[target] = bytes(content)
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text)
    with contextlib.suppress(HalError):
        checkpoint = load(folder)
        checkpoint.summary()
        for module in checkpoint:
            assert checkpoint[module].dequantize().ndim >= 2
        for name in checkpoint.plain:
            checkpoint.tensor(name)


@pytest.fixture(scope="module")
def golden_bytes(tmp_path_factory):
    folder = Path(__file__).with_name("golden")
    found = {
        case: {
            path.name: path.read_bytes()
            for path in (folder / case).iterdir()
            if path.name != "expected.json"
        }
        for case in CASES
    }
    return {**found, "folder": tmp_path_factory.mktemp("fuzz")}
