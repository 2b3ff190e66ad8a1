"""Say what is wrong with a machine in one plain sentence, with its cure."""

from __future__ import annotations

import enum

__all__ = ["Finding", "Severity", "guessed"]


class Severity(enum.IntEnum):
    """Say how much a finding matters.

    NOTE: worth knowing; nothing is wrong.
    WARNING: something works less well than it could, or differently than was asked for.
    ERROR: something that was installed or asked for cannot be used.
    """

    NOTE = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


class Finding(str):
    """A plain sentence about a machine; as text it is followed by its cure.

    Attributes:
        code: Short name of what was found, such as `torch-build`; stable, for programs.
        sentence: What was found.
        cure: What helps, as something to do; may be empty in a note.
        severity: How much it matters.
    """

    code: str
    sentence: str
    cure: str
    severity: Severity

    def __new__(
        cls, code: str, sentence: str, cure: str = "", severity: Severity = Severity.NOTE
    ) -> Finding:
        if severity > Severity.NOTE and not cure:
            raise ValueError(f"finding {code}: a {severity} needs a cure")
        finding = super().__new__(cls, f"{sentence}; {cure}" if cure else sentence)
        finding.code, finding.sentence, finding.cure = code, sentence, cure
        finding.severity = severity
        return finding

    def __getnewargs__(self) -> tuple[str, str, str, Severity]:  # type: ignore[override]
        return self.code, self.sentence, self.cure, self.severity

    def to_dict(self) -> dict[str, str]:
        """Return plain data for JSON."""
        return {
            "code": self.code,
            "severity": str(self.severity),
            "sentence": self.sentence,
            "cure": self.cure,
        }


def guessed(device: str, note: str) -> Finding:
    """Return the finding that a device's architecture is not in the table."""
    return Finding(
        "arch-unknown",
        f"{device}: {note}",
        "kernels made for its neighbours are left out until hal knows it: update hal",
        Severity.WARNING,
    )
