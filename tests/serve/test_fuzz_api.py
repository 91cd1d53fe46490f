"""The server under requests that were good and are changed by chance: no fault of its own, no hang, no trace left."""

from __future__ import annotations

import json
import os

import httpx
import pytest

from llmkit.serve.node import Bounds
from tests.serve.conftest import Running
from tests.serve.judged import HANGS, Tally, ask, held, wrong
from tests.serve.mutated import case

KEY, CHIEF = "k" * 32, "c" * 32
CANARY = {"prompt": "the quick brown", "max_tokens": 12, "temperature": 0, "logprobs": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def fuzzed(tooled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "keys").write_text(f"{KEY} ann\n")
    (folder / "admins").write_text(CHIEF)
    (folder / "roots").mkdir()
    how = {"keys": folder / "keys", "admin_keys": folder / "admins", "admin_port": 1, "adapter_root": folder / "roots"}
    running = Running(tooled, admin=True, bounds=Bounds(max_tokens=24, n=4, receive=2.0), **how)
    yield running
    running.stop()


def canary(server):
    said = httpx.post(
        server.url + "/v1/completions", json=CANARY, headers={"authorization": f"Bearer {KEY}"}, timeout=60
    )
    return json.dumps(said.json()["choices"])


def run(server, numbers, tally=None):
    known, tally, bad = canary(server), tally or Tally(), []
    for count, number in enumerate(numbers, 1):
        made = case(number, KEY, CHIEF)
        answer = ask(server.admin if made.admin else server.url, made.wire())
        tally.take(number, answer)
        if why := wrong(made, answer):
            bad.append((number, why, made.wire()[:600]))
        if count % 100 == 0 and canary(server) != known:
            bad.append((number, "another answer to the canary", b""))
    assert canary(server) == known
    assert not bad, "\n".join(map(str, bad))
    assert not held(server) and not server.engine.stats["used"] and not server.engine.restarts
    return tally


def test_what_is_changed_by_chance_is_answered_or_refused(fuzzed):
    tally = run(fuzzed, range(120))
    assert tally.statuses[200] > 10 and tally.statuses[400] > 40


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_changed_requests(fuzzed):
    count = int(os.environ.get("LLMKIT_FUZZ", "10000"))
    tally = run(fuzzed, range(1000, 1000 + count))
    print(f"{count} cases: {tally.statuses}; the slowest, of at most {HANGS} s: {tally.slowest}")
