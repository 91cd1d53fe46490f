"""The Slurm script under stand-ins that really run the ranks."""

import json
import os
import subprocess
import sys

import pytest

from llmkit.core.folder import read_status
from llmkit.recipe.shipped import folder
from tests.distributed import equal, lines, sft, trained

RECIPE = """\
kind: sft
model: {model}
adapter: {{kind: lora, rank: 4}}
data: {{train: [{{kind: jsonl, path: {rows}}}], max_length: 64}}
batch: {{rows: 12}}
micro_batch: 1
steps: {steps}
optim: {{kind: sgd, lr: 0.5, momentum: 0.0}}
schedule: {{kind: constant}}
out: out
"""


@pytest.fixture
def submit(tiny, rows, tmp_path):
    """`llmkit launch --engine slurm` under the stand-ins: (exit status, what was called, standard output)."""
    os.environ["STAND_IN"] = str(tmp_path)
    from tests.launch.slurm_stand_in import installed

    installed(tmp_path)

    def submitted(*words, steps=20, **env):
        (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny, rows=rows, steps=steps))
        command = [sys.executable, "-m", "llmkit", "launch", "r.yaml", "--engine", "slurm", "--gpus", "2", *words]
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STAND_IN": str(tmp_path), **env}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.returncode, (tmp_path / "calls.txt").read_text().splitlines(), done.stdout + done.stderr

    return submitted


@pytest.mark.slow
def test_out_of_time_it_saves_is_queued_again_and_ends_with_the_same_losses(submit, tiny, rows, tmp_path):
    (tmp_path / "when").write_text(f"{tmp_path}/out/metrics.jsonl 3")
    code, calls, said = submit("--interface", "lo")
    assert code == 0, said
    assert calls[1:] == [
        "scontrol show hostnames 127.0.0.1",
        "scancel",
        "scontrol requeue 4242",
        "batch script ended with 75",
        "scontrol show hostnames 127.0.0.1",
        "batch script ended with 0",
    ], said
    assert "start 1: " in said and read_status(tmp_path / "out")["state"] == "done"
    alone = trained(2, lambda out: sft(tiny, rows, out, steps=20), tmp_path, "whole")
    equal(tmp_path / "out", alone, 0.0)
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(1, 21))


@pytest.mark.slow
def test_what_another_try_cannot_mend_is_not_queued_again(submit, tmp_path):
    code, calls, said = submit("data.max_length=2", "data.overflow=error")
    assert code == 3 and calls[1:] == ["scontrol show hostnames 127.0.0.1", "batch script ended with 3"], said


@pytest.mark.slow
def test_lost_ranks_are_queued_again_so_often_and_no_more(submit, tmp_path):
    (tmp_path / "lost.py").write_text("import os, sys\nos.kill(os.getpid(), 9) if 'run' in sys.argv else None\n")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *"llmkit run"*) exec {sys.executable} {tmp_path}/lost.py run;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    code, calls, said = submit("--restarts", "1", PYTHON=str(tmp_path / "python"))
    assert code == 137 and calls.count("scontrol requeue 4242") == 1, said


@pytest.mark.slow
def test_a_broken_recipe_starts_no_rank(submit, tmp_path):
    script = folder("launch") / "slurm.sh"
    (tmp_path / "bad.yaml").write_text("kind: sft\nmodle: x\n")
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STAND_IN": str(tmp_path),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["sbatch", "--ntasks-per-node", "2", script, "bad.yaml"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "modle" in done.stderr and not (tmp_path / "tasks").exists()


def test_the_command_asks_for_what_the_job_says(tiny, rows, tmp_path, monkeypatch, capsys):
    from llmkit.launch.commands import slurm
    from llmkit.launch.job import Job

    job = Job("r.yaml", ("seed=1",), 2, 8, interface="ib0", restarts=5, time="1:00:00", options=("--partition=gpu",))
    said = " ".join(slurm(job, folder("launch")))
    assert said.startswith("sbatch --job-name r --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 1:00:00 ")
    assert "--export ALL,INTERFACE=ib0,RESTARTS=5 --partition=gpu" in said and said.endswith("slurm.sh r.yaml seed=1")
    assert "--gpus-per-node" not in slurm(Job("r.yaml", cpu=True), folder("launch"))
    assert json.dumps(job.label) == '"r"'
