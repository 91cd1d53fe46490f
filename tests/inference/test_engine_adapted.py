"""Requests with adapters in one engine: each gets the tokens that it gets alone, and the version that it began with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file

from llmkit.core.errors import ModelError
from llmkit.inference.adapters import Adapters
from llmkit.inference.blocks import Blocks
from llmkit.inference.engine import Engine, Facts
from llmkit.inference.request import Request, RequestError
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.paged import BlockStore
from tests.conftest import make_tokenizer
from tests.models.test_loras import ALL, decoder, saved

WORDS = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    saved(root / "lora", LoraConfig(r=4, lora_alpha=8, target_modules=ALL))
    saved(root / "other", LoraConfig(r=2, lora_alpha=8, target_modules=["o_proj", "down_proj"]))
    saved(root / "soft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    return root


def engine(root, blocks: int = 64, tokens: int = 16) -> Engine:
    made, store = decoder(), BlockStore(blocks, 4)
    adapters = Adapters(made.bank, root)
    for name in ("lora", "other", "soft"):
        adapters.load(name, name)

    facts = Facts(WORDS, blocks * 4, ())
    return Engine(
        Runner(made, store), Blocks(blocks, 4), Limits(tokens, 8), facts, Texts(make_tokenizer()), store.copy, adapters
    )


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {one.id: [] for one in requests}
    for one in requests:
        engine.add(one)
    while not engine.idle:
        for event in engine.step():
            assert event.finish != "error", event.why
            said[event.request] += [token.id for token in event.tokens]
    return said


def asked(name: str, length: int, adapter: str, **how: object) -> Request:
    prompt = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Request(name, tuple(prompt), Sampling(max_tokens=8, **how), adapter)


def test_a_mixed_batch_gives_each_what_it_gets_alone(root):
    kinds = ["", "lora", "soft", "other", "soft", "", "lora"]
    requests = [asked(str(i), 5 + 2 * i, kind) for i, kind in enumerate(kinds)]
    alone = {one.id: answers(engine(root), [one])[one.id] for one in requests}
    for blocks, tokens in ((64, 16), (64, 200), (14, 7)):  # in the last they do not all have room
        made = engine(root, blocks, tokens)
        assert answers(made, requests) == alone
        assert not any(one.holders for one in made.adapters.named.values())
    same = [asked(kind, 9, kind) for kind in ("", "lora", "other", "soft")]
    assert len({tuple(said) for said in answers(engine(root), same).values()}) == 4  # the control: they differ


def test_no_adapter_finds_what_another_has_cached(root):
    made = engine(root, tokens=64)
    found: dict[str, list[int]] = {}
    for turn in range(2):
        for kind in ("", "lora", "soft"):
            made.add(asked(f"{kind}{turn}", 17, kind))
            while not made.idle:
                for event in made.step():
                    if event.cached or not found.get(f"{kind}{turn}"):
                        found[f"{kind}{turn}"] = [event.cached]
    assert found == {"0": [0], "lora0": [0], "soft0": [0], "1": [16], "lora1": [16], "soft1": [20]}


def test_a_swap_in_the_middle_leaves_a_request_as_it_began(root):
    made = engine(root)
    request = asked("a", 9, "lora")
    before = answers(engine(root), [request])["a"]
    made.add(request)
    said = [token.id for _ in range(3) for event in made.step() for token in event.tokens]
    tensors = load_file(root / "lora" / "adapter_model.safetensors")
    made.adapters.replace("lora", {name: -t if ".lora_B" in name else t for name, t in tensors.items()})
    made.add(asked("b", 9, "lora"))
    after: list[int] = []
    while not made.idle:
        for event in made.step():
            (said if event.request == "a" else after).extend(token.id for token in event.tokens)
    assert said == before != after
    assert len(made.runner.forward.bank.held) == 3  # the old version is gone with who held it
    made.add(asked("c", 9, "lora"))
    made.adapters.unload("lora")
    made.step()
    made.abort("c")
    assert len(made.runner.forward.bank.held) == 2
    with pytest.raises(RequestError, match="no adapter is named 'lora'"):
        made.add(asked("d", 9, "lora"))
    with pytest.raises(ModelError):
        made.adapters.add("lora", root)
    assert made.idle and made.adapters.names == ["other", "soft"]


def test_virtual_tokens_count_and_are_told_of_by_nothing(root):
    made = engine(root, blocks=8)
    with pytest.raises(RequestError, match="the model takes 26"):
        made.add(asked("a", 26, "soft"))
    assert made.idle and not made.adapters.named["soft"].holders
    request = asked("b", 7, "soft", prompt_logprobs=0, repetition_penalty=1.5, logprobs=0)
    made.add(request)
    events = []
    while not made.idle:
        events += made.step()
    told = next(event.prompt for event in events if event.prompt)
    assert [token.id for token in told[1:]] == list(request.prompt[1:]) and told[0] is None
    made = engine(root)
    made.add(asked("c", 7, "", prompt_logprobs=0, repetition_penalty=1.5))
    plain = next(event.prompt for _ in range(9) for event in made.step() if event.prompt)
    assert abs(plain[1].logprob - told[1].logprob) > 1e-3  # the control: they are heard
