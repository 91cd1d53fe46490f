"""A policy over ranks: answers are dealt, and a step is that of one process."""

import pytest

from llmkit.stages.policy import Policy
from tests.distributed import the_same_steps


@pytest.mark.parametrize("reuse", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_make_the_steps_of_one(reuse, tiny, tmp_path):
    own = {"rollout": {"group": 4, "max_tokens": 5, "reuse": reuse}, "loss": {"kind": "dapo", "beta": 0.1}}
    names = ("loss", "grad_norm", "reward", "kl", "entropy", "length", "ratio", "groups_without_signal")
    the_same_steps(Policy, tiny, tmp_path, names, own)
