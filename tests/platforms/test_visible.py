"""Variables that hide devices, against torch's own reading of them."""

from __future__ import annotations

import pytest
import torch.cuda
from hypothesis import given
from hypothesis import strategies as st

from hal.platforms.visible import cuda_tokens, cuda_visible, rocm_visible, xpu_visible

UUIDS = ["GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333"]

NUMBERS = ["0", "1", "2", "7", "-1", "+1", " 1", "1 ", "1gpu2", "0x1", "１", "1.0"]
NAMES = ["GPU-aaaa1", "GPU-aaaa", "GPU-bbbb3333", "GPU-", "MIG-1", "MIG-2"]
ENTRIES = st.sampled_from([*NUMBERS, *NAMES, "", " ", "gpu", "NoDevFiles"])
VALUES = st.lists(ENTRIES, max_size=4).map(",".join) | st.text("019-, aGPUMI１é", max_size=8)


@given(VALUES)
def test_tokens_are_torch_s(value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert cuda_tokens(value) == torch.cuda._parse_visible_devices()


@given(VALUES)
def test_uuids_resolve_as_in_torch(value: str) -> None:
    tokens = cuda_tokens(value)
    found = cuda_visible(value, UUIDS)
    assert len(set(found)) == len(found)
    assert all(0 <= index < len(UUIDS) for index in found)
    if tokens and isinstance(tokens[0], str) and tokens[0].startswith("GPU-"):
        names = [str(token) for token in tokens]
        assert found == torch.cuda._transform_uuid_to_ordinals(names, UUIDS)


def test_unset_shows_all() -> None:
    assert cuda_tokens(None) is None
    assert cuda_visible(None, UUIDS) == [0, 1, 2]
    assert rocm_visible({}, UUIDS) == ([0, 1, 2], "")


@pytest.mark.parametrize(
    ("environment", "physical", "blame"),
    [
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [2, 0], "ROCR_VISIBLE_DEVICES"),
        ({"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}, [0], "HIP_VISIBLE_DEVICES"),
        ({"ROCR_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "2"}, [], "CUDA_VISIBLE_DEVICES"),
        ({"ROCR_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "0"}, [], "ROCR_VISIBLE_DEVICES"),
        ({"HIP_VISIBLE_DEVICES": "GPU-bbbb"}, [2], "HIP_VISIBLE_DEVICES"),
    ],
)
def test_rocm_masks_compose(environment: dict[str, str], physical: list[int], blame: str) -> None:
    assert rocm_visible(environment, UUIDS) == (physical, blame)


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        (None, [0, 1, 2]),
        ("", [0, 1, 2]),
        ("1", [1]),
        ("2,0", [0, 2]),
        ("1.0,1.1", [1]),
        ("7", []),
        ("junk", []),
    ],
)
def test_affinity_mask(value: str | None, visible: list[int]) -> None:
    assert xpu_visible(value, 3) == visible
