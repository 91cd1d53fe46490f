"""Exact resume: kill the process at any instant, run again, and nothing but the timings tells."""

import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from llmkit import Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError
from llmkit.stages import build_training as stage
from llmkit.stages import measured

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
        "evaluate": {"every": 7, "rows": 6, "samples": 2, "max_tokens": 6},
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


PHASES = {
    "prepare": (stage, "_fit"),
    "step": None,
    "evaluate": (measured, "_evaluate"),
    "save": (stage, "_save"),
    "end": (stage, "finish"),
}
"""Where a kill can land, and the function that a run is in then; what `_fit` does in no other one is a step."""


@pytest.fixture
def phase(monkeypatch):
    """Tells in which phase a forked run is, or was when it died."""
    shared = mmap.mmap(-1, 1)

    def noted(place, name, inside):
        real = getattr(place, name)

        def called(*args, **more):
            before, shared[0] = shared[0], inside
            try:
                return real(*args, **more)
            finally:
                shared[0] = before

        monkeypatch.setattr(place, name, called)

    for number, (kind, spot) in enumerate(PHASES.items()):
        if spot is not None:
            noted(*spot, 1 if kind == "prepare" else number)
    return lambda: list(PHASES)[shared[0]]


def timeline(tiny, rows, out):
    """The seconds at which each line of a run's metrics was there; the last entry is the run's end."""
    began, pid, seen = time.monotonic(), in_child(lambda: node(tiny, rows, out)), [0.0]
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        seen += [time.monotonic() - began] * (lines_of(out) + 1 - len(seen))
        time.sleep(0.001)
    return [*seen, time.monotonic() - began]


def test_what_is_killed_packs_accumulates_shuffles_and_evaluates(tiny, world, monkeypatch, tmp_path):
    """The other tests here prove what they say only if all of this is on."""
    seen, real = [], stage._step_data

    def noted(job, contexts, index):
        seen.append((real(job, contexts, index), job.node.adapter.dropout))
        return seen[-1][0]

    monkeypatch.setattr(stage, "_step_data", noted)
    run(node(tiny, world[1], tmp_path / "run", steps=10), console=Console(quiet=True))
    assert all(len(data.batches) > 1 and dropout for data, dropout in seen)
    assert any(len(batch.attend.segments) > 1 for data, _ in seen for batch in data.batches)
    epochs = [[i for data, _ in seen[first : first + 5] for i in data.ids] for first in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24)) and epochs[0] != epochs[1]
    events = Counter(line["event"] for line in outcome(world[0] / "whole")[1])
    assert events["train"] == STEPS and events["evaluate"] == 10 and events["save"] >= 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_random_instants(tiny, world, phase, capfd):
    """Each kill lands at a random instant of its own fiftieth of the run, by the clock of an uninterrupted one."""
    folder, rows = world
    dice, landed, steps, missed = random.Random(os.environ.get("SEED", "0")), Counter(), set(), 0
    times = timeline(tiny, rows, folder / "timed")
    while landed.total() < 50:
        instant = times[-1] * (landed.total() + dice.random()) / 50
        lines = max(n for n, at in enumerate(times[:-1]) if at <= instant)
        out = folder / f"random-{landed.total()}-{missed}"
        pid = in_child(lambda out=out: node(tiny, rows, out))
        deadline = time.monotonic() + 120
        while lines_of(out) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(instant - times[lines])
        os.kill(pid, signal.SIGKILL)
        if finish(pid) == 0:  # it had ended: only the last instants can come too late
            missed += 1
            assert missed < 10 and lines > len(times) - 8
            continue
        landed[phase()] += 1
        steps.add(lines_of(out))
        assert finish(in_child(lambda out=out: node(tiny, rows, out))) == 0
        assert json.loads((out / "status.json").read_text())["state"] == "done"
        assert outcome(out) == outcome(folder / "whole"), (landed, instant)
    with capfd.disabled():
        sys.stderr.write(f"\n50 of 50 kills ended bit-exact; they landed in {dict(landed)}, {len(steps)} places\n")
    assert landed["step"] >= 15 and landed["evaluate"] and landed["save"] and len(steps) >= 30


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_of_their_own_are_killed_and_end_as_one_of_here(tiny, world, tmp_path):
    folder, dice = world[0], random.Random(os.environ.get("SEED", "0"))
    command = [sys.executable, "-m", "llmkit", "run", str(folder / "whole" / "resolved.yaml"), "out=run"]
    out = tmp_path / "run"
    for least in (0, 20, 45):
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while lines_of(out) <= least:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert outcome(out) == outcome(folder / "whole")


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
    target = newest / "tensors-0-of-1.safetensors"
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    run(node(tiny, rows, out), console=Console(quiet=True))
    said = capfd.readouterr().err
    assert f"passing over a checkpoint: {target}" in said
    assert outcome(out) == outcome(folder / "whole")
