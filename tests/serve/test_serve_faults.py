"""What fails in the middle of an answer is told by a last event, and then it ends; what was tried may be tried again.
And readers that do not read."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from llmkit.inference import sampler
from llmkit.inference.engine import Engine
from llmkit.inference.text import Texts
from llmkit.serve import logs
from llmkit.serve.embedding import Text
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal
from llmkit.serve.remote import Remote
from tests.serve.conftest import Running
from tests.serve.crowd import Ask, Told, ask, crowd
from tests.serve.raw import answer, connect, head
from tests.serve.real import forked
from tests.serve.test_serve_rows import until

LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}


def streamed(server, asked, **headers):
    """The data of all events of a stream, and whether it came to an end by the rules of HTTP."""
    told = []
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
        try:
            with client.stream("POST", "/v1/completions", json=asked) as said:
                assert said.status_code == 200
                for line in said.iter_lines():
                    told += [line[6:]] if line else []
        except httpx.RemoteProtocolError:
            return told, False
    return told, True


def check_broken(told, code):
    *before, last = map(json.loads, told)
    assert last["error"]["code"] == code and set(last) == {"error"}
    assert before and all(not choice["finish_reason"] for event in before for choice in event["choices"])


def refusals(server, code):
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'llmkit_rejected_total{{code="{code}"}}'))


def test_an_answer_that_cannot_go_on_ends_in_an_error(server):
    (letter,) = httpx.post(server.url + "/tokenize", json={"prompt": "a"}).json()["tokens"]
    never = {"allowed_token_ids": [letter], "bad_words": ["aaaa"]}  # a, a, a, and then nothing is left
    before = refusals(server, "generation_failed")
    told, whole = streamed(server, LONG | never)
    check_broken(told, "generation_failed")
    text = "".join(json.loads(event)["choices"][0]["text"] for event in told[:-1])
    assert whole and text == "aaa" and refusals(server, "generation_failed") == before + 1


def test_a_deadline_in_the_middle_is_told(server):
    told, whole = streamed(server, LONG | {"deadline": 0.05, "n": 8})
    check_broken(told, "deadline_exceeded")
    assert whole


class Breaking(Texts):
    """Meets a fault of its own at the fortieth token."""

    def stream(self, sampling):
        made = super().stream(sampling)
        own, seen = made.add, []

        def add(*given, **named):
            seen.append(given)
            return own(*given, **named) if len(seen) < 40 else 1 / 0

        made.add = add
        return made


@pytest.fixture
def small(llm):
    running = Running(llm, bounds=Bounds(stall=0.5, requests=16))
    yield running
    running.stop()


def test_a_fault_of_the_server_is_told_and_asked_again_with_its_key_it_is_carried_out_again(small, llm):
    good = Texts(llm.tokenizer)
    for number, key in enumerate(({}, {"idempotency-key": "one"}), 1):  # the second time it is asked again
        small.service.__dict__["texts"] = Breaking(llm.tokenizer)
        told, whole = streamed(small, LONG, **key)
        check_broken(told, "internal_error")
        assert not whole and "ZeroDivision" not in told[-1] and refusals(small, "internal_error") == number
        small.service.__dict__["texts"] = good
        assert streamed(small, LONG | {"max_tokens": 5}, **(key and {"idempotency-key": "two"}))[0][-1] == "[DONE]"
    assert streamed(small, LONG, **key)[0][-1] == "[DONE]"
    assert not small.service.gate.answers and not small.engine.waiting


@contextlib.contextmanager
def logged(path):
    """What the log says inside, by then a list of its lines."""
    said = []
    with path.open("w") as stream:
        handler = logs.begin(stream)
        try:
            yield said
        finally:
            for name in ("llmkit.serve", "uvicorn", "asyncio"):
                logging.getLogger(name).removeHandler(handler)
    said += map(json.loads, path.read_text().splitlines())


@pytest.mark.parametrize(
    ("where", "name"), [(Engine, "_begun"), (Engine, "long"), (sampler, "_opened"), (Text, "advance")]
)
def test_a_fault_of_the_engine_is_told_by_a_name_under_which_the_log_has_all_of_it(
    small, monkeypatch, tmp_path, where, name
):
    def fails(*_):
        raise TypeError("no place of this machine")

    path, asked = ("embeddings", {"input": "hello"}) if where is Text else ("completions", LONG)
    url, headers = f"{small.url}/v1/{path}", {"x-request-id": "mine-1"}
    with logged(tmp_path / "log") as said, monkeypatch.context() as patched:
        patched.setattr(where, name, fails)
        answer = httpx.post(url, json=asked, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 500 and (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "mine-1" in error["message"] and "place" not in answer.text and "TypeError" not in answer.text
    (fault,) = [line for line in said if "trace" in line]
    assert fault["request_id"] == "mine-1" and fault["trace"][-1] == "TypeError: no place of this machine"
    assert any(line.strip().startswith("File ") and "in fails" in line for line in fault["trace"])
    assert refusals(small, "internal_error") == 1
    assert httpx.post(url, json=asked, timeout=60).status_code == 200  # the engine goes on
    assert not small.engine.restarts
    until(lambda: not small.service.gate.answers and not small.engine.waiting)


def test_what_nobody_waits_for_any_longer_is_not_prepared(small, monkeypatch):
    begun, go, asked = [], threading.Event(), LONG | {"max_tokens": 2}
    data = json.dumps(asked).encode()

    def prepare(*_):
        begun.append(1)
        assert go.wait(30)

    monkeypatch.setattr(Engine, "long", lambda *_: True)
    monkeypatch.setattr(Engine, "prepare", prepare)
    with contextlib.ExitStack() as held:
        for _ in range(4):
            own = held.enter_context(connect(small))
            own.sendall(head("/v1/completions", Content_Length=len(data)) + data)
        until(lambda: len(begun) == 2 and len(small.engine.waiting) == 4)
    until(lambda: not small.engine.waiting)
    small.call("reset")  # comes after they were given up
    go.set()
    assert httpx.post(small.url + "/v1/completions", json=asked, timeout=60).status_code == 200
    assert len(begun) == 3


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reads_nothing(server, asked):
    """A connection with little room on its side, over which more comes than it takes."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    data = json.dumps(asked).encode()
    own.sendall(head("/v1/completions", Content_Length=len(data)) + data)
    return own


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_reads_nothing_is_let_go_and_holds_up_nobody(small, stream):
    large = LONG | {"n": 16, "logprobs": 20, "stream": stream, "max_tokens": 90 if stream else 200}
    before = rss()
    with reads_nothing(small, large) as own:
        while not small.service.gate.answers:
            time.sleep(0.001)
        end = time.monotonic() + 60
        while small.door.inside:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert rss() - before < 64 << 20
        assert not small.service.gate.answers and not small.engine.waiting
        if not stream:  # the server's work is done, and what it made waits to be taken
            time.sleep(3 * small.service.bounds.stall)
        with pytest.raises(ConnectionResetError):
            while own.recv(1 << 20):
                pass
    assert streamed(small, LONG | {"max_tokens": 5})[0][-1] == "[DONE]"
    while small.engine.stats["used"]:
        assert time.monotonic() < end


def all_hear_of_it(server, count):
    """Kills the engine while so many are answered or wait; gives seconds to the last one's error."""
    told, began = Told(), threading.Event()

    async def one(number):
        came = await ask(server.url, Ask("/v1/completions", LONG, 1), lambda came: began.set() if came.times else None)
        told.done[number] = came
        ends.append(time.monotonic())

    async def all_of_them():
        waiting = asyncio.ensure_future(crowd(map(one, range(count)), count))
        while not (began.is_set() and server_inside(server) >= count):
            await asyncio.sleep(0.01)
        dead = server.engine
        os.kill(dead, signal.SIGKILL)
        killed = time.monotonic()
        await waiting
        return dead, killed

    ends = []
    dead, killed = asyncio.run(all_of_them())
    assert len(told.done) == count
    for came in told.done.values():
        assert came.error == "engine_died" and not came.whole and not came.finishes
        assert came.status == (200 if came.times else 503)
    assert sum(came.status == 200 for came in told.done.values()) >= min(count, 64) // 2
    assert httpx.get(server.url + "/health").status_code == 503
    server.said("ready", 2)
    assert server.engine != dead and httpx.get(server.url + "/health").status_code == 200
    assert asyncio.run(ask(server.url, Ask("/v1/completions", LONG | {"max_tokens": 3}, 1))).whole
    return max(ends) - killed


def server_inside(server):
    return server.numbers()["llmkit_accepted"]


@pytest.mark.slow
def test_each_of_two_hundred_hears_that_the_engine_died(llm, tiny, tmp_path):
    with forked(tmp_path / "log", {"folder": str(tiny)}) as server:
        print(f"{all_hear_of_it(server, 200):.3f} s to the last one's error")


@pytest.mark.slow
def test_descriptors_run_out_under_load_and_all_are_answered_in_the_end(llm, tiny, tmp_path):
    """The limit is 64; clients are refused, or wait to be let in, and come again."""
    told, short = Told(), Ask("/v1/completions", LONG | {"max_tokens": 3}, 1)

    async def one(number):
        while number not in told.done:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                came = await ask(server.url, short)
                if came.status == 503:
                    told.refused.append(came)
                    await asyncio.sleep(0.05)
                elif came.status:
                    told.done[number] = came

    with forked(tmp_path / "log", {"folder": str(tiny)}, 64) as server:
        idle = [connect(server) for _ in range(20)]  # each holds a descriptor
        asyncio.run(crowd(map(one, range(100)), 20))
        for own in idle:
            own.close()
        assert all(came.whole for came in told.done.values()) and len(told.done) == 100
        assert told.refused and all(came.error == "overloaded" and came.wait for came in told.refused)
        with connect(server) as own:
            own.sendall(head("/health", "GET"))
            assert answer(own)[0] == 200
        assert server.files() < 32


def test_texts_whose_client_left_are_not_embedded(llm):
    server, go, begun, done = Running(llm), threading.Event(), threading.Event(), []
    between = server.engine.process.served.between
    own = between["embed"]

    def slow(asked, future):
        done.append(asked)
        begun.set()
        assert go.wait(30)
        return own(asked, future)

    between["embed"] = slow
    try:
        body = json.dumps({"input": [[5, at] for at in range(8)]}).encode()
        with connect(server) as client:
            client.sendall(head("/v1/embeddings", Content_Length=len(body)) + body)
            assert begun.wait(30)
        until(lambda: not server.engine.calls and not server.service.gate.answers)
        go.set()
        server.call("reset")  # comes after all that was asked before
        assert len(done) == 1
        assert httpx.post(server.url + "/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
        assert len(done) == 3  # the control
    finally:
        server.stop()


def test_what_no_engine_could_be_told_is_waited_for_by_nobody():
    engine = Remote({})

    async def ask_it():
        with pytest.raises(Refusal):
            await engine.call("embed")

    asyncio.run(ask_it())
    assert not engine.calls


def test_a_text_that_a_device_has_no_memory_for_fails_alone(server, monkeypatch):
    forward = server.within.runner.forward

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(forward, "hidden", full)
        said = httpx.post(server.url + "/v1/embeddings", json={"input": "a"}, timeout=30)
    assert (said.status_code, said.json()["error"]["param"]) == (400, "input") and "CUDA" not in said.text
    assert httpx.post(server.url + "/v1/embeddings", json={"input": "a"}, timeout=30).status_code == 200
    assert not server.engine.restarts
