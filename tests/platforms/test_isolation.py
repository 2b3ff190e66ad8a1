"""One device for a child process: the environment and the index agree on every machine."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import platform_fakes as fakes
import pytest
from mask_fakes import BOXES, DIVIDED, identity, records

from hal.errors import PlatformError, SimulatedDeviceError, ValueRangeError
from hal.isolation import Isolation
from hal.platforms.cuda import CudaPlatform
from hal.platforms.detection import detect
from hal.platforms.ordering import HostOrdering
from hal.runtime import platform, platform_for_device_type


@pytest.mark.parametrize("name", BOXES)
def test_a_child_sees_the_device_and_no_other(tmp_path: Path, name: str) -> None:
    box = BOXES[name]
    tried = 0
    for environment in box.environments:
        parent = box.platform(tmp_path, environment)
        for index, record in enumerate(records(parent) if parent else []):
            assert parent is not None
            isolation = parent.isolated(index)
            child_environment = isolation.apply({**environment, "HOME": "/root"})
            child = box.platform(tmp_path, child_environment)
            assert child is not None, (environment, index, child_environment)
            assert child.device_count() == 1
            assert identity(child.record(isolation.index)) == identity(record)
            assert isolation.device.partition(":")[0] == parent.torch_device_type
            assert child_environment["HOME"] == "/root"
            again = child.isolated(0).apply(child_environment)
            assert again == child_environment, "a grandchild sees what the child sees"
            tried += 1
    assert tried >= len(box.environments) - 3


@pytest.mark.parametrize("name", [name for name, box in BOXES.items() if box.kind != "cpu"])
def test_masks_of_another_parent_do_not_matter(tmp_path: Path, name: str) -> None:
    box = BOXES[name]
    free = box.platform(tmp_path, {})
    assert free is not None
    for environment in box.environments:
        # A launcher may hand on masks that it was not itself started with.
        for index, record in enumerate(records(free)):
            child = box.platform(tmp_path, free.isolated(index).apply(environment))
            assert child is not None, (environment, index)
            assert [identity(each) for each in records(child)] == [identity(record)]


def test_devices_are_named_by_uuid_where_there_is_one(tmp_path: Path) -> None:
    mixed = BOXES["mixed"].platform(tmp_path, {})
    assert mixed is not None
    isolation = mixed.isolated(0)
    assert isolation == Isolation({"CUDA_VISIBLE_DEVICES": fakes.h200(0).uuid}, 0, "cuda:0")
    assert isolation.apply({"CUDA_VISIBLE_DEVICES": "1", "A": "b"}) == {
        "CUDA_VISIBLE_DEVICES": fakes.h200(0).uuid,
        "A": "b",
    }


def test_numbers_come_with_the_order_they_count_in(tmp_path: Path) -> None:
    mixed = BOXES["mixed without UUIDs"].platform(tmp_path, {})
    assert mixed is not None
    assert mixed.physical_index(0) == 1, "CUDA puts the H200 first"
    assert dict(mixed.isolated(0).environment) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_a_mig_instance_is_named_by_its_own_uuid(tmp_path: Path) -> None:
    divided = BOXES["MIG"].platform(tmp_path, {"CUDA_VISIBLE_DEVICES": DIVIDED[2].uuid})
    assert divided is not None
    assert dict(divided.isolated(0).environment) == {"CUDA_VISIBLE_DEVICES": DIVIDED[2].uuid}


def test_every_variable_of_rocm_is_set(tmp_path: Path) -> None:
    environment = {"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}
    found = BOXES["three MI300X"].platform(tmp_path, environment)
    assert found is not None
    assert dict(found.isolated(0).environment) == {
        "ROCR_VISIBLE_DEVICES": "GPU-1b2c3d4e5f607081",
        "HIP_VISIBLE_DEVICES": "0",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def test_a_uuid_that_two_partitions_share_is_not_used(tmp_path: Path) -> None:
    found = BOXES["partitions of one UUID"].platform(tmp_path, {})
    assert found is not None
    selectors = [
        found.isolated(index).environment["ROCR_VISIBLE_DEVICES"]
        for index in range(found.device_count())
    ]
    assert selectors == ["0", "1", "GPU-1b2c3d4e5f607083"]


def test_a_tile_is_named_in_the_hierarchy_in_force(tmp_path: Path) -> None:
    box = BOXES["two Max 1550"]
    flat = box.platform(tmp_path, {"ONEAPI_DEVICE_SELECTOR": "level_zero:2,3"})
    assert flat is not None
    assert dict(flat.isolated(1).environment) == {
        "ZE_AFFINITY_MASK": "3",
        "ZE_FLAT_DEVICE_HIERARCHY": None,
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": None,
        "ONEAPI_DEVICE_SELECTOR": None,
    }
    whole = box.platform(
        tmp_path, {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE", "ZE_AFFINITY_MASK": "0,1.1"}
    )
    assert whole is not None
    changes = [whole.isolated(index).environment for index in (0, 1)]
    assert [change["ZE_AFFINITY_MASK"] for change in changes] == ["0", "1.1"]
    assert changes[0]["ZE_FLAT_DEVICE_HIERARCHY"] == "COMPOSITE"


def test_nothing_changes_on_the_cpu(tmp_path: Path) -> None:
    found = detect(fakes.machine(tmp_path)).current
    assert found.isolated(0) == Isolation({}, 0, "cpu")
    assert found.isolated(0).apply({"A": "b"}) == {"A": "b"}


def test_what_cannot_be_isolated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulatedDeviceError, match=r"cuda\.isolated: H200"):
        platform("cuda:h200").isolated(0)
    found = detect(fakes.machine(tmp_path)).current
    with pytest.raises(ValueRangeError):
        found.isolated(1)
    assert isinstance(platform("cuda:h200"), CudaPlatform)
    live = CudaPlatform([platform("cuda:h200").record(0)], HostOrdering())
    with pytest.raises(PlatformError, match="by asking torch only"):
        live.isolated(0)


def test_it_can_be_sent_to_a_process_and_compared() -> None:
    isolation = Isolation({"A": "1", "B": None}, 0, "cuda:0")
    assert pickle.loads(pickle.dumps(isolation)) == isolation
    assert len({isolation, Isolation({"A": "1", "B": None}, 0, "cuda:0")}) == 1
    assert isolation.apply({"B": "2", "C": "3"}) == {"A": "1", "C": "3"}


CHILD = """
import json, sys, torch
from hal.runtime import platform_for_device_type
kind, index = sys.argv[1], int(sys.argv[2])
module = getattr(torch, kind)
properties = module.get_device_properties(index)
here = platform_for_device_type(kind)
torch.zeros(8, device=f"{kind}:{index}").add_(1)
print(json.dumps({
    "count": module.device_count(),
    "uuid": str(getattr(properties, "uuid", "")),
    "hal": [here.record(i).uuid for i in range(here.device_count())],
    "address": here.record(index).pci_bus_id,
    "physical": here.physical_index(index),
}))
"""


@pytest.mark.gpu
def test_children_on_this_machine() -> None:
    import torch

    kind = "cuda" if torch.cuda.is_available() else "xpu"
    here = platform_for_device_type(kind)
    for index in range(here.device_count()):
        record, isolation = here.record(index), here.isolated(index)
        answer = subprocess.run(
            [sys.executable, "-c", CHILD, kind, str(isolation.index)],
            env=isolation.apply(os.environ),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert answer.returncode == 0, answer.stderr
        child = json.loads(answer.stdout)
        assert child["count"] == 1, child
        assert child["hal"] == [record.uuid]
        assert (child["address"], child["physical"]) == (record.pci_bus_id, record.physical_index)
        if here.is_cuda:
            assert record.uuid is not None
            assert record.uuid.partition("-")[2] == child["uuid"]
