"""A policy over ranks: answers are dealt, and a step is that of one process."""

import json

import pytest

from llmkit.stages.policy import Policy
from tests.distributed import lines, trained


@pytest.mark.parametrize("reuse", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_make_the_steps_of_one(reuse, tiny, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i} of the model"}) + "\n" for i in range(8)))

    def make(out, **more):
        return Policy(
            model=str(tiny),
            data={"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
            rollout={"group": 4, "max_tokens": 5, "reuse": reuse},
            reward=[{"kind": "length", "shape": {"kind": "target", "length": 4, "slack": 24}, "unit": "characters"}],
            loss={"kind": "dapo", "beta": 0.1},
            batch={"prompts": 3},
            micro_batch=1,
            steps=4,
            optim={"kind": "sgd", "lr": 1e-2},
            schedule={"kind": "constant"},
            out=str(out),
            **more,
        )

    one, two = (trained(world, make, tmp_path, f"ranks-{world}", 240.0) for world in (1, 2))
    answers = [
        [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    assert [line["ids"] for line in answers[0]] == [line["ids"] for line in answers[1]]
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "length", "ratio", "groups_without_signal"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
