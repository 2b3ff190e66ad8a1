"""How devices reach each other on machines that are not here."""

from __future__ import annotations

import ctypes
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import platform_fakes as fakes
import pytest
from platform_fakes import (
    CUDA_TORCH,
    GIB,
    ROCM_TORCH,
    SWITCH,
    XPU_TORCH,
    FakeNvml,
    LinkedNvml,
    h200,
    machine,
)

from hal.describe import info_sections
from hal.device import DeviceSpec, Link
from hal.platforms import nvlink
from hal.platforms.detection import detect
from hal.platforms.interconnect import generation_rate, pcie_rate
from hal.platforms.nvlink import nvidia_links
from hal.platforms.nvml import Nvml, _FieldValue, _PciInfo
from hal.render import to_text
from hal.report import info_report

GEN5, GEN4, GEN4_HALF = 126030769231.0, 63015384615.0, 31507692308.0


def rtx3090(number: int) -> Any:
    name = "NVIDIA GeForce RTX 3090"
    return fakes.gpu(name, (8, 6), 24 * GIB, f"GPU-{number}0", 0x18 + 0x10 * number)


def links(root: Path, nvml: Any, **environment: str) -> list[tuple[Link, ...]]:
    """Return the links of every visible device of a machine with `nvml`."""
    platform = detect(machine(root, CUDA_TORCH, nvml=nvml, environment=environment)).current
    assert platform.is_cuda
    return [platform.device(index).links for index in range(platform.device_count())]


def amd_links(root: Path, **environment: str) -> list[tuple[Link, ...]]:
    platform = detect(machine(root, ROCM_TORCH, environment=environment)).current
    assert platform.is_rocm
    return [platform.device(index).links for index in range(platform.device_count())]


def test_two_h200_with_direct_links(tmp_path: Path) -> None:
    nvml = LinkedNvml(h200(0), h200(1), ends=((1,) * 18, (0,) * 18))
    assert links(tmp_path, nvml) == [(Link(1, "nvlink", 900e9),), (Link(0, "nvlink", 900e9),)]


def test_eight_devices_through_switches(tmp_path: Path) -> None:
    nvml = LinkedNvml(*map(h200, range(8)), ends=((SWITCH,) * 18,) * 8)
    found = links(tmp_path, nvml)
    for index, row in enumerate(found):
        assert row == tuple(Link(peer, "nvlink", 900e9) for peer in range(8) if peer != index)
    assert nvml.asked == 28 + 8, "one call for each pair and one for each device"
    assert nvml.started == 0


@pytest.mark.parametrize("unable", [(147,), ("nvmlDeviceGetFieldValues",), (90,), (91,)])
def test_switches_are_seen_without_any_one_field(tmp_path: Path, unable: tuple[Any, ...]) -> None:
    nvml = LinkedNvml(h200(0), h200(1), ends=((SWITCH,) * 18,) * 2, unable=unable)
    rate = None if unable == ("nvmlDeviceGetFieldValues",) else 900e9
    assert links(tmp_path, nvml) == [(Link(1, "nvlink", rate),), (Link(0, "nvlink", rate),)]


def test_a_device_with_fewer_links_sets_the_rate(tmp_path: Path) -> None:
    nvml = LinkedNvml(h200(0), h200(1), ends=((SWITCH,) * 18, (SWITCH,) * 8 + (None,) * 10))
    assert links(tmp_path, nvml)[0] == (Link(1, "nvlink", 400e9),)


def test_a_bridge_on_one_pair_of_three(tmp_path: Path) -> None:
    for bus in ("18", "28", "38"):
        fakes.add_pcie(tmp_path, f"0000:{bus}:00.0", ("16.0 GT/s PCIe", 16))
    cards = [rtx3090(0), rtx3090(1), rtx3090(2)]
    nvml = LinkedNvml(*cards, ends=((2,) * 4, (None,) * 4, (0,) * 4), speed=14062)
    assert links(tmp_path, nvml) == [
        (Link(1, "pcie", GEN4), Link(2, "nvlink", 112.5e9)),
        (Link(0, "pcie", GEN4), Link(2, "pcie", GEN4)),
        (Link(0, "nvlink", 112.5e9), Link(1, "pcie", GEN4)),
    ]
    platform = detect(machine(tmp_path, CUDA_TORCH, nvml=nvml)).current
    report = info_report(platform)
    assert [device["alike"] for device in report["devices"]] == [[0, 1, 2]] * 3
    assert platform.device().links == ()
    text = to_text(info_sections(json.loads(json.dumps(report))))
    assert "links of 0" in text
    assert "1 by pcie, 63.02 GB/s; 2 by nvlink, 112.5 GB/s" in text
    first = platform.device(0)
    assert DeviceSpec.from_dict(json.loads(json.dumps(first.to_dict()))) == first


@pytest.mark.parametrize("status", [None, 6])
def test_direct_links_count_where_the_status_is_unknown(tmp_path: Path, status: int | None) -> None:
    """A pair joined by links is known, one with no link that is up too; the rest is not."""
    unable = () if status is not None else ("nvmlDeviceGetP2PStatus",)
    cards = [rtx3090(0), rtx3090(1), rtx3090(2), rtx3090(3)]
    ends = ((1,) * 4, (0,) * 4, (None,) * 4, (SWITCH,) * 4)
    nvml = LinkedNvml(*cards, ends=ends, speed=14062, status=status, unable=unable)
    assert links(tmp_path, nvml) == [
        (Link(1, "nvlink", 112.5e9), Link(2, "pcie")),
        (Link(0, "nvlink", 112.5e9), Link(2, "pcie")),
        (Link(0, "pcie"), Link(1, "pcie"), Link(3, "pcie")),
        (Link(2, "pcie"),),
    ]


def test_a_fabric_that_is_down_leaves_pcie(tmp_path: Path) -> None:
    """Links to switches train without the fabric manager, and carry nothing."""
    nvml = LinkedNvml(h200(0), h200(1), ends=((SWITCH,) * 18,) * 2, status=5, pcie=(5, 16))
    assert links(tmp_path, nvml)[0] == (Link(1, "pcie", GEN5),)


def test_an_old_library_says_nothing(tmp_path: Path) -> None:
    assert links(tmp_path, FakeNvml(h200(0), h200(1))) == [(), ()]


@pytest.mark.parametrize(
    "name",
    [
        "nvmlDeviceGetP2PStatus",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        "nvmlDeviceGetNvLinkRemotePciInfo",
    ],
)
def test_no_function_is_needed(tmp_path: Path, name: str) -> None:
    nvml = LinkedNvml(
        rtx3090(0), rtx3090(1), ends=((1,) * 4, (0,) * 4), speed=14062, unable=(name,)
    )
    known = name not in ("nvmlDeviceGetNvLinkState", "nvmlDeviceGetNvLinkRemotePciInfo")
    rate = 112.5e9 if known and name != "nvmlDeviceGetFieldValues" else None
    assert links(tmp_path, nvml)[0] == (Link(1, "nvlink", rate),)


def test_wrong_kinds_of_answers_are_unknown(tmp_path: Path) -> None:
    nvml = LinkedNvml(h200(0), h200(1), ends=((1,) * 18, (0,) * 18))
    nvml.nvmlDeviceGetFieldValues = lambda device, fields: [object()]  # type: ignore[assignment]
    assert links(tmp_path, nvml)[0] == (Link(1, "nvlink", None),)
    nvml.nvmlDeviceGetP2PStatus = lambda one, other, index: "?"  # type: ignore[assignment]
    assert links(tmp_path, nvml)[0] == (Link(1, "nvlink", None),)


def test_peers_are_visible_indices(tmp_path: Path) -> None:
    cards = [rtx3090(0), rtx3090(1), rtx3090(2)]
    ends = ((1,) * 4, (0,) * 4, (None,) * 4)
    nvml = LinkedNvml(*cards, ends=ends, speed=14062, pcie=(4, 16))
    pcie = Link(0, "pcie", GEN4)
    assert links(tmp_path, nvml, CUDA_VISIBLE_DEVICES="2,1,0") == [
        (Link(1, "pcie", GEN4), Link(2, "pcie", GEN4)),
        (pcie, Link(2, "nvlink", 112.5e9)),
        (pcie, Link(1, "nvlink", 112.5e9)),
    ]
    assert links(tmp_path, nvml, CUDA_VISIBLE_DEVICES="1,0") == [
        (Link(1, "nvlink", 112.5e9),),
        (Link(0, "nvlink", 112.5e9),),
    ]
    assert links(tmp_path, nvml, CUDA_VISIBLE_DEVICES="1") == [()]


def test_a_divided_device_has_no_link(tmp_path: Path) -> None:
    part = fakes.gpu("NVIDIA H200 MIG 3g.71gb", (9, 0), 71 * GIB, "MIG-1", 0x18, sms=60)
    whole = fakes.gpu("NVIDIA H200", (9, 0), 141 * GIB, "GPU-1", 0x18, (part,))
    nvml = LinkedNvml(whole, h200(1), ends=((1,) * 18, (0,) * 18))
    assert set(links(tmp_path, nvml)) == {()}
    assert links(tmp_path, nvml, CUDA_VISIBLE_DEVICES="1") == [()]


def test_names_come_without_links_from_the_driver_s_files(tmp_path: Path) -> None:
    fakes.add_proc_nvidia(tmp_path, "NVIDIA H200", "NVIDIA H200")
    assert links(tmp_path, FakeNvml(fail="Driver Not Loaded")) == [(), ()]


@pytest.mark.parametrize(
    ("ports", "rate"),
    [
        ([("32.0 GT/s PCIe", 16)], GEN5),
        ([("8 GT/s", 16)], GEN4_HALF),
        ([("5.0 GT/s PCIe", 8)], 8e9),
        ([("64.0 GT/s PCIe", 16)], 256e9),
        ([("16.0 GT/s PCIe", 16), ("16.0 GT/s PCIe", 8)], GEN4_HALF),
        ([("32.0 GT/s PCIe", 16), ("Unknown", 255), ("16.0 GT/s PCIe", 16)], GEN4),
        ([("2.5 GT/s PCIe", 1), ("2.5 GT/s PCIe", 1), ("16.0 GT/s PCIe", 8)], GEN4_HALF),
        ([("32.0 GT/s PCIe", 16), ("16.0 GT/s PCIe", 32)], GEN5),
        ([("Unknown", 16)], None),
        ([("32.0 GT/s PCIe", 255)], None),
        ([("32.0 GT/s PCIe", "junk")], None),
        ([("", "")], None),
    ],
)
def test_the_slowest_port_sets_the_rate_of_pcie(
    tmp_path: Path, ports: list[tuple[str, object]], rate: float | None
) -> None:
    fakes.add_pcie(tmp_path, "0000:18:00.0", *ports)
    assert pcie_rate(machine(tmp_path), "0000:18:00.0") == pytest.approx(rate)
    assert pcie_rate(machine(tmp_path), "0000:99:00.0") is None
    assert pcie_rate(machine(tmp_path), None) is None


def test_generations_have_rates() -> None:
    assert [generation_rate(number, 16) for number in (1, 2, 5)] == [8e9, 16e9, GEN5]
    assert generation_rate(7, 16) is generation_rate(0, 16) is generation_rate(None, 16) is None
    assert generation_rate(5, None) is generation_rate(5, 0) is None


def mi300x(root: Path, megabytes: int = 64000) -> None:
    """Write eight MI300X, each linked to every other."""
    fakes.add_kfd(root, *[{}] * 8)
    for node in range(1, 9):
        fakes.add_io_link(root, node, 0, kind=2)
    for one, other in combinations(range(1, 9), 2):
        fakes.add_io_link(root, one, other, megabytes=megabytes)
        fakes.add_io_link(root, other, one, megabytes=megabytes)


def test_eight_mi300x(tmp_path: Path) -> None:
    mi300x(tmp_path)
    for index, row in enumerate(amd_links(tmp_path)):
        assert row == tuple(Link(peer, "xgmi", 128e9) for peer in range(8) if peer != index)
    platform = detect(machine(tmp_path, ROCM_TORCH)).current
    assert "1-7 by xgmi, 128 GB/s" in to_text(info_sections(info_report(platform)))


def test_amd_masks_hide_links(tmp_path: Path) -> None:
    mi300x(tmp_path)
    assert amd_links(tmp_path, ROCR_VISIBLE_DEVICES="5,2") == [
        (Link(1, "xgmi", 128e9),),
        (Link(0, "xgmi", 128e9),),
    ]
    assert amd_links(tmp_path, HIP_VISIBLE_DEVICES="3") == [()]


def test_mi250x_has_two_devices_in_a_package(tmp_path: Path) -> None:
    fakes.add_kfd(tmp_path, *[{"gfx_target_version": 90010, "device_id": 0x7408}] * 4)
    for node in range(1, 5):
        fakes.add_pcie(tmp_path, f"0000:{0x20 + node:02x}:00.0", ("16.0 GT/s PCIe", 16))
        fakes.add_io_link(tmp_path, node, 0, megabytes=36000)  # XGMI to the processor
        fakes.add_io_link(tmp_path, node, node % 2 * 2 + node - 1, megabytes=200000)
        # As the driver copies it from the link to the processor.
        fakes.add_io_link(tmp_path, node, (node + 1) % 4 + 1, peer=True)
    package, others = Link(1, "xgmi", 400e9), (Link(2, "pcie", GEN4), Link(3, "pcie", GEN4))
    assert amd_links(tmp_path)[0] == (package, *others)
    assert amd_links(tmp_path)[2][2] == Link(3, "xgmi", 400e9)


def test_xgmi_through_others_has_no_rate(tmp_path: Path) -> None:
    mi300x(tmp_path, megabytes=0)
    assert amd_links(tmp_path, ROCR_VISIBLE_DEVICES="0,1")[0] == (Link(1, "xgmi"),)


@pytest.mark.parametrize("text", ["", "\x00\xff", "type eleven\nnode_to 2\n", "type 11\n"])
def test_junk_in_the_topology_is_unknown(tmp_path: Path, text: str) -> None:
    fakes.add_kfd(tmp_path, {}, {})
    for node in (1, 2):
        path = f"sys/class/kfd/kfd/topology/nodes/{node}/io_links/0/properties"
        fakes.write(tmp_path, path, text)
    assert amd_links(tmp_path) == [(), ()]


def arc(root: Path, number: int, device: int = 0xE20B, **changes: int) -> None:
    fakes.add_drm(root, number, device, **changes)
    slow = ("2.5 GT/s PCIe", 1)
    fakes.add_pcie(root, f"0000:{number + 3:02x}:00.0", slow, slow, ("16.0 GT/s PCIe", 8))


def test_two_arc_b580(tmp_path: Path) -> None:
    arc(tmp_path, 0)
    arc(tmp_path, 1)
    platform = detect(machine(tmp_path, XPU_TORCH)).current
    assert platform.device(0).links == (Link(1, "pcie", GEN4_HALF),)
    assert platform.device(1).links == (Link(0, "pcie", GEN4_HALF),)


def test_xe_link_is_not_known(tmp_path: Path) -> None:
    arc(tmp_path, 0, 0x0BD5, tiles=2)
    arc(tmp_path, 1)
    platform = detect(machine(tmp_path, XPU_TORCH)).current
    found = [[link.peer for link in platform.device(i).links] for i in range(3)]
    assert found == [[2], [2], [0, 1]]


class Library:
    """Two devices with four links to a switch, as the C library answers."""

    class nvmlErrorString:
        restype: Any = None

        def __new__(cls, code: int) -> Any:
            return b"Not Supported"

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: Any, status: Any) -> int:
        assert (one.value, other.value, index.value) == (1, 2, 2)
        status._obj.value = 0
        return 0

    def nvmlDeviceGetFieldValues(self, handle: Any, count: int, values: Any) -> int:
        answers = {91: (0, 4), 147: (3, 0), 90: (0, 53125), 164: (0, 53125)}
        assert count == len(values._obj) == 4
        for value in values._obj:
            value.nvmlReturn, value.value.uiVal = answers[value.fieldId]
            value.valueType = 1
        return 0

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: Any, state: Any) -> int:
        state._obj.value = 1
        return 0

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Any, link: Any, kind: Any) -> int:
        kind._obj.value = 2 if link.value < 2 else 0
        return 0

    def nvmlDeviceGetNvLinkRemotePciInfo_v2(self, handle: Any, link: Any, info: Any) -> int:
        info._obj.busId = b"00000000:%02X:00.0" % (0x38 - 0x10 * handle.value)
        return 0


def test_answers_come_through_pointers(tmp_path: Path) -> None:
    nvml = Nvml(Library())
    handles = {0: (ctypes.c_void_p(1), "0000:18:00.0"), 1: (ctypes.c_void_p(2), "0000:28:00.0")}
    found = nvidia_links(nvml, machine(tmp_path), handles)
    # Each device has two links to the other, and two to a switch that are not needed for it.
    assert found == {0: (Link(1, "nvlink", 200e9),), 1: (Link(0, "nvlink", 200e9),)}
    values = nvml.nvmlDeviceGetFieldValues(handles[0][0], [91, 147, 90, 164])
    assert ctypes.sizeof(values) == 4 * 40


def test_numbers_and_layouts_are_those_of_nvidia_ml_py() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = {
        "NVML_P2P_CAPS_INDEX_NVLINK": nvlink._OVER_NVLINK,
        "NVML_P2P_STATUS_OK": nvlink._REACHED,
        "NVML_P2P_STATUS_UNKNOWN": nvlink._NOT_KNOWN,
        "NVML_NVLINK_DEVICE_TYPE_GPU": nvlink._TO_DEVICE,
        "NVML_NVLINK_DEVICE_TYPE_SWITCH": nvlink._TO_SWITCH,
        "NVML_FI_DEV_NVLINK_LINK_COUNT": nvlink._LINKS,
        "NVML_FI_DEV_NVSWITCH_CONNECTED_LINK_COUNT": nvlink._LINKS_TO_SWITCHES,
        "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON": nvlink._SPEED,
        "NVML_FI_DEV_NVLINK_GET_SPEED": nvlink._SPEED_OF_FIRST,
    }
    for name, number in names.items():
        # Older versions lack the newest names, and none changes a number.
        assert getattr(pynvml, name, number) == number, name
    theirs = pynvml.c_nvmlFieldValue_t
    assert ctypes.sizeof(theirs) == ctypes.sizeof(_FieldValue)
    for name in ("fieldId", "valueType", "nvmlReturn", "value"):
        assert getattr(theirs, name).offset == getattr(_FieldValue, name).offset, name
    assert ctypes.sizeof(pynvml.nvmlPciInfo_t) == ctypes.sizeof(_PciInfo)
