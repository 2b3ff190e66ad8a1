"""Variables that hide devices, against torch's own reading and the runtimes' source."""

from __future__ import annotations

import re

import pytest
import torch
import torch.cuda
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hal.platforms.affinity import by_selector, masked_parts
from hal.platforms.visible import (
    cuda_tokens,
    cuda_visible,
    hip_value,
    hip_visible,
    rocm_visible,
    rocr_visible,
    torch_rocm_count,
)

UUIDS = ["GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333"]
AMD = ["GPU-00aa000000000001", "GPU-00aa000000000002", None, "GPU-00bb000000000003"]

NUMBERS = ["0", "1", "2", "7", "-1", "+1", " 1", "1 ", "1gpu2", "0x1", "１", "1.0"]
NAMES = ["GPU-aaaa1", "GPU-aaaa", "GPU-bbbb3333", "GPU-", "MIG-1", "MIG-2", "gpu-aaaa1111"]
ENTRIES = st.sampled_from([*NUMBERS, *NAMES, "", " ", "gpu", "NoDevFiles"])
VALUES = st.lists(ENTRIES, max_size=4).map(",".join) | st.text("019-, aGPUMI１é", max_size=8)
ROCM = st.fixed_dictionaries(
    {},
    optional={
        name: VALUES
        for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    },
)


def lone_sign(value: str) -> bool:
    """Tell whether an entry is a sign without a number: torch itself raises ValueError there."""
    return any(re.match(r"[+-](?!\d)", entry.strip()) for entry in value.split(","))


@pytest.mark.parametrize("value", ["-", "+", "0,-", "-gpu"])
def test_a_lone_sign_ends_the_list(value: str) -> None:
    assert cuda_tokens(value) == ([0] if value[0] == "0" else [])


@given(VALUES)
def test_tokens_are_torch_s(value: str) -> None:
    assume(not lone_sign(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert cuda_tokens(value) == torch.cuda._parse_visible_devices()


@given(VALUES)
def test_devices_are_as_many_as_torch_counts(value: str) -> None:
    found = cuda_visible(value, UUIDS)
    assert len(set(found)) == len(found)
    assert all(0 <= index < len(UUIDS) for index in found)
    assume(not lone_sign(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value)
        patch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(UUIDS))
        patch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: UUIDS)
        count = torch.cuda._device_count_nvml()
    assert count in (-1, len(found)), "torch says -1 where it asks CUDA, for MIG"
    tokens = cuda_tokens(value)
    if tokens and isinstance(tokens[0], str) and tokens[0].startswith("GPU-"):
        names = [str(token) for token in tokens]
        assert found == torch.cuda._transform_uuid_to_ordinals(names, UUIDS)


@pytest.mark.parametrize(
    ("value", "physical"),
    [
        (None, [0, 1, 2]),
        ("", []),
        (" ", []),
        ("-1", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0,0", []),
        ("1,1gpu", []),
        ("0,,1", [0]),
        (",0", []),
        ("0,", [0]),
        ("0,7,1", [0]),
        ("junk", []),
        ("0,junk,1", [0]),
        ("NoDevFiles", []),
        ("GPU-aaaa1111", [0]),
        ("GPU-aaaa1", [0]),
        ("GPU-aaaa", []),
        ("GPU-bbbb,GPU-aaaa2", [2, 1]),
        ("GPU-bbbb,GPU-aaaa,GPU-aaaa2", [2]),
        ("GPU-bbbb,GPU-bbbb3", []),
        ("GPU-bbbb3333,0", [2]),
        ("0,GPU-bbbb3333", [0]),
        ("gpu-bbbb3333", []),
    ],
)
def test_cuda_values(value: str | None, physical: list[int]) -> None:
    assert cuda_visible(value, UUIDS) == physical


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ("", []),
        (" ", []),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 1 , 0 ", [1, 0]),
        ("0x1,02", [1, 2]),
        ("+1", [1]),
        ("08", []),
        ("1a", []),
        ("1_0", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("0,0,1", [0]),  # a repeated entry ends the list; in CUDA it hides everything
        ("0,7,1", [0]),
        ("0,", [0]),
        ("0,,1", []),  # the runtime throws, and does not start
        (",0", []),
        ("7,", []),
        ("GPU-00AA000000000002", [1]),
        ("gpu-00aa000000000002", [1]),
        ("GPU-00b", [3]),
        ("GPU-00aa", []),
        ("GPU-", []),
        ("GPU-00aa00000000000111", []),
        ("GPU-XX", []),
        ("2,GPU-00bb", [2, 3]),
        ("0,1,2,3,", [0, 1, 2, 3]),
        ("0,1,2,3,,", [0, 1, 2, 3]),  # no more entries are read than there are devices
    ],
)
def test_rocr_values(value: str, places: list[int]) -> None:
    assert rocr_visible(value, AMD) == places


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (" ", []),
        ("0", [0]),
        ("3,1", [3, 1]),
        ("1, 0", [1]),
        ("01", []),
        ("0x1", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("0,0,1", [0, 1]),  # a repeated entry counts once
        ("0,7,1", [0]),
        ("0,", [0]),
        ("0,,1", [0]),
        ("GPU-00aa000000000002", [1]),
        ("GPU-00AA000000000002", []),
        ("GPU-00aa", [0]),  # the first that fits
        ("GPU-", [0]),
        ("GPU-XX", [2]),
        ("3,GPU-00aa000000000002", [3, 1]),
    ],
)
def test_hip_values(value: str, places: list[int]) -> None:
    assert hip_visible(value, AMD) == places


@pytest.mark.parametrize(
    ("value", "held"),
    [(None, ""), ("", " "), ('"0,1"', "0,1"), (' "1" ', "1"), ('""', ""), ('"1', '"1'), ("0", "0")],
)
def test_hip_drops_quotes_and_sees_an_empty_value(value: str | None, held: str) -> None:
    assert hip_value(value) == held


ROCR, HIP, CUDA = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("environment", "physical", "variable", "offered"),
    [
        ({}, [0, 1, 2, 3], "", 4),
        ({ROCR: "2,0"}, [2, 0], ROCR, 4),
        ({ROCR: "3,2,1,0"}, [3, 2, 1, 0], "", 4),
        ({ROCR: ""}, [], ROCR, 4),
        ({ROCR: "2,0", HIP: "1"}, [0], HIP, 2),
        ({ROCR: "2,0", HIP: "1", CUDA: "0"}, [0], HIP, 2),
        ({ROCR: "1", HIP: "1"}, [], HIP, 1),
        ({ROCR: "2", CUDA: "2"}, [], CUDA, 1),
        ({ROCR: "-1", HIP: "0"}, [], ROCR, 4),
        ({HIP: ""}, [], HIP, 4),
        ({HIP: "", CUDA: "0"}, [], HIP, 4),
        ({HIP: '""', CUDA: "1"}, [1], CUDA, 4),
        ({CUDA: ""}, [], CUDA, 4),
        ({CUDA: "-1"}, [], CUDA, 4),
        ({CUDA: "3"}, [3], CUDA, 4),
        ({HIP: "GPU-00bb"}, [3], HIP, 4),
        ({ROCR: "GPU-00bb,0", CUDA: "GPU-00bb"}, [3], CUDA, 2),
        ({"GPU_DEVICE_ORDINAL": "1"}, [0, 1, 2, 3], "", 4),
    ],
)
def test_rocm_masks_compose(
    environment: dict[str, str], physical: list[int], variable: str, offered: int
) -> None:
    assert rocm_visible(environment, AMD) == (physical, variable, offered)


def torch_s_rocm_count(environment: dict[str, str]) -> int | None:
    """Return what torch for ROCm would count, from the parser of the torch that is here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (ROCR, HIP, CUDA):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(torch.version, "hip", "7.2")
        patch.setattr(torch.cuda, "_raw_device_count_amdsmi", lambda: len(UUIDS))
        serials = [uuid.removeprefix("GPU-") for uuid in UUIDS]
        patch.setattr(torch.cuda, "_raw_device_uuid_amdsmi", lambda: serials)
        try:
            return torch.cuda._device_count_amdsmi()
        except RuntimeError:
            return None


@given(ROCM)
@example({ROCR: "0", HIP: "0,1"})
@example({ROCR: "", CUDA: "1"})
@example({ROCR: "0,1,2", CUDA: "1"})
def test_torch_s_count_on_rocm(environment: dict[str, str]) -> None:
    assume(not any(lone_sign(value) for value in environment.values()))
    assert torch_rocm_count(environment, UUIDS) == torch_s_rocm_count(environment)


@pytest.mark.parametrize(
    "environment",
    [{}, {ROCR: "2,0"}, {HIP: "1"}, {CUDA: "1,2"}, {ROCR: "2,0", HIP: "1"}, {HIP: ""}, {CUDA: ""}],
)
def test_plain_values_mean_the_same_to_torch_and_rocm(environment: dict[str, str]) -> None:
    assert torch_s_rocm_count(environment) == len(rocm_visible(environment, UUIDS).devices)


@given(ROCM)
def test_rocm_masks_never_invent_or_repeat(environment: dict[str, str]) -> None:
    found, variable, offered = rocm_visible(environment, UUIDS)
    assert len(set(found)) == len(found) <= offered
    assert all(0 <= index < len(UUIDS) for index in found)
    assert (variable == "") == (len(found) == len(UUIDS))


TILES = (2, 1, 2)


@pytest.mark.parametrize(
    ("value", "flat", "composite"),
    [
        (None, "0 1 2 3 4", "0 1 2"),
        ("", "0 1 2 3 4", "0 1 2"),
        ("default", "0 1 2 3 4", "0 1 2"),
        ("1", "1", "1"),
        ("2,0", "0 2", "0 2"),
        ("0,0", "0", "0"),
        ("4", "4", ""),
        ("7", "", ""),
        ("0,7", "0", "0"),
        ("-1", "", ""),
        ("0x1,2", "1 2", "1 2"),
        ("0.1", "", "0.1"),
        ("0.1,1", "1", "0.1 1"),
        ("0.0,0.1", "", "0"),
        ("2.1,0", "0", "0 2.1"),
        ("0,0.1", "0", "0"),
        ("1.1", "", ""),
        ("0.1.0", "", ""),
        ("0,", "0", "0"),
        ("0,,1", "", ""),  # the driver throws
        ("junk", "", ""),
        (" ", "", ""),
    ],
)
def test_affinity_mask(value: str | None, flat: str, composite: str) -> None:
    for wanted, whole in ((flat, False), (composite, True)):
        parts = masked_parts(value, TILES, composite=whole)
        assert [part.mask for part in parts] == wanted.split()


def test_parts_know_their_place() -> None:
    flat = masked_parts("4,1", TILES, composite=False)
    assert [tuple(part) for part in flat] == [(1, 0, (1,), "1"), (4, 2, (1,), "4")]
    whole = masked_parts("2,0.1", TILES, composite=True)
    assert [tuple(part) for part in whole] == [(0, 0, (1,), "0.1"), (2, 2, (0, 1), "2")]


@given(
    st.lists(st.sampled_from(["0", "1", "2", "3", "9", "0.0", "0.1", "2.1", "", "x"])),
    st.lists(st.integers(1, 3), max_size=4),
    st.booleans(),
)
def test_masks_name_themselves(entries: list[str], tiles: list[int], composite: bool) -> None:
    every = {part.number: part for part in masked_parts(None, tiles, composite=composite)}
    for part in masked_parts(",".join(entries), tiles, composite=composite):
        assert set(part.tiles) <= set(every[part.number].tiles)
        assert masked_parts(part.mask, tiles, composite=composite) == [part]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, [0, 1, 2]),
        ("", [0, 1, 2]),
        ("*:*", [0, 1, 2]),
        ("*:gpu", [0, 1, 2]),
        ("level_zero:*", [0, 1, 2]),
        ("level_zero:gpu", [0, 1, 2]),
        ("Level_Zero:GPU", [0, 1, 2]),
        ("level_zero:0", [0]),
        ("level_zero:2,0", [0, 2]),
        ("level_zero:7", []),
        ("*:1", [1]),
        ("opencl:gpu;level_zero:gpu", [0, 1, 2]),
        ("opencl:*;level_zero:1", [1]),
        ("opencl:*", []),
        ("opencl:gpu", []),
        ("cuda:*", []),
        ("*:cpu", []),
        ("!opencl:*", [0, 1, 2]),
        ("!level_zero:1", [0, 2]),
        ("level_zero:*;!level_zero:0,2", [1]),
        ("!*:gpu", []),
        ("level_zero", None),
        ("level_zero:gpu:0", None),
        ("level_zero:0.1", None),
        ("level_zero:*.*", None),
        ("level_zero:dgpu", None),
        ("gpu", None),
    ],
)
def test_device_selector(value: str | None, kept: list[int] | None) -> None:
    assert by_selector(value, 3) == kept


def test_a_prefix_without_digits_names_no_device() -> None:
    assert cuda_visible("GPU-", UUIDS[:1]) == []
    assert cuda_visible("GPU-a", UUIDS[:1]) == [0]
