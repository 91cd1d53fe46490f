"""Models and caches beside the model in training: what they take, and how long answers are drawn."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForSequenceClassification

from llmkit import Preference, run
from llmkit.build.reward_model import RewardModel
from llmkit.core.console import Console
from llmkit.core.errors import ResourceError
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.models.node import ModelRef
from llmkit.models.outline import stored
from llmkit.plan.account import HEADROOM, account
from llmkit.plan.beside import Round
from llmkit.plan.devices import DEVICES
from llmkit.plan.drawing import LAUNCHED, decoding
from llmkit.stages import sizes as sizing
from llmkit.stages.changes import changes
from llmkit.stages.companions import companions
from llmkit.stages.holding import held_by
from llmkit.stages.planned import planned
from llmkit.stages.policy import Policy
from tests.conftest import make_model, make_tokenizer
from tests.plan.test_shares import FULL, SHAPE

LENGTH = {"kind": "length", "shape": {"kind": "at_most", "length": 8}}
GIB = 2**30


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    return path


def policy(model, out, path="none.jsonl", **more):
    options = {
        "model": str(model),
        "data": {"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
        "rollout": {"group": 4, "max_tokens": 6},
        "reward": [LENGTH],
        "batch": {"prompts": 3},
        "steps": 1,
        "out": str(out),
    }
    return Policy(**(options | more))


def llama(**more):
    """8B, whose answers are of 1024 tokens to prompts of 512."""
    rollout = {"group": 8, "max_tokens": 1024} | more.pop("rollout", {})
    data = {"train": [{"kind": "jsonl", "path": "none.jsonl"}], "max_length": 1536}
    options = {"rollout": rollout, "data": data, "batch": {"prompts": 64}, "memory": {"recompute": "full"}}
    return policy("meta-llama/Llama-3.1-8B", "x", **options | more)


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A model whose heads are of 16 numbers, as a vector is: narrower ones are filled up."""
    folder = tmp_path_factory.mktemp("wider")
    make_model(hidden_size=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A classifier of one score, smaller than the policy."""
    folder = tmp_path_factory.mktemp("scorer")
    config = make_model(num_hidden_layers=1).config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def weights(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_what_is_said_of_a_run_is_what_it_holds(wider, scorer, asked, tmp_path, monkeypatch):
    """The engine's cache to the byte, the second reference and the reward model to their heads."""
    stores, open_ = [], OwnEngine.open

    def watched(self, held):
        writer = open_(self, held)
        stores.append(sum(writer.turns.engine.runner.store.bytes.values()))
        return writer

    monkeypatch.setattr(OwnEngine, "open", watched)
    more = {"reference": "model", "loss": {"kind": "grpo", "beta": 0.1}}
    node = policy(wider, tmp_path / "run", asked, reward=[{"kind": "model", "path": str(scorer)}], **more)
    told = companions(node, stored(wider), "cpu", 1, 0)
    run(node, console=Console(quiet=True))
    assert stores == [told["cache"]]
    assert told["reference"] == 4 * stored(wider).params
    model = RewardModel(ModelRef(name=str(scorer)))
    assert told["reward"] == pytest.approx(weights(model.loaded.model), rel=0.01)
    assert set(told) == {"reference", "reward", "cache"}


def test_parts_and_peaks_know_what_is_beside(tiny):
    node = policy(tiny, "x", reference="model", loss={"kind": "grpo", "beta": 0.1})
    shape = stored(tiny)
    held = held_by(node, shape, "cpu")
    made, bare = (account(shape, one, 192) for one in (held, replace(held, beside={}, drawing=0)))
    assert made.total == sum(made.parts.values()) == bare.total + sum(held.beside.values())
    assert made.parts.items() >= held.beside.items()
    assert made.load > bare.load
    assert bare.rollout == 0 < made.rollout == made.held + held.drawing
    large = account(shape, replace(held, drawing=1 << 40), 192)
    assert large.peak == large.rollout > made.peak


def test_a_model_that_is_cut_has_a_whole_copy_to_draw_from_and_a_whole_reference():
    priced = {"loss": {"kind": "grpo", "beta": 0.1}, "adapter": "none", "reference": "model"}
    whole, cut = (planned(llama(parallel={"strategy": how}, **priced), "b200-180gb", 8) for how in ("ddp", "fsdp"))
    parts = cut.choice.account.parts
    assert parts["engine weights"] == parts["reference"] == 4 * SHAPE.params
    assert "engine weights" not in whole.choice.account.parts
    assert whole.choice.account.parts["reference"] == 4 * SHAPE.params
    adapter = planned(llama(parallel={"strategy": "fsdp"}, quant="bnb_nf4"), "b200-180gb", 8).choice.account.parts
    assert SHAPE.params // 2 < adapter["engine weights"] < SHAPE.params


def test_a_judge_without_a_size_takes_what_its_requests_need():
    """A token of 8B has 128 KiB of keys and values."""
    judge = {"kind": "judge", "model": "meta-llama/Llama-3.1-8B", "generator": {"kind": "engine"}}
    sized = judge | {"generator": {"kind": "engine", "cache": {"size": "4GiB"}}}
    few = judge | {"generator": {"kind": "engine", "sequences": 4}}
    usual, told, least = (planned(llama(reward=[one]), "h100-80gb", 8).choice for one in (judge, sized, few))
    assert told.fits and told.account.beside["judge"] == 2 * SHAPE.params + 4 * GIB
    assert usual.account.beside["judge"] == 2 * SHAPE.params + OwnEngine().sequences * 2048 * 128 * 1024
    assert least.account.beside["judge"] == 2 * SHAPE.params + 4 * GIB  # one of 32,768 tokens has room
    endpoint = {"kind": "judge", "generator": {"kind": "openai", "url": "http://x/v1", "model": "m"}}
    assert "judge" not in planned(llama(reward=[endpoint]), "h100-80gb", 8).choice.account.beside


def test_a_run_that_cannot_fit_is_told_what_to_lower(tiny, asked, tmp_path, monkeypatch):
    node = policy(tiny, tmp_path / "run", asked)
    monkeypatch.setattr(sizing, "available", lambda device: 64 << 20)
    with pytest.raises(ResourceError, match=r"lower rollout.engine.sequences, rollout.group or rollout.max_tokens"):
        run(node, console=Console(quiet=True))


def test_a_smaller_cache_is_one_of_the_changes():
    node = llama(rollout={"engine": {"kind": "engine", "sequences": 512}}, batch={"prompts": 512}, micro_batch=1)
    made = planned(node, "h100-80gb", 8)
    assert not made.choice.fits and made.choice.account.beside["cache"] > 64 * GIB
    found = changes(node, "h100-80gb", 8, made.free, SHAPE)
    assert any(change.keys == "rollout.engine.sequences=128" for change in found)
    assert all(change.peak <= HEADROOM * made.free for change in found)


DRAWS = Round(Cache(), 64, None, 64, 8, 512, 1024)


def drawn(device="h100-80gb", held=FULL, world=8, **more):
    return decoding(SHAPE, replace(held, weight_bytes=2, recompute=0), DEVICES[device], replace(DRAWS, **more), world)


def test_decoding_waits_for_the_slowest_of_three():
    few = drawn(sequences=1)
    assert few.step == SHAPE.layers * LAUNCHED, "the host"
    many = drawn(sequences=512, world=1)
    slow = drawn("l4-24gb", sequences=512, world=1)
    bytes_ = 2 * (SHAPE.params - SHAPE.embedded // 2) + 512 * 1024 * 2 * SHAPE.layers * SHAPE.keys * 2
    assert slow.step == pytest.approx(bytes_ / (0.8 * DEVICES["l4-24gb"].bandwidth), rel=0.01), "the memory"
    assert many.step < slow.step
    assert (few.steps, many.steps) == (64 * 1024, 1024), "64 answers one by one, 512 at once"
    assert drawn("l4-24gb", sequences=512, world=1, cache=Cache(precision="int8")).step < 0.7 * slow.step


def test_a_step_has_its_rollout_and_what_scores_it():
    def spent(**more):
        return planned(llama(**more), "h100-80gb", 8).times

    plain = spent()
    assert plain.rollout > 0 == plain.scoring
    assert plain.seconds == pytest.approx(plain.compute + plain.waiting + plain.update + plain.rollout)
    assert plain.answers == 512 and 0 < plain.share < 1
    priced = spent(loss={"kind": "grpo", "beta": 0.1})
    assert 0.15 < priced.scoring / plain.compute < 0.4, "a forward of three and one that is made again"
    again = spent(rollout={"reuse": 2})
    assert again.rollout == plain.rollout / 2 and again.scoring == pytest.approx(priced.scoring / 2)
    reward = spent(reward=[{"kind": "model", "path": "meta-llama/Llama-3.1-8B"}])
    ratio = 8 * 8 * 1536 / (512 + 8 * 1024)  # one rank for eight, and each answer with its prompt
    assert reward.scoring / priced.scoring == pytest.approx(ratio, rel=0.01)
    second = spent(loss={"kind": "grpo", "beta": 0.1}, reference="model")
    assert second.scoring == pytest.approx(priced.scoring)


def test_a_preference_holds_its_reference_whole_on_each_rank():
    data = {"train": [{"kind": "jsonl", "path": "none.jsonl"}], "max_length": 512}
    more = {"reference": "model", "adapter": "none", "parallel": {"strategy": "fsdp"}}
    node = Preference(model="meta-llama/Llama-3.1-8B", data=data, out="x", **more)
    made = planned(node, "h100-80gb", 8)
    assert made.choice.account.parts["reference"] == 4 * SHAPE.params and made.times.rollout == 0
