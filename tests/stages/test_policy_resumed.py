"""A policy stage that goes on: an interrupted run is the same to the bit, with what it began with."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmkit.core.errors import RecipeError
from llmkit.core.run import Grants
from tests.stages.drawn import LETTER, go, lines_of, policy, steps_of

CASES = {
    "grpo": {},
    "a price in the reward": {"loss": {"kind": "rloo", "beta": 0.05}},
    "drawn ahead": {"rollout": {"group": 4, "max_tokens": 6, "asynchronous": 1}, "loss": {"kind": "grpo", "beta": 0.1}},
    "drawn ahead, used twice": {"rollout": {"group": 4, "max_tokens": 6, "asynchronous": 1, "reuse": 2}},
    "used twice": {"rollout": {"group": 4, "max_tokens": 6, "reuse": 2}, "loss": {"kind": "reinforce", "beta": 0.1}},
}


@pytest.mark.parametrize("case", CASES)
def test_going_on_in_the_middle_is_exact(case, tiny, asked, tmp_path, monkeypatch):
    from llmkit.stages import build_training

    more = {"steps": 5, "checkpoint": {"every": 3}, **CASES[case]}
    whole, part = (policy(tiny, asked, tmp_path / name, **more) for name in ("whole", "part"))
    whole, show = go(whole), build_training.show

    def interrupted(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == 4:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(build_training, "show", interrupted)
        go(part)
    assert len(steps_of(tmp_path / "part")) == 4
    again = go(part)
    assert lines_of(again.folder) == lines_of(whole.folder)
    assert lines_of(again.folder, "rollouts.jsonl") == lines_of(whole.folder, "rollouts.jsonl")
    assert _weights(again) == _weights(whole)
    if case.startswith("drawn ahead"):  # of all rollouts but the first the one that `step-3` goes on from
        for one in (again, whole):
            assert {line["rollout"] for line in lines_of(one.folder, "rollouts.ahead.jsonl")} == {
                2 if "twice" in case else 3
            }


def _reward_of(text):
    return f"def score(completions, **columns):\n    return [{text} for one in completions]\n"


@pytest.fixture
def cut_short(tiny, asked, tmp_path, monkeypatch):
    """Runs to a checkpoint after one step, and ends there."""
    from llmkit.stages import build_training

    show = build_training.show

    def interrupted(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == 2:
            raise RuntimeError("the machine is gone")

    def started(node, **more):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine"):
            patch.setattr(build_training, "show", interrupted)
            go(node, **more)

    return started


def test_a_run_goes_on_with_the_rewards_and_the_reference_that_it_began_with(
    cut_short, tiny, asked, tmp_path, monkeypatch
):
    """Files and models that a recipe names only: what they hold may have become another thing."""
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    own, schema, other = tmp_path / "my.py", tmp_path / "schema.json", tmp_path / "other"
    own.write_text(_reward_of("len(one) / 9"))
    schema.write_text('{"type": "object"}')
    shutil.copytree(tiny, other)
    rewards = [{"kind": "python", "ref": f"{own}:score", "timeout": 60}]
    rewards += [{"kind": "json_schema", "path": str(schema), "timeout": 60}]
    more = {"reward": rewards, "loss": {"kind": "grpo", "beta": 0.1}, "checkpoint": {"every": 1}}
    node = policy(tiny, asked, tmp_path / "run", **more, reference={"kind": "model", "path": str(other)})
    cut_short(node, grants=Grants(python=True))
    schema.write_text('{"type": "array"}')
    own.write_text(_reward_of("len(one) / 8"))
    weights = load_file(other / "model.safetensors")
    save_file({name: one + 1e-3 for name, one in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError) as caught:
        go(node, grants=Grants(python=True))
    for key in ("reward.0.ref", "reward.1.path", "reference.path"):
        assert f"--accept {key}." in str(caught.value), key
    accepted = ("reward.0.ref", "reward.1.path", "reference.path")
    assert go(node, grants=Grants(python=True, accept=accepted)).manifest["step"] == 3


def test_training_and_evaluations_ask_the_same_rewards(tiny, asked, tmp_path, monkeypatch):
    """A judge is not loaded twice, and what the run was granted holds for both."""
    from llmkit.rl.bench import Bench

    kept, seen = Bench.kept, []
    monkeypatch.setattr(Bench, "kept", lambda self, *a: seen.append(self) or kept(self, *a))
    source = [{"kind": "jsonl", "path": str(asked), "take": 2}]
    more = {"reward": [LETTER], "data": {"train": source, "valid": source, "max_length": 48}, "batch": {"prompts": 2}}
    go(policy(tiny, asked, tmp_path / "run", steps=1, **more), grants=Grants(code=True))
    assert len(seen) > 2 and len(set(map(id, seen))) == 1
    assert seen[0].grants.code and not seen[0].held


def _weights(artifact):
    return (artifact.model() / "adapter_model.safetensors").read_bytes()
