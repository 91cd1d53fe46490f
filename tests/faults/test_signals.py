"""Runs under signals in every phase, and streams that are closed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmkit import Evaluate, Merge
from llmkit.build import training
from llmkit.checkpoint import draft, state
from llmkit.cli.main import main
from llmkit.core.artifact import Artifact
from llmkit.data import prepare as reading
from llmkit.data.render import Renderer
from llmkit.evals import run as evals
from llmkit.inference.engined import EngineWriter
from llmkit.models import export
from llmkit.stages import build_inference as inference
from llmkit.stages import build_training as stage
from llmkit.stages import finished, measured
from tests.faults import at_call, go, in_child, outcome, sft, status, why


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
    "export": (finished, "write", 1, 0, 6),
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

    began, ended = time.monotonic(), in_child(work)
    assert ended in (code, 0 if step is None else code) and time.monotonic() - began < 10
    code = ended
    if step is None:  # beside the loop, which is some steps further, or at its end
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
    "samples": (EngineWriter, "_ended", 1, sft),
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
