"""The page of `hal matrix --html` in a real headless Chromium: keys, clicks, filters, colors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser

from hal.matrix import build_matrix
from hal.matrix_page import matrix_page

CHROMIUM = find_browser()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that a child inherits"),
]
OPEN = "document.querySelector('dialog').open"
TEXT = "document.querySelector('dialog').innerText"
SHOWN = "Array.from(document.querySelectorAll('tbody tr')).filter(row => !row.hidden).length"
COLUMNS = "Array.from(document.querySelectorAll('[data-column]')).filter(x => !x.hidden).length"
FOCUS = "document.activeElement.getAttribute('aria-label')"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "matrix.html"
    path.write_text(matrix_page(build_matrix(["linear", "route"])), encoding="utf-8")
    return path


@pytest.fixture
def browser(file: Path, tmp_path: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    found = Browser(CHROMIUM, tmp_path)
    try:
        found.open(file)
        yield found
        assert found.errors == []
        # Offline by construction: nothing but the page itself is ever asked for.
        assert set(found.requested) <= {file.as_uri()}
    finally:
        found.close()


def focus(browser: Browser, label: str) -> None:
    browser.run(f"document.querySelector('[aria-label^=\"{label}\"]').focus()")


def filter_by(browser: Browser, field: str, value: str) -> None:
    browser.run(
        f"(f => {{ f.value = '{value}'; f.dispatchEvent(new Event('input')); }})"
        f"(document.getElementById('{field}'))"
    )


def test_a_click_opens_the_reasons_and_escape_closes_them(browser: Browser) -> None:
    browser.click('[aria-label^="linear fp8_channel on rocm:gfx90a"]')
    browser.wait(OPEN)
    text = browser.run(TEXT)
    assert text.startswith("linear under fp8_channel on rocm:gfx90a")
    assert "MI210" in text
    assert "Cannot run" in text
    assert "triton_fp8 [native]" in text
    assert "needs Triton's own matrix instruction" in text
    browser.press("Escape")
    browser.wait(f"!{OPEN}")


def test_the_keyboard_alone_is_enough(browser: Browser) -> None:
    focus(browser, "linear bf16 on cuda:sm_80")
    for key, place in (
        ("ArrowRight", "linear bf16 on cuda:sm_86"),
        ("ArrowDown", "linear fp8_tensor on cuda:sm_86"),
        ("ArrowLeft", "linear fp8_tensor on cuda:sm_80"),
        ("ArrowUp", "linear bf16 on cuda:sm_80"),
        ("ArrowUp", "linear bf16 on cuda:sm_80"),
        ("End", "linear bf16 on cpu:aarch64+sve"),
    ):
        browser.press(key)
        assert browser.run(FOCUS).startswith(place), key
    browser.press("Home")
    browser.press("Enter", text="\r")
    browser.wait(OPEN)
    assert browser.run(TEXT).startswith("linear under bf16 on cuda:sm_70")
    browser.press("Escape")
    browser.wait(f"!{OPEN}")
    assert browser.run(FOCUS).startswith("linear bf16 on cuda:sm_70"), "focus comes back"


def test_tab_enters_the_table_once(browser: Browser) -> None:
    assert browser.run("document.querySelectorAll('td button[tabindex=\"0\"]').length") == 1
    browser.run("document.getElementById('evidence').focus()")
    for _ in range(3):  # the scrolling box takes the focus in some versions
        browser.press("Tab")
        if str(browser.run(FOCUS)).startswith("linear bf16 on cuda:sm_70"):
            break
    assert browser.run(FOCUS).startswith("linear bf16 on cuda:sm_70")


def test_filters_hide_what_does_not_match(browser: Browser) -> None:
    rows, columns = browser.run(SHOWN), browser.run(COLUMNS)
    filter_by(browser, "op", "route")
    assert (browser.run(SHOWN), browser.run(COLUMNS)) == (1, columns)
    filter_by(browser, "op", "")
    filter_by(browser, "scheme", "mxfp4")
    assert 1 < browser.run(SHOWN) < rows
    filter_by(browser, "platform", "h100")
    assert browser.run(COLUMNS) == 1
    filter_by(browser, "platform", "rocm")
    assert 1 < browser.run(COLUMNS) < columns
    assert browser.run("document.getElementById('count').textContent").endswith(" cells")
    filter_by(browser, "platform", "nothing of the kind")
    assert browser.run(SHOWN) == 0
    for field in ("scheme", "platform"):
        filter_by(browser, field, "")
    assert (browser.run(SHOWN), browser.run(COLUMNS)) == (rows, columns)


def test_compile_facts_are_told(browser: Browser) -> None:
    browser.click('[aria-label^="linear bf16 on cuda:sm_100"]')
    browser.wait(OPEN)
    text = browser.run(TEXT)
    assert "gemm/bf16/few" in text
    assert "registers" in text
    assert "tcgen05.mma" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_can_be_read_in_light_and_dark(browser: Browser, scheme: str) -> None:
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.ask("Emulation.setEmulatedMedia", features=media)
    pairs = browser.run(
        "Array.from(new Map(Array.from(document.querySelectorAll('td')).map(cell => "
        "[cell.className, [getComputedStyle(cell.firstElementChild).color, "
        "getComputedStyle(cell).backgroundColor]])).values())"
    )
    assert len(pairs) >= 3
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page) > 0.5) == (scheme == "light")
    for ink, ground in pairs:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        # Source: WCAG 2.2, success criterion 1.4.3 (AA)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def luminance(color: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`. Source: WCAG 2.2."""
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
