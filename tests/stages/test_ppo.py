"""PPO on a tiny model: it learns what it is paid for, with either critic, and an interrupted run is the same to the
bit."""

import json

import pytest
from safetensors.torch import load_file

from llmkit.core.errors import LlmkitError, ModelError, RecipeError
from llmkit.stages.ppo import Ppo
from tests.stages.drawn import LETTER, go, lines_of, small, steps_of

LORA = {"kind": "lora", "rank": 4}
CRITICS = {
    "of the policy's states": {"kind": "shared"},
    "over the base": {"kind": "shared", "adapter": LORA, "lr": 1e-3},
    "a model": {"kind": "model", "adapter": LORA},
}


def ppo(tiny, asked, out, **more):
    own = {"rollout": {"group": 2, "max_tokens": 5, "reuse": 2, "parts": 2}, "batch": {"prompts": 4}, "steps": 4}
    return small(Ppo, tiny, asked, out, own | more)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_run_leaves_a_policy_a_critic_and_figures(critic, tiny, asked, tmp_path):
    artifact = go(ppo(tiny, asked, tmp_path / "run", critic=CRITICS[critic], kl={"kind": "adaptive", "horizon": 8}))
    artifact.verify()
    steps, rolled = steps_of(artifact.folder), lines_of(artifact.folder, "rollouts.jsonl")
    assert len(rolled) == 4 * 2
    assert [line["samples"] for line in steps] == [2] * 4
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert steps[1]["ratio"] != 1.0
    assert steps[0]["beta"] == pytest.approx(0.2)
    assert steps[0]["divergence"] == pytest.approx(0, abs=1e-5)
    assert {"value_loss", "value_clipped", "explained", "penalty", "entropy", "kl", "clipped"} <= steps[-1].keys()
    for one in rolled:
        assert one["value"] == [0.0] * len(one["ids"])  # a new head knows nothing
        assert one["return"][-1] == pytest.approx(one["reward"], abs=1e-5)
        assert len(one["advantage"]) == len(one["pieces"]) == len(one["ids"])
    head = load_file(artifact.folder / "critic" / "value_head.safetensors")["weight"]
    assert float(head.abs().max()) > 0
    assert (artifact.folder / "critic" / "adapter_model.safetensors").is_file() == (critic != "of the policy's states")


def test_both_learn_over_one_base(tiny, asked, tmp_path):
    folder = go(ppo(tiny, asked, tmp_path / "run", critic=CRITICS["over the base"])).folder
    policy, critic = (load_file(folder / name / "adapter_model.safetensors") for name in ("model", "critic"))
    assert {len(x) for name, x in critic.items() if "lora_A" in name} == {4}
    assert {len(x) for name, x in policy.items() if "lora_A" in name} == {16}
    for made in (policy, critic):
        assert any(float(x.abs().max()) > 0 for name, x in made.items() if "lora_B" in name)


def test_it_learns_what_it_is_paid_for(tiny, asked, tmp_path):
    more = {"steps": 14, "rollout": {"group": 16, "max_tokens": 4}, "batch": {"prompts": 4}, "adapter": "none"}
    more |= {"kl": {"kind": "fixed", "beta": 0.0}}
    more |= {"optim": {"kind": "adamw", "lr": 1.5e-2}, "reward": [LETTER]}
    steps = steps_of(go(ppo(tiny, asked, tmp_path / "run", **more)).folder)
    rewards, losses = ([line[name] for line in steps] for name in ("reward", "value_loss"))
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 1.0
    assert losses[-1] < losses[0] / 2


CASES = {
    "over the base": {"critic": CRITICS["over the base"], "kl": {"kind": "adaptive", "horizon": 8}},
    "a model": {"critic": CRITICS["a model"], "gae": {"whiten_rewards": True, "discount": 0.9}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("every", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_going_on_is_exact(case, every, tiny, asked, tmp_path, monkeypatch):
    """From the midst of a rollout, and from between two."""
    from llmkit.stages import build_training

    more = {"steps": 6, "checkpoint": {"every": every}, **CASES[case]}
    whole, part = (ppo(tiny, asked, tmp_path / name, **more) for name in ("whole", "part"))
    whole, show = go(whole), build_training.show

    def interrupted(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == 5:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(build_training, "show", interrupted)
        go(part)
    again = go(part)
    assert lines_of(again.folder) == lines_of(whole.folder)
    assert lines_of(again.folder, "rollouts.jsonl") == lines_of(whole.folder, "rollouts.jsonl")
    if "kl" in more:
        prices = [line["beta"] for line in steps_of(whole.folder)]
        assert prices[0] == prices[3] != prices[4]
    for name in (
        "model/adapter_model.safetensors",
        "critic/adapter_model.safetensors",
        "critic/value_head.safetensors",
    ):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_the_price_follows_the_divergence(tiny, asked, tmp_path):
    kl = {"kind": "adaptive", "beta": 0.3, "target": 0.01, "horizon": 40}
    steps = steps_of(
        go(ppo(tiny, asked, tmp_path / "run", kl=kl, rollout={"group": 2, "max_tokens": 5}, steps=4)).folder
    )
    price = 0.3
    for line in steps:
        assert line["beta"] == pytest.approx(price, rel=1e-6)
        assert line["penalty"] == pytest.approx(price * line["divergence"], rel=1e-5, abs=1e-7)
        price *= 1 + min(0.2, max(-0.2, line["divergence"] / 0.01 - 1)) * 8 / 40
    assert price != 0.3


def test_a_critic_begins_from_a_critic(tiny, asked, tmp_path):
    first = go(ppo(tiny, asked, tmp_path / "first", critic=CRITICS["a model"])).folder / "critic"
    critic, still = {"kind": "model", "path": str(first)}, {"kind": "adamw", "lr": 1e-12}
    second = go(ppo(tiny, asked, tmp_path / "second", critic=critic, steps=1, optim=still)).folder
    assert any(any(one["value"]) for one in lines_of(second, "rollouts.jsonl"))
    for name in ("adapter_model.safetensors", "value_head.safetensors"):  # what it learned first is still there
        was, now = load_file(first / name), load_file(second / "critic" / name)
        assert was.keys() == now.keys()
        assert all((was[key] - now[key]).abs().max() < 1e-9 for key in was)
    with pytest.raises(RecipeError, match=r"critic\.adapter"):
        go(ppo(tiny, asked, tmp_path / "third", critic=critic | {"adapter": LORA}))


def test_parts_of_which_nothing_counts_are_passed_over(tiny, asked, tmp_path):
    rollout = {"group": 2, "max_tokens": 3, "parts": 2, "drop_unended": True}
    assert len(steps_of(go(ppo(tiny, asked, tmp_path / "run", rollout=rollout)).folder)) == 4


def test_a_critic_begins_from_a_reward_model(tiny, asked, tmp_path):
    from llmkit.stages.reward import Reward

    rows = tmp_path / "pairs.jsonl"
    said = [{"prompt": f"q {i}", "chosen": "a good one", "rejected": "no"} for i in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 64}
    judge = go(
        Reward(model=str(tiny), data=data, adapter=LORA, steps=2, batch={"pairs": 2}, out=str(tmp_path / "judge"))
    )
    critic = {"kind": "model", "path": str(judge.model())}
    folder = go(ppo(tiny, asked, tmp_path / "run", critic=critic, steps=1)).folder
    assert any(any(one["value"]) for one in lines_of(folder, "rollouts.jsonl"))


def test_a_policy_that_differs_from_itself_is_told(tiny, asked, tmp_path, monkeypatch):
    from llmkit.stages.likelihoods import Likelihoods

    plain = Likelihoods.both
    monkeypatch.setattr(Likelihoods, "both", lambda *a: [[[x - 1e-3 for x in own] for own in one] for one in plain(*a)])
    with pytest.raises(LlmkitError, match="ratio of the policy to itself"):
        go(ppo(tiny, asked, tmp_path / "run"))


ODD = {
    "critic.adapter": {"adapter": "none", "kl": {"kind": "fixed", "beta": 0.0}, "critic": CRITICS["over the base"]},
    "critic.adapter: contradicts adapter: adapter.modules_to_save": {
        "adapter": LORA | {"modules_to_save": ["lm_head"]},
        "critic": CRITICS["over the base"],
    },
    "kl.horizon": {"kl": {"kind": "adaptive", "horizon": 1}},
    "critic.adapter.dropout": {"critic": {"kind": "model", "adapter": {"kind": "lora", "dropout": 0.1}}},
    "reference.kind": {"adapter": "none"},
    "reference": {"reference": {"kind": "model"}, "kl": {"kind": "fixed", "beta": 0.0}},
    "rollout.parts": {"rollout": {"group": 2, "max_tokens": 5, "parts": 5}},
    "parallel.tensor": {"parallel": {"tensor": 2}},
    "adapter.dropout": {"adapter": {"kind": "lora", "dropout": 0.1}},
}


@pytest.mark.parametrize("key", ODD)
def test_what_contradicts_is_told(key, tiny, asked, tmp_path):
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        ppo(tiny, asked, tmp_path / "run", **ODD[key])


def test_a_critic_with_other_tokens_is_told(tiny, asked, tmp_path):
    import shutil

    other = shutil.copytree(tiny, tmp_path / "other")
    path = other / "tokenizer.json"
    said = json.loads(path.read_text())
    vocabulary = said["model"]["vocab"]
    (first, a), (second, b), *_ = list(vocabulary.items())[40:]
    vocabulary[first], vocabulary[second] = b, a
    path.write_text(json.dumps(said))
    with pytest.raises(ModelError, match="another tokenizer"):
        go(ppo(tiny, asked, tmp_path / "run", critic={"kind": "model", "path": str(other)}))
