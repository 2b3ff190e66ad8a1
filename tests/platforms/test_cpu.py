"""Odd machines as /proc and /sys describe them: each gets a CPU platform, and true facts of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import platform_fakes as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from platform_fakes import GIB, machine

from hal.device import DeviceSpec
from hal.platforms.cpu import CpuPlatform, detect
from hal.platforms.machine import Machine
from hal.platforms.procfs import parse_list

ONLINE = "sys/devices/system/cpu/online"
CGROUP = "sys/fs/cgroup"
AMX = "avx2 avx512f avx512bw avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
SVE = "fp asimd asimddp i8mm bf16 sve"


def cpu(root: Path, files: dict[str, str] | None = None, **changes: Any) -> CpuPlatform:
    """Return what is found where only `files` are; the probe must have come to its end."""
    for path, text in (files or {}).items():
        fakes.write(root, path, text)
    here = machine(root, **changes)
    found = detect(here)
    assert here.log[-1].outcome == "found", here.log[-1]
    return found


def status(allowed: str) -> str:
    return f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\nMems_allowed:\t1\n"


def cpuinfo(*flags: str, label: str = "flags", more: str = "") -> str:
    """Return a /proc/cpuinfo of one processor for each of `flags`."""
    return "\n".join(
        f"processor\t: {number}\n{more}{label}\t\t: {text}\nvmx flags\t: {AMX}\n"
        for number, text in enumerate(flags)
    )


# Which CPUs


def test_only_online_and_allowed_cpus_count(tmp_path: Path) -> None:
    fakes.add_cpu(tmp_path, online="0-5,7", allowed="4-7")
    fakes.write(tmp_path, "proc/self/cgroup", "0::/jobs/pod\n")
    fakes.write(tmp_path, f"{CGROUP}/jobs/pod/memory.max", "max\n")
    fakes.write(tmp_path, f"{CGROUP}/jobs/memory.max", f"{8 * GIB}\n")
    platform = cpu(tmp_path)
    spec = platform.device(0)
    assert (spec.compute_units, spec.memory_bytes) == (3, 8 * GIB)
    assert (spec.name, str(spec.arch), spec.guess) == ("Intel(R) Xeon(R)", "x86_64+amx", False)
    assert platform.memory(0) == (8 * GIB, 8 * GIB)
    assert platform.notes == ()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-3,8", {0, 1, 2, 3, 8}),
        (" 1 , 3 \n", {1, 3}),
        ("0-1023", set(range(1024))),
        ("0-", set()),
        ("-", set()),
        ("", set()),
        ("4-2", set()),
        ("x,2,1-y,²", {2}),
        ("7,0-4294967295", set(range(1 << 16))),
        ("9" * 5000, set()),
    ],
)
def test_lists(text: str, numbers: set[int]) -> None:
    assert parse_list(text) == numbers


@pytest.mark.parametrize(
    ("files", "count"),
    [
        pytest.param({}, 1, id="nothing is said"),
        pytest.param({ONLINE: "0-3\n"}, 4, id="no /proc"),
        pytest.param({ONLINE: "0-"}, 1, id="a torn list"),
        pytest.param({ONLINE: "", "proc/self/status": status("2,4")}, 2, id="an empty list"),
        pytest.param(
            {"proc/self/status": status("0-127"), "proc/cpuinfo": cpuinfo("avx2", "avx2")},
            2,
            id="no /sys, and a virtual machine that allows CPUs it has not",
        ),
        pytest.param(
            {ONLINE: "0-1", "proc/self/status": status("4,7,9")},
            3,
            id="lxcfs numbers the container's CPUs anew",
        ),
        pytest.param(
            {ONLINE: "0-7", "proc/self/cgroup": "0::/", f"{CGROUP}/cpuset.cpus.effective": "0,5"},
            2,
            id="gVisor has no list of allowed CPUs",
        ),
        pytest.param(
            {
                ONLINE: "0-7",
                "proc/self/cgroup": "3:cpuset:/docker/ab",
                f"{CGROUP}/cpuset/cpuset.effective_cpus": "2-4",
            },
            3,
            id="a cpuset of version 1",
        ),
    ],
)
def test_where_the_count_comes_from(tmp_path: Path, files: dict[str, str], count: int) -> None:
    assert cpu(tmp_path, files).device(0).compute_units == count


# How much of their time

HYBRID = """\
12:cpu,cpuacct:/user.slice
4:memory:/pod
1:name=systemd:/user.slice/session:1
0::/user.slice/session-1.scope
"""


@pytest.mark.parametrize(
    ("files", "count", "share"),
    [
        ({"": "0::/jobs/pod", "jobs/pod/cpu.max": "max 100000"}, 8, ""),
        ({"": "0::/jobs/pod", "jobs/pod/cpu.max": "200000 100000"}, 2, "2"),
        ({"": "0::/jobs/pod", "jobs/pod/cpu.max": "150000 100000"}, 2, "1.5"),
        ({"": "0::/jobs/pod", "jobs/pod/cpu.max": "750000 100000"}, 8, ""),
        ({"": "0::/a/b", "a/cpu.max": "300000 100000", "a/b/cpu.max": "700000 100000"}, 3, "3"),
        ({"": "0::/", "cpu.max": "5000 10000"}, 1, "0.5"),
        ({"": "0::/seen/from/outside", "cpu.max": "400000"}, 4, "4"),
        ({"": "0::/../sibling", "../sibling/cpu.max": "100000 100000"}, 8, ""),
        ({"": "0::/", "cpu.max": "0 100000"}, 8, ""),
        ({"": "0::/", "cpu.max": "100000 0"}, 8, ""),
        ({"": "0::/", "cpu.max": "9" * 30 + " 1"}, 8, ""),
        ({"": "0::/", "cpu.max": "\0\1 junk"}, 8, ""),
        ({"": "0::/nul\0byte", "cpu.max": "100000 100000"}, 1, "1"),
        ({"": HYBRID, "cpu/user.slice/cpu.cfs_quota_us": "-1"}, 8, ""),
        (
            {
                "": HYBRID,
                "cpu/user.slice/cpu.cfs_quota_us": "300000",
                "cpu/user.slice/cpu.cfs_period_us": "50000",
            },
            6,
            "6",
        ),
        ({"": HYBRID, "cpu/cpu.cfs_quota_us": "200000"}, 2, "2"),
    ],
)
def test_a_quota_cuts_what_can_be_kept_busy(
    tmp_path: Path, files: dict[str, str], count: int, share: str
) -> None:
    fakes.add_cpu(tmp_path)
    fakes.write(tmp_path, "proc/self/cgroup", files.pop(""))
    platform = cpu(tmp_path, {f"{CGROUP}/{path}": text for path, text in files.items()})
    assert platform.device(0).compute_units == count
    assert platform.notes == (
        (f"the control group allows {share} of 8 CPUs' time",) if share else ()
    )


def test_groups_are_looked_for_where_they_are_mounted(tmp_path: Path) -> None:
    """In a container the mount shows a part of the tree, under any name."""
    fakes.add_cpu(tmp_path)
    mounts = (
        "30 24 0:26 / /sys rw - sysfs sysfs rw\n"
        "41 31 0:38 /docker\\134x2d/ab /cg/unified rw shared:9 master:1 - cgroup2 cgroup2 rw\n"
        "33 31 0:30 /ab /cg/cpu\\040time rw - cgroup cgroup rw,cpu,cpuacct\n"
        "damaged - cgroup\n\n - \n"
    )
    files = {
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": "2:cpu,cpuacct:/ab/job\n0::/docker\\x2d/ab/job\n",
        "cg/unified/job/memory.max": f"{3 * GIB}",
        "cg/cpu time/job/cpu.cfs_quota_us": "200000",
        f"{CGROUP}/cpu/job/cpu.cfs_quota_us": "100000",
    }
    spec = cpu(tmp_path, files).device(0)
    assert (spec.compute_units, spec.memory_bytes) == (2, 3 * GIB)


# Memory


@pytest.mark.parametrize(
    ("meminfo", "limit", "memory"),
    [
        ("MemTotal: 1048576 kB", "max", GIB),
        ("MemTotal: 1048576 kB", "0", GIB),
        ("MemTotal: 1048576 kB", "9223372036854771712", GIB),
        ("MemTotal: 1048576 kB", f"{GIB // 2}", GIB // 2),
        ("MemTotal: 1048576 kB", "-1", GIB),
        ("MemFree: 3 kB", f"{GIB}", GIB),
        ("MemFree: 3 kB", "9223372036854771712", None),
        ("MemTotal: 0 kB", "max", None),
        ("MemTotal: lots", "", None),
        ("MemTotal: " + "9" * 5000 + " kB", "", None),
    ],
)
@pytest.mark.parametrize(
    ("group", "file"),
    [("0::/", "memory.max"), ("4:memory:/", "memory/memory.limit_in_bytes")],
)
def test_memory(
    tmp_path: Path, meminfo: str, limit: str, memory: int | None, group: str, file: str
) -> None:
    files = {"proc/meminfo": meminfo, "proc/self/cgroup": group, f"{CGROUP}/{file}": limit}
    assert cpu(tmp_path, files).device(0).memory_bytes == memory


# NUMA nodes


@pytest.mark.parametrize(
    ("nodes", "allowed", "expected"),
    [
        pytest.param({}, "0-7", (0,), id="a kernel without nodes"),
        pytest.param({0: "0-3", 1: "4-7"}, "0-7", (0, 1), id="two sockets"),
        pytest.param({0: "0-3", 1: "4-7"}, "5", (1,), id="bound to one socket"),
        pytest.param({0: "0-7", 1: "", 2: "\n"}, "0-7", (0,), id="CXL and HBM have no CPU"),
        pytest.param({0: "0-3", 1: "8-11"}, "0-15", (0,), id="all CPUs of a node are offline"),
        pytest.param({0: "0-3", 8: "4-7", 255: ""}, "0-7", (0, 8), id="POWER9 with GPU memory"),
        pytest.param({2: "64-95"}, "0-7", (2,), id="a list that contradicts the others"),
        pytest.param({0: "-", 1: "x"}, "0-7", (0,), id="junk"),
    ],
)
def test_numa_nodes(
    tmp_path: Path, nodes: dict[int, str], allowed: str, expected: tuple[int, ...]
) -> None:
    fakes.add_cpu(tmp_path, allowed=allowed)
    folder = "sys/devices/system/node"
    files = {f"{folder}/node{node}/cpulist": text for node, text in nodes.items()}
    files |= {f"{folder}/has_cpu": "0\n", f"{folder}/nodes": "", f"{folder}/node": ""}
    assert cpu(tmp_path, files).device(0).numa_nodes == expected


# Instruction sets


@pytest.mark.parametrize(
    ("processor", "info", "arch", "features"),
    [
        ("x86_64", "flags : fpu avx2 fma\n", "x86_64", "avx2"),
        ("AMD64", "flags : avx2 avx512f avx512bw avx512vl\n", "x86_64+avx512", "avx2 avx512"),
        ("x86_64", "FLAGS\t:AVX2 avx_vnni\r\n", "x86_64", "avx2"),
        ("x86_64", cpuinfo(AMX), "x86_64+amx", None),
        ("x86_64", cpuinfo("avx2 avx512f avx512_vnni"), "x86_64", "avx2 avx512_vnni"),
        ("aarch64", "Features : fp asimd sve\n", "aarch64+neon", "neon sve"),
        ("arm64", f"Features : {SVE}\n", "aarch64+sve", "neon dotprod i8mm arm_bf16 sve"),
        ("aarch64", f"features: {SVE}\n", "aarch64+sve", "neon dotprod i8mm arm_bf16 sve"),
    ],
)
def test_instruction_sets(
    tmp_path: Path, processor: str, info: str, arch: str, features: str | None
) -> None:
    spec = cpu(tmp_path, {"proc/cpuinfo": info}, processor=processor).device(0)
    expected = (AMX if features is None else features).replace(" avx512f avx512bw avx512vl", "")
    assert spec.features - {"avx512"} == set(expected.split()) - {"avx512"}
    assert (str(spec.arch), spec.guess, spec.compute_units) == (arch, False, 1)


@pytest.mark.parametrize(
    ("system", "processor", "info", "arch"),
    [
        pytest.param("linux", "x86_64", "flags : fpu sse2\n", "x86_64", id="before AVX2"),
        pytest.param("linux", "x86_64", "", "x86_64", id="no /proc"),
        pytest.param("linux", "x86_64", "flags\t:\n\nprocessor", "x86_64", id="torn"),
        pytest.param("linux", "x86_64", "\0\xff\ufffd:\x85" * 999, "x86_64", id="binary"),
        pytest.param("linux", "aarch64", cpuinfo(AMX), "aarch64+neon", id="qemu-user shows x86"),
        pytest.param("linux", "x86_64", f"Features: {SVE}", "x86_64", id="Rosetta shows Arm"),
        pytest.param("linux", "armv8l", "Features : neon asimd i8mm", "armv8l", id="32-bit Arm"),
        pytest.param("linux", "riscv64", "isa : rv64imafdcv\n", "riscv64", id="RISC-V"),
        pytest.param("linux", "ppc64le", "cpu : POWER9\n", "ppc64le", id="POWER"),
        pytest.param("linux", "s390x", "features\t: vx vxe\n", "s390x", id="s390x"),
        pytest.param("linux", "loongarch64", "Features : lasx\n", "loongarch64", id="LoongArch"),
        pytest.param("darwin", "x86_64", "", "x86_64", id="Intel Mac"),
        pytest.param("win32", "AMD64", "", "x86_64", id="Windows"),
        pytest.param("aix", "Power Macintosh", "", "power_macintosh", id="a name with a blank"),
        pytest.param("linux", "", "", "unknown", id="no name"),
    ],
)
def test_unknown_processors_are_cautious_guesses(
    tmp_path: Path, system: str, processor: str, info: str, arch: str
) -> None:
    files = {"proc/cpuinfo": info} if info else {}
    spec = cpu(tmp_path, files, system=system, processor=processor).device(0)
    assert (str(spec.arch), spec.guess, spec.features) == (arch, True, frozenset())
    assert DeviceSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_arm_without_proc(tmp_path: Path, system: str) -> None:
    spec = cpu(tmp_path, system=system, processor="ARM64").device(0)
    assert (str(spec.arch), spec.features, spec.guess) == ("aarch64+neon", {"neon"}, False)


@pytest.mark.parametrize(
    ("allowed", "arch"),
    [("0-3", "x86_64"), ("0-1", "x86_64+amx"), ("2", "x86_64+avx512"), ("8-9", "x86_64")],
)
def test_unlike_cores_have_in_common_what_they_have(
    tmp_path: Path, allowed: str, arch: str
) -> None:
    info = cpuinfo(AMX, AMX, "avx2 avx512f avx512bw avx512vl", "avx2")
    files = {"proc/cpuinfo": info, "proc/self/status": status(allowed)}
    assert str(cpu(tmp_path, files).arch()) == arch


def test_flags_that_stand_once_are_of_all(tmp_path: Path) -> None:
    """Arm kernels before 3.18 listed the processors first, and what they can do at the end."""
    numbers = "Processor : AArch64 rev 0\nprocessor : 0\nprocessor : 1\n\nFeatures : fp asimd\n"
    files = {"proc/cpuinfo": numbers, "proc/self/status": status("0")}
    spec = cpu(tmp_path, files, processor="aarch64").device(0)
    assert (spec.features, spec.name) == ({"neon"}, "AArch64 rev 0")


def test_a_huge_cpuinfo_is_read_in_time(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": cpuinfo(*[AMX + " x" * 600] * 2048),
        "proc/self/status": status("0-2047"),
    }
    start = time.perf_counter()
    spec = cpu(tmp_path, files).device(0)
    assert (str(spec.arch), spec.compute_units) == ("x86_64+amx", 2048)
    assert time.perf_counter() - start < 60


# Names


@pytest.mark.parametrize(
    ("info", "model", "name"),
    [
        (cpuinfo("avx2", more="model\t: 17\nmodel name\t: AMD EPYC  9654 \n"), "", "AMD EPYC 9654"),
        ("CPU implementer : 0x41\nCPU part : 0xd4f\n", "", "Neoverse-V2"),
        (
            "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd87\n\n"
            "processor : 1\nCPU implementer : 0x41\nCPU part : 0xd85\n",
            "NVIDIA GB10\0",
            "Cortex-A725 + Cortex-X925",
        ),
        ("CPU implementer : 0x99\nCPU part : 0xd4f\n", "A board\0", "A board"),
        ("Model : Raspberry Pi 9\n", "", "Raspberry Pi 9"),
        ("cpu\t\t: POWER9, altivec supported\n", "", "POWER9, altivec supported"),
        ("uarch : sifive,u74-mc\n", "", "sifive,u74-mc"),
        ("model name : \x1b[31mred\x07" + "x" * 900, "", "[31mred " + "x" * 72),
        ("", "\0\0", "aarch64+neon"),
    ],
)
def test_names(tmp_path: Path, info: str, model: str, name: str) -> None:
    files = {"proc/cpuinfo": info, "proc/device-tree/model": model}
    assert cpu(tmp_path, files, processor="aarch64").device(0).name == name


# Whatever happens


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
def test_a_proc_that_hangs_costs_the_time_limit(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    pipe = tmp_path / "proc/cpuinfo"
    os.mkfifo(pipe)
    found = detect(machine(tmp_path, seconds=0.2))
    assert (found.device(0).compute_units, found.device(0).numa_nodes) == (1, (0,))
    (note,) = found.notes
    assert note.startswith("asking about the CPU failed: no answer within 0.2 s")
    pipe.open("wb").close()  # lets the probe's thread end


def test_folders_and_links_in_place_of_files(tmp_path: Path) -> None:
    for path in ("proc/cpuinfo", "proc/self/status", ONLINE, "sys/devices/system/node/node0"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "proc/meminfo").symlink_to(tmp_path / "proc/meminfo")
    assert cpu(tmp_path).device(0).compute_units == 1


FILES = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/self/status",
    "proc/self/cgroup",
    "proc/self/mountinfo",
    "proc/device-tree/model",
    ONLINE,
    "sys/devices/system/node/node0/cpulist",
    "sys/devices/system/node/node1/cpulist",
    f"{CGROUP}/cpu.max",
    f"{CGROUP}/memory.max",
    f"{CGROUP}/cpuset.cpus.effective",
    f"{CGROUP}/cpu/cpu.cfs_quota_us",
    f"{CGROUP}/cpu/cpu.cfs_period_us",
)
PIECES = (
    *("processor", "flags", "Features", "model name", "CPU part", "Cpus_allowed_list"),
    *("MemTotal", "MemAvailable", "kB", "max", "avx2", "asimd", "cpu", "memory", "cpuset", "0::"),
    *(":", ": ", "\t", " ", "\n", "-", ",", "/", "..", "\0", " - cgroup2 ", "rw", "\\040"),
    *("0", "1", "-1", "7", "100000", "9223372036854771712", "9" * 40, "99999999999", "²"),
)
TEXTS = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(str.encode),
    st.lists(st.sampled_from(PIECES), max_size=30).map(lambda pieces: "".join(pieces).encode()),
)


@given(
    files=st.dictionaries(st.sampled_from(FILES), TEXTS),
    processor=st.one_of(st.sampled_from(["x86_64", "aarch64", "riscv64"]), st.text(max_size=9)),
    system=st.sampled_from(["linux", "darwin", "win32"]),
)
def test_whatever_the_files_say(files: dict[str, bytes], processor: str, system: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        platform = cpu(Path(folder), processor=processor, system=system)
        spec = platform.device(0)
        assert spec.compute_units is not None
        assert spec.compute_units >= 1
        assert len(spec.numa_nodes) >= 1
        assert DeviceSpec.from_dict(spec.to_dict()) == spec
        free, total = platform.memory(0)
        assert free is None or total is None or 0 <= free <= total


# The machine that the tests run on


def test_this_machine() -> None:
    spec = detect(Machine.here()).device(0)
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert spec.compute_units is not None
    assert 1 <= spec.compute_units <= (most or 1)
    assert spec.numa_nodes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_this_process_bound_to_one_cpu() -> None:
    allowed = os.sched_getaffinity(0)
    units: list[int | None] = []

    def bound() -> None:
        os.sched_setaffinity(0, {min(allowed)})  # of this thread alone, and of what it starts
        units.append(detect(Machine.here()).device(0).compute_units)

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert units == [1]


def test_no_process_is_started_and_lscpu_least_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM broke four times on `lscpu -J`: a bare `-`, no key `node`, no nodes, offline CPUs."""
    fakes.write(tmp_path, "lscpu", f"#!/bin/sh\ntouch {tmp_path}/ran\necho '{{\"cpus\": [-]'\n")
    (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    started: list[str] = []
    before = detect(Machine.here()).device(0)

    def refuse(name: str) -> Any:
        return lambda *args, **kwargs: started.append(name)

    for name in ("fork", "posix_spawn", "posix_spawnp", "forkpty", "system", "popen"):
        monkeypatch.setattr(os, name, refuse(name), raising=False)
    monkeypatch.setattr(subprocess, "Popen", refuse("Popen"))
    assert detect(Machine.here()).device(0) == before
    assert started == []
    assert not (tmp_path / "ran").exists()


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from hal.device import Software; from hal.platforms.cpu import detect; "
        "from hal.platforms.machine import Machine; detect(Machine({}, Software())); "
        "heavy = {'torch', 'numpy', 'subprocess', 'importlib.metadata', 'triton'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
