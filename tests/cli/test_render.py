"""Text and Markdown stay readable whatever a driver or a file calls its devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.render import Fields, Paragraph, Section, Table, fold, plain, styled, to_markdown, to_text

HOSTILE = "Radeon\u2122 | <b>\x1b[31mred\x07\n# title ```"


def test_plain_is_one_printable_line_of_ascii() -> None:
    assert plain("a\tb\n  c") == "a b c"
    assert plain("\u2122\x1b") == "\\u2122\\x1b"
    assert plain("lone \udc80 surrogate") == "lone \\udc80 surrogate"


@given(st.lists(st.tuples(st.text(max_size=200), st.text(max_size=200)), max_size=4))
def test_text_never_exceeds_the_page(rows: list[tuple[str, str]]) -> None:
    cells = tuple((first[:30], second) for first, second in rows)
    sections = [
        Section("title " * 20, (Fields(cells), Paragraph("word " * 50))),
        Section("table", (Table(("a", "b"), tuple(rows), "note", ("n" * 300,) * len(rows)),)),
    ]
    text = to_text(sections)
    assert text.isascii()
    assert max(map(len, text.split("\n"))) <= 80


def test_wide_tables_wrap_in_their_cells() -> None:
    table = Table(("name", "long", "longer"), (("x", "a " * 60, "b" * 120),))
    text = to_text([Section("t", (table,))])
    assert text.count("a") == 60 + len("name") - 3  # none is lost
    assert text.count("b") == 120


def test_columns_line_up_and_are_not_padded_at_the_end() -> None:
    table = Table(("op", "level"), (("linear", "native"), ("x", "absent")))
    assert to_text([Section("T", (table,))]) == (
        "T\n  op      level\n  linear  native\n  x       absent\n"
    )


def test_color_changes_nothing_but_color() -> None:
    table = Table(("op", "level"), (("linear", "native"), ("x", "absent")))
    sections = [Section("T", (table, Paragraph("p")))]
    colored = to_text(sections, color=True)
    assert "\x1b[32mnative\x1b[0m" in colored
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[32m"):
        colored = colored.replace(code, "")
    assert colored == to_text(sections)
    assert styled("x", "", True) == styled("x", "red", False) == "x"


def test_hostile_names_stay_data() -> None:
    sections = [Section(HOSTILE, (Fields(((HOSTILE, HOSTILE),)), Paragraph(HOSTILE)))]
    assert "\x1b" not in to_text(sections) + to_markdown(sections)
    (row,) = [line for line in to_markdown(sections).splitlines() if line.startswith("| Radeon")]
    assert row.count(" | ") == 1
    assert "\\<b>" in row
    assert "\\`\\`\\`" in row


def test_markdown_puts_notes_into_a_last_column() -> None:
    table = Table(("op",), (("linear",), ("route",)), "why", ("because", ""))
    assert to_markdown([Section("T", (table,))]) == (
        "### T\n\n| op | why |\n| --- | --- |\n| linear | because |\n| route |  |\n"
    )


@pytest.mark.parametrize(
    "line", ["   short", "   " + "word " * 40, " " * 70 + "far", "x" * 200, ""]
)
def test_fold_keeps_the_words_of_a_line(line: str) -> None:
    folded = fold(line)
    assert max(map(len, folded)) <= 80
    assert "".join("".join(folded).split()) == "".join(line.split())
    if len(line) <= 40:
        assert folded == [line]
