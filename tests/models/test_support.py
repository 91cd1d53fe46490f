"""docs/support.md says what is measured now."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.models.support import FAMILIES, HEAD, Row, measure, table

DOC = Path(__file__).parents[2] / "docs" / "support.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_of_the_table_is_current(family: str) -> None:
    line = table([measure(family)]).removeprefix(HEAD)
    assert line in DOC.read_text("utf-8"), f"{line.strip()}: run `python -m llmkit.models.support > docs/support.md`"


def test_the_table_has_these_families_and_no_others() -> None:
    text = DOC.read_text("utf-8")
    assert text.startswith(HEAD)
    named = [line.split("|")[1].strip() for line in text.removeprefix(HEAD).splitlines()]
    assert named == list(FAMILIES)


def test_a_no_has_its_reason() -> None:
    row = table([Row("X", True, False, True, True, True, "X gives other values under a tree")]).splitlines()[-1]
    assert row == "| X | yes | no | yes | yes | yes | X gives other values under a tree |"
