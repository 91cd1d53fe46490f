"""The server with its two processes: an engine that dies, a signal to stop, few file descriptors."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.raw import answer, connect, head
from tests.serve.real import forked, interpreter

LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 480, "ignore_eos": True}


@pytest.fixture
def served(llm, tiny, tmp_path):
    """`llm`: what the processes need is imported before they are forked."""
    with contextlib.ExitStack() as stack:
        yield lambda files=0: stack.enter_context(forked(tmp_path / "log", {"folder": str(tiny)}, files))


def events(url, asked, told, begun):
    with httpx.Client(timeout=60) as client, client.stream("POST", url + "/v1/chat/completions", json=asked) as said:
        for line in said.iter_lines():
            if line.startswith("data: "):
                told.append(line[6:])
                begun.set()


def test_a_dead_engine_is_told_to_each_client_and_started_again(served):
    server = served()
    told, waiting = [[] for _ in range(8)], []
    for one in told:
        begun = threading.Event()
        asked = (server.url, LONG | {"stream": True}, one, begun)
        waiting.append((threading.Thread(target=events, args=asked), begun))
        waiting[-1][0].start()
    for _, begun in waiting:
        assert begun.wait(30)
    dead = server.engine
    os.kill(dead, signal.SIGKILL)
    for thread, _ in waiting:
        thread.join(10)
        assert not thread.is_alive()
    for one in told:
        assert json.loads(one[-1])["error"]["code"] == "engine_died" and "[DONE]" not in one
        assert all("error" not in json.loads(line) for line in one[:-1])
    assert httpx.get(server.url + "/health").status_code == 503
    refused = httpx.post(server.url + "/v1/chat/completions", json=LONG)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    server.said("ready", 2)
    assert httpx.get(server.url + "/health").status_code == 200 and server.engine != dead
    good = httpx.post(server.url + "/v1/chat/completions", json=LONG | {"max_tokens": 3}, timeout=30)
    assert good.json()["usage"]["completion_tokens"] == 3


def test_what_was_accepted_is_finished_after_a_signal_and_nothing_new_is_taken(served):
    server = served()
    told, begun = [], threading.Event()
    thread = threading.Thread(target=events, args=(server.url, LONG | {"stream": True}, told, begun))
    thread.start()
    assert begun.wait(30)
    child = server.engine
    os.kill(server.process.pid, signal.SIGTERM)
    server.said("draining")
    with contextlib.suppress(httpx.TransportError):  # unless it was over before this came
        assert httpx.post(server.url + "/v1/chat/completions", json=LONG).status_code == 503
        assert httpx.get(server.url + "/health").status_code == 503
    thread.join(60)
    assert told[-1] == "[DONE]" and json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait() == 0
    end = time.monotonic() + 10
    while (stat := Path(f"/proc/{child}/stat")).exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_signal_tells_who_waits_that_the_server_stops_and_is_no_fault(served):
    server = served()
    told, begun = [], threading.Event()
    thread = threading.Thread(target=events, args=(server.url, LONG | {"stream": True, "n": 8}, told, begun))
    with connect(server) as slow:
        slow.sendall(head(Content_Length=100) + b"{")  # one that is not done with asking
        thread.start()
        assert begun.wait(30)
        child = server.engine
        os.kill(child, signal.SIGSTOP)  # so that the answer is not over before
        os.kill(server.process.pid, signal.SIGINT)
        server.said("draining")
        os.kill(server.process.pid, signal.SIGINT)
        thread.join(30)
        assert server.process.wait() == 0
    assert json.loads(told[-1])["error"]["code"] == "unavailable" and "[DONE]" not in told
    assert '"level": "error"' not in server.log.read_text(), server.log.read_text()


def test_with_few_file_descriptors_some_are_told_to_come_back_and_then_all_are_served(served):
    server = served(files=64)
    with contextlib.ExitStack() as stack:
        owns = [stack.enter_context(connect(server)) for _ in range(80)]
        told = []
        for own in owns[-20:]:
            own.settimeout(5)
            with contextlib.suppress(OSError):
                told.append(answer(own)[0])
        assert 503 in told
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), connect(server) as own:
            own.sendall(head("/health", "GET"))
            if answer(own)[0] == 200:
                break
        assert time.monotonic() < end
        time.sleep(0.05)
    assert httpx.post(server.url + "/v1/chat/completions", json=LONG | {"max_tokens": 3}).status_code == 200


@pytest.mark.slow
def test_the_command_serves_and_stops(tiny, tmp_path):
    words = ["llmkit", "serve", str(tiny), "--port", "0", "--name", "tiny"]
    with interpreter(tmp_path / "log", *words, seconds=200) as server:
        assert httpx.post(server.url + "/v1/chat/completions", json=LONG | {"max_tokens": 3}).status_code == 200
        assert server.stop(30) == 0
