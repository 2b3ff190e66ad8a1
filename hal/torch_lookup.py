"""Find parts of torch that only some releases have, and say which release brings them."""

from __future__ import annotations

from typing import Any

from hal.errors import PlatformError

__all__ = ["find", "require", "too_old"]


def find(*paths: str) -> Any:
    """Return the first of torch's attributes that exists, such as `nn.functional.scaled_mm`.

    Returns None where torch has none of them, or only as None.
    """
    import torch

    for path in paths:
        found: Any = torch
        for part in path.split("."):
            found = getattr(found, part, None)
            if found is None:
                break
        else:
            return found
    return None


def require(*paths: str, since: str | None) -> Any:
    """Return the first of torch's attributes that exists.

    Args:
        *paths: Attributes of torch, newest names first.
        since: First release that has the last of them; None where a later release dropped it.

    Raises:
        PlatformError: If torch has none of them.
    """
    found = find(*paths)
    if found is not None:
        return found
    if since is not None:
        raise too_old(f"torch.{paths[-1]}", since)
    import torch

    raise PlatformError(f"torch {torch.__version__} no longer has torch.{paths[-1]}")


def too_old(what: str, since: str) -> PlatformError:
    """Return the error for something that only newer releases have."""
    import torch

    return PlatformError(
        f"{what}: found torch {torch.__version__}, needed torch >= {since}; install a newer torch"
    )
