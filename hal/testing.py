"""Check that a platform keeps the protocol; for the built-in ones and for those of plugins.

    @pytest.mark.parametrize("check", hal.testing.PLATFORM_CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(my_platform)

Every check takes a platform, found or simulated, and raises `ConformanceError` with the fault found
and what is needed. `check_plugin` does all that can be done for a plugin without its devices.
`check_kernel` does so for a kernel (`hal.testing_kernels`).
"""

from __future__ import annotations

import inspect
import json
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.device import DeviceSpec, Software
from hal.errors import (
    AmbiguousDeviceError,
    PlatformError,
    SimulatedDeviceError,
    UnknownNameError,
    ValueRangeError,
)
from hal.formats import FORMATS, Support
from hal.needs import Context
from hal.probe import Absent, Broken, Found, Probe
from hal.protocol import Platform
from hal.quirks import QUIRKS
from hal.registry import find_op, op_names
from hal.selection import choose
from hal.testing_kernels import (
    KERNEL_CHECKS,
    ConformanceError,
    check_kernel,
    compare_kernel,
    find_kernel,
)

if TYPE_CHECKING:
    from hal.platforms.plugins import PlatformPlugin

__all__ = [
    "KERNEL_CHECKS",
    "PLATFORM_CHECKS",
    "ConformanceError",
    "check_kernel",
    "check_platform",
    "check_plugin",
    "compare_kernel",
    "find_kernel",
]

_IDENTITY = ("cuda", "rocm", "xpu", "cpu")


def check_platform(platform: Platform) -> None:
    """Run every check on a platform.

    Raises:
        ConformanceError: For the first check that fails.
    """
    for check in PLATFORM_CHECKS:
        check(platform)


def check_plugin(plugin: PlatformPlugin, empty: Path) -> None:
    """Check a plugin's tables, its detection on a machine without devices, and every product.

    Args:
        plugin: What the entry point names.
        empty: An empty folder, the root of a machine that has nothing.

    Raises:
        ConformanceError: If something is at fault.
    """
    from hal.platforms.machine import Machine
    from hal.platforms.tables import make_spec

    with _demanding(f"plugin {plugin.name}: its tables must pass their checks"):
        tables = plugin.check()
    _demand(bool(tables.devices), f"plugin {plugin.name}: the table names no product")
    with _demanding(f"plugin {plugin.name}: detect must not raise"):
        found = plugin.detect(Machine({}, root=empty, system="linux", processor="x86_64"))
    _demand(
        isinstance(found, (Absent, Broken)),
        f"plugin {plugin.name}: detect on an empty machine returned {type(found).__name__}, "
        "needed Absent with a reason",
    )
    if not isinstance(found, Found):
        _demand(bool(found.reason), f"plugin {plugin.name}: Absent has no reason")
    software = Software(torch="2.13.0", torch_build=plugin.name, triton="3.7.1")
    for row in tables.devices:
        spec = make_spec(tables.archs[row.arch], row, software=software)
        with _demanding(f"plugin {plugin.name}: {row.name} must be simulated"):
            platform = plugin.platform.simulate(spec)
        check_platform(platform)


def has_the_members(platform: Platform) -> None:
    """Check that every member of the protocol is there, as a property or with its arguments."""
    for name in _members():
        wanted = inspect.getattr_static(Platform, name)
        mine = inspect.getattr_static(type(platform), name, None)
        _demand(mine is not None, f"{name}: missing")
        kind = "a property" if isinstance(wanted, property) else "a method"
        _demand(isinstance(mine, property) == isinstance(wanted, property), f"{name}: not {kind}")
        if not isinstance(wanted, property):
            needed = inspect.signature(wanted).parameters
            found = inspect.signature(getattr(type(platform), name)).parameters
            _demand(
                list(found) == list(needed),
                f"{name}: found arguments {list(found)}, needed {list(needed)}",
            )


def says_who_it_is(platform: Platform) -> None:
    """Check the name, the four questions about identity, and the names for torch."""
    flags = [platform.is_cuda, platform.is_rocm, platform.is_xpu, platform.is_cpu]
    wanted = [platform.name == name for name in _IDENTITY]
    _demand(flags == wanted, f"{platform.name}: is_cuda, is_rocm, is_xpu, is_cpu are {flags}")
    for label in ("name", "torch_device_type", "dist_backend"):
        value = getattr(platform, label)
        _demand(bool(value) and isinstance(value, str), f"{label}: found {value!r}, needed a name")
    for label in ("simulated", "pinned_memory", "graph_capture"):
        value = getattr(platform, label)
        _demand(isinstance(value, bool), f"{label}: found {value!r}, needed True or False")
    _demand(platform.name in repr(platform), f"repr: found {platform!r}, needed the name in it")


def describes_every_device(platform: Platform) -> None:
    """Check the facts of each device: of this platform, hashable, the same twice, through JSON."""
    count = platform.device_count()
    _demand(count >= 1, f"device_count: found {count}, needed at least 1")
    for index in range(count):
        spec = platform.device(index)
        _demand(isinstance(spec, DeviceSpec), f"device({index}): found {type(spec).__name__}")
        _demand(
            spec.platform == platform.name,
            f"device({index}): of platform {spec.platform}, needed {platform.name}",
        )
        _demand(
            spec == platform.device(index) and hash(spec) == hash(platform.device(index)),
            f"device({index}): differs when it is asked for twice",
        )
        plain = json.loads(json.dumps(spec.to_dict()))
        _demand(
            DeviceSpec.from_dict(plain) == spec, f"device({index}): JSON does not bring it back"
        )
        _demand(bool(spec.origin), f"device({index}): origin is empty")
        for link in spec.links:
            _demand(
                link.peer != index and link.peer < count,
                f"device({index}): link to {link.peer}, needed another visible index",
            )
        number = platform.physical_index(index)
        _demand(number >= 0, f"physical_index({index}): found {number}")


def refuses_other_indices(platform: Platform) -> None:
    """Check that indices of no device are refused, and that nothing falls back to device 0."""
    for index in (-1, platform.device_count(), 10**6):
        for name in ("device", "arch", "physical_index", "memory"):
            _demand_error(ValueRangeError, f"{name}({index})", getattr(platform, name), index)
    kinds = {platform.device(index).kind for index in range(platform.device_count())}
    if len(kinds) > 1:
        for name in ("device", "arch", "supports_fp8"):
            what = f"{name}() of unlike devices"
            _demand_error(AmbiguousDeviceError, what, getattr(platform, name))
        return
    _demand(
        platform.device().kind in kinds,
        "device(): found other facts than those which the visible devices share",
    )
    if platform.device_count() > 1:
        for name in ("physical_index", "memory"):
            what = f"{name}() of several devices"
            _demand_error(AmbiguousDeviceError, what, getattr(platform, name))


def answers_for_every_format(platform: Platform) -> None:
    """Check capability: architecture, compute capability, formats, fp8 and features."""
    for index in range(platform.device_count()):
        spec = platform.device(index)
        _demand(platform.arch(index) == spec.arch, f"arch({index}) is not device({index}).arch")
        capability = platform.compute_capability(index)
        _demand(
            (capability is None) == (not platform.is_cuda),
            f"compute_capability({index}): found {capability}; it is CUDA's alone",
        )
        for name in FORMATS:
            for use in ("storage", "math"):
                found = platform.support(name, index, use=use)
                _demand(
                    found is spec.formats.of(use, name),
                    f"support({name!r}, {index}, use={use!r}): found {found}",
                )
        for feature in spec.features:
            _demand(platform.has(feature, index), f"has({feature!r}, {index}): found False")
        _demand(not platform.has("no such feature", index), "has('no such feature'): found True")
        _fp8(platform, index)
    _demand_error(UnknownNameError, "support('e4m4')", platform.support, "e4m4", 0)


def _fp8(platform: Platform, index: int) -> None:
    formats = platform.device(index).formats
    if formats.fp8_encoding is None:
        _demand(not platform.supports_fp8(index), f"supports_fp8({index}): True, no encoding")
        _demand_error(PlatformError, f"fp8_dtype({index})", platform.fp8_dtype, index)
        return
    native = formats.of("math", formats.fp8_encoding) is Support.NATIVE
    _demand(
        platform.supports_fp8(index) == native,
        f"supports_fp8({index}): found {not native}, needed what formats say of "
        f"{formats.fp8_encoding}",
    )
    size = platform.fp8_dtype(index).itemsize
    _demand(size == 1, f"fp8_dtype({index}): {size} bytes, needed 1")


def reports_what_it_knows(platform: Platform) -> None:
    """Check memory, probes, notes, versions and quirks."""
    for index in range(platform.device_count()):
        free, total = platform.memory(index)
        fits = free is None or total is None or 0 <= free <= total
        _demand(fits and total != 0, f"memory({index}): found ({free}, {total})")
    _demand(all(isinstance(note, str) for note in platform.notes), "notes: not all are text")
    _demand(all(isinstance(probe, Probe) for probe in platform.probes), "probes: not all Probe")
    version = platform.torch_version
    _demand(version is None or bool(version), "torch_version: found '', needed None or a version")
    _demand(set(platform.quirks) <= set(QUIRKS), "quirks: some are not in hal.quirks.QUIRKS")


def starts_no_runtime(platform: Platform) -> None:
    """Check that answering starts no device runtime in this process."""
    before = _started()
    for index in range(platform.device_count()):
        str((platform.device(index), platform.memory(index), platform.arch(index)))
    str((platform.notes, platform.probes, platform.quirks, platform.graph_capture))
    _demand(_started() == before, f"answering started {sorted(_started() - before)}")


def accounts_for_every_kernel(platform: Platform) -> None:
    """Check that every op, under every scheme, selects with a reason for each candidate."""
    for index in range(platform.device_count()):
        spec = platform.device(index)
        for op in map(find_op, op_names()):
            for scheme in sorted({scheme for kernel in op.kernels for scheme in kernel.schemes}):
                where = f"{op.name} with {scheme} on {spec.key}"
                selection = choose(op, scheme, spec, {})
                told = {candidate.kernel.name for candidate in selection.candidates}
                _demand(told == {kernel.name for kernel in op.kernels}, f"{where}: {told}")
                for candidate in selection.candidates:
                    unmet = [
                        need
                        for need in candidate.kernel.requires
                        if need.check(Context(spec, scheme, {}))
                    ]
                    _demand(
                        candidate.can_run or bool(candidate.failures),
                        f"{where}: {candidate.kernel.name} is left out without a reason",
                    )
                    _demand(
                        not (candidate.can_run and unmet),
                        f"{where}: {candidate.kernel.name} can run although needs are not met",
                    )


def orders_work(platform: Platform) -> None:
    """Check the actions: refused where simulated, done where torch has the device."""
    if platform.simulated:
        with platform.ordered([]):
            pass
        platform.wait([])
        for name in ("synchronize", "current_stream", "event"):
            _demand_error(SimulatedDeviceError, f"{name}()", getattr(platform, name))
        _demand_error(SimulatedDeviceError, "isolated(0)", platform.isolated, 0)
        return
    tensor = _tensor(platform.torch_device_type)
    if tensor is None:
        return  # facts of a machine that is not here, or torch without its backend
    with platform.ordered([tensor]):
        tensor.add_(1)
    platform.wait([tensor])
    _demand(float(tensor.sum()) == float(tensor.numel()), "ordered: its body was not run once")
    event = platform.event()
    event.record()
    event.synchronize()
    _demand(bool(event.query()), "event: not complete after synchronize()")
    platform.synchronize()


def isolates_a_device(platform: Platform) -> None:
    """Check that a child's environment and index come as one answer."""
    if platform.simulated:
        return
    for index in range(platform.device_count()):
        alone: Any = platform.isolated(index)
        texts = all(
            isinstance(name, str) and (value is None or isinstance(value, str))
            for name, value in alone.environment.items()
        )
        _demand(texts, f"isolated({index}): environment {alone.environment!r}")
        _demand(alone.index == 0, f"isolated({index}): index {alone.index}, needed 0")
    last = platform.device_count()
    _demand_error(ValueRangeError, f"isolated({last})", platform.isolated, last)


PLATFORM_CHECKS: tuple[Callable[[Platform], None], ...] = (
    has_the_members,
    says_who_it_is,
    describes_every_device,
    refuses_other_indices,
    answers_for_every_format,
    reports_what_it_knows,
    starts_no_runtime,
    accounts_for_every_kernel,
    orders_work,
    isolates_a_device,
)
"""Every check of a platform, by what a platform does that passes it."""


def _members() -> list[str]:
    return [name for name in vars(Platform) if not name.startswith("_")]


def _started() -> set[str]:
    torch = sys.modules.get("torch")
    modules = [(name, getattr(torch, name, None)) for name in ("cuda", "xpu")]
    return {name for name, module in modules if module is not None and module.is_initialized()}


def _tensor(device_type: str) -> Any:
    """Return two zeros on a device of that type, or None where torch cannot put them there."""
    import torch

    try:
        return torch.zeros(2, device=device_type)
    except (AssertionError, NotImplementedError, RuntimeError):
        return None


def _demand(holds: bool, fault: str) -> None:
    if not holds:
        raise ConformanceError(fault)


def _demand_error(kind: type[Exception], what: str, ask: Callable[..., Any], *given: Any) -> None:
    try:
        found = ask(*given)
    except kind:
        return
    except Exception as error:
        raise ConformanceError(
            f"{what}: raised {type(error).__name__} ({error}), needed {kind.__name__}"
        ) from error
    raise ConformanceError(f"{what}: returned {reprlib.repr(found)}, needed {kind.__name__}")


@contextmanager
def _demanding(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConformanceError(f"{what}: {type(error).__name__}: {error}") from error
