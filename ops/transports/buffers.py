"""See the buffers of a workspace as rows, and keep those views: a call has a dozen of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.ops.rows import RowParts

if TYPE_CHECKING:
    import torch

    from hal.ops.payload import Payload
    from hal.ops.workspace import Workspace

__all__ = ["Buffers"]

MOST_VIEWS = 256
"""Views of a layer: numbers of rows that keep changing must not fill the memory."""


class Buffers:
    """The buffers of one layer.

    Args:
        workspace: Where they are; it may replace them.
        payload: What travels.
    """

    def __init__(self, workspace: Workspace, payload: Payload) -> None:
        self._workspace, self._payload = workspace, payload
        self._held: dict[str, torch.Tensor] = {}
        self._views: dict[Any, Any] = {}

    def parts(self, name: str, count: int) -> RowParts:
        """Return the first rows of a buffer of payload rows, part by part."""
        buffer, key = self._buffer(name), (name, count)
        found: RowParts | None = self._views.get(key)
        if found is None:
            width = self._payload.row_bytes
            rows = buffer[: count * width].view(count, width)
            found = self._views[key] = RowParts.of(rows, self._payload)
        return found

    def rows(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first rows `[count, hidden]` of a buffer of results."""
        buffer, key = self._buffer(name), (name, count, dtype)
        found: torch.Tensor | None = self._views.get(key)
        if found is None:
            hidden = self._payload.hidden
            flat = buffer[: count * hidden * dtype.itemsize].view(dtype)
            found = self._views[key] = flat.view(count, hidden)
        return found

    def _buffer(self, name: str) -> torch.Tensor:
        buffer = self._workspace.take(name)
        if self._held.get(name) is not buffer or len(self._views) >= MOST_VIEWS:
            # Of a buffer that was replaced nothing is held.
            self._held[name] = buffer
            self._views.clear()
        return buffer
