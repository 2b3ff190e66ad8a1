"""Weights of every format against the library that defines it, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_golden
import pytest
import torch

from hal.errors import UnknownNameError, UnsupportedModelError
from hal.ops import Linear
from hal.quant import SCHEMES, QTensor
from hal.quant.checkpoint import FORMATS, load
from hal.quant.checkpoint.convert import to_qtensor
from hal.quant.mx import decode_e8m0
from hal.quant.nibbles import pack_int32, unpack, unpack_int32
from hal.quant.scheme import group_of

DOWN, UP = make_golden.DOWN, make_golden.UP
GOLDEN = make_golden.GOLDEN
# scheme that each case must come out as; activations that hal has no scheme for stay as given
EXPECTED_SCHEMES = {
    "awq": "int4_w4a16_g32",
    "ct_fp8_block": "fp8_block128",
    "ct_fp8_channel": "fp8_channel",
    "ct_fp8_channel_float32_scales": "fp8_channel",
    "ct_fp8_channel_static": "fp8_static_channel",
    "ct_fp8_tensor_static": "fp8_static",
    "ct_int4_channel": "int4_w4a16",
    "ct_int4_fp8_activations": "int4_w4a16",
    "ct_int4_group128": "int4_w4a16",
    "ct_int4_group32": "int4_w4a16_g32",
    "ct_int4_group64_asymmetric": "int4_w4a16_g64",
    "ct_int8_channel": "int8_channel",
    "ct_int8_asymmetric": "int8_channel_asymmetric",
    "ct_int8_static": "int8_static",
    "ct_int8_static_asymmetric": "int8_static_asymmetric",
    "ct_int8_weight_zeros": "int8_weight_zeros",
    "ct_int8_weight_zeros_w8a16": "int8_weight_zeros_w8a16",
    "ct_int8_w8a16": "int8_w8a16",
    "ct_mxfp4": "mxfp4",
    "ct_mxfp4_w4a16": "mxfp4_w4a16",
    "ct_mxfp8": "mxfp8",
    "ct_nvfp4": "nvfp4_static",
    "ct_nvfp4_w4a16": "nvfp4_w4a16",
    "gpt_oss_mxfp4": "mxfp4_w4a16",
    "gptq_act_order": "int4_w4a16_g32",
    "gptq_act_order_asymmetric": "int4_w4a16_g64",
    "gptq_asymmetric": "int4_w4a16_g32",
    "gptq_symmetric": "int4_w4a16_g64",
    "hf_fp8_block": "fp8_block128",
    "hf_fp8_block_ragged": "fp8_block128",
    "hf_fp8_experts_ue8m0": "fp8_block128_ue8m0",
    "hf_fp8_tensor": "fp8_static",
    "modelopt_fp8": "fp8_static",
    "modelopt_nvfp4": "nvfp4_static",
    "vllm_fp8_dynamic": "fp8_tensor",
    "vllm_fp8_static": "fp8_static",
}


def numbers(checkpoint, module: str, *, scale_first: bool = False) -> torch.Tensor:
    """Return a weight as hal dequantizes it, or where asked in the order of the others' products.

    NVFP4 is a product of three: hal rounds once, ModelOpt rounds scale x second scale, too, and
    its table has no -0.
    """
    pieces = checkpoint.pieces(module)
    if not scale_first:
        return checkpoint[module].dequantize()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = unpack(pieces.values, pieces.logical_shape[-1]).long()
    signed = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scales = pieces.scales.float() * pieces.global_scale
    return signed * scales.repeat_interleave(group_of(pieces.rule.granularity), -1) + 0.0


def compare(folder: Path, expected: dict) -> None:
    with load(folder) as checkpoint:
        checkpoint.check(values=True)
        assert set(checkpoint) == set(expected)
        for module, fact in expected.items():
            exact = fact["dtype"] == "float32" and "nvfp4" in folder.name
            found = numbers(checkpoint, module, scale_first=exact)
            found = found.to(getattr(torch, fact["dtype"]))
            assert make_golden.digest(found) == fact, module


def test_every_case_is_there() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(make_golden.CASES)
    assert set(EXPECTED_SCHEMES) == set(make_golden.CASES)


def test_every_format_has_a_case() -> None:
    used = set()
    for path in GOLDEN.iterdir():
        with load(path) as checkpoint:
            used |= {checkpoint.pieces(name).rule.format for name in checkpoint}
    assert used == set(FORMATS)


@pytest.mark.parametrize("name", sorted(make_golden.CASES))
def test_golden(name) -> None:
    compare(GOLDEN / name, json.loads((GOLDEN / name / "expected.json").read_text()))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Return a folder of all cases whose libraries are installed here, whatever their version.

    Made in a process of its own: the libraries warn, patch torch and leave packages half imported.
    """
    folder = tmp_path_factory.mktemp("live")
    arguments = [sys.executable, make_golden.__file__, str(folder)]
    subprocess.run(arguments, check=True, timeout=250, capture_output=True, cwd=folder)
    return folder


@pytest.mark.parametrize("name", sorted(make_golden.CASES))
def test_live(name, live) -> None:
    if package := make_golden.missing(name):
        pytest.skip(f"{package} is not installed")
    compare(live / name, json.loads((live / name / "expected.json").read_text()))


@pytest.mark.parametrize("name", sorted(EXPECTED_SCHEMES))
def test_schemes(name) -> None:
    wanted = EXPECTED_SCHEMES[name]
    with load(GOLDEN / name) as checkpoint:
        summary = checkpoint.summary()
        assert {module.scheme for module in summary.modules} == {wanted}
        for module in checkpoint:
            assert checkpoint[module].scheme is SCHEMES[wanted]
        assert summary.nbytes == sum(
            tensor.nbytes
            for tensor in map(checkpoint.tensor, [*checkpoint.plain, *all_names(checkpoint)])
        )


def test_pieces_without_a_scheme() -> None:
    with load(GOLDEN / "ct_int8_channel") as checkpoint:
        pieces = checkpoint.pieces(DOWN)
    pieces = replace(pieces, rule=replace(pieces.rule, granularity="group128"))
    with pytest.raises(UnsupportedModelError, match=r"scales per group128, .*\.pieces\(name\)"):
        to_qtensor(pieces)


def test_one_scale_a_row_of_int4_is_that_of_its_groups(golden) -> None:
    copy = golden("ct_int4_channel")
    with load(copy.folder) as checkpoint:
        pieces, weight = checkpoint.pieces(DOWN), checkpoint[DOWN]
    codes = unpack(pieces.values, pieces.logical_shape[-1]).int()
    wanted = ((codes ^ 8) - 8).float() * pieces.scales.unsqueeze(-1)
    assert torch.equal(weight.dequantize(), wanted)
    wide = replace(
        pieces,
        values=pieces.values.repeat(1, 25),
        logical_shape=(12, 600),
        zeros=torch.arange(12, dtype=torch.uint8),
        rule=replace(pieces.rule, encoding="uint4"),
    )
    found = to_qtensor(wide)
    assert found.scales.shape == found.zeros.shape == (12, 5)
    wanted = (codes.repeat(1, 25) - torch.arange(12).view(12, 1)) * pieces.scales.unsqueeze(-1)
    assert torch.equal(found.dequantize(), wanted)


def all_names(checkpoint) -> list[str]:
    return [name for module in checkpoint for name in checkpoint.names_of(module)]


def test_nvfp4_rounds_at_most_one_unit_apart() -> None:
    with load(GOLDEN / "modelopt_nvfp4") as checkpoint:
        ours, theirs = (numbers(checkpoint, DOWN, scale_first=first) for first in (False, True))
    units = ((ours + 0.0).view(torch.int32) - theirs.view(torch.int32)).abs()
    assert units.max() <= 1


def test_global_scales_are_inverse_to_each_other(golden) -> None:
    """compressed-tensors' second scale encodes, ModelOpt's decodes."""
    with load(GOLDEN / "ct_nvfp4") as checkpoint:
        stored = checkpoint.tensor(f"{DOWN}.weight_global_scale")
        pieces = checkpoint.pieces(DOWN)
        assert float(checkpoint[DOWN].input_scale) == 16.0
    assert torch.equal(pieces.global_scale, (1 / stored).reshape(()))
    with load(GOLDEN / "modelopt_nvfp4") as checkpoint:
        stored = checkpoint.tensor(f"{DOWN}.weight_scale_2")
        pieces = checkpoint.pieces(DOWN)
        assert float(checkpoint[DOWN].input_scale) == 0.001953125
    assert torch.equal(pieces.global_scale, stored)


def test_products_take_the_second_scale_of_the_file() -> None:
    """Activations far from what was calibrated tell a fixed scale from one of their own."""
    with load(GOLDEN / "modelopt_nvfp4") as checkpoint:
        weight = checkpoint[DOWN]
    x = torch.full((2, weight.shape[1]), 100.0, dtype=torch.bfloat16)
    seen = weight.input_scale * 448 * 6  # what saturates
    assert seen < 6
    wanted = (seen * weight.dequantize().sum(-1)).bfloat16()
    assert torch.equal(Linear(weight, force="reference")(x)[1], wanted)


def test_fixed_zero_points_come_along() -> None:
    with load(GOLDEN / "ct_int8_static_asymmetric") as checkpoint:
        for module in checkpoint:
            weight = checkpoint[module]
            stored = checkpoint.tensor(f"{module}.input_zero_point")
            assert int(stored) == int(weight.input_zero) == -29
            assert float(weight.input_scale) == 0.0625


def test_summary_and_plain_tensors() -> None:
    with load(GOLDEN / "ct_fp8_channel") as checkpoint:
        assert checkpoint.plain == ("lm_head.weight", "model.norm.weight")
        assert checkpoint.tensor("model.norm.weight").dtype is torch.bfloat16
        text = str(checkpoint.summary())
        assert "fp8_channel: 2 modules" in text
        assert "as given: 2 tensors, 144 bytes" in text
        assert isinstance(checkpoint[DOWN], QTensor)
        assert DOWN in checkpoint
        assert "model.norm" not in checkpoint
        with pytest.raises(UnknownNameError, match="did you mean"):
            checkpoint[DOWN.replace("down", "dawn")]
        with pytest.raises(UnknownNameError):
            checkpoint.tensor("model.norm.bias")


def test_nothing_is_read_before_it_is_asked_for(golden) -> None:
    copy = golden("ct_int8_channel")
    files = copy.shard()
    needed = {files[name] for name in files if name.startswith(DOWN)}
    spare = files[f"{UP}.weight"]
    name = next(n for n in files if files[n] == spare)
    checkpoint = load(copy.folder)
    for file in set(files.values()):
        (copy.folder / file).write_bytes(b"")  # a header that is read now would be an error
    with pytest.raises(Exception, match="0 bytes"):
        checkpoint.tensor(name)
    assert len(checkpoint) == 2
    assert needed


def test_sharded(golden) -> None:
    copy = golden("ct_int4_group64_asymmetric")
    before = load(copy.folder)[DOWN]
    files = copy.shard()
    assert len({files[name] for name in files if name.startswith(DOWN)}) == 2
    after = load(copy.folder)[DOWN]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert torch.equal(one, other)


def test_weights_are_the_callers_own(golden) -> None:
    """Written in place, they change neither the file nor what is read later."""
    copy = golden("ct_fp8_channel")
    data = copy.file.read_bytes()
    checkpoint = load(copy.folder)
    weight, plain = checkpoint[DOWN], checkpoint.tensor("model.norm.weight")
    for tensor in (*weight.tensors, plain):
        tensor.view(torch.uint8).fill_(1)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert copy.file.read_bytes() == data
    assert not torch.equal(
        checkpoint[DOWN].values.view(torch.uint8), weight.values.view(torch.uint8)
    )


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_the_hubs_cache_is_made_of_links(golden, tmp_path) -> None:
    copy = golden("gptq_symmetric")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy.folder / name).rename(blobs / f"0{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"0{name}")
    assert len(load(snapshot)) == 2


def test_not_quantized(golden) -> None:
    copy = golden("ct_fp8_channel")
    copy.change(__weight_scale=None)
    copy.change(
        mlp__down_proj__weight=lambda t: t.float(), mlp__up_proj__weight=lambda t: t.float()
    )
    (copy.folder / "config.json").write_text("{}")
    checkpoint = load(copy.folder)
    assert len(checkpoint) == 0
    assert len(checkpoint.plain) == 4
    assert "not quantized" in str(checkpoint.summary())


def test_gptq_v2_stores_zero_points_as_they_are(golden) -> None:
    copy = golden("gptq_asymmetric")
    before = load(copy.folder)[DOWN]
    copy.change(__qzeros=lambda words: words + 0x11111111)
    copy.settings(checkpoint_format="gptq_v2")
    after = load(copy.folder)[DOWN]
    assert torch.equal(before.zeros, after.zeros)
    assert torch.equal(before.dequantize(), after.dequantize())


def test_group_index_in_order_is_nothing_special(golden) -> None:
    copy = golden("gptq_symmetric")
    copy.settings(desc_act=True)
    assert len(load(copy.folder)) == 2
    with_index = load(copy.folder)[DOWN]
    copy.change(__g_idx=None)
    assert torch.equal(load(copy.folder)[DOWN].values, with_index.values)


@pytest.mark.parametrize(
    ("name", "module"), [("gptq_act_order", DOWN), ("gptq_act_order_asymmetric", UP)]
)
def test_act_order_sorts_columns_into_groups(name, module) -> None:
    """What lies in the file in the weight's own order comes sorted, and the order beside it."""
    with load(GOLDEN / name) as checkpoint:
        weight, pieces = checkpoint[module], checkpoint.pieces(module)
        groups = checkpoint._source(module).read(".g_idx").long()
    order = weight.column_order
    assert order.dtype is torch.int32
    assert torch.equal(order, pieces.column_order)
    assert torch.equal(groups[order.long()], groups.sort().values)
    plain = replace(weight, column_order=None).dequantize()
    assert torch.equal(weight.dequantize()[:, order.long()], plain)
    assert not torch.equal(weight.dequantize(), plain)
    assert "columns reordered" in repr(weight)


def test_act_order_of_compressed_tensors(golden) -> None:
    """Releases before 0.20.1 wrote it; the codes are those of the same weight in order."""
    copy = golden("ct_int4_group32")
    before = load(copy.folder)[DOWN]
    columns = before.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
    copy.settings(config_groups={"group_0": {"weights": {"actorder": "group"}}})
    # As the file has it: column k of the codes moves to order[k], with the group it was in.
    back = order.argsort()
    copy.change(
        down_proj__weight_packed=lambda words: pack_int32(unpack_int32(words, columns)[:, back])
    )
    copy.add(**{f"{DOWN}.weight_g_idx": (back // 32).int()})
    after = load(copy.folder)[DOWN]
    assert torch.equal(after.dequantize()[:, order], before.dequantize())
    assert torch.equal(after.scales, before.scales)
    # A module without an order of its own was written so.
    copy.change(down_proj__weight_g_idx=lambda groups: torch.full_like(groups, -1))
    assert load(copy.folder)[DOWN].column_order is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.uint8])
def test_powers_of_two_are_exponents_however_they_are_stored(golden, stored) -> None:
    """DeepSeek-V3.1 holds them in float32, and says `scale_fmt: ue8m0`; activations follow."""
    copy = golden("hf_fp8_block")
    plain = load(copy.folder)[DOWN]
    exponents = torch.tensor([[120, 1]], dtype=torch.uint8)
    scales = exponents if stored is torch.uint8 else decode_e8m0(exponents).to(stored)
    copy.change(down_proj__weight_scale_inv=lambda old: scales.view(old.shape))
    copy.settings(scale_fmt="ue8m0")
    weight = load(copy.folder)[DOWN]
    assert weight.scheme.name == "fp8_block128_ue8m0"
    assert torch.equal(weight.scales, exponents)
    assert torch.equal(weight.values.view(torch.uint8), plain.values.view(torch.uint8))
    wide = decode_e8m0(exponents).repeat_interleave(128, 1)
    assert torch.equal(weight.dequantize(), weight.values.float() * wide)
    copy.settings(scale_fmt=None)
    assert load(copy.folder)[DOWN].scheme.name == "fp8_block128"


@pytest.mark.parametrize("pattern", ["re:.*up_proj$", UP])
def test_targets_by_name_and_pattern(golden, pattern) -> None:
    """Two groups, where the more exact target wins over the class."""
    copy = golden("ct_int8_channel")
    group = json.loads((copy.folder / "config.json").read_text())["quantization_config"]
    other = {**group["config_groups"]["group_0"], "targets": [pattern], "input_activations": None}
    copy.settings(config_groups={"group_1": other})
    checkpoint = load(copy.folder)
    assert checkpoint[DOWN].scheme.name == "int8_channel"
    assert checkpoint[UP].scheme.name == "int8_w8a16"


def test_modelopt_mixed_precision(golden) -> None:
    copy = golden("modelopt_fp8")
    path = copy.folder / "hf_quant_config.json"
    config = json.loads(path.read_text())
    layers = {DOWN: {"quant_algo": "FP8"}, UP: {"quant_algo": "NVFP4", "group_size": 16}}
    config["quantization"].update(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    path.write_text(json.dumps(config))
    other = load(GOLDEN / "modelopt_nvfp4")
    parts = {name.replace(".", "__"): other.tensor(name) for name in other.names_of(UP)}
    copy.add(**parts)
    checkpoint = load(copy.folder)
    assert [checkpoint[name].scheme.name for name in (DOWN, UP)] == ["fp8_static", "nvfp4_static"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_more_memory_than_one_weight(tmp_path) -> None:
    """What was given and let go is gone, and the file's own pages are not copied."""
    size = 2048
    settings = json.loads((GOLDEN / "ct_int8_channel" / "config.json").read_text())
    weights = {f"m.{i}.weight": torch.zeros(size, size, dtype=torch.int8) for i in range(8)}
    weights |= {f"m.{i}.weight_scale": torch.ones(size, 1) for i in range(8)}
    make_golden.write(tmp_path, weights, settings)
    del weights
    checkpoint = load(tmp_path)
    before = anonymous_bytes()
    for module in checkpoint:
        weight = checkpoint[module]
        # Blocks that the allocator keeps for later count, too; eight weights would be kept else.
        assert anonymous_bytes() - before < 3 * weight.nbytes + (2 << 20)
        del weight


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("ct_fp8_tensor_static", ".input_scale"),
        ("ct_fp8_channel_static", ".input_scale"),
        ("ct_int8_static", ".input_scale"),
        ("ct_int8_static_asymmetric", ".input_scale"),
        ("hf_fp8_tensor", ".activation_scale"),
        ("modelopt_fp8", ".input_scale"),
    ],
)
def test_fixed_scales_of_activations_come_along(name, suffix) -> None:
    with load(GOLDEN / name) as checkpoint:
        for module in checkpoint:
            stored = checkpoint.tensor(module + suffix)
            assert torch.equal(checkpoint[module].input_scale, stored.float().reshape(()))


def test_fixed_scales_per_token_are_refused(golden) -> None:
    copy = golden("ct_fp8_tensor_static")
    changes = {"group_0": {"input_activations": {"strategy": "token"}}}
    copy.settings(config_groups=changes)
    with pytest.raises(UnsupportedModelError, match="fixed scales of strategy token"):
        load(copy.folder)
