"""The launchers themselves: torchrun, accelerate, deepspeed and the scripts of hosts, each with two ranks over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmkit.core.folder import read_status
from llmkit.recipe.shipped import folder
from tests.distributed import equal, free_port, lines, sft, trained
from tests.launch.test_slurm import RECIPE

PYTHON = Path(sys.executable)


@pytest.fixture
def start(tiny, rows, tmp_path):
    """Starts a launcher in a folder with a recipe; what is left of it at the end is ended."""
    left = []

    def started(*command, steps=3, **env):
        (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny, rows=rows, steps=steps))
        env = {**os.environ, "PYTHON": str(PYTHON), **env}
        said = (tmp_path / "said.txt").open("w")
        how = {"cwd": tmp_path, "env": env, "stdout": said, "stderr": said, "start_new_session": True}
        left.append(subprocess.Popen([str(word) for word in command], **how))
        return left[-1]

    yield started
    for process in left:
        if process.poll() is None:
            process.terminate()  # it passes that on to the ranks, which are in sessions of their own
            process.wait(60)


def finished(process, tmp_path, code=0):
    assert process.wait(300) == code, (tmp_path / "said.txt").read_text()[-4000:]


def reference(tiny, rows, tmp_path, steps=3):
    return trained(1, lambda out: sft(tiny, rows, out, steps=steps), tmp_path, "alone")


def until(tmp_path, seen, process):
    """Waits for so many lines of metrics."""
    path, end = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 300
    while not (path.exists() and len(path.read_text().splitlines()) >= seen):
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()[-4000:]
        time.sleep(0.01)


def test_torchrun_by_launch(start, tiny, rows, tmp_path):
    process = start(PYTHON, "-m", "llmkit", "launch", "r.yaml", "--gpus", "2", "--interface", "lo", "seed=0")
    finished(process, tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path))
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said.count("out") == 1 and json.loads(said[-1])["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_itself(start, tiny, rows, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished(start(PYTHON, *torchrun, "-m", "llmkit", "run", "r.yaml"), tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_accelerate(start, tiny, rows, tmp_path):
    # of CPUs too: its `--cpu` starts one process, or wants mpirun
    how = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    how += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    finished(start(PYTHON, *how, "-m", "llmkit", "run", "r.yaml", HF_HOME=str(tmp_path / "hf")), tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path))
    assert "ranks" in [path.name for path in (tmp_path / "out").iterdir()], "there was one rank"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_by_its_script(start, tiny, rows, tmp_path):
    words = ["--gpus", "2", "--port", free_port(), "--interface", "lo", "r.yaml"]
    finished(start("bash", folder("launch") / "deepspeed.sh", *words, DS_ACCELERATOR="cpu"), tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path))
    assert "--local_rank=1" in (tmp_path / "said.txt").read_text()


@pytest.fixture
def hosts(tmp_path):
    """Two hosts that are both this one: `ssh HOST COMMAND` runs the command in a session of its own."""
    (tmp_path / "ssh").write_text('#!/bin/bash\nexec setsid -w bash -c "${@: -1}"\n')
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    port = free_port()
    return ["--nodes", "2", "--hostfile", "hosts", "--master", "127.0.0.1", "--port", port, "--interface", "lo"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["torchrun", "deepspeed"])
def test_over_two_hosts_it_stops_when_asked_and_goes_on(engine, start, hosts, tiny, rows, tmp_path):
    if find_spec(engine.replace("torchrun", "torch")) is None:
        pytest.skip(f"{engine} is not installed")
    command = ["bash", folder("launch") / f"{engine}.sh", *hosts, "r.yaml"]
    env = {"SSH": str(tmp_path / "ssh"), "DS_ACCELERATOR": "cpu"}
    process = start(*command, steps=20, **env)
    until(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    finished(process, tmp_path, 75)
    status = read_status(tmp_path / "out")
    assert status["state"] == "stopped" and 3 <= status["step"] < 20, status
    finished(start(*command, steps=20, **env), tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path, 20))
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_one_host_it_stops_when_asked_and_goes_on(number, start, tiny, rows, tmp_path):
    command = [PYTHON, "-m", "llmkit", "launch", "r.yaml", "--gpus", "2"]
    process = start(*command, steps=20)
    until(tmp_path, 3, process)
    process.send_signal(number)
    finished(process, tmp_path, 75)
    assert "stopped by SIGTERM" in read_status(tmp_path / "out")["why"]
    finished(start(*command, steps=20), tmp_path)
    equal(tmp_path / "out", reference(tiny, rows, tmp_path, 20))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_exit_status_is_the_runs_own(start, tmp_path):
    process = start(
        PYTHON, "-m", "llmkit", "launch", "r.yaml", "--gpus", "2", "data.max_length=2", "data.overflow=error"
    )
    finished(process, tmp_path, 3)  # torchrun says 1
    assert "ChildFailedError" in (tmp_path / "said.txt").read_text() and not (tmp_path / "out" / "status.json").exists()
    (tmp_path / "said.txt").unlink()
    process = start("bash", folder("launch") / "torchrun.sh", "--gpus", "2", "--doctor")
    finished(process, tmp_path)
    assert "all-reduce" in (tmp_path / "said.txt").read_text()
