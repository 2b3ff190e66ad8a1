"""What children find out about torch, Triton and kernel packages, and what is remembered of it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import platform_fakes as fakes
import pytest
from platform_fakes import CPU_TORCH, CUDA_TORCH, FakeNvml, h200

from hal.arch import parse_arch
from hal.children import run_in_child
from hal.device import Software
from hal.diagnosis import Subject
from hal.findings import Severity
from hal.health import HEALTH_FILE, Health, known_health, try_packages
from hal.needs import Context
from hal.platforms.detection import detect
from hal.platforms.tables import device_spec
from hal.software import find_software, forget_software
from hal.trials import TRIALS, built_for, compare_devices, run_trials, try_kernel_packages

SYMBOL = "libacme.so: undefined symbol: _ZN3c105ErrorC2Ev"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is remembered in a folder of the test's own."""
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that children import from before anything else."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def cpu(root: Path, **changes: Any) -> Subject:
    machine = fakes.machine(root, dataclasses.replace(CPU_TORCH, **changes))
    return Subject(machine, detect(machine))


def cuda(root: Path) -> Subject:
    machine = fakes.machine(root, CUDA_TORCH, nvml=FakeNvml(h200(0), h200(1)))
    return Subject(machine, detect(machine))


def told(name: str, subject: Subject, seconds: float = 60.0) -> dict[str, str]:
    return {finding.code: str(finding) for finding in TRIALS[name](subject, seconds)}


class TestChildren:
    def test_the_last_answer_counts_whatever_else_is_printed(self) -> None:
        code = "print('noise'); answer(1); print('more'); answer(arguments); print('end')"
        result = run_in_child(code, "a", "b", seconds=20)
        assert (result.answer, result.failure) == (["a", "b"], "")

    @pytest.mark.parametrize(
        ("code", "failure"),
        [
            ("raise OSError('no such thing')", "OSError: no such thing"),
            ("raise SystemExit(4)", "ended the process with status 4 and without a word"),
            ("import os; os.abort()", "ended by SIGABRT"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
            ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ],
    )
    def test_a_bad_end_is_one_line(self, code: str, failure: str) -> None:
        result = run_in_child(f"answer(7)\n{code}", seconds=20)
        assert (result.answer, result.failure) == (7, failure)

    def test_a_child_that_hangs_is_killed_with_all_that_it_started(self, tmp_path: Path) -> None:
        mark = tmp_path / "alive"
        grandchild = (
            f"import time\nwhile 1:\n    open({str(mark)!r}, 'a').write('x')\n    time.sleep(.05)"
        )
        code = (
            "import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
            "time.sleep(60)"
        )
        start = time.perf_counter()
        result = run_in_child(code, seconds=1.5)
        assert result.failure == "no end within 1.5 s"
        assert time.perf_counter() - start < 40
        size = mark.stat().st_size
        assert size, "the grandchild ran"
        time.sleep(0.3)
        assert mark.stat().st_size == size

    def test_it_sees_the_packages_of_this_process_and_not_the_folder(
        self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (site / "acme_here.py").write_text("")
        (tmp_path / "acme_there.py").write_text("")
        monkeypatch.chdir(tmp_path)
        assert not run_in_child("import acme_here", seconds=20).failure
        if hasattr(sys.flags, "safe_path"):
            assert "acme_there" in run_in_child("import acme_there", seconds=20).failure


class TestTorch:
    def test_the_one_here_is_well(self, tmp_path: Path) -> None:
        software = find_software()
        if software.torch_build != "cpu":
            pytest.skip("torch here is no CPU build: its own devices are tried by hal doctor")
        machine = fakes.machine(tmp_path, software)
        assert told("torch", Subject(machine, detect(machine))) == {}

    @pytest.mark.parametrize(
        ("code", "code_found", "words"),
        [
            (f"raise ImportError({SYMBOL!r})", "torch-broken", SYMBOL),
            ("import os; os.abort()", "torch-broken", "SIGABRT"),
            ("import time; time.sleep(60)", "torch-broken", "no end within 2 s"),
            ("__version__ = '2.12.0+cpu'", "torch-two", "calls itself 2.12.0+cpu"),
            (
                "__version__ = '2.13.0+cpu'\n"
                "def ones(*a, **k): raise RuntimeError('CUDA driver version is insufficient')",
                "torch-device",
                "driver version is insufficient",
            ),
        ],
    )
    def test_one_at_fault(
        self, site: Path, tmp_path: Path, code: str, code_found: str, words: str
    ) -> None:
        (site / "torch.py").write_text(code)
        found = told("torch", cpu(tmp_path), 2.0)
        assert words in found[code_found]

    def test_no_torch_is_no_trial(self, tmp_path: Path) -> None:
        machine = fakes.machine(tmp_path, Software())
        assert told("torch", Subject(machine, detect(machine))) == {}

    def test_devices_that_torch_sees_otherwise(self) -> None:
        spec = device_spec("cuda", "h200").replace(memory_bytes=1000)
        row = {"name": "H200", "memory": 1005, "uuid": "0A-1"}
        assert list(compare_devices([spec], ["GPU-0a-1"], [row])) == []
        assert list(compare_devices([spec], [None], [{**row, "uuid": None}])) == []
        (count,) = compare_devices([spec, spec], ["GPU-0a-1", "GPU-0a-2"], [row])
        assert (count.code, count.severity) == ("devices-differ", Severity.ERROR)
        (other,) = compare_devices([spec], ["GPU-9"], [row])
        assert "GPU-9 for hal and 0A-1 for torch" in other
        (memory,) = compare_devices([spec], ["GPU-0a-1"], [{**row, "memory": 1020}])
        assert memory.code == "memory-differs"

    @pytest.mark.parametrize(
        ("platform", "arch", "archs", "runs"),
        [
            ("cuda", "sm_90", ["sm_80", "sm_90"], True),
            ("cuda", "sm_89", ["sm_80", "sm_90"], True),
            ("cuda", "sm_70", ["sm_75", "sm_80"], False),
            ("cuda", "sm_120", ["sm_90", "sm_100"], False),
            ("cuda", "sm_120", ["sm_90", "compute_90"], True),
            ("cuda", "sm_103", ["sm_100"], True),
            ("cuda", "sm_103", ["sm_100a"], False),
            ("cuda", "sm_103", ["sm_100f"], True),
            ("cuda", "sm_90", ["sm_90a"], True),
            ("cuda", "sm_90", ["sm_100", "compute_100"], False),
            ("rocm", "gfx942", ["gfx90a", "gfx942"], True),
            ("rocm", "gfx942", ["gfx942:xnack-"], True),
            ("rocm", "gfx1103", ["gfx1100"], False),
            ("rocm", "gfx1103", ["gfx11-generic"], True),
            ("xpu", "xe2", ["pvc"], True),
        ],
    )
    def test_builds_and_architectures(
        self, platform: str, arch: str, archs: list[str], runs: bool
    ) -> None:
        assert built_for(parse_arch(platform, arch), archs) is runs


BACKENDS = """
class Backend:
    def __init__(self, answer): self.driver = self; self.answer = answer
    def is_active(self): return self.answer()
def fail(): raise RuntimeError("libcuda.so.1: version mismatch")
def end():
    import os; os.abort()
def yes(): return True
def no(): return False
backends = {{{rows}}}
"""


class TestTriton:
    def make(self, site: Path, **rows: str) -> None:
        folder = site / "triton"
        (folder / "backends").mkdir(parents=True)
        (folder / "__init__.py").write_text("__version__ = '3.7.1'\n")
        text = ", ".join(f"{name!r}: Backend({answer})" for name, answer in rows.items())
        (folder / "backends" / "__init__.py").write_text(BACKENDS.format(rows=text))

    def test_absent_is_no_trial(self, tmp_path: Path) -> None:
        assert told("Triton", cpu(tmp_path, triton=None)) == {}

    def test_without_a_driver_on_a_cpu_is_well(self, site: Path, tmp_path: Path) -> None:
        self.make(site, nvidia="no", amd="no")
        assert told("Triton", cpu(tmp_path)) == {}

    def test_one_driver_on_a_gpu_is_well(self, site: Path, tmp_path: Path) -> None:
        self.make(site, nvidia="yes", amd="no", cpu="yes")
        assert told("Triton", cuda(tmp_path)) == {}

    @pytest.mark.parametrize(
        ("rows", "code", "words"),
        [
            ({"nvidia": "no"}, "triton-driver", "finds no driver for the cuda devices"),
            ({"nvidia": "yes", "amd": "yes"}, "triton-drivers", "(nvidia, amd)"),
            ({"nvidia": "yes", "amd": "fail"}, "triton-backend", "backend amd fails"),
            ({"amd": "no", "nvidia": "end"}, "triton-backend", "it ended the process"),
        ],
    )
    def test_at_fault(
        self, site: Path, tmp_path: Path, rows: dict[str, str], code: str, words: str
    ) -> None:
        self.make(site, **rows)
        assert words in told("Triton", cuda(tmp_path))[code]

    @pytest.mark.parametrize("text", [f"raise ImportError({SYMBOL!r})", "raise SystemExit(1)"])
    def test_that_cannot_be_imported(self, site: Path, tmp_path: Path, text: str) -> None:
        (site / "triton.py").write_text(text)
        assert "cannot be imported" in told("Triton", cuda(tmp_path))["triton-broken"]


class TestPackages:
    def install(self, site: Path, name: str, code: str, version: str = "1.0") -> None:
        (site / f"{name}.py").write_text(code)
        (site / f"{name}-{version}.dist-info").mkdir(exist_ok=True)

    def test_an_undefined_symbol_is_a_reason_that_every_later_process_knows(
        self, site: Path, tmp_path: Path
    ) -> None:
        import hal

        self.install(site, "torchao", f"raise ImportError({SYMBOL!r})")
        forget_software()
        try:
            assert find_software().version_of("torchao") == "1.0"
            health = {row.package: row for row in try_kernel_packages(find_software(), 60)}
            assert health["torchao"].failure == f"ImportError: {SYMBOL}"
            hal.refresh()
            reason = dict(find_software().broken)["torchao"]
            assert reason.startswith(f"ImportError: {SYMBOL} (seen by hal doctor")
            spec = hal.current_platform().device(0)
            failure = hal.Needs.package("torchao").check(Context(spec, "bf16"))
            assert failure is not None
            assert SYMBOL in failure.found
            assert any(SYMBOL in note for note in hal.current_platform().notes)
            # mended in the same version: the next trial takes the reason back
            self.install(site, "torchao", "")
            try_kernel_packages(find_software(), 60)
            hal.refresh()
            assert "torchao" not in dict(find_software().broken)
        finally:
            (site / "torchao.py").unlink()
            (site / "torchao-1.0.dist-info").rmdir()
            hal.refresh()

    def test_what_a_version_forbids_is_never_imported(self, site: Path, tmp_path: Path) -> None:
        mark = tmp_path / "imported"
        self.install(site, "intel_extension_for_pytorch", f"open({str(mark)!r}, 'w')", "2.8.0")
        name = "intel-extension-for-pytorch"
        software = Software(
            torch="2.13.0", packages=((name, "2.8.0"),), broken=((name, "ends the process"),)
        )
        assert try_kernel_packages(software, 60) == ()
        assert not mark.exists()

    def test_the_first_name_that_is_there_is_imported(self, site: Path) -> None:
        self.install(site, "acme_new", "print('hello')")
        self.install(site, "acme_broken", "raise ImportError('undefined symbol')")
        wanted = {
            "amd-aiter": ("3.0", "acme_old|acme_new"),
            "deep-gemm": ("2.0", "acme_broken|acme_new"),
            "torchao": ("1.0", "acme_old|acme_older"),
        }
        failures = {row.package: row.failure for row in try_packages(wanted, None, seconds=20)}
        assert failures.pop("amd-aiter") == ""
        assert "undefined symbol" in failures.pop("deep-gemm")
        assert "acme_old" in failures.pop("torchao")

    def test_hanging_ending_and_good_packages(self, site: Path) -> None:
        self.install(site, "torchao", "import time; time.sleep(60)")
        self.install(site, "deep_gemm", "import os; os._exit(3)")
        self.install(site, "aiter", "print('hello')")
        wanted = {
            "torchao": ("1.0", "torchao"),
            "deep-gemm": ("2.0", "deep_gemm"),
            "amd-aiter": ("3.0", "aiter"),
        }
        seen: list[str] = []
        rows = try_packages(wanted, "2.13.0", seconds=2, done=lambda row: seen.append(row.package))
        assert {row.package: row.failure for row in rows} == {
            "torchao": "no end within 2 s",
            "deep-gemm": "ended the process with status 3 and without a word",
            "amd-aiter": "",
        }
        assert sorted(seen) == sorted(wanted)
        assert set(known_health({n: v for n, (v, _) in wanted.items()}, "2.13.0")) == {
            "torchao",
            "deep-gemm",
        }


class TestMemory:
    ROW = Health("vllm", "1.0", "ImportError: oh", 1.0)

    def keep(self, cache: Path, **stamp: Any) -> Path:
        try_packages({}, "2.13.0", seconds=1)
        path = cache / HEALTH_FILE
        kept = json.loads(path.read_text())
        kept["stamp"] |= stamp
        kept["rows"] = [dataclasses.asdict(self.ROW)]
        path.write_text(json.dumps(kept))
        return path

    def test_it_counts_for_the_same_versions_only(self, cache: Path) -> None:
        self.keep(cache)
        assert "ImportError: oh" in known_health({"vllm": "1.0"}, "2.13.0")["vllm"]
        assert known_health({"vllm": "1.1"}, "2.13.0") == {}
        assert known_health({}, "2.13.0") == {}
        assert known_health({"vllm": "1.0"}, "2.14.0") == {}
        self.keep(cache, python="3.9")
        assert known_health({"vllm": "1.0"}, "2.13.0") == {}

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"stamp": 1}', '{"stamp": {}, "rows": 3}', "\0", "é" * 9],
    )
    def test_a_damaged_file_counts_as_none_and_is_replaced(self, cache: Path, text: str) -> None:
        path = self.keep(cache)
        path.write_text(text, encoding="latin-1")
        assert known_health({"vllm": "1.0"}, "2.13.0") == {}
        self.keep(cache)
        assert known_health({"vllm": "1.0"}, "2.13.0")

    @pytest.mark.parametrize("rows", [[3], [{"package": "vllm"}], [{"package": 1, "version": 2}]])
    def test_rows_of_another_form_count_as_none(self, cache: Path, rows: list[Any]) -> None:
        path = self.keep(cache)
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({**kept, "rows": rows}))
        assert known_health({"vllm": "1.0"}, "2.13.0") == {}

    def test_a_folder_that_cannot_be_written_is_no_fault(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HAL_CACHE", str(tmp_path / "file"))
        (row,) = try_packages({"vllm": ("1.0", "no_such_module")}, "2.13.0", seconds=20)
        assert "no_such_module" in row.failure
        assert known_health({"vllm": "1.0"}, "2.13.0") == {}

    def test_nothing_half_written_is_left(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.keep(cache)
        before = path.read_text()

        def fail(*names: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        try_packages({}, "2.13.0", seconds=1)
        assert path.read_text() == before
        assert [file.name for file in cache.iterdir()] == [HEALTH_FILE]


def test_quirks_are_probed_in_a_child(tmp_path: Path) -> None:
    software = find_software()
    machine = fakes.machine(tmp_path, dataclasses.replace(software, torch_build="cpu"))
    found = told("quirks of torch", Subject(machine, detect(machine)))
    assert found == {}, "this torch has the quirks that its version says"


def test_trials_are_announced(tmp_path: Path) -> None:
    machine = fakes.machine(tmp_path, Software())
    said: list[str] = []
    assert run_trials(Subject(machine, detect(machine)), 1.0, said.append) == ()
    assert said == list(TRIALS)
