"""PPO over ranks: answers are dealt, advantages are those of all of them, and a step is that of one process."""

import json

import pytest

from llmkit.stages.ppo import Ppo
from tests.distributed import lines, trained


def test_two_ranks_make_the_steps_of_one(tiny, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i} of the model"}) + "\n" for i in range(8)))

    def make(out, **more):
        return Ppo(
            model=str(tiny),
            data={"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
            rollout={"group": 2, "max_tokens": 5, "reuse": 2},
            reward=[{"kind": "length", "shape": {"kind": "target", "length": 4, "slack": 24}, "unit": "characters"}],
            critic={"kind": "shared", "adapter": {"kind": "lora", "rank": 4}},
            kl={"kind": "adaptive", "horizon": 16},
            gae={"whiten_rewards": True},
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
    names = ("loss", "grad_norm", "reward", "kl", "value_loss", "explained", "beta", "divergence", "ratio")
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in names:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
