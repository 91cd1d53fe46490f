"""Whether rewards can say what answers are worth, and rows have what they read of them, before there are answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.core.errors import DataError, Problem, told_below
from llmkit.rl.rewards_node import Reward, placed


def check_columns(
    rewards: Reward | Sequence[Reward], rows: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, int]]
) -> None:
    """`rows`: columns beside what is asked; `places`: the file and the line of each.

    Raises:
        DataError: no answer to a row could have a score; of each reward the first such row is told.
        RecipeError, ModelError, ResourceError: a reward is not what it has to be.
    """
    wrong: list[Problem] = []
    for key, reward in placed(rewards):
        with told_below(key):
            reward.ready()
            lack = reward.lacks(rows)
        if lack is not None:
            file, line = places[lack.row]
            wrong.append(Problem(lack.why, lack.fix, file, line, key=f"{key}.{lack.key}"))
    if wrong:
        raise DataError(problems=wrong)
