"""Ranks that only draw: the others make the steps that they make where they draw themselves."""

import json
import signal
import time
from dataclasses import fields

import peft  # noqa: F401  # ranks are forks: they import nothing then
import pytest

from llmkit import run
from llmkit.core.errors import PeerError, RecipeError
from llmkit.core.peers import Alone
from llmkit.core.ranks import Ranks
from llmkit.core.scalars import Origin
from llmkit.inference.grammar import JsonObject
from llmkit.inference.request import Ask, Completion, Output, Prompt, RequestError, Token
from llmkit.inference.sampling import Sampling
from llmkit.parallel.apart import Sides
from llmkit.recipe.execute import check_ranks
from llmkit.recipe.load import Recipe
from llmkit.rl.elsewhere import Crossing, ask_of, ask_told, completion_of, completion_told
from llmkit.stages.ppo import Ppo
from tests.disks import kill
from tests.distributed import QUIET, ended, together, trained
from tests.distributed.faults import BAR, stopping
from tests.distributed.test_rollout_ranks import answers, maker, same

LORA = {"adapter": {"kind": "lora", "rank": 4}, "loss": {"kind": "dapo", "beta": 0.1}}
WAYS = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "zero 3": {"strategy": {"kind": "zero", "stage": 3}}}
APART = {"group": 4, "max_tokens": 5, "ranks": 1}


@pytest.mark.parametrize(
    ("adapter", "way"),
    [
        pytest.param(adapter, way, marks=() if (adapter, way) == ("none", "fsdp") else pytest.mark.slow)
        for adapter in ("lora", "none")
        for way in WAYS
    ],
)
def test_a_rank_that_only_draws_changes_no_step(adapter, way, tiny, tmp_path):
    make = maker(tiny, tmp_path, parallel=WAYS[way], **(LORA if adapter == "lora" else {"adapter": "none"}))
    both = trained(2, make, tmp_path, "both")
    apart = tmp_path / "apart"
    together(3, lambda _: run(make(apart, rollout=APART), console=QUIET), tmp_path, 200.0)
    same(apart, both)
    assert {line["version"] for line in answers(apart)} == {0, 1, 2}


@pytest.mark.parametrize("how", ["dies", pytest.param("is stopped", marks=pytest.mark.slow)])
def test_a_rank_that_draws_ends_the_run_by_its_name_and_it_goes_on(how, faults, tiny, tmp_path):
    make = maker(tiny, tmp_path, **LORA, checkpoint={"every": 1})
    both = trained(2, make, tmp_path, "both")
    what = kill if how == "dies" else stopping(signal.SIGTERM)
    more = {"rollout": APART}
    codes, seconds = faults.codes(faults.launch(3, make, lambda rank: faults.at("data", what, rank=2), **more))
    assert seconds < BAR
    if how == "dies":
        assert codes == [6, 6, -signal.SIGKILL]
        (line,) = faults.errors
        assert "rank 2 (" in line and "died in data, step 2" in line
        assert (faults.status["state"], faults.kept) == ("failed", [1])
    else:
        assert set(codes) <= {0, 75} and faults.kept == [1]
        assert (faults.status["state"], faults.status["exit_code"]) == ("stopped", 75)
        assert "SIGTERM" in faults.status["why"]
    assert ended(faults.launch(3, make, **more), 200.0) == [0, 0, 0]
    same(faults.out, both)


@pytest.mark.slow
def test_a_rank_that_draws_and_stands_still_is_named(faults, tiny, tmp_path):
    make = maker(tiny, tmp_path, **LORA, parallel={"patience": 20}, rollout=APART)

    def fault(rank):
        faults.at("data", lambda: time.sleep(300), rank=2)

    codes, _ = faults.codes(faults.launch(3, make, fault))
    assert codes == [6, 6, 6]
    (line,) = faults.errors
    assert "rank 2 (" in line and " in data, step 2, last seen at distributed/test_drawing_ranks.py:" in line


@pytest.mark.slow
def test_ppo_goes_the_same_way(tiny, tmp_path):
    """What is trained beside the policy stays where it is trained."""
    ppo = {"critic": {"kind": "shared", "adapter": {"kind": "lora", "rank": 4}}, "kl": {"beta": 0.1}}
    make = maker(tiny, tmp_path, Ppo, **LORA | {"loss": {"clip": 0.2}}, **ppo)
    both, apart = trained(2, make, tmp_path, "both"), tmp_path / "apart"
    together(3, lambda _: run(make(apart, rollout=APART), console=QUIET), tmp_path, 200.0)
    same(apart, both, ("loss", "grad_norm", "reward", "length", "ratio", "value_loss"))


@pytest.mark.slow
@pytest.mark.parametrize("aside", [1, 2])
def test_one_rank_trains_and_others_draw(aside, tiny, tmp_path):
    """Of several that draw each has its share of the prompts, or none."""
    make = maker(tiny, tmp_path, **LORA)
    one, apart = trained(1, make, tmp_path, "one"), tmp_path / "apart"
    rollout = APART | {"ranks": aside}
    together(1 + aside, lambda _: run(make(apart, rollout=rollout), console=QUIET), tmp_path, 200.0)
    same(apart, one)


@pytest.mark.parametrize(
    ("more", "world", "here", "said"),
    [
        ({}, 1, 1, "1 of 1 ranks only draw, and none is left to train; fix: start 2 or more"),
        ({}, 4, 2, "4 ranks on hosts of 2"),
        ({"parallel": {"replicate": 3}}, 3, 3, "3"),
    ],
)
def test_ranks_that_do_not_go_with_it_are_refused(more, world, here, said, tiny, tmp_path):
    node = maker(tiny, tmp_path, rollout=APART, **more)(tmp_path / "run")
    with pytest.raises(RecipeError, match=said):
        check_ranks(Recipe((("", node),), {"": Origin()}), Ranks(0, world, 0, here))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rollout": APART | {"asynchronous": 1}}, "rollout.ranks: .*by a thread"),
        ({"rollout": APART | {"vllm": {"url": "http://127.0.0.1:9/v1", "model": "m"}}}, "rollout.ranks: .*vllm draws"),
        ({"rollout": APART, "parallel": {"tensor": 2}}, "rollout.ranks: .*cut by heads"),
        ({"rollout": APART, "parallel": {"pipeline": 2}}, "parallel.pipeline"),
    ],
)
def test_what_is_not_there_for_them_is_refused(more, said, tiny, tmp_path):
    with pytest.raises(RecipeError, match=said):
        maker(tiny, tmp_path, **more)(tmp_path / "run")


@pytest.mark.parametrize("trains", [True, False])
def test_every_rank_knows_what_is_free_before_any_reads_its_model(trains, tiny, tmp_path, monkeypatch):
    """Those of a host share it: what one holds already would be counted as taken, and as its share."""
    seen = []

    class Whole(Alone):
        def barrier(self, where):
            seen.append("all are here")

    def free(device, ranks):
        seen.append("what is free")
        return 1 << 40

    def read(*given):
        raise PeerError("far enough")

    monkeypatch.setattr(Alone, "apart", Sides(trains, Alone(), Whole(), None))
    monkeypatch.setattr("llmkit.recipe.execute.check_ranks", lambda *given: None)
    for name in ("llmkit.stages.sizes.room", "llmkit.stages.drawing_apart.room"):
        monkeypatch.setattr(name, free)
    for name in ("llmkit.stages.build_training._built", "llmkit.stages.drawing_apart.again"):
        monkeypatch.setattr(name, read)
    with pytest.raises(PeerError, match="far enough"):
        run(maker(tiny, tmp_path, rollout=APART)(tmp_path / "run"), console=QUIET)
    assert seen == ["what is free", "all are here"]


def json_of(said):
    return json.loads(json.dumps(said))


CHANGED = {
    Ask: {"adapter": "a", "processors": (print,), "prediction": (4, 5)},
    Sampling: {
        **{name: 0.5 for name in ("temperature", "top_p", "min_p", "length_penalty", "repetition_penalty")},
        **{name: 2 for name in ("top_k", "max_tokens", "min_tokens", "seed", "n", "beams", "drafts")},
        **{name: 1.5 for name in ("presence_penalty", "frequency_penalty")},
        **{"early_stopping": "never", "ignore_eos": True, "stop": ("a",), "bad_words": ("b",), "stop_ids": (3,)},
        **{"allowed_ids": (7, 8), "logit_bias": {7: 1.0}, "logprobs": 2, "prompt_logprobs": 0, "grammar": JsonObject()},
    },
}
"""Each field with a value that is not its own."""
AT_HOME = ("processors", "logit_bias", "logprobs", "prompt_logprobs", "grammar")
"""What is refused by name."""


@pytest.mark.parametrize("kind", CHANGED)
def test_what_an_ask_holds_arrives_or_is_refused_by_its_name(kind):
    """Every field of it: one that comes anew is missing here until somebody has said which."""
    assert {field.name for field in fields(kind)} - {"prompt", "sampling"} == {*CHANGED[kind]}
    for name, value in CHANGED[kind].items():
        own = {name: value} if kind is Ask else {"sampling": Sampling(**{name: value})}
        ask = Ask(Prompt((3, 1)), **own)
        if name in AT_HOME:
            with pytest.raises(RequestError, match=f"^{name}: is not told to ranks that only draw"):
                ask_told(ask)
        else:
            assert ask_of(json_of(ask_told(ask))) == ask


def test_what_an_ask_is_for_is_its_tokens_alone_where_an_engine_reads_it():
    assert [field.name for field in fields(Prompt)] == ["ids", "said", "tools"]
    ask = Ask(Prompt((3,), ({"role": "user", "content": "hello"},), ({"name": "sum"},)))
    assert ask_of(json_of(ask_told(ask))) == Ask(Prompt((3,)))


@pytest.mark.parametrize(
    ("held", "into", "said"),
    [
        (
            (["a", "b"], [], []),
            ([], ["a", "b"], ["a"]),
            "rank 2 does not draw from b, which is trained; fix: report it",
        ),
        ((["a", "b"], [], []), ([], ["a"], ["a", "b"]), "rank 2 alone draws from b, which is trained"),
        ((["a"], [], []), ([], ["a", "c"], ["a", "c"]), "rank 1 draws from c, which no rank trains"),
    ],
)
def test_tensors_that_do_not_go_together_are_named_with_their_rank(held, into, said):
    class All(Alone):
        def gather(self, value):
            return [list(pair) for pair in zip(held, into, strict=True)]

    with pytest.raises(PeerError, match=said):
        Crossing(All(), lambda name: (), held[0], {})


def test_what_is_asked_and_answered_arrives_as_it_is():
    ask = Ask(Prompt((3, 1)), Sampling(temperature=0.7, n=2, seed=5, stop=("a", "b"), stop_ids=(2,), logprobs=0))
    assert ask_of(json_of(ask_told(ask))) == ask
    tokens = (Token(7, -0.125, -0.1), Token(8, None, -1e-17))
    made = Completion((Output("x", (7, 8), "stop", tokens, 2), Output("", (), "error", why="so")), 2, version=4)
    assert completion_of(json_of(completion_told(made))) == made
