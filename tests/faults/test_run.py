"""Runs under fault: bad numbers, memory that gives out, clocks, evaluations that fail, rows."""

import ast
import gc
import json
import math
import os
import re
import resource
import signal
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from llmkit_kernels import memory
from safetensors.torch import load_file

import llmkit
from llmkit import Evaluate
from llmkit.checkpoint import state
from llmkit.core.errors import DataError, ModelError, ResourceError
from llmkit.core.types import LossSum
from llmkit.data.jsonl import read_jsonl
from llmkit.evals import run as evals
from llmkit.losses.node import CrossEntropy
from llmkit.recipe.load import load_recipe
from llmkit.stages import build_training as stage
from tests.faults import at_call, go, in_child, killed_after, outcome, sft, status, why

# T1: numbers


class Poisoned:
    """The loss, but harmed in one step."""

    step = 0

    def __init__(self, at, how):
        self.at, self.how = at, how

    def __call__(self, logps, batch):
        made = CrossEntropy()(logps, batch)
        if Poisoned.step != self.at:
            return made
        if self.how == "gradient":
            logps.register_hook(lambda grad: grad * math.inf)
            return made
        return LossSum(made.total * {"nan": math.nan, "inf": math.inf, "spike": 50.0}[self.how], made.count)


@pytest.fixture
def poison(monkeypatch):
    real = stage._step_data

    def noted(job, contexts, index):
        Poisoned.step = index + 1
        return real(job, contexts, index)

    def poisoned(at, how):
        monkeypatch.setattr(stage, "_step_data", noted)
        monkeypatch.setattr(llmkit.Sft, "objective", lambda self, train: Poisoned(at, how))

    return poisoned


def held(out, step):
    return load_file(out / "checkpoints" / f"step-{step}" / "tensors-0-of-1.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_t1_a_skipped_step_leaves_weights_and_optimizer_as_they_were(how, tiny, world, tmp_path, poison):
    poison(3, how)
    checkpoint = {"every": 1, "keep": 9}
    made = go(sft(tiny, world[0], tmp_path / "run", guard={"nonfinite": "skip"}, checkpoint=checkpoint))
    steps = [held(made.folder, step) for step in range(1, 7)]
    assert [same(a, b) for a, b in pairwise(steps)] == [False, True, False, False, False]
    assert all(value.isfinite().all() for value in steps[-1].values())
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line.get("skipped") for line in lines if line["event"] == "train"}
    (rows,) = [line["skipped_rows"] for line in lines if line.get("skipped")]
    assert rows == [f"{world[0]}:{i + 1}" for i in skipped[3]]  # no row was left out: ids are lines
    assert len(skipped[3]) == 4 and not any(skipped[step] for step in (1, 2, 4, 5, 6))  # 20 rows: 8, 8 and 4


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_t1_a_stopped_run_keeps_its_checkpoint_and_goes_on_exactly(how, tiny, world, tmp_path, poison, monkeypatch):
    poison(5, how)
    out = tmp_path / "run"
    with pytest.raises(
        ResourceError, match=r"step 5: the .* is (nan|inf); sample ids \d+.*; fix: lower optim.lr, "
    ) as caught:
        go(sft(tiny, world[0], out))
    assert f", rows {world[0]}:" in str(caught.value)
    assert status(out) == ("failed", 5, 4) and state.steps(out / "checkpoints") == [4, 2]
    assert same(held(out, 4), held(world[1], 4))
    monkeypatch.undo()
    go(sft(tiny, world[0], out))
    assert outcome(out) == outcome(world[1])


def test_t1_a_spike_in_a_real_run_stops_it(tiny, world, tmp_path, poison):
    poison(12, "spike")
    with pytest.raises(ResourceError, match=r"step 12: the loss .* times its median"):
        go(sft(tiny, world[0], tmp_path / "run", steps=14))


# T2: memory


def limited(room):
    """This process may take `room` more bytes of addresses. What earlier tests gave back may be kept, such as caches of
    2 GiB: a pool that gave it up later would make more room."""
    gc.collect()
    memory.trim()
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def greedy():
    """Asks for 4 GiB when 64 MiB are left."""
    limited(64 << 20)
    torch.empty(1 << 30)


def test_t2_too_little_memory_is_said_before_the_model_loads(tiny, world, half):
    node = sft(tiny, world[0], half)

    def work():
        at_call(1, "build", lambda: os._exit(99))
        limited(16 << 20)
        go(node)

    assert in_child(work) == 5 and status(half) == ("failed", 5, 4)
    need = r"micro_batch: training needs about \d\d MiB, (\d|1[0-6]) MiB are free; fix: lower micro_batch or"
    assert re.match(need, why(half)), why(half)
    state.load(half / "checkpoints" / "step-4")
    go(node)  # the control: without the limit it fits
    assert outcome(half) == outcome(world[1])


@pytest.mark.parametrize(("name", "call", "step"), [("_step_data", 2, 4), ("losses", 1, 6), ("write", 1, 6)])
def test_t2_memory_that_gives_out_in_a_run_is_one_line_and_the_run_goes_on_exactly(name, call, step, tiny, world, half):
    node = sft(tiny, world[0], half)

    def work():
        at_call(call, name, greedy)
        try:
            go(node)
        finally:
            if psutil.Process().children():
                os._exit(98)

    def control():
        at_call(call, name, lambda: torch.empty(1 << 30))
        killed_after(5, lambda: go(node)) if name == "_step_data" else go(node)

    assert in_child(work) == 5 and status(half) == ("failed", 5, step)
    said = why(half)
    assert "memory gave out" in said and "4294967296 bytes" in said and "MiB are free" in said
    assert said.endswith("fix: lower micro_batch or data.max_length, or set memory.recompute=full")
    state.load(half / "checkpoints" / f"step-{step}")
    assert in_child(control) in (0, -signal.SIGKILL)  # as much is had where there is no limit
    go(node)
    assert outcome(half) == outcome(world[1])


def test_t2_memory_that_gives_out_in_an_evaluation_stage_is_told_alike(tiny, world, tmp_path):

    said = tmp_path / "said"
    tasks = [{"kind": "perplexity", "data": [{"kind": "jsonl", "path": str(world[0])}]}]

    def work():
        at_call(1, "losses", greedy, evals)
        try:
            go(Evaluate(model=str(tiny), tasks=tasks, out=str(tmp_path / "run")))
        except ResourceError as error:
            said.write_text(str(error))
            raise

    assert in_child(work) == 5 and "memory gave out" in said.read_text()
    assert not (tmp_path / "run").exists()


# T5: clocks


class Leaping:
    """A clock that leaps by a day, there and back, from reading to reading."""

    def __init__(self, real, unit=1):
        self.real, self.unit, self.read = real, unit, 0

    def __call__(self):
        self.read += 1
        return self.real() + self.unit * 86400 * (-1) ** self.read


@pytest.mark.parametrize("leaps", [True, False])
def test_t5_a_wall_clock_that_leaps_changes_no_duration_and_saves_nothing_early(
    leaps, tiny, world, tmp_path, monkeypatch
):
    clock = Leaping(time.time)
    if leaps:
        monkeypatch.setattr(time, "time", clock)
        monkeypatch.setattr(time, "time_ns", Leaping(time.time_ns, 10**9))
        assert abs(time.time() - time.time()) > 86400  # the fault took effect
    began = time.monotonic()
    made = go(sft(tiny, world[0], tmp_path / "run", checkpoint={"every": "1h"}))
    most = time.monotonic() - began
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["event"] == "train"]
    assert len(trained) == 6 and 0 < sum(line["seconds"] for line in trained) <= most
    assert all(line["tokens_per_second"] > 0 and line["mfu"] >= 0 for line in trained)
    assert state.steps(made.folder / "checkpoints") == [6]


def test_t5_control_the_schedule_of_saves_follows_the_clock_that_only_goes_on(tiny, world, tmp_path, monkeypatch):
    real, began = time.monotonic, time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: real() + (real() - began) * 1e7)
    go(sft(tiny, world[0], tmp_path / "run", checkpoint={"every": "1h", "keep": 9}))
    monkeypatch.undo()
    assert state.steps(tmp_path / "run" / "checkpoints") == [6, 5, 4, 3, 2, 1]


def test_t5_checkpoints_are_ordered_by_step_and_not_by_date(tmp_path):
    for step in (9, 10, 100):
        path = state.save(tmp_path, step, {"a": torch.zeros(2)}, {"step": step})
        os.utime(path, (2e9 - step * 86400,) * 2)
    assert state.newest(tmp_path, lambda text: None)[0].name == "step-100"
    state.prune(tmp_path, 1, None)
    assert state.steps(tmp_path) == [100]


def test_t5_nothing_of_ours_reads_the_wall_clock_to_measure():
    asked = {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}
    told = Path(llmkit.__file__).parent / "core" / "clock.py"  # the one that says when something was
    for path in (path for path in Path(llmkit.__file__).parent.rglob("*.py") if path != told):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in asked), f"{path}:{node.lineno}"


# T7: evaluation


def test_t7_an_evaluation_that_fails_in_a_real_run_leaves_state_and_best(tiny, world, tmp_path, monkeypatch):
    def fail():
        raise ZeroDivisionError("no tokens")

    node = sft(tiny, world[0], tmp_path / "run", evaluate={"every": 2}, checkpoint={"best": "valid.loss", "keep": 1})
    monkeypatch.setattr(evals, "losses", evals.losses)
    at_call(3, "losses", fail)
    with pytest.raises(DataError, match="evaluate: the evaluation after step 4 failed: no tokens"):
        go(node)
    monkeypatch.undo()
    out = tmp_path / "run"
    assert status(out) == ("failed", 3, 4) and state.steps(out / "checkpoints") == [4, 2]
    progress = state.load(out / "checkpoints" / "step-4")[1]["progress"]
    assert (progress["step"], progress["best_step"], progress["evaluated"]) == (4, 2, 2)
    go(node)  # the control: it goes on with the evaluation that failed
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open() if '"evaluate"' in line] == [0, 2, 4, 6]


# D: rows


def test_d1_what_is_set_aside_lies_beside_the_run_and_is_counted(tiny, world, tmp_path, capfd):
    rows, torn = tmp_path / "rows.jsonl", '{"messages": [{"role": "user", "con'
    rows.write_text(world[0].read_text() + torn)
    node = sft(tiny, rows, tmp_path / "run")
    with pytest.raises(DataError, match=r"rows\.jsonl:21: is torn off at byte \d+"):
        go(node)
    source = [{"kind": "jsonl", "path": str(rows)}]
    capfd.readouterr()
    made = go(sft(tiny, rows, tmp_path / "aside", data={"train": source, "on_bad_row": "quarantine"}, evaluate={}))
    (kept,) = [json.loads(line) for line in (made.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (kept["file"], kept["line"], kept["row"]) == (str(rows), 21, torn) and "torn off" in kept["why"]
    assert made.manifest["counts"]["quarantined"] == 1 and made.manifest["counts"]["examples"] == 20
    assert "1 rows are set aside in quarantine.jsonl" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "garbage\n", '{"text": ""}\n' * 9], ids=["empty", "garbage", "blank"])
def test_d5_rows_that_cannot_be_trained_on_are_told_before_a_model_loads(text, tiny, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stage, "build", refuse)
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError):
        go(sft(tiny, tmp_path / "rows.jsonl", tmp_path / "runs" / "run"))
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_error_before_anything_is_done_leaves_only_what_was_there(tiny, world, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    out.mkdir()
    for _ in range(2):
        with pytest.raises(DataError):
            go(sft(tiny, rows, out), resume="never")
        assert os.listdir(tmp_path) == ["run"] and os.listdir(out) == []
    rows.write_text(world[0].read_text())
    go(sft(tiny, rows, out), resume="never")
    assert outcome(out)[0] == outcome(world[1])[0]


def test_an_error_in_the_first_stage_of_a_pipeline_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "data: {train: [{kind: jsonl, path: rows.jsonl}]}"
    Path("p.yaml").write_text(f"out: runs/o\nstages:\n- {{name: a, kind: sft, model: {tiny}, {data}}}\n")
    with pytest.raises(DataError):
        go(load_recipe("p.yaml"))
    assert os.listdir(tmp_path) == ["p.yaml"]


def test_an_error_after_rows_were_set_aside_keeps_them_and_says_so(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text("garbage\n")
    source = [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}]
    with pytest.raises(DataError):
        go(sft(tiny, "", tmp_path / "run", data={"train": source, "on_bad_row": "quarantine"}, evaluate={}))
    assert status(tmp_path / "run")[:2] == ("failed", 3) and (tmp_path / "run" / "quarantine.jsonl").stat().st_size


def test_d7_a_line_of_a_gigabyte_costs_no_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "a", "completion": "b"}\n'
    with path.open("wb") as file:
        file.write(good)
        file.truncate(1 << 30)  # a hole: zeros that lie nowhere
    with path.open("ab") as file:
        file.write(b"\n" + good)
    tracemalloc.start()
    first, bad, last = read_jsonl(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20 and str(bad).startswith(f"{path}:2: is longer than 16 MiB; fix: split the row")
    assert first.values == last.values and last.line == 3


def test_every_error_of_this_file_has_its_exit_status():
    assert (DataError.code, ModelError.code, ResourceError.code) == (3, 4, 5)
