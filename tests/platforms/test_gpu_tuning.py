"""On a GPU: what is warmed compiles no more, and tiles that are searched are found and taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hal
from hal.cli import main
from hal.errors import CompiledError
from hal.ops import FusedMoE, Linear, Routing, tuned, tuning
from hal.ops.shapes import read_shapes
from hal.quant import quantize
from hal.timing import time_graph

pytestmark = pytest.mark.gpu
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 2, 512, 256
SIZES = [f"experts={EXPERTS}", f"top_k={TOP_K}", f"hidden={HIDDEN}", f"intermediate={INTERMEDIATE}"]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA or ROCm: graphs of other devices are not timed")
    pytest.importorskip("triton", reason="needs the package triton")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))


def weights(scheme: str) -> tuple[Any, Any]:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16() / 16

    w13, w2 = random(EXPERTS, 2 * INTERMEDIATE, HIDDEN), random(EXPERTS, HIDDEN, INTERMEDIATE)
    return quantize(w13, scheme), quantize(w2, scheme)


def inputs(tokens: int) -> tuple[Any, Routing]:
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    ids = torch.randint(EXPERTS, (tokens, TOP_K), device="cuda", dtype=torch.int32)
    return x, Routing(ids=ids, weights=torch.rand(tokens, TOP_K, device="cuda"))


def own_kernel(scheme: str) -> str:
    spec = hal.current_platform().device(0)
    found = hal.select("fused_moe", scheme=scheme, platform=hal.current_platform())
    for candidate in found.candidates:
        if candidate.can_run and candidate.kernel.name in tuning.TUNABLE["fused_moe"]:
            return candidate.kernel.name
    pytest.skip(f"needs a Triton kernel of {scheme} for {spec.name}")


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "int4_w4a16"])
def test_nothing_compiles_after_warm_up(scheme: str) -> None:
    counts = [1 << power for power in range(11)]
    bound = FusedMoE(*weights(scheme), top_k=TOP_K, force=own_kernel(scheme), warmup=counts)
    with hal.no_compiles() as seen:
        for tokens in (1, 2, 3, 7, 24, 77, 300, 1000):
            bound(*inputs(tokens))
        torch.cuda.synchronize()
    assert seen.watching.startswith("triton")


def test_a_late_compile_names_what_changed() -> None:
    weight = quantize(torch.randn(192, 520, device="cuda").bfloat16(), "bf16")
    bound = Linear(weight, force="triton")
    with pytest.raises(CompiledError) as caught, hal.no_compiles():
        bound(torch.randn(40, 520, device="cuda").bfloat16())
    assert any("gemm" in each.kernel or "gemv" in each.kernel for each in caught.value.compiles)


def test_a_capture_is_recorded_and_its_replays_are_not(tmp_path: Path) -> None:
    bound, path = FusedMoE(*weights("bf16"), top_k=TOP_K, warmup=[8]), tmp_path / "shapes.json"
    x, routing = inputs(8)
    with hal.record_shapes(path):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bound(x, routing)
        for _ in range(3):
            graph.replay()
    (one,) = read_shapes(path)
    assert one.calls == {8: 1}


def test_times_are_those_of_a_cold_cache() -> None:
    source = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    small = time_graph(lambda: source[:64].add_(1))
    large = time_graph(lambda: source.add_(1))
    assert 0 < small < large


@pytest.mark.slow
def test_tiles_are_searched_written_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = own_kernel("fp8_channel")
    every = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *told, **more: every(*told, **more)[:4])
    arguments = ["fused_moe", "--scheme", "fp8_channel", *SIZES, "--tokens", "64"]
    assert main(["tune", *arguments, "--kernel", kernel, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["found"]
    assert found["note"] == ""
    assert 0 < found["us"] <= found["default_us"]
    assert found["tried"] >= 2
    rows = tuned.read_tiles(tuned.user_table())
    assert len(rows) == answer["rows"] == len(found["tiles"])
    w13, w2 = weights("fp8_channel")
    x, routing = inputs(64)
    wanted = FusedMoE(w13, w2, force="reference")(x, routing).float()
    got = FusedMoE(w13, w2, force=kernel)(x, routing).float()
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    assert main(["bench", *arguments, "--kernel", kernel, "--json"]) == 0
    (timed,) = json.loads(capsys.readouterr().out)["times"]
    assert timed["us"] > 0
