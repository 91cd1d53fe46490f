"""docs/methods.md says what is measured now."""

from pathlib import Path

import pytest

from llmkit.build.methods import GRID, HEAD, METHODS, facts, line, measure
from llmkit.models.families import FAMILIES

DOC = Path(__file__).parents[2] / "docs" / "methods.md"
QUICK = ("GPT-J", "BLOOM")
"""Families that `tests/adapters` does not measure, one of them with refusals."""


def row(family):
    """The table's row of a family, and the reasons that its numbers stand for."""
    text = DOC.read_text("utf-8")
    (cells,) = (said for said in text.splitlines() if said.startswith(f"| {family} |"))
    notes = [said.split(". ", 1)[1] for said in text.splitlines() if f" on {family}: " in said]
    return cells, notes


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_row_of_the_table_is_current(family):
    cells, notes = row(family)
    found = [line(name, family, measure(name, family), []) for name in METHODS]
    assert [cell.split(" (")[0].strip() for cell in cells.split("|")[2:-1]] == [said.split(" (")[0] for said in found]
    assert [note.split(" on ")[0] for note in notes] == [
        name for name, said in zip(METHODS, found, strict=True) if said != "yes"
    ]


def test_the_page_has_these_methods_and_families_and_no_others():
    text = DOC.read_text("utf-8")
    assert text.startswith(HEAD + facts() + GRID)
    rows = text.split("## On each family")[1].splitlines()
    assert [said.split("|")[1].strip() for said in rows if said.startswith("| ")][1:] == list(FAMILIES)


def test_a_no_has_the_number_of_its_reason():
    notes = ["another"]
    assert line("ia3", "X", "yes", notes) == "yes" and line("ia3", "X", "is no good", notes) == "no (2)"
    assert notes[1] == "ia3 on X: is no good"
