"""Which platform is in use: asked for, or found."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import hal
from hal import runtime
from hal.device import Software
from hal.errors import DTypeError, PlatformError, UnknownNameError
from hal.platforms.tables import device_spec

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    hal.refresh()
    yield
    hal.refresh()


@pytest.mark.parametrize(
    ("text", "name", "arch"),
    [
        ("rocm:gfx942", "MI300X", "gfx942"),
        ("rocm:gfx942:sramecc+:xnack-", "MI300X", "gfx942"),
        ("cuda:h200", "H200", "sm_90"),
        ("CUDA:H200", "H200", "sm_90"),
        (" cuda:sm_90 ", "H100", "sm_90"),
        ("cuda:9.0", "H100", "sm_90"),
        ("cuda:sm90a", "H100", "sm_90"),
        ("cuda:RTX 5090", "RTX 5090", "sm_120"),
        ("xpu:b580", "Arc B580", "xe2"),
        ("cpu:avx512", "x86-avx512", "x86_64+avx512_bf16"),
    ],
)
def test_names(text: str, name: str, arch: str) -> None:
    made = hal.platform(text)
    assert (made.device().name, str(made.arch()), made.simulated) == (name, arch, True)
    assert hal.platform(text) is made


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("cuda:h20x", "cuda:h200"),
        ("rocm:mi300", "rocm:mi300x"),
        ("h200", "cuda:h200"),
        ("cud", "cuda"),
        ("rocm:gfx94", "rocm:gfx942"),
    ],
)
def test_unknown_names_carry_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        hal.platform(text)
    assert nearest in caught.value.nearest


def test_a_platform_that_is_not_here_says_why_and_what_can_be_simulated() -> None:
    missing = next(name for name in ("xpu", "rocm", "cuda") if not _is_here(name))
    with pytest.raises(PlatformError, match=f"{missing} cannot be used here: .*{missing}:"):
        hal.platform(missing)


def _is_here(name: str) -> bool:
    return name in runtime._detection().present


def test_bare_cpu_is_this_machine() -> None:
    assert not hal.platform("cpu").simulated
    assert hal.platform("CPU") is hal.platform("cpu")


def test_current_is_found_once_until_refresh() -> None:
    first = hal.current_platform()
    assert hal.current_platform() is first
    hal.refresh()
    assert hal.current_platform() is not first
    assert not first.simulated


def test_software_can_be_given() -> None:
    old = Software(torch="2.6.0", torch_build="rocm 6.2")
    spec = hal.platform("rocm:mi300x", software=old).device()
    assert spec.software is old
    assert hal.platform("rocm:mi300x").device().software != old
    with pytest.raises(PlatformError, match="simulated device only"):
        hal.platform("cpu", software=old)


def test_use_platform_nests() -> None:
    outside = hal.current_platform()
    with hal.use_platform("cuda:h100") as h100:
        assert hal.current_platform() is h100
        with hal.use_platform(device_spec("rocm", "mi300x")) as mi300x:
            assert hal.current_platform() is mi300x
            with hal.use_platform(h100):
                assert hal.current_platform() is h100
            assert hal.current_platform() is mi300x
        assert hal.current_platform() is h100
        with pytest.raises(UnknownNameError), hal.use_platform("cuda:h20x"):
            pass
        assert hal.current_platform() is h100
        with pytest.raises(KeyError), hal.use_platform("xpu:b580"):
            raise KeyError
        assert hal.current_platform() is h100
    assert hal.current_platform() is outside


def test_use_platform_is_of_one_thread_and_task() -> None:
    seen: dict[str, str] = {}
    inside = threading.Barrier(2)

    def run(name: str) -> None:
        with hal.use_platform(name):
            inside.wait(10)
            seen[name] = hal.current_platform().device().key
            inside.wait(10)

    names = ["cuda:h100", "rocm:mi300x"]
    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == {name: name for name in names}

    async def task(name: str) -> str:
        with hal.use_platform(name):
            await asyncio.sleep(0.01)
            return hal.current_platform().device().key

    async def both() -> list[str]:
        return await asyncio.gather(*map(task, names))

    assert asyncio.run(both()) == names


def test_detection_runs_once_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.platforms import detection

    calls: list[int] = []
    real = detection.detect

    def slow(machine: object) -> object:
        calls.append(1)
        threading.Event().wait(0.05)
        return real(machine)  # type: ignore[arg-type]

    monkeypatch.setattr(detection, "detect", slow)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(hal.current_platform())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1
    assert len(set(map(id, found))) == 1


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PLATFORM", "rocm:GFX942")
    assert hal.current_platform().device().name == "MI300X"
    with hal.use_platform("cuda:h100"):
        assert hal.current_platform().device().name == "H100"
    monkeypatch.setenv("HAL_PLATFORM", "rocm:gfx94x")
    with pytest.raises(UnknownNameError, match="gfx942"):
        hal.current_platform()
    monkeypatch.setenv("HAL_PLATFORM", " ")
    assert not hal.current_platform().simulated


def test_facts_belong_to_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.platform_of(CPU).is_cpu
    assert runtime.platform_of(META) is hal.current_platform()
    assert runtime.platform_of(CPU, "cuda:h100").device().name == "H100"
    with hal.use_platform("cuda:h100") as h100:
        assert runtime.platform_of(CPU) is h100, "a simulated platform computes on the CPU"
        assert runtime.platform_of(META) is h100
        assert runtime.platform_of(CPU, "cpu").is_cpu
    monkeypatch.setenv("HAL_PLATFORM", "xpu:b580")
    assert runtime.platform_of(CPU).is_xpu


def found_here(*, simulated: bool = False) -> hal.Platform:
    """Return an H200 that counts as found, next to the CPU."""
    from hal.platforms.cuda import CudaPlatform

    made = CudaPlatform.simulate(device_spec("cuda", "h200"))
    made._simulated = simulated
    return made


def test_mixed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = found_here(), hal.platform("cpu")
    both = SimpleNamespace(
        current=gpu, present={"cuda": gpu, "cpu": cpu}, absent={}, software=Software()
    )
    monkeypatch.setattr(runtime, "_detection", lambda: both)
    assert hal.current_platform() is gpu
    assert hal.platform("cuda") is gpu
    assert runtime.platform_of(CPU) is cpu
    assert runtime.platform_of(CUDA) is gpu
    assert runtime.platform_of(META) is gpu
    with hal.use_platform(cpu):
        assert hal.current_platform() is cpu
        assert runtime.platform_of(CUDA) is gpu, "what is asked for serves its own tensors only"
        assert runtime.platform_of(META) is cpu


def test_a_device_that_no_probe_found_is_described_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if _is_here("cuda") or _is_here("rocm"):
        pytest.skip("needs a machine where no probe finds a torch.cuda device")
    with pytest.raises(PlatformError, match="no platform serves tensors on 'cuda'"):
        runtime.platform_of(CUDA)
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=143771 << 20, multi_processor_count=132
    )
    fake = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: properties,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    found = runtime.platform_of(CUDA)
    assert (found.name, found.device().name, found.device().origin) == ("cuda", "H200", "torch")
    monkeypatch.setattr(torch.version, "hip", "7.2")
    properties.gcnArchName = "gfx1201:sramecc+"
    properties.name, properties.multi_processor_count = "AMD Radeon RX 9070 XT", 32
    properties.total_memory = 16304 << 20
    found = runtime.platform_of(CUDA)
    assert (found.name, found.device().name, found.device().compute_units) == (
        "rocm",
        "RX 9070 XT",
        64,
    )


def test_resolve() -> None:
    assert runtime.resolve_platform() is hal.current_platform()
    assert runtime.resolve_platform("cuda:h100") is hal.platform("cuda:h100")
    spec = device_spec("cuda", "h100")
    assert runtime.resolve_platform(spec).device() is spec
    made = hal.platform("xpu:b580")
    assert runtime.resolve_platform(made) is made
    with pytest.raises(DTypeError):
        runtime.resolve_platform(3)  # type: ignore[arg-type]


def test_selection_works_for_devices_that_are_not_here() -> None:
    for name in ("cuda:h100", "rocm:gfx942", "xpu:b580", "cpu:amx"):
        selection = hal.select("linear", scheme="bf16", platform=name)
        assert selection.kernel is not None
        assert selection.spec.key.startswith(name.partition(":")[0])


def mixed() -> hal.Platform:
    """Return an RTX 3090 and an H200 in one machine."""
    from hal.platforms.base import DeviceRecord
    from hal.platforms.cuda import CudaPlatform
    from hal.platforms.ordering import SimulatedOrdering

    specs = [hal.platform(f"cuda:{name}").device() for name in ("rtx-3090", "h200")]
    records = [DeviceRecord(spec, index) for index, spec in enumerate(specs)]
    return CudaPlatform(records, SimulatedOrdering("cuda", "two"), simulated=True)


def test_nothing_is_answered_for_device_0_because_no_other_was_named() -> None:
    both = mixed()
    with pytest.raises(hal.errors.AmbiguousDeviceError) as caught:
        hal.select("linear", scheme="fp8_channel", platform=both)
    assert "0: RTX 3090, 1: H200" in str(caught.value)
    assert caught.value.devices == ("RTX 3090", "H200")
    chosen = [
        hal.select("linear", scheme="fp8_channel", platform=both, device=index).spec.name
        for index in range(2)
    ]
    assert chosen == ["RTX 3090", "H200"]
    for ask in (both.device, both.arch, both.fp8_dtype, both.compute_capability, both.memory):
        with pytest.raises(hal.errors.AmbiguousDeviceError):
            ask()


def test_alike_devices_share_their_answers_and_nothing_else() -> None:
    from hal.device import Link
    from hal.platforms.base import DeviceRecord
    from hal.platforms.cuda import CudaPlatform
    from hal.platforms.ordering import SimulatedOrdering

    spec = hal.platform("cuda:h200").device()
    records = [
        DeviceRecord(spec.replace(numa_nodes=(i,), links=(Link(1 - i, "nvlink"),)), i)
        for i in range(2)
    ]
    both = CudaPlatform(records, SimulatedOrdering("cuda", "two"), simulated=True)
    assert both.device() == spec
    assert both.device(1).numa_nodes == (1,)
    assert both.arch() == spec.arch
    assert hal.select("linear", scheme="bf16", platform=both).kernel is not None
    with pytest.raises(hal.errors.AmbiguousDeviceError):
        both.physical_index()


def test_explain_tells_one_table_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from hal.cli import main

    with hal.use_platform(mixed()):
        assert main(["explain", "linear", "--scheme", "fp8_channel"]) == 0
        text = capsys.readouterr().out
        assert "cuda:rtx-3090 (sm_86)" in text
        assert "cuda:h200 (sm_90)" in text
        assert main(["explain", "linear", "--scheme", "fp8_channel", "--json"]) == 0
        first, second = json.loads(capsys.readouterr().out)
        assert (first["arch"], second["arch"]) == ("sm_86", "sm_90")
        assert main(["explain", "linear", "--scheme", "fp8_channel", "--device", "1"]) == 0
        assert "rtx-3090" not in capsys.readouterr().out
        assert main(["explain", "linear", "--scheme", "fp8_channel", "--device", "2"]) == 2
