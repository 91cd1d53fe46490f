"""A server whose model two processes hold: what it says, one of them that dies, and an end that leaves nobody."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from llmkit.build import spread as spreading
from llmkit.build.leading import Leading
from llmkit.inference.node import OwnEngine
from llmkit.models.node import ModelRef
from llmkit.serve.start import Settings, start
from tests.distributed.followers import Fork, gone
from tests.serve.real import at_work, engine_of, interpreter, serving
from tests.serve.test_serve_process import LONG, events

SHORT = LONG | {"max_tokens": 4, "temperature": 0.0}


def serve(folder):
    spreading.Leading = partial(Leading, start=Fork)  # in the engine's process, which is forked from this one
    serving({"folder": str(folder), "engine": {"tensor": 2}}, engine_of)


def children(pid):
    """The processes that any thread of a process started."""
    found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for some in found for child in some]


def follower_of(spread):
    """The other process that holds the model."""
    return children(spread.engine)[-1]


def said(url):
    return httpx.post(url + "/v1/chat/completions", json=SHORT, timeout=60).json()["choices"][0]["message"]


def embedded(url):
    return httpx.post(url + "/v1/embeddings", json={"input": "hello world"}, timeout=60).json()["data"][0]["embedding"]


@pytest.fixture
def spread(llm, tiny, tmp_path):
    """`llm`: what the processes need is imported before they are forked."""
    with at_work(tmp_path / "log", lambda: serve(tiny)) as spread:
        yield spread


def streamed(url):
    """A long answer that has begun: its thread, and its lines."""
    told, begun = [], threading.Event()

    def listen():
        with contextlib.suppress(httpx.TransportError):  # where the server itself is killed
            events(url, LONG | {"stream": True}, told, begun)

    thread = threading.Thread(target=listen)
    thread.start()
    assert begun.wait(60)
    return thread, told


def test_two_processes_serve_one_dies_and_both_are_started_again(spread, server):
    expected = said(server.url)
    assert said(spread.url) == expected
    assert embedded(spread.url) == pytest.approx(embedded(server.url), abs=1e-5)
    leader, follower = spread.engine, follower_of(spread)
    thread, told = streamed(spread.url)
    os.kill(follower, signal.SIGKILL)
    began = time.monotonic()
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() - began < 15
    assert json.loads(told[-1])["error"]["code"] == "engine_died" and "[DONE]" not in told
    assert "rank 1" in spread.said("the engine failed")["why"]
    spread.said("ready", 2)
    assert spread.engine != leader and follower_of(spread) != follower
    assert gone(leader)
    assert said(spread.url) == expected
    # idle: it is seen without a request, and readiness is the truth
    os.kill(follower_of(spread), signal.SIGKILL)
    spread.said("ready", 3)
    assert httpx.get(spread.url + "/health").status_code == 200
    leader, follower = spread.engine, follower_of(spread)
    thread, told = streamed(spread.url)
    spread.process.kill(signal.SIGTERM)
    thread.join(60)
    assert told[-1] == "[DONE]" and json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
    assert spread.process.wait() == 0
    assert gone(leader) and gone(follower)


@pytest.mark.slow
def test_a_stopped_process_ends_what_is_asked_and_is_ended(spread):
    follower = follower_of(spread)
    thread, told = streamed(spread.url)
    os.kill(follower, signal.SIGSTOP)
    thread.join(60)
    assert not thread.is_alive() and json.loads(told[-1])["error"]["code"] == "engine_died"
    spread.said("ready", 2)
    assert gone(follower) and follower_of(spread) != follower


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["server", "engine"])
def test_a_killed_server_or_engine_leaves_nobody(spread, killed):
    leader, follower = spread.engine, follower_of(spread)
    streamed_to = streamed(spread.url)
    if killed == "server":
        spread.process.kill()
        spread.process.wait()
    else:
        os.kill(leader, signal.SIGKILL)
    streamed_to[0].join(30)
    assert gone(leader, 20) and gone(follower, 20)


@pytest.mark.slow
def test_the_command_serves_over_two_interpreters(tiny, server, tmp_path):
    words = ["llmkit", "serve", str(tiny), "--port", "0", "--name", "tiny", "--tensor", "2", "--cache-size", "8MiB"]
    with interpreter(tmp_path / "log", *words, seconds=300) as spread:
        assert said(spread.url) == said(server.url)
        (leader,) = children(spread.process.pid)
        followers = children(leader)
        assert followers
        assert spread.stop() == 0
        assert gone(leader) and all(map(gone, followers))


def test_heads_that_do_not_divide_are_refused_before_anything_is_started(tiny):
    from llmkit.core.errors import RecipeError

    with pytest.raises(RecipeError, match=r"engine.tensor: 3 ranks cannot share 4 heads.*use 1, 2 or 4"):
        start(Settings(ModelRef(name=str(tiny)), port=0, engine=OwnEngine(tensor=3)), lambda _: pytest.fail("started"))


def test_check_says_it_too(tiny, tmp_path):
    from llmkit.cli.inspect import inspect
    from llmkit.core.errors import RecipeError
    from llmkit.recipe.load import load_recipe

    def checked(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        for name, node in load_recipe(str(path)).stages:
            inspect(name, node, 0)

    text = f"kind: serve\nmodel: {tiny}\nout: {tmp_path / 'out'}\nengine: {{tensor: 2}}\n"
    checked(text)  # the control
    with pytest.raises(RecipeError, match=r"tensor: 3 ranks cannot share 4 heads.*use 1, 2 or 4"):
        checked(text.replace("tensor: 2", "tensor: 3"))
    tasks = "tasks: [{kind: perplexity, data: [{kind: jsonl, path: rows.jsonl}]}]"
    with pytest.raises(RecipeError, match=r"generator.tensor: .*the whole model in this process"):
        checked(f"kind: evaluate\nmodel: {tiny}\n{tasks}\ngenerator: {{kind: engine, tensor: 2}}\nout: x\n")
