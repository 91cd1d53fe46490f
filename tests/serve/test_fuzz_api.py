"""The server under requests that were good and are changed by chance: no fault of its own, no hang, no trace left.

LLMKIT_FUZZ says how many the long run has.
"""

from __future__ import annotations

import os
import socket

import pytest

from tests.conftest import make_model, make_tokenizer
from tests.serve.conftest import TOOLED, Running
from tests.serve.judged import HANGS, Tally, Target, ask, held, wrong
from tests.serve.mutated import case
from tests.serve.real import spawned

KEY, CHIEF = "k" * 32, "c" * 32
BOUNDS = {"max_tokens": 24, "n": 4, "receive": 2.0}
"""What is asked for by chance ends soon."""
MIB = 1 << 20


def files(folder):
    """Keys, and a folder of adapters that has none."""
    (folder / "keys").write_text(f"{KEY} ann\n")
    (folder / "admins").write_text(CHIEF)
    (folder / "roots").mkdir()
    return {"keys": folder / "keys", "admin_keys": folder / "admins", "adapter_root": folder / "roots"}


@pytest.fixture(scope="module")
def near(tooled, tmp_path_factory):
    """In this process."""
    from llmkit.serve.node import Bounds

    running = Running(
        tooled, admin=True, bounds=Bounds(**BOUNDS), admin_port=1, **files(tmp_path_factory.mktemp("fuzz"))
    )
    yield Target(running.url, running.admin, KEY, CHIEF, lambda: held(running))
    running.stop()


@pytest.fixture
def far(tmp_path):
    """In two processes of its own."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(TOOLED).save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
    said = {name: str(path) for name, path in files(tmp_path).items()}
    said |= {"folder": str(tmp_path / "model"), "bounds": BOUNDS, "admin_port": port}
    with spawned(tmp_path / "log", said) as real:

        def left():
            return real.held(KEY) | {"restarts": real.numbers(KEY)["llmkit_engine_restarts_total"]}

        yield Target(real.url, f"http://127.0.0.1:{port}", KEY, CHIEF, left), real


def run(target, numbers, most):
    """One after the other; the canary beside each hundred."""
    known, tally, bad = target.canary(), Tally(), []
    for count, number in enumerate(numbers, 1):
        made = case(number, target.key, target.chief)
        answer = ask(target.admin if made.admin else target.url, made.wire())
        tally.take(number, answer)
        if why := wrong(made, answer, most):
            bad.append((number, why, made.wire()[:600]))
        if count % 100 == 0 and target.canary() != known:
            bad.append((number, "another answer to the canary", b""))
    assert target.canary() == known and not bad, "\n".join(map(str, bad))
    assert not target.settled()
    return tally


def test_what_is_changed_by_chance_is_answered_or_refused(near):
    tally = run(near, range(100), 60.0)
    assert tally.statuses[200] > 10 and tally.statuses[400] > 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_changed_requests(far):
    target, real = far
    run(target, range(1000, 2000), HANGS)  # what is kept for good is there
    before, count = sum(real.resident()), int(os.environ.get("LLMKIT_FUZZ", "10000"))
    tally = run(target, range(2000, 2000 + count), HANGS)
    grown = (sum(real.resident()) - before) / MIB
    print(f"{count} cases: {tally.statuses}; {grown:.0f} MiB more; the slowest, of {HANGS} s: {tally.slowest}")
    assert grown < 256
