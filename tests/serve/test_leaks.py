"""Clients that leave: while they wait, while their prompt is read, while they are answered; nothing of them is left."""

import asyncio
import random
import time
from dataclasses import replace

import pytest

from tests.serve.crowd import ask, asks, crowd
from tests.serve.real import forked, spawned

MIB = 1 << 20
LANES = 200
SOON = 0.15
"""Seconds within which those leave that do not wait for the first part."""


def settings(folder):
    """Little budget in a step, so that prompts are read in several; few places, so that many wait, and room for all of
    them: who left may ask for four answers, and be waited for when the next has come."""
    bounds = {"requests": 8 * LANES, "length": 512}
    return {"folder": str(folder), "bounds": bounds, "engine": {"tokens": 96, "sequences": 32}, "cache": 4 * MIB}


def leaving(number, streamed):
    """Half of the clients leave: at once, soon, after the head of an answer, or after some of its parts."""
    rng = random.Random(number)
    if number % 2:
        return lambda _: None
    parts = rng.choice((0, 0, 1, 3)) if streamed else 0
    wait = 0.0 if parts else rng.choice((0.001, SOON * rng.random()))  # the next part may hold all of the rest

    def leave(came):
        return wait if len(came.times) >= parts and (came.status or not parts) else None

    return leave


async def one_client(server, number, came):
    one = asks(number, longest=8)
    if number % 2 == 0:
        body = {"n": random.Random(number).choice((1, 1, 4)), "max_tokens": 100}
        one = replace(one, body={**one.body, **body})
    came[number] = await ask(server.url, one, leaving(number, one.body["stream"]))


def come_and_go(server, numbers):
    came = {}
    asyncio.run(crowd((one_client(server, number, came) for number in numbers), LANES))
    return came


def nothing_is_left(server, seconds=30.0):
    """Waits until it is so, and tells how long that was."""
    began = time.monotonic()
    while any((held := server.held()).values()):
        assert time.monotonic() < began + seconds, held
        time.sleep(0.01)
    return time.monotonic() - began


def comes_down(count, most, seconds=10.0):
    """What asked last may be in the midst of ending when it has its answer."""
    end = time.monotonic() + seconds
    while (left := count()) > most:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def the_others_were_answered(came):
    for number, one in came.items():
        if number % 2:
            assert one.status == 200 and one.whole and not one.left, (number, one)
            assert set(one.finishes.values()) == {"length"}
        else:
            assert one.left or one.whole, (number, one)
    left = [one for number, one in came.items() if one.left]
    assert any(one.times for one in left) and sum(not one.status for one in left) > len(left) // 4
    return len(left)


def check(server, warm, numbers, room=0):
    come_and_go(server, warm)
    nothing_is_left(server)
    tasks, files, before, aborted = server.tasks(), server.files(), server.resident(), aborts(server)
    left = the_others_were_answered(come_and_go(server, numbers))
    took = nothing_is_left(server)
    comes_down(server.tasks, tasks)
    comes_down(server.files, files)
    after, ended = server.resident(), aborts(server) - aborted
    print(f"{left} left, {ended:.0f} in the engine; free {took:.3f} s after the last; MiB {before} -> {after}")
    assert 0 < ended <= left
    assert not room or all(now - then <= room for now, then in zip(after, before, strict=True)), (before, after)


def aborts(server):
    return server.numbers()["llmkit_engine_aborted_total"]


def test_clients_that_leave_leave_nothing(llm, tiny, tmp_path):
    with forked(tmp_path / "log", settings(tiny)) as server:
        check(server, range(20), range(100, 180))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_twenty_thousand_connections_half_leave_and_leave_nothing(tiny, tmp_path):
    with spawned(tmp_path / "log", settings(tiny)) as server:
        check(server, range(1000), range(10_000, 30_000), 10 * MIB)
        assert server.stop() == 0
