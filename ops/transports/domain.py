"""Say where ranks must be for a library's exchange: needs of transports, as data with reasons."""

from __future__ import annotations

from dataclasses import dataclass

from hal.needs import Code, Context, Failure, Need, Needs

__all__ = ["LinkedBy", "one_host"]


@dataclass(frozen=True, slots=True)
class LinkedBy(Need):
    """Need devices that are connected by a kind of link; see `DeviceSpec.interconnect`.

    What a device is connected by is a fact of its product, and of the links that were found. Where
    nobody knows it, the library's own look at the machine has to do.

    Attributes:
        kinds: Names of `hal.device.LINKS`.
    """

    kinds: tuple[str, ...]

    def check(self, context: Context) -> Failure | None:
        spec = context.spec
        found = {link.kind for link in spec.links}
        if spec.interconnect is not None:
            found.add(spec.interconnect)
        if not found or found.intersection(self.kinds):
            return None
        needed = f"devices linked by {' or '.join(self.kinds)}"
        return Failure(Code.RANK, needed, " and ".join(sorted(found)))


def one_host(most: int, library: str) -> tuple[Need, ...]:
    """Return the needs of an exchange among the devices of one host.

    Args:
        most: Ranks.
        library: Whose exchange it is.
    """
    return (
        Needs.between("hosts", 1, 1, "ranks of one host: hal cannot tell what others reach"),
        Needs.one_of(
            "ranks",
            *(2**power for power in range(1, most.bit_length())),
            code=Code.RANK,
            hint=f"{library} has kernels for these numbers of ranks of a host",
        ),
    )
