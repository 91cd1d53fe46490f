"""S1, S2 and S5 of a server: what it was told in confidence is shown nowhere, it speaks to no network, and it does not
start on what is known to be unsafe."""

import json
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmkit.cli.main import _guarded
from llmkit.core.errors import RecipeError
from llmkit.models.node import ModelRef
from llmkit.serve import floors
from llmkit.serve import start as starting
from tests.faults.conftest import CANARY, NAMES, URLS, leaks
from tests.serve.forked import Forked
from tests.serve.raw import answer, connect, head
from tests.serve.real import at_work, engine_of, interpreter

KEY = "k3y-" + CANARY + "-0123456789"
RECIPE = """
kind: serve
model: {{name: '{tiny}', template: '${{env:WORD}}.jinja'}}
port: 0
name: tiny
key_file: '${{env:KEYS}}'
engine: {{cache: {{size: 8MiB}}}}
out: o
"""


@pytest.fixture(scope="module")
def ready(tiny):
    """What the processes need is imported before they are forked."""
    from llmkit.build.llm import LLM

    LLM(str(tiny), generator="transformers").close()


@contextmanager
def served(work, log):
    """A process of its own that serves, and ends well when it is asked to."""
    with at_work(log, work, 60) as server:
        yield server
        assert server.stop(30) == 0


def recipe(tiny, folder, monkeypatch):
    (folder / f"{CANARY}.jinja").write_text((tiny / "chat_template.jinja").read_text())
    (folder / f"{CANARY}.keys").write_text(f"{KEY}\n")
    monkeypatch.setenv("WORD", CANARY)
    monkeypatch.setenv("KEYS", str(folder / f"{CANARY}.keys"))
    (folder / "r.yaml").write_text(RECIPE.format(tiny=tiny))
    monkeypatch.chdir(folder)


def asked(server):
    """Requests with canaries in every header and in addresses; all that came back."""
    chat = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 2, "temperature": 0}
    good = {"authorization": f"Bearer {KEY}", "cookie": f"s={CANARY}", "x-api-key": CANARY, "referer": CANARY}
    said = []
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for headers in (good, good | {"idempotency-key": CANARY}, {"authorization": f"Bearer {CANARY}"}, {}):
            said += [client.post("/v1/chat/completions", json=chat, headers=headers)]
        bad = [chat | {"model": f"http://user:{CANARY}@hub.example/x"}, chat | {"max_tokens": -1}, {}]
        said += [client.post(f"/v1/chat/completions?api_key={CANARY}", json=one, headers=good) for one in bad]
        said += [client.get("/metrics", headers=good), client.get("/v1/models", headers=good)]
        assert [one.status_code for one in said] == [200, 200, 401, 401, 404, 400, 400, 200, 200]
    with connect(server) as own:
        own.sendall(head(f"http://user:{CANARY}@x/v1/models", "GET", authorization=f"Bearer {KEY}"))
        told = answer(own)[1]
    return [*(one.text + str(one.headers) for one in said), told.decode()]


def test_s1_no_canary_is_in_what_a_server_shows_or_leaves(canaries, tiny, ready, tmp_path, monkeypatch):
    assert len(NAMES) + len(URLS) == 30
    recipe(tiny, tmp_path, monkeypatch)

    def work():
        starting.start.__defaults__ = (engine_of,)  # in this process alone
        return _guarded(["run", "r.yaml"], False)

    with served(work, tmp_path / "log") as server:
        said = asked(server)
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["exact"].startswith(("yes", "no: "))
    assert not [text for text in said if CANARY in text]
    assert len((tmp_path / "o" / "requests.jsonl").read_text().splitlines()) == 2
    for name in (f"{CANARY}.jinja", f"{CANARY}.keys"):
        (tmp_path / name).unlink()
    assert leaks(tmp_path) == []
    assert server.log.read_text().count('"request"') == 9  # the control: there was something to tell


def heard(seen):
    """From here on a word to anything but this machine is noted, and refused."""

    def hear(event, args):
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
            there = args[1][0] if event in ("socket.connect", "socket.sendto") and args[1] else args[0]
            if there not in ("127.0.0.1", "::1", "localhost", ""):
                seen.write_text(f"{event} {there!r}")
                raise OSError("no route")

    sys.addaudithook(hear)


def test_s2_a_server_and_its_engine_speak_to_no_network(tiny, ready, tmp_path):
    seen = tmp_path / "seen"

    def work():
        heard(seen)
        os.environ.pop("HF_HUB_OFFLINE", None)
        how = starting.Settings(ModelRef(name=str(tiny)), port=0)
        starting.start(how, engine_of)  # the hook is in the engine's process too: it is forked from this one

    with (
        served(work, tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert all(client.get(path).status_code == 200 for path in ("/", "/metrics", "/v1/models"))
    assert not seen.exists()

    def control():
        heard(seen)
        socket.create_connection(("192.0.2.1", 9), timeout=1)

    assert Forked(control, err=os.open(os.devnull, os.O_WRONLY)).wait() == 1 and seen.read_text()


@pytest.mark.slow
def test_s1_s2_no_title_of_a_process_holds_a_canary_and_no_route_is_needed(canaries, tiny, tmp_path, monkeypatch):
    """The command itself, in a network of its own where that can be made."""
    recipe(tiny, tmp_path, monkeypatch)
    with interpreter(tmp_path / "log", "llmkit", "run", "r.yaml", seconds=60) as server:
        pid = server.process.pid
        pids = [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        assert len(pids) >= 2
        for pid in pids:
            for what in ("cmdline", "comm"):
                assert CANARY.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
            assert CANARY.encode() in Path(f"/proc/{pid}/environ").read_bytes()  # the control: it was there
        assert not [text for text in asked(server) if CANARY in text]
        assert server.stop() == 0


@pytest.mark.parametrize("name", floors.FLOORS)
def test_s5_a_dependency_under_its_floor_starts_no_server_and_takes_no_port(name, tiny, monkeypatch):
    least, id = floors.FLOORS[name]
    old = {other: here for other, (here, _) in floors.FLOORS.items()} | {name: "0.1"}
    monkeypatch.setattr(floors.check_floors, "__defaults__", (old.__getitem__,))
    monkeypatch.setattr(starting, "listen", None)  # it is refused before
    with pytest.raises(RecipeError) as refused:
        starting.start(starting.Settings(ModelRef(name=str(tiny)), port=0))
    said = str(refused.value)
    assert said == f"{name} 0.1 is not safe before strangers ({id}); fix: pip install '{name}>={least}'"
    monkeypatch.setattr(floors.check_floors, "__defaults__", (lambda name: floors.FLOORS[name][0],))
    floors.check_floors()  # the control
