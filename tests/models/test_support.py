"""The shipped table of support: its page, its text, and what its cells mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.cli.main import _guarded
from llmkit.models import support
from llmkit.models.families import FAMILIES
from llmkit.models.support import COLUMNS, measured, numbered, page, said, summary, text

REASON = "X gives other values under a tree"
ROW = dict.fromkeys(COLUMNS, "yes") | {"tree": REASON, "QLoRA": "yes: without its experts"}


def test_the_table_has_these_families_and_no_others() -> None:
    assert list(measured()) == list(FAMILIES)
    assert len(FAMILIES) >= 60
    assert all(list(row) == list(COLUMNS) for row in measured().values())


def test_a_cell_that_is_no_plain_yes_has_the_number_of_its_note() -> None:
    rows, notes = numbered({"X": ROW, "Y": ROW | {"paged": REASON, "tree": "another"}})
    assert rows[0] == ["X", "yes", "no (1)", "yes", "yes", "yes", "yes (2)", "yes", "yes", "yes"]
    assert rows[1] == ["Y", "yes", "no (3)", "no (1)", "yes", "yes", "yes (2)", "yes", "yes", "yes"]
    assert notes == [REASON, "without its experts", "another"]


def test_an_exception_counts_as_a_yes_and_a_reason_does_not() -> None:
    counts = summary({"X": ROW})
    assert {column for column in COLUMNS if not counts[column]} == {"tree"}
    assert said("yes: but") and not said("yesterday's values")


def test_every_reason_is_one_line_that_names_no_place_on_this_machine() -> None:
    cells = {cell for row in measured().values() for cell in row.values()}
    assert all(cell and "\n" not in cell and len(cell) < 300 and "/tmp" not in cell for cell in cells)


def test_page_and_text_say_the_same() -> None:
    rows, notes = numbered(measured())
    assert all(f"| {' | '.join(row)} |\n" in page() for row in rows)
    printed = text().splitlines()
    assert [line.split("  ")[0] for line in printed[1 : len(rows) + 1]] == list(FAMILIES)
    assert printed[-len(notes) :] == [f"({n}) {note}" for n, note in enumerate(notes, 1)]


def test_doctor_prints_the_table_or_its_counts(capfd: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["doctor", "--support"], False) == 0
    assert capfd.readouterr().out == text()
    assert _guarded(["doctor", "--support", "--json"], False) == 0
    assert json.loads(capfd.readouterr().out) == measured()
    assert _guarded(["doctor", "--json"], False) == 0
    assert json.loads(capfd.readouterr().out)["supported"] == summary(measured())


def test_the_data_is_in_the_package() -> None:
    assert Path(support.__file__).parent == support.DATA.parent
