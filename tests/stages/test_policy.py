"""A policy stage on a tiny model: it learns what it is paid for, and an interrupted run is the same to the bit."""

import re
import shutil

import pytest
import torch

from llmkit import run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.run import Grants
from tests.stages.drawn import LETTER, ROWS, go, lines_of, policy, steps_of


def test_a_run_leaves_its_rollouts_and_figures(tiny, asked, tmp_path):
    artifact = go(policy(tiny, asked, tmp_path / "run", loss={"kind": "grpo", "beta": 0.1}, reward=[LETTER]))
    artifact.verify()
    steps, rolled = steps_of(artifact.folder), lines_of(artifact.folder, "rollouts.jsonl")
    assert len(steps) == 3
    assert len(rolled) == 3 * 3 * 4
    for step, line in enumerate(steps):
        mine = [one for one in rolled if one["rollout"] == step]
        assert line["reward"] == pytest.approx(sum(one["reward"] for one in mine) / 12)
        assert line["reward.regex"] == line["reward"]
        assert line["length"] == pytest.approx(sum(len(one["ids"]) for one in mine) / 12)
        assert line["ratio"] == 1.0
        assert line["clipped"] == 0.0
        assert line["engine_gap"] < 1e-4
        assert 0 < line["entropy"] < 7
        assert 0 <= line["groups_without_signal"] <= 1
        assert line["samples"] == 3
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert steps[-1]["kl"] > 0
    first = [one for at, one in enumerate(rolled) if at % 4 == 0]
    assert all(one["question"] == ROWS[one["prompt"]]["prompt"] for one in first)
    assert sum("question" in one for one in rolled) == len(first) == 9 and "pieces" not in rolled[0]
    page = (artifact.folder / "rollouts.html").read_text()
    assert page.count("<article") == 36 and f"<pre>{first[0]['question']}</pre>" in page
    for one in rolled:
        assert len(one["ids"]) <= 6
        assert ("a" in one["text"]) == (one["reward"] == 1.0)
        assert len(one["reference"]) == len(one["ids"])


def test_it_is_said_where_rewards_teach_nothing_and_progress_has_the_reward(tiny, asked, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def score(completions):\n    raise ValueError('no')\n")
    reward = [{"kind": "python", "ref": f"{own}:score", "failed": 1e38, "weight": 3.0}]
    node = policy(tiny, asked, tmp_path / "run", reward=reward, steps=2)
    artifact = run(node, console=Console(), grants=Grants(python=True))
    said = "".join(capsys.readouterr())
    assert said.count("rollout 0: reward python failed of all 12 answers, which have what its `failed` says") == 1
    assert said.count("of no prompt is one answer better than another") == 1 and "rollout 1" not in said
    assert ", reward 3e+38, " in said
    assert steps_of(artifact.folder)[0]["reward"] == pytest.approx(3e38)


def test_it_learns_what_it_is_paid_for(tiny, asked, tmp_path):
    data = {"train": [{"kind": "jsonl", "path": str(asked)}], "max_length": 48}
    data["valid"] = [{"kind": "jsonl", "path": str(asked), "take": 4}]
    more = {"steps": 12, "rollout": {"group": 16, "max_tokens": 4}, "batch": {"prompts": 4}, "data": data}
    more |= {"adapter": "none", "optim": {"kind": "adamw", "lr": 1.5e-2}, "reward": [LETTER]}
    artifact = go(policy(tiny, asked, tmp_path / "run", **more))
    rewards = [line["reward"] for line in steps_of(artifact.folder)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1.0
    evaluated = [line for line in lines_of(artifact.folder) if line["event"] == "evaluate"]
    assert evaluated[-1]["valid.reward"] > evaluated[0]["valid.reward"]
    assert evaluated[-1]["valid.reward"] == evaluated[-1]["valid.reward.regex"]


OTHERS = ("dr_grpo", "gspo", "cispo", "rloo", "reinforce")


@pytest.mark.parametrize("kind", ["dapo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_every_loss_runs_and_reuses(kind, tiny, asked, tmp_path):
    more = {"loss": {"kind": kind, "beta": 0.05}, "rollout": {"group": 4, "max_tokens": 6, "reuse": 2}, "steps": 2}
    steps = steps_of(go(policy(tiny, asked, tmp_path / "run", **more)).folder)
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert steps[0]["reward"] == steps[1]["reward"]
    assert steps[1]["ratio"] != 1.0
    assert "engine_gap" in steps[0]
    assert "engine_gap" not in steps[1]


def test_tokens_with_advantages_of_their_own_are_told_with_their_texts(tiny, asked, tmp_path):
    more = {"loss": {"kind": "reinforce", "beta": 0.1, "penalty": "reward"}, "steps": 2}
    folder = go(policy(tiny, asked, tmp_path / "run", **more)).folder
    rolled = lines_of(folder, "rollouts.jsonl")
    for one in rolled:
        assert len(one["advantage"]) == len(one["pieces"]) == len(one["ids"])
        assert re.sub(r"<\|\w+\|>", "", "".join(one["pieces"])) == one["text"]
    page = (folder / "rollouts.html").read_text()
    assert page.count("<i") >= sum(len(one["ids"]) for one in rolled)
    assert sum(sum(one["advantage"]) for one in rolled) == pytest.approx(0, abs=1e-3)


def test_a_loss_that_is_far_from_the_others_stops_no_policy(tiny, asked, tmp_path, monkeypatch):
    """Losses of policies are near 0, now above it and now below."""
    from llmkit.train import fit

    plain = fit.Watch.judge
    seen = []

    def judge(self, guard, step, loss, norm, samples):
        seen.append(guard.spike)
        return plain(self, guard, step, 1e-4 if step < 12 else 0.5, norm, samples)

    monkeypatch.setattr(fit.Watch, "judge", judge)
    more = {"steps": 13, "rollout": {"group": 2, "max_tokens": 2}, "batch": {"prompts": 1}}
    go(policy(tiny, asked, tmp_path / "run", **more))
    assert seen == [0.0] * 13


def test_micro_batches_do_not_change_a_step(tiny, asked, tmp_path):
    found = []
    for size in (1, 3):
        folder = go(policy(tiny, asked, tmp_path / str(size), micro_batch=size, steps=1)).folder
        found.append(steps_of(folder)[0])
    for name in ("loss", "grad_norm", "entropy", "reward"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5, abs=1e-7)


def test_prompts_without_signal_give_way_to_others(tiny, asked, tmp_path):
    rewards = [{"kind": "length", "shape": {"kind": "at_most", "length": 6}, "unit": "characters"}]
    more = {"reward": rewards, "rollout": {"group": 2, "max_tokens": 3}, "steps": 2, "batch": {"prompts": 4}}
    plain = steps_of(go(policy(tiny, asked, tmp_path / "plain", **more)).folder)
    more["rollout"] = {**more["rollout"], "redraw": 3}
    redrawn = steps_of(go(policy(tiny, asked, tmp_path / "redrawn", **more)).folder)
    assert plain[0]["groups_without_signal"] > redrawn[0]["groups_without_signal"]
    assert all(line["samples"] == 4 for line in redrawn)


def test_a_policy_that_differs_from_itself_is_told(tiny, asked, tmp_path, monkeypatch):
    from llmkit.stages.likelihoods import Likelihoods

    plain = Likelihoods.policy
    monkeypatch.setattr(Likelihoods, "policy", lambda *a: [[x - 1e-3 for x in own] for own in plain(*a)])
    with pytest.raises(LlmkitError, match="ratio of the policy to itself"):
        go(policy(tiny, asked, tmp_path / "run", rollout={"group": 4, "max_tokens": 6, "reuse": 2}))


@pytest.mark.parametrize("more", [{"adapter": "none"}, {"loss": {"kind": "dapo", "entropy": 0.01}}], ids=str)
def test_the_policy_before_its_update_is_itself_to_the_bit(more, tiny, asked, tmp_path, monkeypatch):
    """Also where the head is trained, or entropies are: what is known before goes the way of training."""
    from llmkit.rl import objective

    seen = []
    plain = objective.check
    monkeypatch.setattr(objective, "check", lambda logps, batch: (seen.append(batch), plain(logps, batch)))
    monkeypatch.setattr(objective, "CLOSE", 1e-6)
    made = go(policy(tiny, asked, tmp_path / "run", rollout={"group": 4, "max_tokens": 6, "reuse": 2}, steps=1, **more))
    (line,) = steps_of(made.folder)
    assert seen and all("old" in batch.branches.each for batch in seen)
    assert line["ratio"] == 1.0


ODD = {
    "adapter.dropout": {"adapter": {"kind": "lora", "dropout": 0.1}},
    "neftune": {"neftune": 5.0},
    "reward": {"reward": []},
    "rollout.max_tokens": {"rollout": {"group": 4, "max_tokens": 48}},
    "rollout.group": {"rollout": {"group": 1, "max_tokens": 4}},
    "reference": {"reference": {"kind": "model"}},
    "reference.kind": {"adapter": "none", "loss": {"kind": "grpo", "beta": 0.1}},
    "batch.rows": {"batch": {"rows": 4}},
}


@pytest.mark.parametrize("key", ODD)
def test_what_contradicts_is_told(key, tiny, asked, tmp_path):
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        policy(tiny, asked, tmp_path / "run", **ODD[key])


def test_nothing_in_its_forward_is_random():
    from llmkit.models.quiet import quiet
    from tests.conftest import make_model

    model = make_model(attention_dropout=0.5).train()
    quiet(model)
    tokens = torch.arange(1, 9)[None]
    first, second = (model(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(first, second)


def test_prompts_once_or_for_each_answer_are_one_step(tiny, asked, tmp_path):
    found = []
    for shared in (True, False):
        more = {"share_prompts": shared, "steps": 1, "loss": {"kind": "dapo", "beta": 0.1, "entropy": 0.01}}
        found.append(steps_of(go(policy(tiny, asked, tmp_path / str(shared), **more)).folder)[0])
    for name in ("loss", "grad_norm", "entropy", "reward", "kl"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["dapo", "grpo"])
def test_a_step_of_which_nothing_counts_changes_nothing(kind, tiny, asked, tmp_path):
    rollout = {"group": 4, "max_tokens": 1, "drop_unended": True}
    folder = go(
        policy(tiny, asked, tmp_path / "run", rollout=rollout, steps=1, loss={"kind": kind, "beta": 0.1})
    ).folder
    (line,) = steps_of(folder)
    assert line["unended"] == 1.0
    assert line["loss"] == line["grad_norm"] == line["entropy"] == 0.0


def test_answers_that_were_cut_short_have_their_price_though_they_teach_nothing(tiny, asked, tmp_path):
    rollout = {"group": 4, "max_tokens": 2, "drop_unended": True}
    more = {"rollout": rollout, "steps": 1, "loss": {"kind": "rloo", "beta": 0.1}}
    folder = go(policy(tiny, asked, tmp_path / "run", **more)).folder
    rolled = lines_of(folder, "rollouts.jsonl")
    assert any(one["finish"] == "length" for one in rolled)
    assert all(x < 0 for one in rolled for name in ("old", "reference") for x in one[name])


@pytest.fixture
def calling(tiny, tmp_path):
    """The tiny model with a template that shows calls of tools."""
    from tests.conftest import make_tokenizer
    from tests.rl.test_tool_environment import TEMPLATE

    folder = shutil.copytree(tiny, tmp_path / "calling")
    make_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


TOOLS = {"group": 4, "max_tokens": 6, "environment": {"kind": "tools", "tools": [{"kind": "calculator"}], "turns": 2}}


def test_a_conversation_with_tools_is_asked_as_the_template_shows_them(calling, asked, tmp_path):
    data = {"train": [{"kind": "jsonl", "path": str(asked)}], "max_length": 400}
    made = go(policy(calling, asked, tmp_path / "run", rollout=TOOLS, steps=1, data=data))
    (line,) = steps_of(made.folder)
    rolled = lines_of(made.folder, "rollouts.jsonl")
    assert line["calls"] == 0.0  # it knows no words yet
    assert line["supervised_tokens"] == sum(len(one["ids"]) for one in rolled)
    assert all(all(one["own"]) and one["turns"][0]["role"] == "assistant" for one in rolled)
    assert len(rolled[0]["prompt_ids"]) > 60


def test_what_tools_say_is_no_part_of_what_is_learned(calling, asked, tmp_path, monkeypatch):
    from llmkit.rl.rollout import Answer
    from llmkit.stages import answering

    def converse(writer, asked, prompts, how, longest, seeds, speech, environment):
        turns = ({"role": "assistant", "content": "?"}, {"role": "tool", "content": "7"})
        made = []
        for _ in prompts:
            ids = tuple(range(10, 16))
            own = (True, True, False, False, False, True)
            made.append([Answer(ids, "a" * j, "stop", (None,) * 6, own, turns, float(j), (1, 5, 6)) for j in range(4)])
        return made

    monkeypatch.setattr(answering, "converse", converse)
    more = {"rollout": {**TOOLS, "reuse": 2}, "loss": {"kind": "reinforce", "beta": 0.1}, "steps": 2}
    made = go(policy(calling, asked, tmp_path / "run", **more))
    first, _ = steps_of(made.folder)
    assert first["supervised_tokens"] == 3 * 4 * 3
    assert first["calls"] == 1.0
    assert first["reward.environment"] == 1.5
    assert first["reward"] == pytest.approx(first["reward.length"] + 1.5)
    assert first["length"] == 6.0
    old = lines_of(made.folder, "rollouts.jsonl")[0]["old"]
    assert [x == 0.0 for x in old] == [False, False, True, True, True, False]
