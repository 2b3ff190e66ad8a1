"""`benchmarks/mutations.py`: what it would break is there to be broken, and the page is its own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from mutations import (
    BEGIN,
    END,
    MUTATIONS,
    PAGE,
    ROOT,
    Mutation,
    caught_before,
    mutate,
    table,
    with_table,
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_changes_a_file_that_still_parses(mutation: Mutation, tmp_path) -> None:
    path = tmp_path / mutation.path
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / mutation.path).read_text(encoding="utf-8"), encoding="utf-8")
    before = mutate(tmp_path, mutation)
    after = path.read_text(encoding="utf-8")
    assert after != before
    if path.suffix == ".py":
        ast.parse(after)
    assert (ROOT / mutation.check).exists()


def test_a_text_that_is_no_longer_there_is_named(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    gone = Mutation("gone", "a.py", "y = 1", "y = 2", "tests")
    with pytest.raises(ValueError, match=r"a\.py: found no 'y = 1' \(gone\)"):
        mutate(tmp_path, gone)


def test_the_page_names_mutations_that_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = caught_before(text)
    assert list(found) == [mutation.name for mutation in MUTATIONS], "run benchmarks/mutations.py"
    assert text == with_table(text, [])


def test_a_run_of_some_leaves_the_rows_of_the_others() -> None:
    first, second, third = MUTATIONS[:3]
    text = f"before\n{BEGIN}{table([(first, 'a.py::a'), (third, 'c.py::c')])}{END}after\n"
    assert caught_before(text) == {first.name: "a.py::a", third.name: "c.py::c"}
    text = with_table(text, [(second, "b.py::b"), (third, "d.py::d")])
    tests = [(first, "a.py::a"), (second, "b.py::b"), (third, "d.py::d")]
    assert text == f"before\n{BEGIN}{table(tests)}{END}after\n"
