"""Marks, and an environment that does not depend on the machine's settings."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# Reproducible by default; `--hypothesis-profile explore` looks for new examples.
hypothesis.settings.register_profile("hal", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("hal")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the caller's HAL_* settings and the network out of the tests, and of their children."""
    for name in [name for name in os.environ if name.startswith("HAL_")]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What `hal doctor` remembers of this machine must not decide, nor be changed by a test.
    cache = tempfile.TemporaryDirectory(prefix="hal-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    # torch reads this when it is first imported: workers share the cores instead of each using all.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if INTERPRETING:
        from hal.triton_interpreter import prepare_once_per_launch

        prepare_once_per_launch()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give `interpreter` tests a process of their own.

    Triton reads TRITON_INTERPRET when a kernel is decorated, and what it patches then breaks
    later compilations: a process either interprets or compiles.
    """
    interpreted = [item for item in items if item.get_closest_marker("interpreter")]
    if INTERPRETING:
        config.hook.pytest_deselected(items=[item for item in items if item not in interpreted])
        items[:] = interpreted
    else:
        reason = "needs a process of its own: TRITON_INTERPRET=1 pytest -m interpreter"
        for item in interpreted:
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def no_gpu() -> str | None:
    """Return why GPU tests cannot run here, or None; asked when the first of them starts."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "no CUDA/ROCm/XPU device"


@functools.cache
def no_interpreter() -> str | None:
    """Return why Triton cannot interpret kernels here, or None.

    Triton before 3.7 makes Python numbers of arrays of one element, which numpy 2.4 refuses.
    """
    import numpy
    import triton

    from hal.device import version_at_least

    try:
        int(numpy.ones(1))
    except TypeError:
        if not version_at_least(triton.__version__, "3.7"):
            return f"Triton {triton.__version__} cannot interpret with numpy {numpy.__version__}"
    return None


def lacking_math(error: Exception) -> str | None:
    """Return what math the CPU of this machine lacks for a kernel that a test forces, or None.

    None where the kernel is refused for anything else too, or on another device: only the table of
    CPUs may excuse a test, and tests of that table do not bind kernels.
    """
    import hal
    from hal.errors import ForcedKernelError

    if not isinstance(error, ForcedKernelError):
        return None
    selection = error.selection
    kernel = selection.options.force
    failures = selection.candidate(kernel).failures
    native = [f.code == "format" and f.needed.endswith(" math native") for f in failures]
    if selection.spec != hal.platform("cpu").device(0) or not native or not all(native):
        return None
    return f"{kernel} on this CPU: {'; '.join(map(str, failures))}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Skip tests of kernels whose math this machine's CPU does not have, such as int8 on AVX2."""
    try:
        return (yield)
    except Exception as error:
        if reason := lacking_math(error):
            pytest.skip(reason)
        raise


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that this machine, or this process, cannot run."""
    if item.get_closest_marker("interpreter") and INTERPRETING and (reason := no_interpreter()):
        pytest.skip(reason)
    if item.get_closest_marker("gpu") and (reason := no_gpu()):
        pytest.skip(reason)


COUNT_CALLS = """
import sys, threading
calls, waits = 0, []
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
def watch(event, arguments):
    if event in ("time.sleep", "subprocess.Popen", "os.system", "os.posix_spawn", "socket.connect"):
        waits.append(event)
sys.addaudithook(watch)
threading.setprofile(count)
sys.setprofile(count)
exec(compile(sys.argv[1], "counted", "exec"), {})
sys.setprofile(None)
assert not waits, waits
print(calls)
"""


@pytest.fixture
def calls_made(tmp_path: Path) -> Callable[..., int]:
    """Return a function that counts the calls some lines of code make in a new interpreter.

    All threads count. Who waits for a process, a socket or a clock fails: no call shows that.
    """

    def count(*lines: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", COUNT_CALLS, "\n".join(lines)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return count
