"""PPO over ranks: answers are dealt, advantages are those of all of them, and a step is that of one process, whoever
holds which part of policy and critic."""

import pytest
from safetensors.torch import load_file

from llmkit.stages.ppo import Ppo
from tests.distributed import the_same_steps

LORA = {"kind": "lora", "rank": 4}
FREE = {"adapter": "none", "kl": {"kind": "fixed", "beta": 0.0}}
ADAPTIVE = {"adapter": LORA, "kl": {"kind": "adaptive", "horizon": 16}}
CASES = {
    "of its states": ADAPTIVE | {"critic": {"kind": "shared"}},
    "over the base": ADAPTIVE | {"critic": {"kind": "shared", "adapter": LORA}},
    "over the base, again": ADAPTIVE | {"critic": {"kind": "shared", "adapter": LORA}, "memory": {"recompute": "full"}},
    "a model": ADAPTIVE | {"critic": {"kind": "model", "adapter": LORA}},
    "a model, again": ADAPTIVE | {"critic": {"kind": "model", "adapter": LORA}, "memory": {"recompute": "full"}},
    "all of both": FREE | {"critic": {"kind": "model", "adapter": "none"}},
    "of its states, all": FREE | {"critic": {"kind": "shared"}},
}
WAYS = {
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp"}),
    "kept": (2, {"strategy": {"kind": "fsdp", "reshard": False}}),
    "zero 3": (2, {"strategy": {"kind": "zero", "stage": 3}}),
    "zero 2": (2, {"strategy": {"kind": "zero", "stage": 2}}),
    "hybrid": (4, {"strategy": "fsdp", "replicate": 2, "shard": 2}),
}
FAST = (("over the base", "ddp"), ("over the base, again", "fsdp"))
NAMES = ("loss", "grad_norm", "reward", "kl", "value_loss", "explained", "beta", "divergence", "ratio")


@pytest.mark.parametrize(
    ("case", "way"),
    [pytest.param(case, way, marks=() if (case, way) in FAST else pytest.mark.slow) for case in CASES for way in WAYS],
)
def test_ranks_make_the_steps_of_one(case, way, tiny, tmp_path):
    world, parallel = WAYS[way]
    own = {"rollout": {"group": 2, "max_tokens": 5, "reuse": 2}, "gae": {"whiten_rewards": True}}
    names = (
        NAMES
        if CASES[case].get("adapter") == LORA
        else tuple(x for x in NAMES if x not in ("kl", "beta", "divergence"))
    )
    one, several = the_same_steps(Ppo, tiny, tmp_path, names, own | CASES[case], parallel, world)
    there = sorted(path.name for path in (one / "critic").glob("*.safetensors"))
    assert there == sorted(path.name for path in (several / "critic").glob("*.safetensors"))
    for name in there:
        ours, theirs = (load_file(folder / "critic" / name) for folder in (several, one))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), (name, key)
