"""Keep the buffers through which the tokens of expert-parallel layers travel.

One workspace may serve many layers, of unlike formats, sizes and numbers of experts: rows carry
their own ids, so that layers share nothing but bytes. It holds the largest buffer of each name that
a layer asked for, and grows only when a layer is made, never in a call. Make the layers before the
first call: a layer that makes it grow later gives the others new memory, too, and graphs that were
captured with the old one keep that alive through `retired`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hal.errors import ArgumentError, DeviceMismatchError, RankError
from hal.ops.payload import SYMMETRIC, union

if TYPE_CHECKING:
    import torch

    from hal.ops.ranks import Ranks
    from hal.ops.window import Window

__all__ = ["Abandoning", "Workspace"]


class Workspace:
    """Buffers by name, on one device and for one size of group.

    Attributes:
        retired: Buffers that calls have used and that were too small for a later layer.
    """

    def __init__(self) -> None:
        self.retired: list[torch.Tensor] = []
        self._held: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()
        self._window: Window | None = None
        self._windows: list[Window] = []
        self._group: Any = None
        self._packages: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._travelling = False
        self._ranks: int | None = None
        self._device: torch.device | None = None

    def reserve(
        self,
        sizes: Mapping[str, int],
        ranks: int,
        device: torch.device,
        group: Ranks | None = None,
    ) -> None:
        """Make every buffer at least as large as a layer needs it.

        Args:
            sizes: Bytes of buffers by name.
            ranks: Size of the group.
            device: Where they are.
            group: The group, for memory that its ranks share.

        Raises:
            ArgumentError: If the workspace serves a group of another size; see `reset`.
                Also if it would grow while a graph is captured.
            DeviceMismatchError: If it is on another device.
        """
        import torch

        if self._ranks not in (None, ranks):
            raise ArgumentError(
                "expert_parallel: workspace",
                found=f"a group of {ranks} ranks",
                needed=f"{self._ranks} as for the layers before",
                cure="give each group a workspace, or call reset() where the old group is gone",
            )
        if self._device not in (None, device):
            raise DeviceMismatchError(
                "expert_parallel: workspace", found=device, needed=self._device
            )
        if self._window is not None and SYMMETRIC in sizes:
            assert group is not None
            if group.group is not self._group:
                raise ArgumentError(
                    "expert_parallel: workspace",
                    found="another process group",
                    needed="the one whose ranks share its symmetric memory",
                    cure="give each group a workspace, or call reset() where the old group is gone",
                )
        held = {name: buffer.numel() for name, buffer in self._held.items()}
        wanted = {n: s for n, s in union((held, sizes)).items() if s > held.get(n, -1)}
        if wanted:
            _require_no_capture(device, *wanted)
        for name, size in wanted.items():
            if name == SYMMETRIC:
                assert group is not None
                self._keep_window()
                self._window, self._group = group.window(size), group.group
                self._held[name] = self._window.memory
            else:
                fresh = torch.zeros(size, dtype=torch.uint8, device=device)
                if name in self._used:
                    self.retired.append(self._held[name])
                self._held[name] = fresh
        self._ranks, self._device = ranks, device

    def take(self, name: str) -> torch.Tensor:
        """Return a buffer, of which a call may use as many bytes as its layer reserved.

        It is the same object until a layer makes it grow or a collective failed.
        """
        self._used.add(name)
        return self._held[name]

    def depart(self) -> None:
        """Take the buffers in which tokens travel, until `arrive`.

        Raises:
            ArgumentError: If those that another dispatch sent have not been received.
        """
        if self._travelling:
            raise ArgumentError(
                "expert_parallel: workspace",
                found="a dispatch while tokens of another are on their way",
                needed="receive of what was sent before, by whichever layer here",
                cure="give layers whose tokens travel at once a workspace each; after an error "
                "between the two, workspace.reset() and new layers on every rank",
            )
        self._travelling = True

    def arrive(self) -> None:
        """Give them back."""
        self._travelling = False

    def package(self, name: str, sizes: tuple[int, ...], make: Callable[..., Any]) -> Any:
        """Return what another library keeps for all layers here, made anew where it is too small.

        Args:
            name: Of the library's object.
            sizes: Bytes that a layer needs of each of its parts.
            make: Makes it, of the largest sizes that were asked for.

        Raises:
            ArgumentError: If it would be made while a graph is captured.
        """
        held, found = self._packages.get(name, ((0,) * len(sizes), None))
        if found is None or any(size > old for size, old in zip(sizes, held, strict=True)):
            if self._device is not None:
                _require_no_capture(self._device, name)
            held = tuple(map(max, sizes, held))
            found = make(*held)  # layers that have the old one keep it alive
            self._packages[name] = held, found
        return found

    @property
    def window(self) -> Window:
        """Return the symmetric memory.

        Raises:
            RankError: If it was abandoned.
        """
        if self._window is None:
            raise RankError(
                "expert_parallel: symmetric_memory",
                missing=(),
                found="a call after ranks had failed",
                cause="the memory that they shared was abandoned",
            )
        return self._window

    def _keep_window(self) -> None:
        if self._window is not None:
            self.retired.append(self._window.memory)
            self._windows.append(self._window)
            self._window = None

    def abandon(self) -> None:
        """Replace every buffer: a collective that failed may still write into the old ones."""
        import torch

        self._keep_window()
        self._held.pop(SYMMETRIC, None)
        self._travelling = False
        self._packages.clear()
        self._held = {name: torch.zeros_like(buffer) for name, buffer in self._held.items()}
        self._used.clear()

    def reset(self) -> None:
        """Forget the size of the group, so that layers of a new group can be made."""
        self._ranks, self._travelling = None, False
        self._packages.clear()
        self._keep_window()
        self._held.pop(SYMMETRIC, None)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers, retired ones included."""
        return sum(buffer.numel() for buffer in (*self._held.values(), *self.retired))


def _require_no_capture(device: torch.device, *names: str) -> None:
    """Raise if what a layer needs more of would be allocated while a graph is captured."""
    from hal.torch_compat import is_capturing

    if is_capturing(device):
        raise ArgumentError(
            "expert_parallel: workspace",
            found=f"a layer that needs more of {', '.join(names)} while a graph is captured",
            needed="buffers that are there before",
            cure="make all layers, and call each once, before the capture",
        )


class Abandoning:
    """Take other buffers where a collective failed: it may still write into these."""

    __slots__ = ("workspace",)

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, RankError):
            self.workspace.abandon()
