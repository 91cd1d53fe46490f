"""Answers that are drawn while steps learn from those before: of weights one rollout old, and counted by that."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from llmkit import load_recipe
from llmkit.core.errors import DataError, RecipeError
from llmkit.models.node import Int8, NoQuant
from llmkit.stages import drawing
from llmkit.stages.ahead import Ahead
from llmkit.stages.drawing import _check
from tests.stages.drawn import go, lines_of, policy, steps_of

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


def test_a_recipe_may_ask_for_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{kind: policy, model: m, rollout: {asynchronous: 1}, reward: [{kind: regex, pattern: a}], out: o,\n"
        "  data: {train: [{kind: jsonl, path: a.jsonl}], max_length: 512}, steps: 2}"
    )
    ((_, node),) = load_recipe(str(path)).stages
    assert node.rollout.asynchronous == 1


def test_a_rollout_that_fails_ahead_costs_no_step_that_is_done(tiny, asked, tmp_path, monkeypatch):
    """Its fault is told where it would be taken, and a run that goes on draws it from the weights that it has."""
    node = policy(tiny, asked, tmp_path / "run", rollout=AHEAD, checkpoint={"every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Ahead, "_told", failing)
        with pytest.raises(DataError, match="no reward today"):
            go(node)
    made = go(node)
    assert [line["step"] for line in steps_of(made.folder)] == [1, 2, 3]
    rolled = lines_of(made.folder, "rollouts.jsonl")
    assert [one["version"] for one in rolled[::12]] == [0, 1, 1]
    assert steps_of(made.folder)[1]["importance"] == 1.0


def failing(self, number, version, prompts):
    raise DataError("no reward today", fix="wait")


def test_a_long_run_keeps_of_what_was_drawn_ahead_what_its_checkpoints_go_on_from(tmp_path):
    """Two of which are kept, and one is on its way to the disk while the next is asked about."""
    path, node = tmp_path / "rollouts.ahead.jsonl", SimpleNamespace(rollout=SimpleNamespace(steps=2))
    ahead = Ahead(SimpleNamespace(node=node), None, None, path, 99)
    for step in range(1, 12):
        if step > 2:
            (tmp_path / "checkpoints" / f"step-{step - 2}").mkdir(parents=True)
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step - 4}", ignore_errors=True)
        ahead.kept = [{"rollout": -(-step // 2), "text": f"drawn before step {step}"}]
        assert ahead.state(-(-step // 2)) == {"ahead": -(-step // 2), "ahead_lost": -1}
    assert [line["rollout"] for line in lines_of(tmp_path, path.name)] == [4, 5, 6]
    assert lines_of(tmp_path, path.name)[-1]["text"] == "drawn before step 11"
    ahead.begin({"ahead": 5, "ahead_lost": -1})
    assert [line["rollout"] for line in lines_of(tmp_path, path.name)] == [4, 5]
    assert ahead.state(5)["ahead"] == 5 and len(lines_of(tmp_path, path.name)) == 2


def test_the_forward_of_the_weights_that_drew_is_counted(tiny, asked, tmp_path):
    made = [policy(tiny, asked, tmp_path, rollout={**AHEAD, "asynchronous": on}).draws(1).passes for on in (0, 1)]
    assert made == [0, 1]


@pytest.mark.parametrize(
    ("world", "quant", "why"), [(2, NoQuant(), "ranks would talk"), (1, Int8(), "8-bit linears take the rows")]
)
def test_what_a_thread_beside_cannot_do_is_refused(world, quant, why):
    job = SimpleNamespace(run=SimpleNamespace(ranks=SimpleNamespace(world=world)), node=SimpleNamespace(quant=quant))
    built = SimpleNamespace(loaded=SimpleNamespace(support=SimpleNamespace(paged=True)))
    with pytest.raises(RecipeError, match=rf"rollout\.asynchronous: .*{why}"):
        _check(job, built, True)


@pytest.mark.parametrize("quant", ["none", "bnb_nf4"])
def test_what_is_frozen_is_there_once_and_says_the_same(quant, tiny, asked, tmp_path, monkeypatch):
    """In no moment is it twice: nothing is built again."""
    monkeypatch.setattr(drawing, "build", None)
    seen = []

    def beside(built):
        made = real(built)
        frozen, own = ({id(p) for p in one.model.parameters() if not p.requires_grad} for one in (built, made))
        assert frozen == own and len(own) > 10
        assert made.trained.keys() == built.trained.keys()
        assert not {p.data_ptr() for p in made.trained.values()} & {p.data_ptr() for p in built.trained.values()}
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            seen.extend(one.model(input_ids=ids).logits for one in (made, built, made))
        return made

    real = drawing.beside
    monkeypatch.setattr(drawing, "beside", beside)
    more = {"rollout": AHEAD, "adapter": {"kind": "lora", "rank": 4}, "quant": quant, "steps": 2}
    made = go(policy(tiny, asked, tmp_path / "run", **more))
    assert seen[0].equal(seen[1]) and seen[0].equal(seen[2])
    assert steps_of(made.folder)[0]["importance"] == 1.0
