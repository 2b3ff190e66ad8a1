"""Examine a machine and tell what does not fit together, with cures, for `hal doctor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hal import __version__
from hal.diagnosis import Subject, diagnose
from hal.findings import Severity
from hal.health import REMEMBERED
from hal.render import Fields, Paragraph, Section

__all__ = ["STATUS", "doctor_report", "doctor_sections", "subject_here"]

STATUS = {"note": 0, "warning": 1, "error": 3}
"""Exit status of `hal doctor` by the severity of the worst finding; 2 is kept for misuse."""


def subject_here() -> Subject:
    """Return this machine and what detection makes of it now."""
    from hal.platforms.detection import detect
    from hal.platforms.machine import Machine
    from hal.platforms.plugins import platform_plugins
    from hal.registry import kernel_plugins

    machine = Machine.here()
    return Subject(machine, detect(machine), (*platform_plugins().states, *kernel_plugins()))


def doctor_report(
    subject: Subject,
    *,
    seconds: float | None,
    said: Callable[[str], None] = lambda title: None,
) -> dict[str, Any]:
    """Return every finding as plain data, the worst first.

    Args:
        subject: What to examine.
        seconds: Time limit of each child process; None starts none and tells facts alone.
        said: Called with the title of each trial before it starts.
    """
    found = list(diagnose(subject))
    tried: list[str] = []
    if seconds is not None:
        from hal.trials import TRIALS, run_trials

        tried = list(TRIALS)
        # What an earlier run remembered is tried again now.
        found = [finding for finding in found if REMEMBERED not in finding]
        found += run_trials(subject, seconds, said)
    findings = sorted(dict.fromkeys(found), key=lambda finding: -finding.severity)
    worst = max((finding.severity for finding in findings), default=Severity.NOTE)
    platform = subject.detection.current
    return {
        "hal": __version__,
        "platform": platform.name,
        "devices": [platform.device(index).name for index in range(platform.device_count())],
        "torch": subject.software.torch,
        "torch_build": subject.software.torch_build,
        "worst": str(worst),
        "status": STATUS[str(worst)],
        "findings": [finding.to_dict() for finding in findings],
        "tried": tried,
    }


def doctor_sections(report: Mapping[str, Any]) -> list[Section]:
    """Return the sections of `hal doctor`."""
    counts = {str(severity): 0 for severity in reversed(Severity)}
    for finding in report["findings"]:
        counts[finding["severity"]] += 1
    told = ", ".join(
        f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count
    )
    names = list(dict.fromkeys(report["devices"]))
    rows = (
        ("platform", f"{report['platform']}: {', '.join(names)}"),
        ("torch", _torch(report)),
        ("tried", ", ".join(report["tried"]) or "nothing, only facts were compared"),
    )
    sections = [Section(f"hal doctor: {told or 'all is well'}", (Fields(rows),))]
    for finding in report["findings"]:
        blocks = [Paragraph(finding["sentence"])]
        if finding["cure"]:
            blocks.append(Paragraph(f"-> {finding['cure']}"))
        sections.append(Section(f"{finding['severity']} [{finding['code']}]", tuple(blocks)))
    return sections


def _torch(report: Mapping[str, Any]) -> str:
    if report["torch"] is None:
        return "not installed"
    return f"{report['torch']} (built for {report['torch_build'] or 'unknown'})"
