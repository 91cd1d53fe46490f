"""What tests of stages share."""

import pytest

from tests.stages.drawn import ROWS, written


@pytest.fixture
def asked(tmp_path):
    """A file of prompts."""
    return written(tmp_path / "asked.jsonl", ROWS)
