"""Turn the plain data of a report into sections that `hal.render` draws.

Only the data is read, never a platform, so a report saved as JSON can be shown elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hal.formats import FORMATS
from hal.render import Block, Fields, Paragraph, Section, Table, fold, styled

__all__ = ["explain_text", "info_sections"]

UNKNOWN = "unknown"
_EXPLAIN_STYLES = {"-> ": "bold", " * ": "green", " - ": "dim"}
# Every device holds and adds these; the tables state nothing about them.
_UNTABULATED = ("int32", "int64", "uint4")
SIMULATED = (
    "The device is a row of hal's tables: it is not in this machine, nothing about it was "
    "measured, and nothing can run on it."
)


def info_sections(report: Mapping[str, Any]) -> list[Section]:
    """Return the sections of `hal info`."""
    shown = [device for device in report["devices"] if device["alike"][0] == device["index"]]
    sections = [_software(report), _platform(report)]
    for device in shown:
        sections.append(_device(report["platform"]["name"], device))
        sections.append(_formats(device))
    sections.append(_probes(report))
    sections += [_selections(report, device) for device in shown]
    sections.append(_packages(report))
    if report["plugins"]:
        sections.append(_plugins(report["plugins"]))
    sections.append(_settings(report))
    if report["quirks"]:
        sections.append(_quirks(report["quirks"]))
    if report["errors"]:
        rows = tuple((row["part"], row["error"]) for row in report["errors"])
        sections.append(Section("What could not be reported", (Fields(rows),)))
    return sections


def explain_text(
    report: Mapping[str, Any], table: str, *, color: bool = False, markdown: bool = False
) -> str:
    """Return what `hal explain` prints: a selection's own table, then what to know about it."""
    lines = [line for row in table.splitlines() for line in fold(row)]
    remarks = []
    if report["instead"] is not None:
        asked = f"Without insisting on {report['insisting']}" if report["insisting"] else ""
        remarks.append(f"{asked or 'Not forced'}, {report['instead']} would run.")
    if report["simulated"]:
        remarks.append("Simulated: " + SIMULATED)
    for remark in remarks:
        lines += ["", *fold(remark)]
    if markdown:
        return "\n".join(["```", *lines, "```"]) + "\n"
    return (
        "\n".join(styled(line, _EXPLAIN_STYLES.get(line[:3], ""), color) for line in lines) + "\n"
    )


def _software(report: Mapping[str, Any]) -> Section:
    rows = (
        ("python", f"{report['python']} on {report['system']}"),
        ("torch", _torch(report)),
        ("triton", report["triton"] or "not installed"),
    )
    return Section(f"hal {report['hal']}", (Fields(rows),))


def _torch(software: Mapping[str, Any]) -> str:
    if software["torch"] is None:
        return "not installed"
    return f"{software['torch']} (built for {software['torch_build'] or UNKNOWN})"


def _platform(report: Mapping[str, Any]) -> Section:
    platform = report["platform"]
    count = platform["devices"]
    title = f"Platform {platform['name']}, {count} device{'' if count == 1 else 's'}"
    blocks: list[Block] = []
    if platform["simulated"]:
        title += ", SIMULATED"
        blocks.append(Paragraph(SIMULATED))
    rows = [
        ("torch device type", platform["torch_device_type"]),
        ("torch.distributed", platform["dist_backend"]),
    ]
    if (assumed := report["assumed"]) is not None:
        rows.append(("assumed torch", _torch(assumed)))
        rows.append(("assumed triton", assumed["triton"] or "not installed"))
    blocks.append(Fields(tuple(rows)))
    blocks += [Paragraph("Note: " + note) for note in report["notes"]]
    return Section(title, tuple(blocks))


def _device(platform: str, device: Mapping[str, Any]) -> Section:
    total, free = device["memory_bytes"], device["memory_free_bytes"]
    memory = _scaled(total, 1024, "B")
    if free is not None:
        memory += f", {_scaled(free, 1024, 'B')} free"
    capability = device["compute_capability"]
    link = device["interconnect"] or UNKNOWN
    if device["interconnect_bytes_per_second"] is not None:
        link += f", {_scaled(device['interconnect_bytes_per_second'], 1000, 'B/s')}"
    rows = [
        ("architecture", device["arch"]),
        ("memory", memory),
        ("memory bandwidth", _scaled(device["bandwidth_bytes_per_second"], 1000, "B/s")),
        ("compute units", _text(device["compute_units"])),
        ("lanes", _text(device["lanes"])),
        ("last-level cache", _scaled(device["l2_bytes"], 1024, "B")),
        ("fp8 encoding", device["formats"]["fp8_encoding"] or "none"),
        ("features", ", ".join(device["features"]) or "none"),
    ]
    if platform != "cpu":
        shared = _scaled(device["shared_memory_bytes"], 1024, "B")
        rows.insert(6, ("shared memory", f"{shared} for one block"))
        rows.append(("interconnect", link))
        if device["links"]:
            # Devices that are alike share a block and may reach each other in different ways.
            whose = f" of {device['index']}" if len(device["alike"]) > 1 else ""
            rows.append((f"links{whose}", _links(device["links"])))
        rows.append(("driver", _text(device["driver_version"])))
    if capability:
        rows.insert(1, ("compute capability", ".".join(map(str, capability))))
    nodes = device["numa_nodes"]
    rows.append(("NUMA nodes" if len(nodes) > 1 else "NUMA node", _ranges(nodes) or UNKNOWN))
    rows.append(("facts from", device["origin"] or UNKNOWN))
    if device["guess"]:
        rows.append(("warning", "architecture not in hal's table; its row is a cautious guess"))
    physical = [device["physical_index"]] if len(device["alike"]) == 1 else []
    if physical and physical != device["alike"]:
        rows.append(("driver's number", str(physical[0])))
    return Section(_title(platform, device), (Fields(tuple(rows)),))


def _links(links: Sequence[Mapping[str, Any]]) -> str:
    """Return `1-3 by nvlink, 900 GB/s; 4 by pcie, unknown`: peers with equal links together."""
    groups: dict[tuple[str, float | None], list[int]] = {}
    for link in links:
        groups.setdefault((link["kind"], link["bytes_per_second"]), []).append(link["peer"])
    return "; ".join(
        f"{_ranges(peers)} by {kind}, {_scaled(rate, 1000, 'B/s')}"
        for (kind, rate), peers in groups.items()
    )


def _title(platform: str, device: Mapping[str, Any]) -> str:
    return f"Device {platform}:{_ranges(device['alike'])}, {device['name']}"


def _formats(device: Mapping[str, Any]) -> Section:
    formats, rates = device["formats"], device["rates"]
    rows = tuple(
        (
            name,
            formats["storage"].get(name, "absent"),
            formats["math"].get(name, "absent"),
            "yes" if name in formats["triton_math"] else "no",
            _scaled(rates.get(name), 1000, "op/s"),
        )
        for name in FORMATS
        if name not in _UNTABULATED
    )
    head = ("format", "storage", "matrix math", "by Triton", "peak")
    return Section(f"Number formats on {device['name']}", (Table(head, rows),))


def _probes(report: Mapping[str, Any]) -> Section:
    title = "What was probed"
    if not report["probes"]:
        return Section(title, (Paragraph("Nothing."),))
    rows = tuple(
        (probe["name"], probe["outcome"], f"{probe['milliseconds']:.1f}", probe["detail"])
        for probe in report["probes"]
    )
    total = f"{title}, in {report['probe_milliseconds']:.1f} ms"
    return Section(total, (Table(("probe", "outcome", "ms", "detail"), rows),))


def _selections(report: Mapping[str, Any], device: Mapping[str, Any]) -> Section:
    chosen = [row for row in report["selections"] if row["devices"] == device["alike"]]
    tables = []
    for op in dict.fromkeys(row["op"] for row in chosen):
        mine = [row for row in chosen if row["op"] == op]
        rows = tuple(
            (row["scheme"], row["kernel"] or "none", row["level"] or "none") for row in mine
        )
        better = (row["why_not_better"] for row in mine)
        notes = tuple(f"not {reason}" if reason else "" for reason in better)
        tables.append(Table((f"{op}: scheme", "kernel", "level"), rows, "why not better", notes))
    about = "For sizes that meet every requirement; hal explain OP --scheme S accounts for all."
    return Section(
        f"What runs on {device['name']}, and what keeps a better kernel away",
        (*tables, Paragraph(about)),
    )


def _packages(report: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    if report["packages"]:
        blocks.append(Fields(tuple(report["packages"].items())))
    blocks += [
        Paragraph(f"{name} is broken: {reason}")
        for name, reason in report["broken_packages"].items()
    ]
    return Section(
        "Kernel packages", tuple(blocks) or (Paragraph("No kernel package is installed."),)
    )


def _plugins(plugins: Sequence[Mapping[str, Any]]) -> Section:
    rows = tuple(
        (plugin["package"], plugin["version"], plugin["group"], plugin["state"])
        for plugin in plugins
    )
    details = tuple(plugin["detail"] for plugin in plugins)
    head = ("package", "version", "adds", "state")
    return Section("Plugins", (Table(head, rows, "detail", details),))


def _settings(report: Mapping[str, Any]) -> Section:
    rows = tuple(
        (row["name"], row["value"] or "(empty)", row["origin"]) for row in report["settings"]
    )
    return Section("Settings", (Table(("variable", "value", "from"), rows),))


def _quirks(quirks: Sequence[Mapping[str, Any]]) -> Section:
    rows = tuple((quirk["id"], f"{quirk['symptom']}; {quirk['handling']}") for quirk in quirks)
    return Section("Quirks of this software that apply", (Fields(rows),))


def _text(value: object) -> str:
    return UNKNOWN if value is None else str(value)


def _scaled(value: float | None, base: int, unit: str) -> str:
    """Return a quantity with a prefix, such as `141.0 GiB` or `4.8 TB/s`; None is unknown."""
    if value is None:
        return UNKNOWN
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if base == 1024 else ("", "k", "M", "G", "T")
    place = 0
    while value >= base and place < len(prefixes) - 1:
        value, place = value / base, place + 1
    return f"{value:.4g} {prefixes[place]}{unit}"


def _ranges(indices: Sequence[int]) -> str:
    """Return `0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
