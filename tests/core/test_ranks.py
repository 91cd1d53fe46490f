"""What a process knows of the others by its environment."""

import pytest

from llmkit.core.errors import RecipeError
from llmkit.core.ranks import exit_status, ranks


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, 75),
        ({"LOCAL_RANK": "0"}, 75),  # by zero on one process, which no launcher has started
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 0),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, 0),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 75),
    ],
)
def test_a_clean_stop_is_no_failure_under_a_launcher_alone(environment, code, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert exit_status(75) == code and exit_status(6) == 6


def test_a_rank_of_nobody_knows_how_many_is_refused():
    with pytest.raises(RecipeError, match="RANK=1 and no WORLD_SIZE"):
        ranks({"RANK": "1"})
    assert ranks({"RANK": "0"}).world == 1
