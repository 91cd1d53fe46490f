"""Answers that are drawn while steps learn from those before: of weights one rollout old, and counted by that."""

import math
from types import SimpleNamespace

import pytest

from llmkit.core.errors import RecipeError
from llmkit.stages.drawing import _check
from tests.stages.test_policy import asked, go, lines_of, policy, steps_of

__all__ = ["asked"]
AHEAD = {"group": 4, "max_tokens": 6, "asynchronous": 1}


def test_a_policy_that_does_not_move_draws_and_learns_as_if_it_waited(tiny, asked, tmp_path):
    made = []
    for asynchronous in (0, 1):
        more = {"rollout": {**AHEAD, "asynchronous": asynchronous}, "optim": {"kind": "sgd", "lr": 1e-30}}
        made.append(go(policy(tiny, asked, tmp_path / str(asynchronous), **more, loss={"kind": "dapo", "beta": 0.1})))
    waited, ahead = (lines_of(one.folder, "rollouts.jsonl") for one in made)
    assert [one["ids"] for one in ahead] == [one["ids"] for one in waited]
    assert [one["version"] for one in ahead[::12]] == [0, 0, 1]
    for mine, theirs in zip(*(steps_of(one.folder) for one in reversed(made)), strict=True):
        assert mine.pop("importance") == 1.0  # to the bit: the same forward over equal weights
        assert mine == theirs


@pytest.mark.parametrize("adapter", [{"kind": "lora"}, "none"], ids=str)
def test_weights_are_the_exact_ratios_up_to_the_bound(adapter, tiny, asked, tmp_path):
    more = {"rollout": {**AHEAD, "reuse": 2}, "adapter": adapter, "steps": 6, "optim": {"kind": "adamw", "lr": 3e-2}}
    made = go(policy(tiny, asked, tmp_path / "run", **more, loss={"kind": "dapo", "truncate": 1.02}))
    rolled, steps = lines_of(made.folder, "rollouts.jsonl"), steps_of(made.folder)
    assert [one["version"] for one in rolled[::12]] == [0, 0, 2]
    bounded = False
    for number in range(3):
        mine = [one for one in rolled if one["rollout"] == number]
        pairs = [pair for one in mine for pair in zip(one["old"], one["behaviour"], strict=True)]
        ratios = [math.exp(old - drawn) for old, drawn in pairs]
        bounded |= max(ratios) > 1.02
        expected = sum(min(ratio, 1.02) for ratio in ratios) / len(ratios)
        for step in steps[2 * number : 2 * number + 2]:
            assert step["importance"] == pytest.approx(expected, rel=1e-5)
        engine = [pair for one in mine for pair in zip(one["logps"], one["behaviour"], strict=True)]
        assert all(abs(told - drawn) < 1e-4 for told, drawn in engine if told is not None)
    assert bounded
    first = [one for one in rolled if one["rollout"] == 0]
    assert all(one["old"] == one["behaviour"] for one in first)


def test_several_ranks_are_refused():
    job = SimpleNamespace(run=SimpleNamespace(ranks=SimpleNamespace(world=2)))
    built = SimpleNamespace(loaded=SimpleNamespace(support=SimpleNamespace(paged=True)))
    with pytest.raises(RecipeError, match=r"rollout\.asynchronous"):
        _check(job, built, True)
