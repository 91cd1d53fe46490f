"""Rows that the engine itself is to stand: timing of another's prefix (N1), crafted names (N2), bounds (N7)."""

from __future__ import annotations

from random import Random

import pytest
import torch
from scipy.stats import ks_2samp

from llmkit.inference.blocks import chain, salted
from llmkit.inference.request import Request, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.models.attend import install
from llmkit.models.families import tiny
from tests.inference.test_engine import answers, made
from tests.inference.world import World, request

SECRET = tuple(range(100, 140))


def work(guess: tuple[int, ...], owner: str) -> int:
    """What a spy's prompt costs to its first token, in tokens computed, where `owner` has asked the secret before."""
    world = World(blocks=64)
    for name, tenant, prompt in (("victim", owner, SECRET), ("probe", "spy", guess)):
        world.took.clear()
        world.add(request(name, prompt, tenant=tenant))
        while name not in world.begun:
            world.step()
        took = sum(world.took)
        while name in world.live:
            world.step()
    return took


def test_n1_no_law_of_costs_tells_what_another_tenant_has_asked() -> None:
    """Kolmogorov's and Smirnov's test over guesses that share 0 to all tokens of the secret."""
    random = Random(1)
    guesses = [SECRET[: random.randrange(41)] for _ in range(150)]
    guesses = [one + tuple(random.randrange(100) for _ in range(44 - len(one))) for one in guesses]
    nothing = [work(one, "") for one in guesses]
    others = [work(one, "victim") for one in guesses]
    assert ks_2samp(nothing, others).pvalue == 1.0 and nothing == others
    own = [work(one, "spy") for one in guesses]
    assert ks_2samp(nothing, own).pvalue < 1e-9  # the control: within a tenant it can be told


def test_n2_no_parts_that_are_put_together_otherwise_have_one_name() -> None:
    """Length before each part and 4 bytes to a token: nothing that is moved over a border makes an old name."""
    random, seen = Random(2), dict[bytes, tuple[object, ...]]()
    for _ in range(3000):
        text = "".join(random.choice("ab\0\x04|,") for _ in range(6))
        cut, other = sorted(random.randrange(7) for _ in range(2))
        parts = (text[:cut], text[cut:other], text[other:])
        tokens = tuple(random.choice((0, 1, 256, 65536)) for _ in range(random.randrange(1, 4)))
        for count in range(1, len(tokens) + 1):
            key = (parts, tokens[:count])
            assert seen.setdefault(chain(salted(*parts), tokens[:count]), key) == key
    assert len(seen) > 2000
    with pytest.raises(OverflowError):
        chain(salted("a"), (2**32,))


BAD = {
    "prompt": lambda id: ((5, id), Sampling(max_tokens=4)),
    "stop_ids": lambda id: ((5, 6), Sampling(max_tokens=4, stop_ids=(id,))),
    "allowed_ids": lambda id: ((5, 6), Sampling(max_tokens=4, allowed_ids=(7, id))),
    "logit_bias": lambda id: ((5, 6), Sampling(max_tokens=4, logit_bias={id: 50.0})),
}


def wrecks(prompt: object, said: object, logits: torch.Tensor) -> torch.Tensor:
    """Writes all over what it is given, and gives a view of more than its own row."""
    logits.fill_(float("nan"))
    return logits.as_strided((len(logits),), (1,)).mul_(torch.nan)


def test_n7_a_bad_request_in_a_full_batch_writes_nowhere_else() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    how = Sampling(max_tokens=6, temperature=1.0, seed=4, logprobs=3)
    good = [Request(f"good{at}", tuple(range(5 + at, 12 + at)), how) for at in range(6)]
    alone = {one.id: answers(made(model), [one])[one.id] for one in good}
    engine = made(model)
    words = engine.facts.words
    for one in good:
        engine.add(one)
    for key, build in BAD.items():
        for id in (-1, -words, words, words + 1, 2**31 - 1, -(2**31)):
            prompt, sampling = build(id)
            with pytest.raises(RequestError) as refused:
                engine.add(Request("bad", prompt, sampling))
            assert refused.value.problems[0].key == key
    engine.add(Request("wrecks", (5, 6), how, processors=(wrecks,)))
    engine.add(Request("words", (5, 6), Sampling(max_tokens=4, bad_words=("the quick brown fox", "hello", "zebra"))))
    said: dict[str, list[int]] = {one.id: [] for one in good}
    ends: dict[str, object] = {}
    while not engine.idle:
        for event in engine.step():
            said.setdefault(event.request, []).extend(token.id for token in event.tokens)
            ends[event.request] = event.finish
    assert {id: [said[id]] for id in alone} == alone
    assert ends.pop("wrecks") == "error" and set(ends.values()) <= {"length", "stop"}
