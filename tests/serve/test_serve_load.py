"""Four times as many clients as there is room for: all that is asked is answered, once; what it took is given back."""

import asyncio
import json
import time

import pytest

from tests.serve.crowd import Told, asks, crowd
from tests.serve.real import forked, spawned
from tests.serve.test_leaks import comes_down

ROOM = 32
TENANTS = tuple(letter * 32 for letter in "abcd")
MIB = 1 << 20


def settings(folder, tmp_path):
    """Of a server of four tenants with little room, that records what it answers."""
    (tmp_path / "keys").write_text("\n".join(f"{key} {key[0]}" for key in TENANTS))
    said = {"folder": str(folder), "bounds": {"requests": ROOM, "share": 0.5}, "cache": 4 * MIB}
    return said | {"keys": str(tmp_path / "keys"), "journal": str(tmp_path / "requests.jsonl")}


async def one_client(server, told, number, pause):
    """Every third gives its request a name, and asks once more when it has its answer."""
    asked = asks(number, TENANTS)
    if number % 3:
        await told.until_done(server.url, number, asked, pause)
        return
    asked.headers["idempotency-key"] = f"key {number}"
    twice = (told.until_done(server.url, again, asked, pause) for again in (number, -1 - number))
    came, more = await asyncio.gather(*twice)
    assert (came.texts, came.ids) == (more.texts, more.ids), number


def loaded(server, numbers, pause):
    told = Told()
    asyncio.run(crowd((one_client(server, told, number, pause) for number in numbers), 4 * ROOM))
    return told


def all_are_answered_once(server, told, numbers, before, journal):
    assert {number for number in told.done if number >= 0} == set(numbers)
    for number, came in told.done.items():
        answers = asks(max(number, -1 - number)).answers
        assert came.status == 200 and came.whole and not came.error, (number, came)
        assert came.finishes == dict.fromkeys(range(answers), "length") and len(came.ids) == 1, (number, came)
    assert told.refused and all(came.wait >= 1 and came.error == "overloaded" for came in told.refused)
    finished = server.numbers(TENANTS[0])["llmkit_engine_finished_total"] - before["llmkit_engine_finished_total"]
    assert finished == sum(asks(number).answers for number in numbers)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines = [line for line in lines if line["finish_reason"] == "length"]
    assert len({line["request_id"] for line in lines}) == len(lines)
    return lines


def rests(server, seconds=20.0):
    """Waits until nothing is held any longer."""
    end = time.monotonic() + seconds
    while any((held := server.held(TENANTS[0])).values()):
        assert time.monotonic() < end, held
        time.sleep(0.02)


def test_a_crowd_is_answered_in_its_turn(llm, tiny, tmp_path):
    with forked(tmp_path / "log", settings(tiny, tmp_path)) as busy:
        numbers, before = range(150), busy.numbers(TENANTS[0])
        told = loaded(busy, numbers, 0.1)
        assert len(all_are_answered_once(busy, told, numbers, before, tmp_path / "requests.jsonl")) == len(numbers)
        rests(busy)
        assert busy.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_at_four_times_capacity_are_answered_once_and_leave_nothing(tiny, tmp_path):
    warm, numbers = range(500), range(1000, 11_000)
    with spawned(tmp_path / "log", settings(tiny, tmp_path)) as busy:
        loaded(busy, warm, 0.2)
        rests(busy)
        before, counted = busy.resident(), busy.numbers(TENANTS[0])
        files, tasks = busy.files(), busy.tasks()
        told = loaded(busy, numbers, None)
        lines = all_are_answered_once(busy, told, numbers, counted, tmp_path / "requests.jsonl")
        assert len(lines) == len(warm) + len(numbers)
        rests(busy)
        after = busy.resident()
        print(f"{len(told.refused)} refused; MiB before {[x / MIB for x in before]}, after {[x / MIB for x in after]}")
        assert all(now - then <= 10 * MIB for now, then in zip(after, before, strict=True)), (before, after)
        comes_down(busy.files, files)
        comes_down(busy.tasks, tasks)
        assert busy.stop() == 0
