"""`LLM` over a tiny model: what it writes, scores and embeds; who leaves early holds nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from llmkit.build.llm import LLM
from llmkit.core.errors import ModelError, RecipeError
from llmkit.data import encode
from llmkit.data.batches import micro_batches
from llmkit.data.node import Data, FirstFit, Jsonl
from llmkit.data.prepare import prepare
from llmkit.inference.request import RequestError
from llmkit.inference.sampling import Sampling

TEXTS = ["hello world", "the quick brown fox jumps over", "a", "a model is trained on rows of text"]
DRAWN = Sampling(max_tokens=6, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def llm(tiny: Any) -> LLM:
    return LLM(str(tiny))


def free(llm: LLM) -> bool:
    """Whether the engine holds nothing."""
    scheduler = llm.engine.scheduler
    return llm.engine.idle and scheduler.blocks.room == scheduler.blocks.count and not llm.turns.sinks


def test_text_tokens_and_messages_are_asked_and_seeds_repeat(llm: LLM) -> None:
    greedy = Sampling(max_tokens=6)
    made = llm.generate(TEXTS, greedy)
    assert [one.token_ids for one in made] == [llm.generate([llm.tokens(t)], greedy)[0].token_ids for t in TEXTS]
    said = [{"role": "user", "content": "hi"}]
    assert llm.chat(said, greedy) == llm.generate([said], greedy)[0] != made[0]
    drawn = llm.generate(TEXTS[:1] * 3, DRAWN)
    assert len({one.token_ids for one in drawn}) == 3 and drawn == llm.generate(TEXTS[:1] * 3, DRAWN)
    each = [Sampling(max_tokens=6, temperature=1.0, seed=seed) for seed in (5, 4, 3)]
    assert llm.generate(TEXTS[:1] * 3, each)[::-1] == drawn
    with pytest.raises(RecipeError, match="sampling: 3 for 1 prompts; fix: give one, or one for each"):
        llm.generate(TEXTS[:1], each)
    assert free(llm)


def test_the_transformers_generator_writes_the_same(tiny: Any, llm: LLM) -> None:
    other = LLM(str(tiny), generator="transformers")
    greedy = Sampling(max_tokens=6)
    said = [(one.text, one.token_ids, one.finish_reason) for one in llm.generate(TEXTS, greedy)]
    assert [(one.text, one.token_ids, one.finish_reason) for one in other.generate(TEXTS, greedy)] == said
    assert "".join(piece.text for piece in other.stream(TEXTS[1], greedy)) == said[1][0]
    with pytest.raises(RequestError, match="n: generator transformers has no n"):
        other.generate(TEXTS, Sampling(n=2))
    with pytest.raises(RequestError, match="n: generator transformers has no n"):
        list(other.stream(TEXTS[0], Sampling(n=2)))


def test_a_bad_request_among_good_ones_is_raised_and_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt: token 100000 is none of the 448"):
        llm.generate([*TEXTS, [1, 100000]], Sampling(max_tokens=6))
    assert free(llm)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=30), DRAWN, Sampling(max_tokens=9, temperature=1.0, n=3)])
def test_pieces_put_together_are_the_answer(llm: LLM, sampling: Sampling) -> None:
    whole = llm.generate([TEXTS[0]], sampling)[0]
    pieces = list(llm.stream(TEXTS[0], sampling))
    for index, output in enumerate(whole.outputs):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == output.text
        assert tuple(token.id for piece in own for token in piece.tokens) == output.token_ids
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [output.finish_reason]
    assert len(pieces) > 1 and free(llm)


def test_no_piece_shows_the_beginning_of_a_stop_text(llm: LLM) -> None:
    text = llm.generate([TEXTS[0]], Sampling(max_tokens=30))[0].text
    stop = text[8:14]
    how = Sampling(max_tokens=30, stop=(stop,))
    said = [piece.text for piece in llm.stream(TEXTS[0], how)]
    assert "".join(said) == llm.generate([TEXTS[0]], how)[0].text == text[: text.index(stop)]


def test_who_leaves_a_stream_early_holds_nothing(llm: LLM) -> None:
    stream = llm.stream(TEXTS[0], Sampling(max_tokens=400))
    assert next(stream) and not free(llm)
    stream.close()
    assert free(llm)


def test_many_stream_at_once_from_one_thread_and_who_is_cancelled_holds_nothing(llm: LLM) -> None:
    how = Sampling(max_tokens=20)

    async def all_of(text: str) -> str:
        return "".join([piece.text async for piece in llm.astream(text, how)])

    async def cancelled() -> None:
        async for _ in llm.astream(TEXTS[0], Sampling(max_tokens=400)):
            pass

    async def at_once() -> list[str]:
        leaves = asyncio.create_task(cancelled())
        said = await asyncio.gather(*map(all_of, TEXTS))
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        with pytest.raises(RequestError, match="max_tokens"):
            async for _ in llm.astream(TEXTS[0], Sampling(max_tokens=10**6)):
                pass
        while not free(llm):
            await asyncio.sleep(0.01)
        return said

    assert asyncio.run(at_once()) == [one.text for one in llm.generate(TEXTS, how)]


def test_what_a_step_fails_of_reaches_everybody_and_the_next_is_answered(llm: LLM, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck")

    async def asked(text: str) -> None:
        async for _ in llm.astream(text, Sampling(max_tokens=4)):
            pass

    async def both() -> list[BaseException | None]:
        return await asyncio.gather(*map(asked, TEXTS[:2]), return_exceptions=True)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "run", broken)
        assert [str(one) for one in asyncio.run(both())] == ["out of luck"] * 2
        with pytest.raises(RuntimeError, match="out of luck"):
            llm.generate(TEXTS, Sampling(max_tokens=4))
    assert free(llm) and llm.generate(TEXTS, Sampling(max_tokens=4))


def by_hand(llm: LLM, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logps = torch.log_softmax(llm.loaded.model(input_ids=torch.tensor([ids])).logits[0], -1)
    return [float(logps[at, token]) for at, token in enumerate(ids[1:])]


@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_the_model_s_own(llm: LLM, packed: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("llmkit.build.laid.TOKENS", 9)  # several rows, and one that is too long for any
    object.__setattr__(llm.loaded.support, "packed", packed)
    try:
        made = llm.score([*TEXTS, [5], [5, 6, 7], ("hello", " world"), ([5, 6], [7, 8])])
    finally:
        object.__setattr__(llm.loaded.support, "packed", True)
    for one in made[:4]:
        assert one.logprobs[0] is None and one.logprobs[1:] == pytest.approx(
            by_hand(llm, list(one.token_ids)), abs=1e-5
        )
    assert made[4].logprobs == (None,) and made[4].total == 0.0
    assert made[6].token_ids == tuple(llm.tokenizer(" world", add_special_tokens=False)["input_ids"])
    assert made[7].token_ids == (7, 8) and made[7].logprobs == pytest.approx(by_hand(llm, [5, 6, 7, 8])[1:], abs=1e-5)


def test_scores_are_those_that_the_trainer_has(llm: LLM, rows: Any) -> None:
    """To 1e-6, whatever is packed beside: the ratio of a policy to itself is 1."""
    data = Data(train=(Jsonl(path=str(rows)),), max_length=96)
    prepared = prepare(data.train, data, llm.tokenizer)
    ids = range(len(prepared))
    examples = [tuple(part.tolist() for part in prepared.example(i)) for i in ids]
    trained = [[at for at, weight in enumerate(weights) if weight] for _, weights in examples]
    pairs = [(row[: own[0]], row[own[0] : own[-1] + 1]) for (row, _), own in zip(examples, trained, strict=True)]
    theirs: dict[int, list[float]] = {}
    for batch in micro_batches(prepared, ids, FirstFit(), 96, 3, True, "cpu"):
        with torch.no_grad():
            logps = llm.scored(batch)
        sizes = [len(pairs[i][1]) for i in batch.ids]
        theirs |= {i: part.tolist() for i, part in zip(batch.ids, logps.split(sizes), strict=True)}
    ours = llm.score(pairs)
    for i in ids:
        assert ours[i].logprobs == pytest.approx(theirs[i], abs=1e-6)


def test_embeddings_are_pooled_as_asked(llm: LLM) -> None:
    with torch.no_grad():
        out = llm.loaded.model(input_ids=torch.tensor([llm.tokens(TEXTS[1])]), output_hidden_states=True)
    own = out.hidden_states[-1][0]
    assert torch.allclose(llm.embed(TEXTS, "last", normalise=False)[1], own[-1], atol=1e-5)
    assert torch.allclose(llm.embed(TEXTS, "mean", normalise=False)[1], own.mean(0), atol=1e-5)
    assert torch.allclose(llm.embed(TEXTS).norm(dim=1), torch.ones(4))
    with pytest.raises(RecipeError, match="pooling: max is no pooling; fix: use mean or last"):
        llm.embed(TEXTS, "max")  # type: ignore[arg-type]


def test_wrong_arguments_are_told_together() -> None:
    with pytest.raises(RecipeError) as refused:
        LLM("x", quant="bnb_nf5", generator={"kind": "engine", "sequencs": 2})
    assert {problem.key for problem in refused.value.problems} == {"quant", "generator.sequencs"}


def test_arguments_that_there_are_none_of_are_told_with_the_nearest() -> None:
    wrong: Any = {"adapter": "x", "devise": "cpu"}
    with pytest.raises(RecipeError) as refused:
        LLM("nowhere", **wrong)
    assert [str(one) for one in refused.value.problems] == [
        "adapter: unknown key, did you mean adapters?; fix: write adapters",
        "devise: unknown key, did you mean device?; fix: write device",
    ]
    with pytest.raises(RecipeError, match="max_token: unknown key, did you mean max_tokens"):
        Sampling(**{"max_token": 3})
    for key in ("stop", "seed"):
        with pytest.raises(RecipeError, match=f"{key}: null is not .*; fix: leave it out"):
            Sampling(**{key: None})


def test_a_family_that_the_engine_cannot_run_is_refused_with_the_way_out(tmp_path: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=448, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"generator: .* cannot be run by the engine: .*fix: use generator: .kind: tr"):
        LLM(str(tmp_path))
    other = LLM(str(tmp_path), generator="transformers")
    assert other.generate(["hello"], Sampling(max_tokens=3))[0].outputs
    ids = other.tokens("hello world")
    assert other.score(["hello world"])[0].logprobs[1:] == pytest.approx(by_hand(other, ids), abs=1e-4)


def test_the_vocabulary_is_read_once_for_all_that_is_asked(tiny: Any, monkeypatch: Any) -> None:
    real, read = encode.words, list[int]()
    monkeypatch.setattr(encode, "words", lambda tokenizer: read.append(1) or real(tokenizer))
    llm = LLM(str(tiny))
    told = [llm.tokens([{"role": "user", "content": text}]) for text in ("hello", "world", "hello")]
    assert told[0] == told[2] != told[1] and len(read) == 1


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda llm: llm.generate([3]),
            r"prompts\[0\]: a value of type int is no prompt; fix: give a text, a list of token",
        ),
        (lambda llm: llm.generate(["a", None]), r"prompts\[1\]: None is no prompt"),
        (lambda llm: llm.generate([b"abc"]), r"prompts\[0\]: a value of type bytes is no prompt"),
        (lambda llm: llm.generate([["a", 3]]), r"prompts\[0\]: a prompt with a value of type str in it cannot be read"),
        (lambda llm: llm.generate({"role": "user"}), "prompts: a value of type dict is no list of prompts"),
        (
            lambda llm: llm.generate([{"role": "user"}]),
            r"prompts\[0\]: one message is no prompt; fix: put it into a list",
        ),
        (lambda llm: llm.generate(["a"], {"max_tokens": 4}), r"sampling: a value of type dict is no Sampling"),
        (lambda llm: llm.chat("a", None), "sampling: None is no Sampling"),
        (lambda llm: llm.score([("a", "b", "c")]), r"given\[0\]: a prompt with a value of type str in it"),
        (lambda llm: llm.score([(None, "b")]), r"given\[0\]: None is no prompt"),
        (lambda llm: llm.embed([None]), r"texts\[0\]: None is no prompt"),
        (lambda llm: llm.embed([[]]), r"texts\[0\]: it has no tokens"),
        (lambda llm: llm.embed(["a", [3] * 9000]), r"texts\[1\]: 9000 tokens are more than the \d+ positions"),
        (lambda llm: llm.score([[3] * 9000]), r"given\[0\]: 9000 tokens are more than"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(llm: LLM, ask: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ask(llm)
    assert free(llm)


def test_one_text_is_a_list_of_one(llm: LLM) -> None:
    greedy = Sampling(max_tokens=3)
    assert llm.generate(TEXTS[0], greedy) == llm.generate(TEXTS[:1], greedy)
    assert llm.score(TEXTS[0]) == llm.score(TEXTS[:1])
    assert torch.equal(llm.embed(TEXTS[0]), llm.embed(TEXTS[:1]))
    assert llm.embed([]).shape == (0, llm.embed(TEXTS[0]).shape[1]) and llm.score([]) == llm.generate([]) == []


def test_what_is_closed_cannot_be_asked(tiny: Any) -> None:
    llm = LLM(str(tiny))
    llm.close()
    for ask in (llm.generate, llm.embed, llm.score):
        with pytest.raises(ModelError, match="this LLM is closed"):
            ask(TEXTS)
    llm.close()
