"""PPO over ranks: answers are dealt, advantages are those of all of them, and a step is that of one process."""

from llmkit.stages.ppo import Ppo
from tests.distributed import the_same_steps


def test_two_ranks_make_the_steps_of_one(tiny, tmp_path):
    own = {
        "rollout": {"group": 2, "max_tokens": 5, "reuse": 2},
        "critic": {"kind": "shared", "adapter": {"kind": "lora", "rank": 4}},
        "kl": {"kind": "adaptive", "horizon": 16},
        "gae": {"whiten_rewards": True},
    }
    names = ("loss", "grad_norm", "reward", "kl", "value_loss", "explained", "beta", "divergence", "ratio")
    the_same_steps(Ppo, tiny, tmp_path, names, own)
