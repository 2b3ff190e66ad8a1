"""Rows of a payload: sizes against the formulas of the field, parts that never overlap."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import UnknownNameError, ValueRangeError
from hal.ops.payload import (
    BUFFERS,
    FORMATS,
    SYMMETRIC,
    Payload,
    flag_bytes,
    payload_format,
    slot_parts,
    union,
    workspace,
)
from hal.quant.scheme import SCHEMES

HIDDEN_AND_SCALES = {
    "bf16": lambda h: (2 * h, 0),
    "fp8": lambda h: (h, 4 * math.ceil(h / 128)),
    "fp8_token": lambda h: (h, 4),
    "int8": lambda h: (h, 4),
    "mxfp8": lambda h: (h, math.ceil(h / 32)),
    "mxfp4": lambda h: (math.ceil(h / 2), math.ceil(h / 32)),
    "nvfp4": lambda h: (math.ceil(h / 2), math.ceil(h / 16) + 4),
}
"""Bytes of codes and of scales: those of FlashInfer's table, and nvfp4's scale of a token."""

payloads = st.builds(
    Payload,
    st.sampled_from(list(FORMATS)),
    st.integers(1, 9000),
    st.integers(1, 16),
    st.sampled_from([1, 32, 128, 256]),
)


@given(payloads)
def test_parts_follow_each_other_aligned(payload):
    element = {"codes": payload.code_bits // 8 or 1, "weights": 4, "ids": 4, "second": 4}
    end = 0
    for name, part in payload.parts.items():
        assert part.start >= end
        assert part.start - end < 4
        assert part.start % element.get(name, 1) == 0
        end = part.stop
    assert 0 <= payload.row_bytes - end < 16
    assert payload.row_bytes % 16 == 0


@given(st.sampled_from(list(FORMATS)), st.integers(1, 9000), st.integers(1, 16))
def test_bytes_are_those_of_the_formula(format, hidden, top_k):
    parts = Payload(format, hidden, top_k).parts
    sizes = {name: part.size for name, part in parts.items()}
    codes, scales = HIDDEN_AND_SCALES[format](hidden)
    assert sizes["codes"] == codes
    assert sizes.get("scales", 0) + sizes.get("second", 0) == scales
    assert sizes["weights"] == sizes["ids"] == 4 * top_k


def test_scales_of_padding_count():
    assert Payload("mxfp8", 2880, 4).scales == 90
    assert Payload("mxfp8", 2880, 4, column_alignment=256).scales == 96
    assert Payload("bf16", 2880, 4, column_alignment=256).scales == 0


def test_a_row_of_deepseek_v3():
    # 7168 codes, 56 scales, 8 weights and 8 ids of 4 bytes.
    assert Payload("fp8", 7168, 8).row_bytes == 7168 + 4 * 56 + 32 + 32
    assert Payload("nvfp4", 7168, 8).row_bytes == 3584 + 448 + 4 + 64 + 12
    assert Payload("bf16", 7168, 8).row_bytes == 14336 + 64


def read(scheme, *, weight_only=False):
    return SCHEMES[scheme].operands(weight_only=weight_only)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_is_what_the_experts_quantize_to(scheme):
    chosen = payload_format(scheme, read=read(scheme))
    activation = SCHEMES[scheme].activation
    if chosen == "bf16":
        served = [SCHEMES[row].activation for row in FORMATS.values()]
        assert activation.format is None or activation not in served
    else:
        assert SCHEMES[FORMATS[chosen]].activation == activation
    # A kernel that decodes weights alone would compute with what quantization lost.
    assert payload_format(scheme, read=read(scheme, weight_only=True)) == "bf16"
    assert payload_format(scheme, read=None) == "bf16"


def test_auto_names():
    names = ("bf16", "fp8_block128", "fp8_channel", "int4_w4a16", "mxfp4_w4a8", "nvfp4")
    assert [payload_format(name, read=read(name)) for name in names] == [
        *("bf16", "fp8", "fp8_token", "bf16", "mxfp8", "nvfp4")
    ]
    assert payload_format("bf16", "nvfp4", read=None) == "nvfp4"
    assert payload_format("fp8_static", read=read("fp8_static")) == "bf16"  # the experts' own scale


@given(payloads, st.sampled_from(list(BUFFERS)), st.integers(1, 64), st.integers(0, 4096))
def test_workspace_grows_with_ranks_and_tokens(payload, transport, ranks, tokens):
    small = workspace(transport, payload, ranks, tokens)
    for more in ((ranks + 1, tokens), (ranks, tokens + 1)):
        large = workspace(transport, payload, *more)
        assert all(large[name] >= size for name, size in small.items())
    if transport == SYMMETRIC:
        parts = slot_parts(payload, ranks, tokens)
        ends = [0]
        for part in parts.values():
            assert part.start >= ends[-1]
            assert part.start % 256 == 0
            ends.append(part.stop)
        slots = small[SYMMETRIC] - flag_bytes(ranks)
        assert 0 <= slots - 2 * ends[-1] < 512
        sent = sum(part.size for part in payload.parts.values())
        held = sum(parts[name].size for name in payload.parts)
        assert held == ranks * tokens * sent
        assert parts["returned"].size == ranks * tokens * payload.combine_bytes
        return
    if not BUFFERS[transport]:
        assert not small  # another library keeps them
        return
    assert small["receive"] == ranks * tokens * payload.row_bytes


@given(st.lists(payloads, min_size=1, max_size=4), st.sampled_from(list(BUFFERS)))
def test_a_union_serves_each_layer_and_is_no_larger_than_needed(layers, transport):
    sizes = [workspace(transport, payload, 4, 64) for payload in layers]
    shared = union(sizes)
    assert all(shared[name] >= size for layer in sizes for name, size in layer.items())
    assert all(any(layer[name] == size for layer in sizes) for name, size in shared.items())


def test_refuses():
    with pytest.raises(UnknownNameError, match="nvfp4"):
        Payload("nvfp", 64, 2)
    with pytest.raises(UnknownNameError, match="auto"):
        payload_format("bf16", "outo", read=None)
    with pytest.raises(ValueRangeError, match="hidden=0"):
        Payload("bf16", 0, 2)
    with pytest.raises(UnknownNameError, match="all_gather"):
        workspace("allgather", Payload("bf16", 64, 2), 2, 8)
