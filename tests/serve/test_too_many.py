"""Connections beyond the bound hear so, whatever they are about to send; what is written together goes out together."""

import asyncio
import contextlib
import threading

import pytest

from llmkit.serve.gathered import MOST, Gathered
from llmkit.serve.node import Bounds
from llmkit.serve.protocol import RESERVE, most_connections, most_turned_away
from llmkit.serve.run import AT_ONCE
from tests.serve.conftest import Running
from tests.serve.crowd import ask, asks, crowd
from tests.serve.raw import answer, connect, head, post
from tests.serve.test_serve_rows import until

ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
FEW = 4


@pytest.fixture(scope="module")
def narrow(llm):
    running = Running(llm, bounds=Bounds(connections=FEW))
    yield running
    running.stop()


def heard(own):
    """What one hears that was turned away: its status, and whether the connection then ends."""
    status, said = answer(own)
    assert b'"code": "overloaded"' in said and own.recv(100) == b""
    return status


@contextlib.contextmanager
def full(server):
    with contextlib.ExitStack() as held:
        for _ in range(FEW):
            own = held.enter_context(connect(server))
            own.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert answer(own)[0] == 200  # and stays
        yield


def test_one_too_many_hears_it_whatever_it_sends(narrow):
    body = b"x" * (1 << 20)
    with full(narrow):
        for _ in range(3 * FEW):  # each makes room for the next
            with connect(narrow) as own:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    own.sendall(head(Content_Length=len(body)) + body[: 1 << 16])
                assert heard(own) == 503
        with contextlib.ExitStack() as held:
            silent = [held.enter_context(connect(narrow)) for _ in range(FEW + 2)]  # more than may stay to hear it
            assert [heard(own) for own in silent] == [503] * len(silent)
    assert post(narrow, ASKED)[0] == 200


def test_who_is_about_to_leave_takes_nobody_s_place(narrow, monkeypatch):
    monkeypatch.setattr("llmkit.serve.protocol.LINGER", 600.0)
    with contextlib.ExitStack() as held:
        with full(narrow):
            silent = [held.enter_context(connect(narrow)) for _ in range(FEW)]
            assert [heard(own) for own in silent] == [503] * FEW
        until(lambda: post(narrow, ASKED)[0] == 200)  # they are there still


def test_more_wait_in_the_system_than_are_taken_in_a_turn(narrow):
    turn, held = threading.Event(), threading.Event()

    def stand():
        held.set()
        turn.wait(10)

    narrow.loop.call_soon_threadsafe(stand)
    assert held.wait(10)
    with contextlib.ExitStack() as opened:
        try:
            waiting = [opened.enter_context(connect(narrow, 5.0)) for _ in range(3 * AT_ONCE)]
        finally:
            turn.set()
        assert [heard(one) for one in waiting[FEW:]] == [503] * (len(waiting) - FEW)


def test_as_many_may_stay_as_there_are_descriptors_for(monkeypatch):
    for soft, most, more in ((20_000, 1024, 1024), (1100, 1024, 1100 - RESERVE - 1024), (64, 32, 0)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_connections(Bounds()) == most and most_turned_away(most) == more


def test_of_a_storm_all_are_answered_whole_or_told_when_to_come_back(llm):
    """All at once, where there is room for eight answers and sixteen connections."""
    running, count = Running(llm, bounds=Bounds(connections=16, requests=8)), 120
    try:
        came = []

        async def one(number):
            came.append(await ask(running.url, asks(number)))

        asyncio.run(crowd(map(one, range(count)), count))
    finally:
        running.stop()
    whole = [one for one in came if one.status == 200 and one.whole and set(one.finishes.values()) == {"length"}]
    refused = {status: [one for one in came if one.status == status and one.wait >= 1] for status in (429, 503)}
    assert len(came) == count == len(whole) + sum(map(len, refused.values()))
    assert whole and refused[503] and not running.service.gate.answers and not running.engine.waiting


class Wire:
    """A transport that notes what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *given: self.told.append((name, *given))


def test_what_is_written_in_one_turn_is_sent_once():
    async def work():
        wire = Wire()
        own = Gathered(wire, asyncio.get_running_loop())
        own.write(b"a")
        own.write(b"b")
        assert not wire.told
        await asyncio.sleep(0)
        own.write(b"c")
        own.close()
        own.write(b"d")
        own.write_eof()
        own.write(b"e" * MOST)  # more is not held
        own.write(b"f")
        own.abort()
        await asyncio.sleep(0)
        return wire.told

    sent = [("write", b"ab"), ("write", b"c"), ("close",), ("write", b"d"), ("write_eof",), ("write", b"e" * MOST)]
    assert asyncio.run(work()) == [*sent, ("abort",)]
