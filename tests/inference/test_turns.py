"""The engine between steps: faults of one request, aborts, deadlines, other weights, and what it counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from threading import Event as Event_
from typing import Any

import pytest
from torch import Tensor

from llmkit.core.errors import ModelError
from llmkit.inference import beam
from llmkit.inference import engine as engine_
from llmkit.inference.engine import Engine
from llmkit.inference.grammar import Regex
from llmkit.inference.pump import Pump
from llmkit.inference.request import Ask, Event, InternalError, Prompt, Request, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.inference.turns import Turns
from llmkit.models.attend import install
from llmkit.models.families import tiny
from tests.inference.test_engine import answers, made

PROMPT = tuple(range(5, 18))


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny("Llama").eval()
    install(model, "auto")
    return model


def all_of(engine: Engine) -> list[Event]:
    events = []
    while not engine.idle:
        events += engine.step()
    return events


def asked(engine: Engine, *requests: Request) -> Engine:
    for one in requests:
        engine.add(one)
    return engine


def free(engine: Engine) -> bool:
    told = engine.stats()
    return (told.used, told.queued, told.running, engine.scheduler.slots) == (0, 0, 0, 0)


class Failing:
    """A function that fails at some of its calls, counted from 1."""

    def __init__(self, whole: Callable[..., Any], *failing: int) -> None:
        self.whole, self.failing, self.calls = whole, failing, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self.calls in self.failing:
            raise RuntimeError("out of memory")
        return self.whole(*given)


def test_a_fault_ends_its_request_alone_and_all_of_its_answers(model: Any) -> None:
    def fails(prompt: Any, made: Any, logits: Tensor) -> Tensor:
        if len(made) == 2:
            raise ZeroDivisionError("oh")
        return logits

    def spoils(prompt: Any, made: Any, logits: Tensor) -> Tensor:
        return logits * float("nan")

    engine, alone = made(model), answers(made(model), [Request("c", PROMPT, Sampling(max_tokens=6))])
    engine.add(Request("a", PROMPT, Sampling(max_tokens=6, n=3, temperature=1.0), processors=(fails,)))
    engine.add(Request("b", PROMPT, Sampling(max_tokens=6), processors=(spoils,)))
    engine.add(Request("c", PROMPT, Sampling(max_tokens=6)))
    engine.add(Request("d", PROMPT, Sampling(max_tokens=6, beams=3), processors=(spoils,)))
    events = all_of(engine)
    ends = sorted((event.request, event.index, event.finish) for event in events if event.finish)
    assert ends == [
        *(("a", index, "error") for index in range(3)),
        ("b", 0, "error"),
        ("c", 0, "length"),
        ("d", 0, "error"),
    ]
    assert "oh" in next(event.why for event in events if event.request == "a" and event.finish)
    assert [token.id for event in events if event.request == "c" for token in event.tokens] == alone["c"][0]
    assert free(engine) and engine.stats().failed == 3


@pytest.mark.parametrize("how", [{}, {"n": 3, "temperature": 1.0}, {"beams": 3}])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])  # queued, in its prompt, with its first token, further on
def test_an_abort_frees_all_at_once_and_no_event_comes_of_it(model: Any, how: dict[str, Any], steps: int) -> None:
    engine = made(model, tokens=8)
    engine.add(Request("a", PROMPT, Sampling(max_tokens=9, **how)))
    for _ in range(steps):
        engine.step()
    assert free(engine) == (steps == 0) or engine.stats().queued
    engine.abort("a")
    assert free(engine) and engine.idle and engine.step() == []
    engine.abort("a")  # it is not there any longer
    assert engine.stats().aborted == 1


def test_a_deadline_ends_all_answers_once(model: Any) -> None:
    engine = made(model, sequences=3)
    late = time.monotonic() + 1e6
    engine.add(Request("a", PROMPT, Sampling(max_tokens=9, n=3), deadline=late))
    engine.add(Request("b", PROMPT, Sampling(max_tokens=9, n=2), deadline=time.monotonic()))
    first = engine.step()
    assert [(e.request, e.index, e.finish) for e in first if e.finish] == [("b", 0, "deadline"), ("b", 1, "deadline")]
    for one in list(engine.live["a"].sequences):  # its time has come
        engine.scheduler.deadlines.push((0.0,), one)
    ends = [(event.request, event.index, event.finish) for event in all_of(engine)]
    assert ends == [("a", index, "deadline") for index in range(3)]
    assert free(engine) and (engine.stats().dropped, engine.stats().late) == (1, 5)


def test_weights_change_when_what_runs_has_ended_and_its_prefixes_are_forgotten(model: Any) -> None:
    engine, asked = made(model), Sampling(max_tokens=6)
    old = answers(made(model), [Request("a", PROMPT, asked)])["a"][0]
    bias = model.get_input_embeddings().weight
    before = bias.detach().clone()

    def work() -> None:
        bias.data.copy_(before.roll(1, 0))

    engine.add(Request("a", PROMPT, asked))
    engine.step()
    update = engine.update(work)
    engine.add(Request("b", PROMPT, asked))
    events = []
    while not update.done:
        events += engine.step()
        assert update.done or {one.request.id for one in engine.scheduler.running} <= {"a"}
    events += all_of(engine)
    try:
        new = answers(made(model), [Request("b", PROMPT, asked)])["b"][0]
    finally:
        bias.data.copy_(before)
    said = {id: [t.id for e in events if e.request == id for t in e.tokens] for id in "ab"}
    assert old[1:] == said["a"] and said["b"] == new != old
    assert {(e.request, e.version, e.cached) for e in events} == {("a", 0, 0), ("b", 1, 0)}


def test_without_draining_what_runs_goes_on_under_the_new_weights(model: Any) -> None:
    engine = made(model)
    engine.add(Request("a", PROMPT, Sampling(max_tokens=6)))
    first = engine.step()
    assert engine.update(lambda: None, drain=False).done
    events = all_of(engine)
    own = answers(made(model), [Request("a", PROMPT, Sampling(max_tokens=6))])["a"][0]
    assert [t.id for e in (*first, *events) for t in e.tokens] == own
    assert {e.version for e in events} == {1} and engine.stats().preempted == 1


def test_an_update_that_fails_leaves_the_old_weights_and_prefixes(model: Any) -> None:
    def fails() -> None:
        raise ModelError("has other shapes")

    engine = made(model)
    said = answers(engine, [Request("a", PROMPT, Sampling(max_tokens=6))])
    update = engine.update(fails)
    assert update.done and "other shapes" in str(update.failed) and engine.version == 0
    engine.add(Request("a", PROMPT, Sampling(max_tokens=6)))
    events = all_of(engine)
    assert events[0].cached == 12 and [t.id for e in events for t in e.tokens] == said["a"][0]


def test_a_step_that_fails_is_computed_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(model)
    monkeypatch.setattr(engine.runner, "run", Failing(engine.runner.run, 1, 3))
    request, said = Request("a", PROMPT, Sampling(max_tokens=6, n=2)), []
    engine.add(request)
    while not engine.idle:
        try:
            said += engine.step()
        except RuntimeError:
            assert engine.stats().running == 0
    own = answers(made(model), [request])["a"]
    assert [[t.id for e in said if e.index == index for t in e.tokens] for index in (0, 1)] == own and free(engine)


@pytest.mark.parametrize("how", [{}, {"n": 2, "temperature": 1.0}, {"beams": 2}])
def test_what_fails_after_the_model_is_computed_again_and_nothing_that_was_told_is_lost(
    model: Any, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any
    module, name = (beam, "normaliser") if "beams" in how else (engine_, "choose")
    failing = Failing(getattr(module, name), 1, 4)
    request, said = Request("a", PROMPT, Sampling(max_tokens=6, **how)), []
    own = all_of(asked(made(model), request))
    engine = asked(made(model), request, Request("b", PROMPT, Sampling(), deadline=time.monotonic()))
    monkeypatch.setattr(module, name, failing)
    for _ in range(40):  # and no more: what is forgotten would never end
        with suppress(RuntimeError):
            said += engine.step()
    texts = [[(e.index, t.id) for e in events if e.request == "a" for t in e.tokens] for events in (said, own)]
    assert sorted(texts[0]) == sorted(texts[1]) and failing.calls > 4 and free(engine) and engine.idle
    assert [e.finish for e in said if e.request == "b"] == ["deadline"]


def test_who_asks_hears_what_was_made_while_another_changes_the_weights(model: Any) -> None:
    turns, ask = Turns(made(model)), Ask(Prompt(PROMPT), Sampling(max_tokens=6))
    waits, own = turns.add(ask).id, answers(made(model), [Request("a", PROMPT, ask.sampling)])["a"][0]
    said = [turns.next(waits)]
    update = turns.update(lambda: None)
    assert update.done and update.failed is None and turns.engine.version == 1 and turns.engine.idle
    while said[-1].finish is None:
        said.append(turns.boxes[waits].popleft())  # they wait there
    assert [t.id for e in said for t in e.tokens] == own and {e.version for e in said} == {0}
    assert turns.update(lambda: None).done and turns.engine.version == 2  # nothing has begun: at once


def test_what_nobody_foresaw_in_taking_one_on_is_its_own_fault(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = asked(made(model), Request("a", PROMPT, Sampling(max_tokens=3)))
    words: Any = ("no", "numbers")
    with pytest.raises(InternalError, match=r"it cannot be taken on \(TypeError: .*; fix: report it"):
        engine.add(Request("b", words, Sampling(max_tokens=3)))
    monkeypatch.setattr(engine_, "Live", Failing(engine_.Live, 1))
    with pytest.raises(InternalError, match="it cannot be taken on .RuntimeError: out of memory"):
        engine.add(Request("b", PROMPT, Sampling(max_tokens=3)))
    assert engine.adapters.whole.holders == 1 and list(engine.live) == ["a"]
    engine.add(Request("b", PROMPT, Sampling(max_tokens=3)))
    ends = sorted((event.request, event.finish) for event in all_of(engine) if event.finish)
    assert ends == [("a", "length"), ("b", "length")] and engine.adapters.whole.holders == 0 and free(engine)


class Slow:
    """Grammars of which each takes until it is told to go on."""

    def __init__(self) -> None:
        self.asked, self.go_on, self.waited = Event_(), Event_(), True

    def matcher(self, grammar: Any) -> Any:
        self.asked.set()
        self.waited = self.go_on.wait(20)
        raise RequestError("cannot be enforced")


def test_others_are_answered_while_a_grammar_is_compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, slow = Turns(made(model)), Slow()
    monkeypatch.setattr(turns.engine.texts, "grammars", slow)
    pump = Pump(turns)

    async def heard(ask: Ask) -> list[str | None]:
        ends = []
        async with aclosing(pump.events(ask)) as events:
            while not any(ends):
                ends.append((await anext(events)).finish)
        return ends

    async def both() -> Any:
        held = asyncio.ensure_future(heard(hard))
        await asyncio.to_thread(slow.asked.wait, 20)
        plain = await heard(Ask(Prompt(PROMPT), Sampling(max_tokens=3)))
        slow.go_on.set()
        return plain, await asyncio.gather(held, return_exceptions=True)

    hard = Ask(Prompt(PROMPT), Sampling(max_tokens=3, grammar=Regex(pattern="a")))
    with ThreadPoolExecutor(1) as beside:
        waits = beside.submit(turns.add, hard)
        assert slow.asked.wait(20)
        own = turns.add(Ask(Prompt(PROMPT), Sampling(max_tokens=2)))
        assert [turns.next(own.id).finish for _ in range(2)] == [None, "length"]
        slow.go_on.set()
        assert "cannot be enforced" in str(waits.exception()) and slow.waited
    slow.asked.clear()
    slow.go_on.clear()
    plain, (refused,) = asyncio.run(both())
    assert plain == [None, None, "length"] and isinstance(refused, RequestError) and slow.waited and turns.engine.idle
    pump.close()


def test_what_it_counts_is_what_it_did(model: Any) -> None:
    engine = made(model)
    for id in "ab":
        engine.add(Request(id, PROMPT, Sampling(max_tokens=4, n=2)))
        all_of(engine)
    told = engine.stats()
    assert (told.requests, told.finished, told.made, told.read, told.looked, told.hits) == (2, 4, 16, 13 + 1, 26, 12)
    assert told.steps == 8 and told.seconds > 0 and free(engine)
