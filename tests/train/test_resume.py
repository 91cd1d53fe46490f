"""Exact resume: kill the process at any instant, run again, and nothing but the timings tells."""

import hashlib
import json
import os
import random
import signal
import sys
import time

import pytest

from llmkit import Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError

STEPS = 60


def node(tiny, rows, out, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(tiny),
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": source, "valid": source, "max_length": 64},
        "batch": {"rows": 5},
        "micro_batch": 1,
        "steps": STEPS,
        "evaluate": {"every": 7, "rows": 6, "samples": 1, "max_tokens": 3},
        "checkpoint": {"every": 5, "keep": 2, "best": "valid.loss"},
        "out": str(out),
    }
    return Sft(**(options | more))


def in_child(make):
    """Runs a stage in a forked child; gives its pid. Exit status as the command line's."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(make(), console=Console(quiet=True))
        code = 0
    except LlmkitError as error:
        code = error.code
    finally:
        os._exit(code)


def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """The weights' sha256 and every line of the metrics but the timings; the samples too."""
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in timings} for line in lines]
    weights = hashlib.sha256((folder / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return weights, kept, (folder / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """An uninterrupted run, made in this warmed process."""
    folder = tmp_path_factory.mktemp("resume")
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(24):
            question, answer = f"{'hello world ' * (1 + i % 5)}{i}", "the lazy dog " * (1 + i % 3)
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": said}) + "\n")
    run(node(tiny, rows, folder / "whole"), console=Console(quiet=True))
    return folder, rows


def lines_of(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_resume(tiny, world, name, instants):
    """Kills the run after so many lines of its metrics and seconds more, as often as asked; then lets it end."""
    folder, rows = world
    out = folder / name
    for lines, seconds in instants:
        pid = in_child(lambda: node(tiny, rows, out))
        deadline = time.monotonic() + 120
        while lines_of(out) < lines:
            assert time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == -signal.SIGKILL, "the run ended before it could be killed"
    assert json.loads((out / "status.json").read_text())["state"] == "running"
    assert finish(in_child(lambda: node(tiny, rows, out))) == 0
    assert outcome(out) == outcome(folder / "whole")


@pytest.mark.parametrize("instants", [[(1, 0.0)], [(17, 0.01)], [(44, 0.0), (47, 0.02), (52, 0.0)]], ids=str)
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, world, instants):
    kill_and_resume(tiny, world, f"killed-{instants[0][0]}", instants)


@pytest.mark.slow
def test_fifty_random_instants(tiny, world):
    dice, total = random.Random(os.environ.get("SEED", "0")), lines_of(world[0] / "whole")
    for n in range(50):
        kill_and_resume(tiny, world, f"random-{n}", [(dice.randrange(1, total - 8), dice.uniform(0, 0.1))])
    sys.stderr.write("\n50 of 50 runs were killed and ended bit-exact\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_t4_a_signal_saves_and_exits_75_and_the_run_goes_on_exactly(tiny, world, number):
    folder, rows = world
    out = folder / f"signal-{number}"
    pid = in_child(lambda: node(tiny, rows, out))
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count('"train"') < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, number)
    os.kill(pid, number)  # a second one corrupts nothing
    asked = time.monotonic()
    assert finish(pid) == 75
    assert time.monotonic() - asked < 10
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75) and status["step"] >= 5
    assert finish(in_child(lambda: node(tiny, rows, out))) == 0
    assert outcome(out) == outcome(folder / "whole")


def test_r11_a_folder_in_use_is_refused_by_name(tiny, world):
    folder, rows = world
    out = folder / "live"
    pid = in_child(lambda: node(tiny, rows, out))
    deadline = time.monotonic() + 60
    while not (out / "status.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    try:
        with pytest.raises(LlmkitError, match=rf"in use by .*pid {pid}, since"):
            run(node(tiny, rows, out), console=Console(quiet=True))
    finally:
        os.kill(pid, signal.SIGKILL)
        finish(pid)


def test_c5_a_damaged_checkpoint_is_passed_over_with_a_notice(tiny, world, capfd):
    folder, rows = world
    out = folder / "damaged"
    pid = in_child(lambda: node(tiny, rows, out))
    deadline = time.monotonic() + 60
    while len(list((out / "checkpoints").glob("step-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    newest = max((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    target = newest / "tensors.safetensors"
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    run(node(tiny, rows, out), console=Console(quiet=True))
    said = capfd.readouterr().err
    assert f"passing over a checkpoint: {target}" in said
    assert outcome(out) == outcome(folder / "whole")
