"""What the engine said is taken all at once, no more often than it is of use; what there is no room for is not read."""

import asyncio
import gc
import weakref

import pytest

from llmkit.core.memory import settle
from llmkit.inference.request import Event, Request, Token
from llmkit.inference.sampling import Sampling
from llmkit.serve.box import GATHERED, Box
from llmkit.serve.caller import Caller
from llmkit.serve.gate import Gate
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal
from llmkit.serve.shed import Shed
from tests.serve.forked import Forked


def event(index, token, finish=None, request="1", **more):
    tokens = () if token is None else (Token(token, None, -0.5, {}),)
    return Event(request, index, tokens, finish, **more)


def box(patient=False, seen=lambda *_: None, n=1, **how):
    return Box([Request("0", (1,)), Request("1", (1,), Sampling(n=n, **how))], patient, seen)


def told(one):
    return [(index, [token.id for token in event.tokens], event.finish) for index, event in asyncio.run(one.take())]


def test_what_came_since_is_one_event_of_each_answer():
    heard = []
    one = box(seen=lambda *told: heard.append(told), n=2)
    for at in range(3):
        one.put(event(0, at, prompt=(None,) if not at else None, cached=4 * (not at)))
        one.put(event(1, 10 + at, drafted=4, accepted=at))
    one.put(event(0, 9, "stop", stopped="x", version=2))
    assert [index for index, _ in heard] == [1, 2, 1, 2, 1, 2, 1]  # each as it came: times are taken then
    first, second = (event for _, event in asyncio.run(one.take()))
    assert [token.id for token in first.tokens] == [0, 1, 2, 9] and (first.finish, first.stopped) == ("stop", "x")
    assert (first.prompt, first.cached, first.version) == ((None,), 4, 2)
    assert [token.id for token in second.tokens] == [10, 11, 12] and second.finish is None
    assert (first.drafted, first.accepted, second.drafted, second.accepted) == (0, 0, 12, 3)
    assert one.left == 2  # of three
    one.put(event(1, 13, "length"))
    one.put(event(0, 5, "length", request="0"))
    assert told(one) == [(2, [13], "length"), (0, [5], "length")] and not one.left


@pytest.mark.parametrize("finish", ["error", "deadline", "abort"])
def test_what_came_before_a_fault_is_told_before_it(finish):
    one = box()
    for said in (event(0, 1), event(0, 2), event(0, None, finish, why="why")):
        one.put(said)
    assert told(one) == [(1, [1, 2], None), (1, [], finish)]


def test_what_is_told_with_how_likely_it_was_is_told_token_by_token():
    one = box(logprobs=2)
    for at in range(3):
        one.put(event(0, at))
    assert told(one) == [(1, [at], None) for at in range(3)]


def test_whoever_wants_the_whole_is_woken_by_its_end_alone():
    one = box(patient=True, n=2)
    for at in range(GATHERED - 1):
        one.put(event(0, at))
    assert not one.there.is_set()
    one.put(event(1, 7, "stop"))
    assert one.there.is_set() and [index for index, _, _ in told(one)] == [1, 2]
    for at in range(GATHERED):
        one.put(event(0, at))
    assert one.there.is_set()  # so many are put together, which takes less memory


def test_a_refusal_comes_after_what_was_said_and_again():
    one = box()
    one.put(event(0, 3))
    one.refuse(Refusal(503, "gone"))
    assert told(one) == [(1, [3], None)]
    for _ in range(2):
        with pytest.raises(Refusal, match="gone"):
            told(one)


def asked_of(gate, method="POST", path="/v1/completions", headers=()):
    """(status, whether it went on to the routes); its body is never read."""
    sent, inner = [], []

    async def app(scope, receive, send):
        inner.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "caller": Caller("", "r", "1")}
    asyncio.run(Shed(app, gate, ["/v1/completions"])(scope, None, send))
    return (sent[0]["status"] if sent else 0), bool(inner)


def test_what_there_is_no_room_for_is_refused_before_its_body_is_read():
    gate, caller = Gate(Bounds(requests=1)), Caller("", "r", "1")
    assert asked_of(gate) == (0, True)
    with gate.place(caller, 1, 1):
        assert asked_of(gate) == (429, False)
        assert asked_of(gate, path="/health") == asked_of(gate, method="GET") == (0, True)
        assert asked_of(gate, headers=[(b"idempotency-key", b"a")]) == (0, True)  # it may have been answered
    assert asked_of(gate) == (0, True)


def test_what_was_there_before_is_collected_no_more_and_what_comes_is():
    class Ring:
        pass

    def work():
        held = [Ring() for _ in range(1000)]
        settle()
        assert gc.get_freeze_count() > 1000 and not gc.collect()
        ring = Ring()
        ring.own, gone = ring, weakref.ref(ring)
        del ring
        return gc.collect() < 1 or gone() is not None or len(held) != 1000

    assert Forked(work).wait() == 0
