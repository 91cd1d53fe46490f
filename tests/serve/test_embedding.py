"""Texts that are embedded in parts: the same vectors, and answers go on between two parts."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest
import torch

from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.serve.embedding import Text
from llmkit.serve.served import served_of
from tests.serve.conftest import SMALL, Running
from tests.serve.raw import connect, head
from tests.serve.test_serve_rows import until

IDS = [5 + at % 40 for at in range(150)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_has_the_same_vector_in_whatever_parts_it_is_read(llm, pooling):
    forward = served_of(llm.loaded, SMALL).engine.runner.forward
    for before in (0, 9):
        vectors = []
        for most in (150, 64, 7, 1):
            text, count = Text(forward, IDS, before, ""), 0
            while not text.done:
                text.advance(most)
                count += 1
            assert count == -(-150 // most)
            vectors.append(torch.tensor(text.vector(pooling)))
        assert all(torch.equal(one, vectors[0]) for one in vectors)
        assert abs(float(vectors[0].norm()) - 1) < 1e-5
        if before == 0:
            tokens = torch.tensor([IDS])
            with torch.no_grad():
                own = llm.loaded.model(tokens, output_hidden_states=True).hidden_states[-1][0]
            own = own.mean(0) if pooling == "mean" else own[-1]
            assert torch.allclose(vectors[0], own / own.norm(), atol=1e-4)


@pytest.fixture
def slow(llm, monkeypatch):
    """A server whose steps hold 32 tokens, and what it did: parts of texts, and steps."""
    running, log = Running(llm, engine=OwnEngine(cache=Cache(size=8 << 20), tokens=32)), []
    engine, advance = running.within, Text.advance
    step = engine.step

    def stepped():
        log.append("step")
        return step()

    def advanced(text, most):
        log.append((most, engine.idle))
        advance(text, most)

    monkeypatch.setattr(engine, "step", stepped)
    monkeypatch.setattr(Text, "advance", advanced)
    yield running, log
    running.stop()


def test_a_step_is_made_between_two_parts_of_a_long_text(slow):
    server, log = slow
    asked = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(httpx.post, server.url + "/v1/completions", json=asked, timeout=60)
        until(lambda: "step" in log)
        assert httpx.post(server.url + "/v1/embeddings", json={"input": IDS}, timeout=60).status_code == 200
        assert answered.result().status_code == 200
    parts = [at for at, one in enumerate(log) if one != "step"]
    assert [log[at] for at in parts] == [(16, False)] * 10  # half of what a step has
    assert all(later - at == 2 for at, later in pairwise(parts))


def test_a_long_text_whose_client_left_is_read_no_further(slow, monkeypatch):
    server, log = slow
    begun, go, advance = threading.Event(), threading.Event(), Text.advance

    def waits(text, most):
        begun.set()
        assert go.wait(30)
        advance(text, most)

    monkeypatch.setattr(Text, "advance", waits)
    body = json.dumps({"input": IDS}).encode()
    with connect(server) as client:
        client.sendall(head("/v1/embeddings", Content_Length=len(body)) + body)
        assert begun.wait(30)
    until(lambda: not server.engine.calls and not server.service.gate.answers)
    go.set()
    server.call("reset")
    assert log == [(32, True)]
    assert httpx.post(server.url + "/v1/embeddings", json={"input": IDS}, timeout=60).status_code == 200
    assert log == [(32, True)] * 6
