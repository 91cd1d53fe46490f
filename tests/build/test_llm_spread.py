"""`LLM` over several processes, or with layers on a disk: the same text, and what cannot be done there by its name."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from peft import LoraConfig

from llmkit.build import spread as spreading
from llmkit.build.leading import Leading
from llmkit.build.llm import LLM
from llmkit.core.errors import LlmkitError, ModelError, PeerError, RecipeError
from llmkit.inference.sampling import Sampling
from tests.build.test_adapters_of import folder
from tests.build.test_drafting import headed
from tests.build.test_llm import TEXTS, free
from tests.distributed.followers import Fork, gone

SLOW = pytest.mark.slow
GREEDY = Sampling(max_tokens=6, ignore_eos=True, logprobs=2)
DRAWN = Sampling(max_tokens=6, temperature=1.0, seed=3, n=2, prompt_logprobs=0)


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    return folder(tiny, tmp_path_factory.mktemp("lora") / "lora", LoraConfig(r=4, target_modules=["o_proj", "up_proj"]))


@pytest.fixture(scope="module")
def one(tiny, lora):
    with LLM(str(tiny), adapters={"lora": lora}) as made:
        yield made


@pytest.fixture
def forked(monkeypatch):
    """Other ranks are forked: what they need is imported here."""
    monkeypatch.setattr(spreading, "Leading", partial(Leading, start=Fork))


def told(made):
    return [(one.text, one.finish_reason, tuple(x.token_ids for x in one.outputs)) for one in made]


def logits(made):
    """Log-probabilities of all that was told, prompts included."""
    prompts = [token.logprob for one in made for token in one.prompt_logprobs or () if token is not None]
    tops = [value for one in made for token in one.logprobs or () for value in token.top.values()]
    return torch.tensor([*prompts, *tops, *(token.logprob for one in made for token in one.logprobs or ())])


def same(spread, whole):
    for sampling, adapter in ((GREEDY, ""), (DRAWN, ""), (GREEDY, "lora")):
        ours, theirs = (made.generate(TEXTS, sampling, adapter=adapter) for made in (spread, whole))
        assert told(ours) == told(theirs)
        gap = (logits(ours) - logits(theirs)).abs().max()
        assert gap < 1e-5 * logits(theirs).abs().max() and len(logits(ours)) > 0, gap
    assert told(whole.generate(TEXTS, GREEDY)) != told(whole.generate(TEXTS, GREEDY, adapter="lora"))  # the control
    (alone,) = whole.generate(TEXTS[1:2], GREEDY)
    assert "".join(piece.text for piece in spread.stream(TEXTS[1], GREEDY)) == alone.text
    assert free(spread)


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=SLOW)])
def test_processes_say_what_one_says(tiny, lora, one, forked, tensor):
    threads = torch.get_num_threads()
    with LLM(str(tiny), adapters={"lora": lora}, tensor=tensor) as spread:
        same(spread, one)
        held = next(iter(spread.engine.runner.store.layers.values()))
        assert held.keys.shape[1] == max(1, 2 // tensor)  # the control: a part of the heads lies here
        for refused in (lambda: spread.score(TEXTS), lambda: spread.embed(TEXTS)):
            with pytest.raises(ModelError, match=f"{tensor} processes hold it together"):
                refused()
        others = spread.held.leading.others.children
        assert len(others) == tensor - 1 and all(other.poll() is None for other in others)

        async def streamed():
            return "".join([piece.text async for piece in spread.astream(TEXTS[1], GREEDY)])

        assert asyncio.run(streamed()) == one.generate(TEXTS[1:2], GREEDY)[0].text
    assert [other.poll() for other in others] == [0] * (tensor - 1)
    assert torch.get_num_threads() == threads
    with pytest.raises(ModelError, match="this LLM is closed"):
        spread.generate(TEXTS[:1], GREEDY)


@pytest.mark.parametrize("kind", ["draft", "head"])
def test_processes_look_at_drafts_together(tiny, one, forked, tmp_path, kind):
    how = Sampling(max_tokens=12, temperature=0.7, seed=1)
    path = str(tiny) if kind == "draft" else headed(tiny, tmp_path / "head")
    with LLM(str(tiny), tensor=2, speculation={kind: path, "fixed": True, "lookup": False}) as spread:
        assert told(spread.generate(TEXTS, how)) == told(one.generate(TEXTS, how))
        stats = spread.engine.stats()
        assert stats.drafted > 0 and (stats.accepted > 0 or kind == "head")  # which nobody trained


def test_an_adapter_s_own_folder_is_run_over_processes(lora, one, forked):
    with LLM(str(lora), tensor=2) as spread:
        assert told(spread.generate(TEXTS, GREEDY)) == told(one.generate(TEXTS, GREEDY, adapter="lora"))


def test_an_adapter_that_does_not_fit_leaves_no_process(tiny, tmp_path, forked, monkeypatch):
    made = []
    monkeypatch.setattr(spreading, "Leading", lambda *given: made.append(Leading(*given, start=Fork)) or made[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="adapter_config"):
        LLM(str(tiny), adapters={"lora": tmp_path / "empty"}, tensor=2)
    assert [other.poll() for other in made[0].others.children] == [0]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=SLOW)])
def test_a_process_that_dies_or_stands_still_ends_what_is_asked_by_its_name(tiny, forked, number):
    with LLM(str(tiny), tensor=2) as spread:
        (other,) = spread.held.leading.others.children
        pieces = spread.stream(TEXTS[0], Sampling(max_tokens=400, ignore_eos=True))
        next(pieces)
        os.kill(other.pid, number)
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"rank 1 \(.*(died|no sign of life)"):
            list(pieces)
        assert time.monotonic() - began < 40
        with pytest.raises(PeerError, match=r"rank 1 .* in answering.*; fix: open the model again$"):
            spread.generate(TEXTS[:1], GREEDY)
    assert other.poll() == -signal.SIGKILL


def test_a_step_that_was_left_midway_is_not_gone_on_with(tiny, forked, monkeypatch):
    with LLM(str(tiny), tensor=2) as spread:
        rank = spread.held.leading.led.rank

        def left(said):
            raise KeyboardInterrupt

        monkeypatch.setitem(rank.verbs, "hidden", left)
        with pytest.raises(KeyboardInterrupt):
            spread.generate(TEXTS[:1], GREEDY)
        with pytest.raises(PeerError, match="out of step since a call was left"):
            spread.generate(TEXTS[:1], GREEDY)
        (other,) = spread.held.leading.others.children
    assert other.poll() is not None


LEADER = """
import sys
from llmkit import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor=2)
    print(*[other.pid for other in llm.held.leading.others.children], flush=True)
    sys.stdin.read()
"""


@SLOW
@pytest.mark.parametrize("stopped", [False, True])
def test_new_interpreters_do_not_outlive_the_one_that_started_them(tiny, tmp_path, stopped):
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(script), str(tiny)], stdin=pipe, stdout=pipe, text=True) as leader:
        pid = int(leader.stdout.readline())
        assert not gone(pid, 0.2)  # the control
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        leader.kill()
    assert gone(pid)


@SLOW
def test_one_killed_while_it_leads_leaves_nobody(tiny, one):
    """The same from a fork; `one`: what is needed is imported."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            gc.freeze()  # as in tests/distributed/followers.py
            spreading.Leading = partial(Leading, start=Fork)
            spread = LLM(str(tiny), tensor=2)
            os.write(writing, b"%d\n" % spread.held.leading.others.children[0].pid)
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        other = int(said.readline())
    assert not gone(other, 0.2)  # the control
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert gone(other)


def test_layers_on_a_disk_say_what_they_say_in_memory(tiny, lora, one):
    with LLM(str(tiny), adapters={"lora": lora}, placement={"cpu": "90KB", "disk": "10MB"}) as spread:
        assert any(weight.is_meta for weight in spread.engine.runner.forward.causal.parameters())  # the control
        same(spread, one)
        with pytest.raises(ModelError, match="its layers are placed over devices"):
            spread.score(TEXTS)


WRONG = {
    "tensor: 3 ranks cannot share 4 heads, 2 key-value heads, intermediate_size 48": {"tensor": 3},
    "fix: use 1, 2 or 4": {"tensor": 8},
    "placement: contradicts tensor": {"tensor": 2, "placement": "auto"},
    "tensor: contradicts generator: generator transformers has no tensor": {"tensor": 2, "generator": "transformers"},
    "tensor: contradicts generator: generator has another tensor": {
        "tensor": 2,
        "generator": {"kind": "engine", "tensor": 4},
    },
    "exact: contradicts tensor": {"tensor": 2, "generator": {"kind": "engine", "exact": True}},
    "placement.tpu: tpu is no device": {"placement": {"tpu": "1GiB"}},
    "placement.cpu: 'much' is not a size": {"placement": {"cpu": "much"}},
    "cuda:77 is no device here; fix: name some of cpu, disk": {"placement": {"cuda:77": "1GiB"}},
    "a quantised base is not cut over ranks": {"tensor": 2, "quant": "bnb_nf4"},
    "a quantised base is not placed": {"placement": "auto", "quant": "bnb_nf4"},
    "no room in cpu": {"placement": {"cpu": "90KB"}},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_spread_is_refused(tiny, what):
    with pytest.raises(LlmkitError) as refused:
        LLM(str(tiny), **WRONG[what])
    assert isinstance(refused.value, RecipeError | ModelError) and what in str(refused.value)
