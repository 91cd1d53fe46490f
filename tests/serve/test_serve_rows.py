"""Rows E, H and N that a server is to stand, by their numbers; docs/faults.md says where the others are."""

import base64
import io
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llmkit.core.records import RequestLog, read
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.serve import logs
from tests.serve.conftest import Running
from tests.serve.raw import connect, head, post

PROMPT = list(range(40, 60))
GOOD = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, "ignore_eos": True, "logprobs": 1}


def complete(server, **more):
    return post(server, GOOD | more, path="/v1/completions")


@pytest.fixture(scope="module")
def alone(server):
    """What a sound request gets when nothing else is asked."""
    status, said = complete(server)
    assert status == 200
    return said["choices"]


def among(server, alone, bad):
    """Asks what is wrong in the midst of what is right, which must get what it gets alone, to the bit."""
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(complete, server) for _ in range(4)]
        told = list(pool.map(lambda one: complete(server, **one), bad))
        assert all(one.result()[1]["choices"] == alone for one in good)
    return told


def test_e1_a_prompt_of_no_tokens_and_one_at_the_limit_and_past_it(server, alone):
    longest = server.service.longest
    bad = {
        "prompt": [{"prompt": []}, {"prompt": [[]]}, {"prompt": [5] * longest}, {"prompt": [5] * (longest + 1)}],
        "max_tokens": [{"max_tokens": longest - len(PROMPT) + 1}, {"prompt": [5] * (longest - 1), "max_tokens": 2}],
    }
    for key, asked in bad.items():
        for status, said in among(server, alone, asked + [{**one, "stream": True} for one in asked]):
            assert (status, said["error"]["param"]) == (400, key), said
    at_the_limit = {"prompt": [5] * (longest - 1), "max_tokens": 1}, {"max_tokens": longest - len(PROMPT)}
    for one in at_the_limit:  # the control
        status, said = complete(server, **one)
        assert status == 200 and said["usage"]["total_tokens"] == longest
    assert complete(server, prompt="")[0] == 200  # a text of none begins with the token that texts begin with


def test_e2_n7_tokens_that_are_none_are_refused_and_reach_nobody_s_row(server, alone):
    words = server.engine.facts["words"]
    fields = {
        "prompt": lambda id: [5, id, 6],
        "stop_token_ids": lambda id: [id],
        "allowed_token_ids": lambda id: [5, id],
        "logit_bias": lambda id: {str(id): 100},
    }
    for key, made in fields.items():
        wrong = [
            {key: made(id)} for id in (-1, words, words + 1, 2**31, 2**63, 10**40) if key != "logit_bias" or id > 0
        ]
        for status, said in among(server, alone, wrong):
            assert (status, said["error"]["param"].partition(".")[0]) == (400, key), said
        assert complete(server, **{key: made(words - 1)})[0] == 200  # the control


def test_e7_what_fails_while_it_is_made_ends_one_request_alone(server, alone):
    nothing = {"allowed_token_ids": server.service.tokenizer.encode("a"), "bad_words": ["a"]}
    for status, said in among(server, alone, [nothing] * 2 + [nothing | {"n": 2}]):
        assert (status, said["error"]["code"]) == (400, "generation_failed"), said
        assert "no token may be made here" in said["error"]["message"]
    assert not server.within.live


class Gate:
    """Lets an engine make so many steps, and no more until it is told."""

    def __init__(self, engine):
        self.engine, self.step, self.left = engine, engine.step, 0
        engine.step = self.gated

    def gated(self):
        if self.left <= 0:
            time.sleep(0.001)
            return []
        events = self.step()
        self.left -= 1
        return events


@pytest.fixture(scope="module")
def gated(llm):
    running = Running(llm, engine=OwnEngine(sequences=4, tokens=16, cache=Cache(size=1 << 20)))
    running.gate = Gate(running.within)
    yield running
    running.stop()


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
@pytest.mark.parametrize(("stage", "steps"), [("queued", 0), ("prefill", 2), ("decode", 8)])
def test_e10_a_client_that_leaves_at_any_stage_leaves_nothing(stage, steps, more, gated):
    engine, gate = gated.within, gated.gate
    data = json.dumps(GOOD | {"prompt": list(range(5, 85)), "max_tokens": 100} | more).encode()
    aborted = engine.tally.aborted
    assert gated.call("reset")  # no prompt is found in the cache
    with connect(gated) as own:
        own.sendall(head(path="/v1/completions", Content_Length=len(data)) + data)
        until(lambda: engine.live)
        gate.left = steps
        until(lambda: gate.left == 0)
        (live,) = engine.live.values()
        made = max((one.made for one in live.sequences), default=0)
        computed = max(one.cached for one in live.sequences)
        assert {"queued": not computed, "prefill": 0 < computed < 80, "decode": made > 0}[stage]
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: not engine.live and not gated.engine.waiting and not gated.service.gate.answers.total())
    assert engine.scheduler.blocks.room == engine.scheduler.blocks.count and engine.tally.aborted == aborted + 1


def test_h5_what_waits_past_its_deadline_is_dropped_unexecuted_and_counted(gated):
    def counted():
        lines = httpx.get(gated.url + "/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('llmkit_rejected_total{code="deadline_exceeded"}')]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    engine, gate, before = gated.within, gated.gate, counted()
    steps, made = engine.tally.steps, engine.tally.made
    with ThreadPoolExecutor(2) as pool:
        late = [pool.submit(complete, gated, deadline=0.05, stream=stream) for stream in (False, True)]
        until(lambda: len(engine.live) == 2)
        time.sleep(0.1)
        gate.left = 1
        for status, said in (one.result() for one in late):
            assert (status, said["error"]["code"], said["error"]["param"]) == (408, "deadline_exceeded", "deadline")
    assert (engine.tally.steps, engine.tally.made) == (steps, made) and counted() == before + 2
    gate.left = 100
    assert complete(gated, deadline=60)[0] == 200  # the control
    gate.left = 0


def tensor():
    import torch

    held = io.BytesIO()
    torch.save(torch.zeros(2, 2), held)
    return base64.b64encode(held.getvalue()).decode()


def test_h11_serialised_tensors_are_taken_nowhere(server, monkeypatch):
    import pickle

    import torch

    said = tensor()
    for module, name in ((torch, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)  # a call would be a fault of the server's own: 500
    parts = [{"type": kind, kind: said} for kind in ("image_embeds", "prompt_embeds", "tensor")]
    bodies = [("/v1/completions", GOOD | {key: said}, key) for key in ("prompt_embeds", "image_embeds")]
    bodies += [("/v1/embeddings", {"input": "a", "prompt_embeds": said}, "prompt_embeds")]
    bodies += [("/v1/completions", GOOD | {"prompt": {"tensor": said}}, "prompt")]
    for part in parts:
        messages = [{"role": "user", "content": [part]}]
        bodies.append(("/v1/chat/completions", {"messages": messages}, "messages.0.content.0.type"))
        bodies.append(("/v1/responses", {"input": messages}, "input.0.content.0.type"))
    for path, body, key in bodies:
        status, told = post(server, body, path=path)
        assert (status, told["error"]["param"]) == (400, key), told


EVIL = 'a"}\r\n{"level": "info", "event": "forged"}\x1b[31m\u2028\x07'


def test_h17_line_breaks_and_json_of_a_client_stay_within_their_line(llm, tmp_path):
    path = tmp_path / "log"
    server = Running(llm, journal=tmp_path / "requests.jsonl", name="tiny")
    with path.open("w") as stream:
        handler = logs.begin(stream, "debug")
        try:
            chat = {"messages": [{"role": "user", "content": EVIL}], "max_tokens": 2, "user": EVIL}
            assert post(server, chat)[0] == 200
            assert post(server, chat | {"model": EVIL})[0] == 404
            assert post(server, chat, path="/v1/%0d%0a" + "%22%7d%1b")[0] == 404
            assert post(server, chat, x_request_id='x"}')[0] == 200
        finally:
            server.stop()
            for name in ("llmkit.serve", "uvicorn", "asyncio"):
                logging.getLogger(name).removeHandler(handler)
    lines = path.read_bytes().splitlines()
    assert len(lines) >= 4 and all(json.loads(line)["event"] != "forged" for line in lines)
    assert not [
        byte for byte in path.read_bytes() + (tmp_path / "requests.jsonl").read_bytes() if byte < 32 and byte != 10
    ]
    rows = list(read(tmp_path / "requests.jsonl", RequestLog))
    assert len(rows) == 2 and rows[0].unit_id == EVIL


def test_n1_a_prefix_of_another_tenant_is_told_by_no_count(llm, tmp_path):
    keys = {"anna": "a" * 32, "ben": "b" * 32}
    (tmp_path / "keys").write_text("".join(f"{key} {tenant}\n" for tenant, key in keys.items()))
    server = Running(llm, keys=tmp_path / "keys")
    try:

        def cached(tenant):
            asked = GOOD | {"prompt": list(range(5, 90)), "max_tokens": 1}
            head = {"authorization": f"Bearer {keys[tenant]}"}
            said = httpx.post(server.url + "/v1/completions", json=asked, headers=head, timeout=30).json()
            return said["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached("anna"), cached("ben"), cached("anna"), cached("ben")] == [0, 0, 80, 80]
    finally:
        server.stop()
