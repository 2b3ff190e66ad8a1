"""List what differs between torch releases and matters here, with what hal does about it.

A row is a fact for the report; the code that acts on it is `hal.torch_compat`, which looks at the
installed torch and not at this table. A row's probe looks at it too, so that `hal doctor` and the
tests find a vendor's torch that is not what its version says.
"""

from __future__ import annotations

from hal.device import version_at_least
from hal.quirk_facts import DTYPE_QUIRKS, INTERFACE_QUIRKS, Quirk
from hal.quirk_products import PRODUCT_QUIRKS

__all__ = ["QUIRKS", "Quirk", "quirks_for", "supported_torch"]

_OLDEST_TORCH = "2.6"

QUIRKS = (*DTYPE_QUIRKS, *INTERFACE_QUIRKS, *PRODUCT_QUIRKS)
"""Every known quirk."""

if len({quirk.id for quirk in QUIRKS}) != len(QUIRKS):
    raise ValueError("two quirks have one id")


def quirks_for(torch_version: str | None, platform: str) -> tuple[Quirk, ...]:
    """Return the quirks to expect under a torch release on a platform; none without torch."""
    if torch_version is None:
        return ()
    return tuple(quirk for quirk in QUIRKS if quirk.applies(torch_version, platform))


def supported_torch(version: str) -> str | None:
    """Return what is wrong with a torch version in a sentence; None from 2.6 to the newest.

    Development builds count as their release, so the 2.6.0a0 of a vendor's container is fine.
    """
    if version_at_least(version, _OLDEST_TORCH):
        return None
    if version_at_least(version, "0"):
        return f"torch {version} is older than {_OLDEST_TORCH}, the oldest that hal supports"
    return (
        f"the version of torch, {version!r}, cannot be read, so no kernel that needs a release of "
        "torch is chosen"
    )
