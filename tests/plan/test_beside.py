"""Models and caches beside the model in training: what they take, and how long answers are drawn."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForSequenceClassification

from llmkit import Preference, run
from llmkit.build.reward_model import RewardModel
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.models.node import ModelRef
from llmkit.models.outline import stored
from llmkit.plan.account import account
from llmkit.plan.beside import Round
from llmkit.plan.choice import HEADROOM
from llmkit.plan.devices import DEVICES
from llmkit.plan.drawing import LAUNCHED, decoding
from llmkit.stages import build_training
from llmkit.stages import sizes as sizing
from llmkit.stages.changes import changes
from llmkit.stages.companions import companions
from llmkit.stages.holding import held_by
from llmkit.stages.planned import planned
from llmkit.stages.policy import Policy
from llmkit.stages.ppo import Ppo
from tests.conftest import make_model, make_tokenizer
from tests.plan.test_shares import FULL, SHAPE

LENGTH = {"kind": "length", "shape": {"kind": "at_most", "length": 8}}
GIB = 2**30


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    return path


def policy(kind, model, out, path="none.jsonl", **more):
    options = {
        "model": str(model),
        "data": {"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
        "rollout": {"group": 4, "max_tokens": 6},
        "reward": [LENGTH],
        "batch": {"prompts": 3},
        "steps": 1,
        "out": str(out),
    }
    return kind(**(options | more))


def llama(kind=Policy, **more):
    """8B, whose answers are of 1024 tokens to prompts of 512."""
    rollout = {"group": 8, "max_tokens": 1024} | more.pop("rollout", {})
    data = {"train": [{"kind": "jsonl", "path": "none.jsonl"}], "max_length": 1536}
    options = {"rollout": rollout, "data": data, "batch": {"prompts": 64}, "memory": {"recompute": "full"}}
    return policy(kind, "meta-llama/Llama-3.1-8B", "x", **options | more)


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
    node = policy(Policy, wider, tmp_path / "run", asked, reward=[{"kind": "model", "path": str(scorer)}], **more)
    told = companions(node, stored(wider), "cpu", 1, 0)
    run(node, console=Console(quiet=True))
    assert stores == [told["cache"]]
    assert told["reference"] == 4 * stored(wider).params
    model = RewardModel(ModelRef(name=str(scorer)))
    assert told["reward"] == pytest.approx(weights(model.loaded.model), rel=0.01)
    assert set(told) == {"reference", "reward", "cache"}


CRITICS = {
    "over the base": {"kind": "shared", "adapter": {"kind": "lora", "rank": 4}},
    "a model": {"kind": "model", "adapter": {"kind": "lora", "rank": 4}},
    "all of a model": {"kind": "model", "adapter": "none"},
    "of another shape": {"kind": "model", "adapter": {"kind": "lora", "rank": 4}},
}


@pytest.mark.parametrize("kind", CRITICS)
def test_what_is_said_of_a_critic_is_what_it_holds(kind, wider, scorer, asked, tmp_path, monkeypatch):
    """Its weights that are not the policy's, and gradients and moments of those that are trained, to the byte."""
    found, real = [], build_training.finish

    def watched(job, built, steps, progress):
        policy = {id(p) for p in built.model.parameters()}
        own = [p for p in built.scored.critic.parameters() if id(p) not in policy]
        moments = [x for key, x in steps.state().items() if key.startswith("optim/critic.") and x.dim()]
        learned = [p for p in own if p.requires_grad]
        found.append(sum(x.numel() * x.element_size() for x in (*own, *learned, *moments)))
        return real(job, built, steps, progress)

    monkeypatch.setattr(build_training, "finish", watched)
    critic = CRITICS[kind] | ({"path": str(scorer)} if kind == "of another shape" else {})
    node = policy(Ppo, wider, tmp_path / "run", asked, critic=critic)
    run(node, console=Console(quiet=True))
    shape = stored(wider)
    copied = 4 * stored(scorer).hidden if kind == "of another shape" else 0  # a head that peft would save with others
    assert account(shape, held_by(node, shape, "cpu"), 192).beside["critic"] == found[0] - copied


def test_parts_and_peaks_know_what_is_beside(tiny):
    node = policy(Policy, tiny, "x", reference="model", loss={"kind": "grpo", "beta": 0.1})
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
    node = policy(Policy, tiny, tmp_path / "run", asked)
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


def test_a_critic_is_in_a_step_and_before_it():
    """Its update takes what a policy's does, and its values a forward of layers of their own."""
    lora = {"kind": "lora", "rank": 16}
    free = {"kl": {"kind": "fixed", "beta": 0.0}}

    def spent(critic, **more):
        made = planned(llama(Ppo, critic=critic, adapter=lora, **free | more), "h200-141gb", 8)
        return made.times, made.choice.account

    (plain, _), (over, held), (apart, whole) = map(
        spent, ({"kind": "shared"}, {"kind": "shared", "adapter": lora}, {"kind": "model", "adapter": lora})
    )
    layers = SHAPE.params - SHAPE.embedded
    share = layers / (layers + SHAPE.embedded / 2)  # no head of the vocabulary
    for both in (over, apart):
        assert both.compute / plain.compute - 1 == pytest.approx(share, rel=0.02)
        assert both.scoring / plain.scoring - 1 == pytest.approx(share, rel=0.02)
        assert both.sent == pytest.approx(2 * plain.sent, rel=0.01) and both.update > 1.9 * plain.update
        assert both.seconds > both.compute + both.scoring + both.rollout
    assert held.beside["critic"] < 1 * GIB < 2 * SHAPE.params < whole.beside["critic"] < 2 * SHAPE.params + GIB
    small, _ = spent({"kind": "model", "path": "Qwen/Qwen2.5-7B-Instruct", "adapter": lora})
    assert plain.compute < small.compute < plain.compute + 0.97 * (apart.compute - plain.compute)


def test_a_critic_keeps_activations_of_its_own():
    more = {"kl": {"kind": "fixed", "beta": 0.0}, "micro_batch": 1}
    small = {"kind": "model", "path": "Qwen/Qwen2.5-7B-Instruct"}
    alone, over, apart = (
        planned(llama(Ppo, critic=critic, **more), "h200-141gb", 8).choice.account
        for critic in ({"kind": "shared"}, {"kind": "shared", "adapter": {"kind": "lora"}}, small)
    )
    assert over.activations == 2 * alone.activations and over.working == alone.working, "layers' inputs are kept twice"
    assert 1.7 * alone.activations < apart.activations < 1.8 * alone.activations, "28 layers of 3584"


def test_a_step_learns_from_a_part_of_the_answers():
    free = {"kl": {"kind": "fixed", "beta": 0.0}}
    whole, parts = (planned(llama(Ppo, rollout={"parts": n}, **free), "h200-141gb", 8) for n in (1, 4))
    assert parts.turns == whole.turns / 4
    assert parts.times.compute == pytest.approx(whole.times.compute / 4, rel=1e-3)
    assert parts.times.rollout == pytest.approx(whole.times.rollout / 4)
    assert parts.times.answers == whole.times.answers / 4


def test_a_preference_holds_its_reference_whole_on_each_rank():
    data = {"train": [{"kind": "jsonl", "path": "none.jsonl"}], "max_length": 512}
    more = {"reference": "model", "adapter": "none", "parallel": {"strategy": "fsdp"}}
    node = Preference(model="meta-llama/Llama-3.1-8B", data=data, out="x", **more)
    made = planned(node, "h100-80gb", 8)
    assert made.choice.account.parts["reference"] == 4 * SHAPE.params and made.times.rollout == 0


def test_ranks_that_only_draw_hold_the_cache_and_those_that_train_do_not():
    """Seven train and one draws all 512 answers of a step: its weights are whole, and its cache is of them."""
    own = {"rollout": {"engine": {"kind": "engine", "sequences": 64}}, "parallel": {"strategy": "fsdp"}}
    made = planned(llama(**own), "h100-80gb", 8)
    apart = planned(llama(**{**own, "rollout": own["rollout"] | {"ranks": 1}}), "h100-80gb", 8)
    before, after = made.choice.account, apart.choice.account
    assert {"cache", "engine weights"} <= before.beside.keys() and not {"cache", "engine weights"} & after.beside.keys()
    assert apart.degrees.shard == 7 and after.rollout == 0
    assert apart.drawing["weights"] == before.beside["engine weights"]
    assert apart.drawing["cache"] == before.beside["cache"]  # as many at once on either
    assert "7 train and 1 only draw" in next(iter(apart.lines()))
    assert apart.values()["drawing_parts"] == apart.drawing and apart.values()["fits"]
    large = planned(
        llama(**{**own, "rollout": {"ranks": 1, "engine": {"kind": "engine", "sequences": 4096}}}),
        "l4-24gb",
        64,
        here=64,
    )
    assert large.choice.fits and not large.fits
    with pytest.raises(RecipeError, match="1 of 1 ranks only draw"):
        planned(llama(rollout={"ranks": 1}), "h100-80gb", 1)


@pytest.mark.parametrize(("where", "ranks", "more"), [("a100-40gb", 8, False), ("cpu", 16, True)])
def test_no_change_is_told_that_ranks_who_only_draw_do_not_go_with(where, ranks, more):
    """Twice the devices would lie on two hosts of eight; the ranks of a CPU are all on this one."""
    few = {"ranks": 1, "engine": {"kind": "engine", "sequences": 8}}
    node = llama(rollout=few, adapter="none", parallel={"strategy": "fsdp"})
    told = changes(node, where, ranks, 48 << 30, SHAPE, 99)
    assert told and any(f"ranks={2 * ranks}" in one.keys.split() for one in told) == more
