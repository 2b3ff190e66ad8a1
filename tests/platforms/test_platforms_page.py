"""The tables in docs/platforms.md are made of the tables that hal uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from hal.config import SETTINGS
from hal.formats import Support
from hal.platforms.tables import PLATFORMS, arch_rows, device_rows
from hal.quirks import QUIRKS

PAGE = Path(__file__).parents[2] / "docs" / "platforms.md"


def table(head: str, rows: Iterable[tuple[str, ...]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def devices() -> str:
    def rows() -> Iterable[tuple[str, ...]]:
        for platform in PLATFORMS:
            for row in device_rows(platform):
                formats = arch_rows()[row.arch].formats
                encoding = formats.fp8_encoding
                math = formats.of("math", encoding) if encoding else Support.ABSENT
                bandwidth = row.bandwidth_bytes_per_second
                yield (
                    f"{platform}:{row.name.lower().replace(' ', '-')}",
                    str(row.arch),
                    f"{row.memory_bytes / 2**30:.0f}",
                    str(row.compute_units),
                    f"{bandwidth / 1e9:.0f}" if bandwidth else "unknown",
                    row.interconnect or "none",
                    f"{encoding or 'none'}, {math}",
                )

    return table("device | arch | GiB | units | GB/s | link | fp8 encoding, matrix math", rows())


def quirks() -> str:
    def when(since: str | None, fixed: str | None) -> str:
        parts = [f"from {since}" if since else "", f"before {fixed}" if fixed else ""]
        return " ".join(filter(None, parts)) or "all"

    return table(
        "quirk | torch | what a user would see | what hal does",
        ((f"`{row.id}`", when(row.since, row.fixed), row.symptom, row.handling) for row in QUIRKS),
    )


def settings() -> str:
    return table(
        "variable | default | meaning",
        (
            (f"`{row.name}`", f"`{row.default}`" if row.default else "", row.meaning)
            for row in SETTINGS.values()
        ),
    )


TABLES = {"devices": devices, "quirks": quirks, "settings": settings}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_table(name: str) -> None:
    _, _, rest = PAGE.read_text().partition(
        f"<!-- {name}: made by tests/platforms/test_platforms_page.py -->\n"
    )
    shown = rest.partition("\n\n")[0] + "\n"
    wanted = TABLES[name]()
    assert shown == wanted, f"docs/platforms.md, {name}: put there\n{wanted}"
