"""`benchmarks/decode_step.py` on a CPU: what it compares, and what it says of what cannot run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the package transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import decode_model
import decode_step

SMALL = decode_model.Shape(
    layers=2, hidden=128, intermediate=128, experts=4, top_k=2, heads=4, key_heads=2, head_size=16,
    vocabulary=64,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_rehearsal_compares_and_times(tmp_path, capsys):
    told = "--device cpu --layers 1 --hidden 128 --intermediate 128 --experts 4 --top-k 2 --heads 2"
    told += " --key-heads 1 --head-size 16 --vocabulary 64 --context 4 --seconds 0 --batches 3"
    path = tmp_path / "rows.json"
    rows = decode_step.main([*told.split(), "--schemes", "bf16,fp8_block128", "--out", str(path)])
    ran = {row.contender: row for row in rows if row.us is not None}
    assert set(ran) >= {
        "transformers/eager", "transformers/batched_mm", "transformers/grouped_mm", "hal",
        "hal+attention", "hal/as loaded",
    }  # fmt: skip
    for row in ran.values():
        assert row.note == ""
        assert 0 < row.error < decode_step.ALLOWED.get(row.scheme, 0.012)
        assert row.floor_us > 0
    text = capsys.readouterr().out
    for row in rows:
        if row.us is None:
            assert row.contender.startswith("transformers/fp8")
            assert f"left out: {row.scheme} {row.contender} at batch 3: {row.note}" in text
    assert len(path.read_text()) > 100


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.inference_mode()
def test_experts_that_give_other_numbers_are_wrong_and_never_the_best():
    device = torch.device("cpu")
    model = decode_model.build(SMALL, "int4_w4a16", device, attention=False, kept=False)
    model.set_experts_implementation("hal")
    step = decode_model.Step(model, SMALL, 2, 4)
    first, seen = decode_model.watch(model, step)
    assert torch.equal(first, step())  # every call writes the same position
    assert seen.error(2) < 0.012
    module, *rest, out = seen.layers[1]
    seen.layers[1] = (module, *rest, out * 1.1)
    assert seen.error(2) == pytest.approx(0.1, abs=0.01)
    rows = [
        decode_step.Row(2, "bf16", "transformers/eager", us=9.0, floor_us=1.0),
        decode_step.Row(2, "bf16", "transformers/grouped_mm", us=4.0, floor_us=1.0, note="wrong"),
    ]
    assert decode_step.best_of_theirs(rows) == {2: 9.0}
    assert "0.44" in decode_step.table(rows)[2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.inference_mode()
def test_the_floor_counts_what_a_step_reads():
    device = torch.device("cpu")
    shape = replace(SMALL, layers=1)
    model = decode_model.build(shape, "bf16", device, attention=False, kept=False)
    expert = 3 * shape.hidden * shape.intermediate * 2
    assert decode_model._expert_bytes(model.model.layers[0].mlp.experts) == shape.experts * expert
    step = decode_model.Step(model, shape, 1, 4)
    model.set_experts_implementation("eager")
    _, seen = decode_model.watch(model, step)
    assert seen.bytes_hit() == shape.top_k * expert  # one token hits as many experts as it takes
    assert step.cache_bytes == 2 * 5 * shape.key_heads * shape.head_size * 2
    attention = 2 * shape.hidden * (shape.heads + shape.key_heads) * shape.head_size
    norms = 3 * shape.hidden + 2 * shape.head_size
    rows = shape.hidden * (shape.experts + shape.vocabulary + 1)
    rotary = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    wanted = 2 * (attention + norms + rows) + rotary
    assert decode_model.other_bytes(model, 1) == wanted
