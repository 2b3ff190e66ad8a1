"""What exchanges of other libraries need, and what is said where they do not have it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hal.device import Link, Software
from hal.errors import ArgumentError
from hal.ops import ExpertParallel
from hal.ops.adapters import deep_ep
from hal.ops.payload import FORMATS
from hal.ops.transports import EXPERT_PARALLEL
from hal.runtime import resolve_platform
from hal.selection import choose, options_from

NAMES = ("deep_ep", "deep_ep_low_latency", "flashinfer_one_sided", "mori")


def kernel_of(name):
    return next(kernel for kernel in EXPERT_PARALLEL.kernels if kernel.name == name)


PROBLEM = {
    "ranks": 8, "experts": 256, "top_k": 8, "hidden": 7168, "max_tokens": 128, "dtype": "bfloat16",
    "backend": "nccl", "host_sync": True, "all_gather": True, "reduce_scatter": True,
    "all_to_all": True, "symmetric_memory": True, "hosts": 1,
}  # fmt: skip
INSTALLED = (
    ("amd-mori", "1.2.4"), ("deep-ep", "1.2.1"), ("flashinfer-python", "0.7.4"),
    ("torch", "2.9"), ("triton", "3.5"),
)  # fmt: skip


def chosen(platform, scheme="fp8", packages=INSTALLED, spec=None, force=None, **changes):
    spec = spec or resolve_platform(platform).device(0)
    software = Software(torch=spec.software.torch, packages=packages)
    problem = {**PROBLEM, **changes}
    options = options_from("expert_parallel", force=force)
    return choose("expert_parallel", scheme, replace(spec, software=software), problem, options)


@pytest.mark.parametrize(
    ("name", "platform", "changes", "words"),
    [
        ("deep_ep", "cuda:h200", {}, ""),
        ("deep_ep", "cuda:h200", {"host_sync": False}, "waits for the number of rows"),
        ("deep_ep", "cuda:h200", {"ranks": 3}, "ranks 2 or 4 or 8"),
        ("deep_ep", "cuda:h200", {"hosts": 2}, "hosts=2"),
        ("deep_ep", "cuda:h200", {"hidden": 2000}, "hidden a multiple of 128"),
        ("deep_ep", "cuda:h200", {"dtype": "float16"}, "dtype bfloat16"),
        ("deep_ep", "cuda:h200", {"backend": "gloo"}, "backend nccl"),
        ("deep_ep", "cuda:a100", {}, "sm_90"),
        ("deep_ep", "cuda:rtx5090", {}, "found pcie, needs devices linked by nvlink"),
        ("deep_ep_low_latency", "cuda:b200", {"host_sync": False, "ranks": 24, "hosts": 3}, ""),
        ("deep_ep_low_latency", "cuda:h200", {"hidden": 2880}, "sizes that it is compiled for"),
        ("deep_ep_low_latency", "cuda:h200", {"max_tokens": 512}, "NVSHMEM_QP_DEPTH"),
        ("deep_ep_low_latency", "cuda:h200", {"top_k": 10}, "top_k <= 9"),
        ("flashinfer_one_sided", "cuda:h200", {"host_sync": False, "ranks": 6}, ""),
        ("flashinfer_one_sided", "cuda:h200", {"top_k": 5}, "top_k 1 or 2 or 3 or 4 or 6"),
        ("flashinfer_one_sided", "rocm:mi300x", {}, "needs cuda"),
        ("mori", "rocm:mi300x", {"host_sync": False}, ""),
        ("mori", "rocm:mi210", {}, "gfx942 or gfx950"),
        ("mori", "rocm:mi355x", {"ranks": 6}, "ranks 2 or 4 or 8"),
        ("mori", "cuda:h200", {}, "needs rocm"),
    ],
)
def test_needs(name, platform, changes, words):
    told = chosen(platform, **changes)
    candidate = told.candidate(name)
    failures = " ".join(map(str, candidate.failures))
    assert bool(failures) == bool(words), failures
    assert words in failures
    assert not told.kernel.claimed, "what hal has not run is not taken unasked"


@pytest.mark.parametrize("name", NAMES)
def test_formats_and_packages(name):
    platform = "rocm:mi300x" if name == "mori" else "cuda:h200"
    for scheme in FORMATS:
        failures = chosen(platform, scheme).candidate(name).failures
        assert bool(failures) == (scheme not in kernel_of(name).schemes), (scheme, failures)
    told = str(chosen(platform, packages=()).candidate(name).failures)
    assert "not installed" in told
    old = tuple((package, "0.1") for package, _ in INSTALLED)
    assert " 0.1" in str(chosen(platform, packages=old).candidate(name).failures)
    assert chosen(platform, packages=(), force=name).kernel is None
    assert chosen(platform, force=name).kernel.name == name


def test_links_that_were_found_count():
    nvl = resolve_platform("cuda:h100-nvl").device(0)
    assert nvl.interconnect == "pcie"
    failures = chosen("", spec=nvl).candidate("deep_ep").failures
    assert "linked by nvlink" in str(failures)
    linked = replace(nvl, links=(Link(1, "nvlink"),))
    assert not chosen("", spec=linked).candidate("deep_ep").failures


def test_weights_of_the_first_product_cannot_be_applied_afterwards():
    from hal.ops.parallel_moe import ParallelFusedMoE

    layer = object.__new__(ExpertParallel)
    layer._exchange = object.__new__(deep_ep._LowLatency)
    layer.selection = chosen("cuda:h200", force="deep_ep_low_latency")
    with pytest.raises(ArgumentError, match="behind deep_ep_low_latency"):
        ParallelFusedMoE(None, None, group=layer, apply_router_weight_on_input=True)
