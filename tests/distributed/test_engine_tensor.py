"""One scheduler over ranks that hold a model together: what one process says, and a named error where a rank dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

from llmkit.build.leading import Leading
from llmkit.build.ranked import Spread, check, opened, rank_of
from llmkit.core.errors import ModelError, PeerError, RecipeError
from llmkit.core.ranks import ranks
from llmkit.core.types import Paged, Span
from llmkit.inference.adapters import Adapters
from llmkit.inference.blocks import Blocks
from llmkit.inference.cache import Cache
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.ranks import Led, Rank, follow
from llmkit.inference.request import Busy, Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef, Nf4, NoQuant
from llmkit.models.paged import BlockStore
from llmkit.models.resolve import resolve
from llmkit.parallel.group import joined
from tests.conftest import make_tokenizer
from tests.distributed import ended, launched, together
from tests.models.test_loras import changed, saved

SLOW = pytest.mark.slow
FAMILIES = ("Llama", "Qwen3", "Gemma-2")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"])
TEXTS = Texts(make_tokenizer())
SOFT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp("model") / family
        tiny(family).save_pretrained(made[family])
        make_tokenizer().save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {family: saved(root / family, LORA, family) for family in FAMILIES} | {"soft": saved(root / "soft", SOFT)}


def engine(forward, store, words: int, bank) -> Engine:
    facts, copies = Facts(words, 128, ()), forward.copy if isinstance(forward, Led) else store.copy
    return Engine(Runner(forward, store), Blocks(32, 4), Limits(24, 8), facts, TEXTS, copies, bank)


def requests(names: list[str]) -> list[Request]:
    source = torch.Generator().manual_seed(5)
    made = []
    for i, name in enumerate(names):
        prompt = torch.randint(3, 60, (4 + 5 * i,), generator=source).tolist()
        made.append(Request(str(i), tuple(prompt), Sampling(max_tokens=6, n=1 + i % 2), name))
    return made


def answers(made: Engine, asked: list[Request]) -> dict[str, list[list[int]]]:
    said = {one.id: [[] for _ in range(one.sampling.n)] for one in asked}
    for one in asked:
        made.add(one)
    while not made.idle:
        for event in made.step():
            said[event.request][event.index] += [token.id for token in event.tokens]
    return said


def logits(forward, store, words: int) -> torch.Tensor:
    """Of every place of two prompts in one step."""
    tokens, where = torch.arange(3, 17), torch.cat([torch.arange(9), torch.arange(5)])
    spans = (Span(0, 0, 9, 0, (29, 30, 31)), Span(0, 9, 14, 0, (27, 28)))
    with torch.no_grad():
        return forward.logits(forward.hidden(tokens, where, Paged(store, spans), ["", ""]))


def whole(folder: Path):
    ref = ModelRef(name=str(folder))
    decoder = Decoder(load(resolve(ref), ref, How()).model)
    return decoder, BlockStore(32, 4)


def part(folder: Path, group, cache: Cache = Cache(block=4), most: int | None = 32 * 4) -> Rank:
    ref = ModelRef(name=str(folder))
    spread = Spread(ref, NoQuant(), {"device": "cpu"}, cache, most)
    return rank_of(opened(resolve(ref), spread), spread, group)


def served(adapters, bank) -> Adapters:
    made = Adapters(bank)
    for name, folder in adapters.items():
        made.add(name, folder)
    return made


@pytest.mark.parametrize(
    ("world", "family"), [(4, "Llama"), *(pytest.param(w, f, marks=SLOW) for w in (2, 4) for f in FAMILIES)]
)
def test_ranks_say_what_one_process_says(world, family, folders, adapters, tmp_path):
    """With 4 ranks there are fewer key-value heads than ranks."""
    given = {"lora": adapters[family]} | ({"soft": adapters["soft"]} if family == "Llama" else {})
    asked = requests(["", *given, "", "lora"])
    decoder, store = whole(folders[family])
    before = logits(decoder, store, 64)
    expected = answers(engine(decoder, store, 64, served(given, decoder.bank)), asked)

    def work(index):
        with joined(ranks(), "cpu", serves=True) as group:
            rank = part(folders[family], group)
            if index:
                follow(rank)
                return
            led = Led(rank)
            gap = (logits(led, rank.store, 64) - before).abs().max() / before.abs().max()
            assert gap < 1e-5, gap
            assert answers(engine(led, rank.store, 64, served(given, led)), asked) == expected
            held = next(iter(rank.store.layers.values()))
            assert held.keys.shape[1] == max(1, 2 // world)  # the control: a part of the heads lies here
            assert len(rank.forward.causal.get_output_embeddings().weight) == 64 // world
            led.close()

    together(world, work, tmp_path)
    assert len({str(said) for said in expected.values()}) == len(expected)


def test_a_rank_that_dies_is_named_and_ends_the_engine(folders, tmp_path):
    said, alone = tmp_path / "said.txt", tmp_path / "pid"

    def work(index):
        with joined(ranks(), "cpu", serves=True) as group:
            rank = part(folders["Llama"], group)
            if index:
                alone.write_text(str(os.getpid()))
                follow(rank)
                return
            led = Led(rank)
            made = engine(led, rank.store, 64, Adapters())
            answers(made, requests([""]))  # the control: it runs
            time.sleep(1.0)  # nothing is asked, and nobody is to blame for it
            made.add(requests(["", ""])[1])
            made.step()
            os.kill(int(alone.read_text()), signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(PeerError, match=r"rank 1 \(.*died") as found:
                while True:
                    made.step()
            assert time.monotonic() - began < 10
            with pytest.raises(PeerError, match="rank 1"):
                made.step()
            raise found.value

    codes = ended(launched(2, work, said))
    assert codes == [PeerError.code, -signal.SIGKILL], said.read_text()


def test_an_adapter_that_cannot_be_read_leaves_all_ranks_as_they_were(folders, adapters, tmp_path):
    def work(index):
        with joined(ranks(), "cpu", serves=True) as group:
            rank = part(folders["Llama"], group)
            if index:
                follow(rank)
                assert not rank.read_
                return
            led = Led(rank)
            bank = served({"lora": adapters["Llama"]}, led)
            held, bank.most = bank.hold("lora"), 1
            with pytest.raises(Busy):
                bank.add("another", adapters["Llama"])
            bank.release(held)
            assert not rank.read_  # here and there: what is not kept takes no memory
            with pytest.raises(ModelError, match="has shape"):
                bank.add("lora", other)
            with pytest.raises(ModelError, match="weights that are handed over do not reach other ranks"):
                bank.replace("lora", {})
            assert len(answers(engine(led, rank.store, 64, bank), requests(["lora"]))["0"][0]) == 6
            led.close()

    other = changed(adapters["Llama"], tmp_path / "other", r=8)
    together(2, work, tmp_path)


def test_the_smallest_room_of_all_ranks_counts_and_what_is_beside_it_is_left_alone(folders, tmp_path):
    decoder, store = whole(folders["Llama"])
    before = logits(decoder, store, 64)

    def work(index):
        with joined(ranks(), "cpu", serves=True) as group:
            rank = part(folders["Llama"], group, Cache(block=4, size=(1 + index) << 16), None)
            own = (1 << 16) // sum(held.keys[0].nbytes + held.values[0].nbytes for held in rank.store.layers.values())
            assert rank.store.blocks == own > 0  # as many as the first has room for; the other has twice that
            if index:
                follow(rank)
                return
            led = Led(rank)
            for held in rank.store.layers.values():
                held.keys.fill_(7.0)
            gap = (logits(led, BlockStore(32, 4), 64) - before).abs().max() / before.abs().max()
            assert gap < 1e-5, gap
            assert all((held.keys == 7.0).all() for held in rank.store.layers.values())
            led.close()

    together(2, work, tmp_path)


def test_what_cannot_be_cut_is_refused_before_it_is_read(folders, adapters, tmp_path):
    ref = ModelRef(name=str(folders["Llama"]))
    with pytest.raises(RecipeError, match="3 ranks cannot share 4 heads"):
        check(resolve(ref), NoQuant(), 3)
    with pytest.raises(ModelError, match="a quantised base is not cut"):
        check(resolve(ref), Nf4(), 2)
    check(resolve(ref), NoQuant(), 2)  # the control


@SLOW
def test_ranks_that_the_first_one_starts_itself(folders, adapters):
    """From the real entry: other processes, which end with the first one's word, or with it."""
    ref, decoder_store = ModelRef(name=str(folders["Qwen3"])), whole(folders["Qwen3"])
    asked = requests(["", "lora"])
    given = {"lora": adapters["Qwen3"]}
    expected = answers(engine(*decoder_store, 64, served(given, decoder_store[0].bank)), asked)
    leading = Leading(resolve(ref), Spread(ref, NoQuant(), {"device": "cpu"}, Cache(block=4), 128), 2)
    children = list(leading.others.children)
    try:
        made = engine(leading.led, leading.led.rank.store, 64, served(given, leading.led))
        assert answers(made, asked) == expected
    finally:
        leading.close()
    assert [child.wait(0) for child in children] == [0]
    with pytest.raises(ModelError, match="other ranks have ended"):
        made.add(asked[0])
        made.step()
