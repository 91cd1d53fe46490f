"""Bodies, heads and connections of the worst kind: an error in OpenAI's shape at the bound, and the server goes on."""

import contextlib
import gzip
import json
import resource
import socket
import time
from pathlib import Path

import pytest

from llmkit.serve import protocol
from tests.serve.raw import answer, connect, head, post

ASKED = b'{"messages":[{"role":"user","content":"hello"}],"max_tokens":2,"temperature":0'
BROKEN = {
    "cut": ASKED,
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "text": b'"a"',
    "twice": ASKED + b',"max_tokens":2}',
    "twice after many": ASKED + b"".join(b',"%x":0' % at for at in range(200_000)) + b',"z":0,"z":0}',
    "nan": ASKED + b',"top_p":NaN}',
    "infinity": ASKED + b',"top_p":-Infinity}',
    "huge number": ASKED + b',"top_p":1e999}',
    "long number": ASKED + b',"seed":' + b"9" * 5000 + b"}",
    "deep": ASKED + b',"user":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and sound": ASKED + b',"user":' + b"[" * 100 + b"]" * 100 + b"}",
    "nul": ASKED.replace(b"hello", b"he\\u0000llo") + b"}",
    "nul in a name": ASKED + b',"a\\u0000":1}',
    "surrogate": ASKED.replace(b"hello", b"\\ud800") + b"}",
    "latin": ASKED.replace(b"hello", b"\xe4") + b"}",
    "unknown": ASKED + b',"temprature":1}',
    "two objects": ASKED + b"}{}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_no_sound_json_is_refused(server, name):
    status, said = post(server, BROKEN[name])
    assert status == 400 and set(said["error"]) == {"message", "type", "param", "code"}
    assert post(server, ASKED + b"}")[0] == 200


ROUTES = ("/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize")


@pytest.mark.parametrize("path", ROUTES)
def test_h1_bodies_are_read_so_on_every_route(server, path):
    for name, body in BROKEN.items():
        status, said = post(server, body, path=path)
        wanted = "unknown_parameter" if name == "unknown" else "invalid_json"
        assert status == 400 and (name == "unknown" or said["error"]["code"] == wanted), (name, said)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
        ("/v1/responses", {"input": "a", "tool_choice": {"x": 1}}, "tool_choice"),
        ("/v1/completions", {"prompt": "a", "suffix": {}}, "suffix"),
        ("/v1/completions", {"prompt": "a", "suffix": False}, "suffix"),
        ("/tokenize", {"prompt": "a", "tools": "a"}, "tools"),
    ],
)
def test_what_a_route_would_not_use_is_refused_and_not_passed_over(server, path, body, param):
    status, said = post(server, body, path=path)
    assert status == 400 and said["error"]["param"] == param, said


def test_a_text_whose_states_are_zeros_has_an_embedding_of_numbers(server):
    """Token 0 of this model pads: its row is zeros, and so is the length by which it would be divided."""
    status, said = post(server, {"input": [[0], [5]]}, path="/v1/embeddings")
    zeros, other = (one["embedding"] for one in said["data"])
    assert status == 200 and set(zeros) == {0.0}
    assert abs(sum(x * x for x in other) - 1) < 1e-5


FIELDS = {
    "model": 3,
    "messages": [{"role": "user"}],
    "messages.0.role": [{"role": "wizard", "content": "a"}],
    "messages.0.content.0.type": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "messages.0.name": [{"role": "user", "content": "a", "name": 3}],
    "temperature": 3,
    "top_p": -0.1,
    "top_k": 1.5,
    "n": 17,
    "max_tokens": 0,
    "max_completion_tokens": 1 << 20,
    "stop": ["", "a"],
    "logit_bias.a": {"a": 1},
    "logit_bias.5": {"5": "much"},
    "stop_token_ids": [1 << 40],
    "seed": "one",
    "top_logprobs": 3,
    "stream_options": {"include_usage": True},
    "presence_penalty": 9,
    "chat_template": "{{ 1 }}",
    "chat_template_kwargs": {"enable_thinking": True},
    "functions": [],
    "prompt_embeds": "AAAA",
    "deadline": -1,
    "tool_choice": "required",
}


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_that_cannot_be_used_is_named(server, key):
    field = key.partition(".")[0]
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | {field: FIELDS[key]}
    status, said = post(server, asked)
    named = said["error"]["param"]
    assert status == (404 if key == "model" and isinstance(FIELDS[key], str) else 400)
    wanted = {"messages": "messages.0.content", "max_completion_tokens": "max_tokens"}
    assert named == wanted.get(key, key)


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_bodies_past_the_bound_are_refused_before_they_are_there(server, monkeypatch):
    monkeypatch.setattr(protocol, "LINGER", 0.3)
    before = rss()
    assert post(server, b"x" * (server.service.bounds.body + 1))[0] == 413
    with connect(server) as own:
        own.sendall(head(Content_Length=1 << 30) + b"{")
        assert answer(own)[0] == 413
    with connect(server) as own:  # chunks without end
        own.sendall(head(Transfer_Encoding="chunked"))
        piece, sent = b"10000\r\n" + b"x" * 65536 + b"\r\n", 0
        with pytest.raises(OSError):
            while sent < 1 << 36:
                own.sendall(piece)
                sent += len(piece)
        assert sent > server.service.bounds.body
    packed = gzip.compress(b"x" * (1 << 20))
    status, said = post(server, packed, Content_Encoding="gzip")
    assert status == 400 and said["error"]["param"] == "content-encoding"
    assert post(server, ASKED + b"}", kind="text/plain")[0] == 400
    assert rss() - before < 64 << 20


def test_heads_past_the_bound_are_refused(server):
    for line in (b"X-A: " + b"a" * (1 << 20) + b"\r\n", b"X-A: a\r\n" * 100_000):
        with connect(server) as own:
            with contextlib.suppress(OSError):  # it was refused before all of it was there
                own.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n")
            try:
                status = answer(own)[0]
            except ConnectionError:
                status = 400
        assert status in (400, 431)
    with connect(server) as own:
        own.sendall(b"NONSENSE\r\n\r\n")
        status, said = answer(own)
    assert status == 400 and json.loads(said)["error"]["type"] == "invalid_request_error"


def test_slow_heads_and_bodies_have_their_time(llm):
    from llmkit.serve.node import Bounds
    from tests.serve.conftest import Running

    server = Running(llm, bounds=Bounds(receive=0.3))
    try:
        with connect(server) as own:
            own.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
            assert own.recv(10) == b""
        with connect(server) as own:
            own.sendall(head(Content_Length=1000) + b"{")
            assert answer(own)[0] == 408
        assert post(server, ASKED + b"}")[0] == 200
    finally:
        server.stop()


def held(server):
    return sum(server.service.gate.answers.values()) + len(server.engine.waiting)


def until(check, seconds=10.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
def test_a_client_that_leaves_frees_what_it_held(server, more):
    data = json.dumps(LONG | more).encode()
    begun = server.engine.stats.get("aborted", 0)
    with connect(server) as own:
        own.sendall(head(Content_Length=len(data)) + data)
        until(lambda: server.engine.stats.get("running"))
        assert held(server)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: not held(server) and not server.engine.stats["used"] and server.engine.stats["aborted"] > begun)


def test_overload_is_told_at_once_and_what_was_accepted_finishes(llm):
    from concurrent.futures import ThreadPoolExecutor

    from llmkit.serve.node import Bounds
    from tests.serve.conftest import Running

    server = Running(llm, bounds=Bounds(requests=4))
    try:
        with ThreadPoolExecutor(16) as pool:
            done = list(pool.map(lambda _: post(server, {**LONG, "max_tokens": 40}), range(16)))
        good = [said for status, said in done if status == 200]
        refused = [said for status, said in done if status == 429]
        assert len(good) + len(refused) == 16 and len(good) >= 4 and refused
        assert {said["usage"]["completion_tokens"] for said in good} == {40}
        assert len({said["choices"][0]["message"]["content"] for said in good}) == 1
        with connect(server) as own:
            data = json.dumps(LONG | {"n": 5}).encode()
            own.sendall(head(Content_Length=len(data)) + data)
            assert answer(own)[0] == 400  # it can never be taken
        assert not held(server)
    finally:
        server.stop()
