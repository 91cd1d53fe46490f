"""The Slurm script under Slurm: a cluster of this machine alone, with daemons, sockets and states of its own."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmkit.core.folder import read_status
from tests.distributed import equal, free_port, lines, sft, trained
from tests.launch.test_slurm import RECIPE

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or not all(map(shutil.which, NEEDED)), reason="needs Slurm, munge and root"),
]
CONF = """\
ClusterName=lk
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster():
    """Starts munged, slurmctld and slurmd; gives the environment of Slurm's commands."""
    folder, host = Path(tempfile.mkdtemp(prefix="lk-slurm-")), platform.node()
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    conf = CONF.format(host=host, ports=(free_port(), free_port()), folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    places = {"key-file": "key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge = [f"--{option}={folder / name}" for option, name in (places | {"seed-file": "seed"}).items()]
    daemons = [["munged", "--force", "--foreground", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    started = []
    try:
        for words in daemons:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(words, env=env, **quiet))
            time.sleep(1)
        until = time.monotonic() + 60
        while (
            "idle" not in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, text=True, check=False).stdout
        ):
            assert time.monotonic() < until, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.5)
        yield env
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder)


class Job:
    """A job of `llmkit launch --engine slurm`."""

    def __init__(self, env, folder, number):
        self.env, self.folder, self.number = env, folder, number

    @property
    def said(self):
        return "".join(path.read_text() for path in self.folder.glob(f"*-{self.number}.log"))

    @property
    def state(self):
        words = ["scontrol", "show", "job", self.number, "--oneliner"]
        found = subprocess.run(words, env=self.env, capture_output=True, text=True, check=True).stdout
        return {key: re.search(rf" {key}=(\S+)", found)[1] for key in ("JobState", "Restarts", "ExitCode")}

    def until(self, done, seconds=500):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{self.state}: {self.said[-3000:]}"
            time.sleep(0.2)

    def trained(self, number):
        """That many lines of metrics."""
        path = self.folder / "out" / "metrics.jsonl"
        self.until(lambda: path.exists() and len(path.read_text().splitlines()) >= number)

    def ended(self):
        """How it ended, for good."""
        self.until(lambda: self.state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        return self.state


@pytest.fixture
def submit(cluster, tiny, rows, tmp_path):
    jobs = []

    def submitted(*words, steps=20):
        (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny, rows=rows, steps=steps))
        env = {**cluster, "PYTHON": sys.executable}
        words = [
            sys.executable,
            "-m",
            "llmkit",
            "launch",
            "r.yaml",
            "--engine",
            "slurm",
            "--cpu",
            "--gpus",
            "2",
            *words,
        ]
        words += ["--interface", "lo", "--option=--overcommit"]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        found = re.search(r"Submitted batch job (\d+)", done.stdout + done.stderr)
        assert done.returncode == 0 and found, done.stderr
        jobs.append(Job(cluster, tmp_path, found[1]))
        return jobs[-1]

    yield submitted
    for job in jobs:
        subprocess.run(["scancel", job.number], env=cluster, check=False, capture_output=True)


def same(tiny, rows, tmp_path, steps=20):
    equal(tmp_path / "out", trained(2, lambda out: sft(tiny, rows, out, steps=steps), tmp_path, "whole"), 0.0)
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(1, steps + 1))


def test_slurms_signal_saves_and_the_job_that_is_queued_again_goes_on(submit, tiny, rows, tmp_path):
    job = submit()
    job.trained(3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], env=job.env, check=True)  # as before the limit
    assert job.ended() == {"JobState": "COMPLETED", "Restarts": "1", "ExitCode": "0:0"}, job.said
    assert '"state": "stopped"' in job.said and "start 1: " in job.said
    same(tiny, rows, tmp_path)


def test_a_job_whose_rank_was_killed_is_queued_again(submit, tiny, rows, tmp_path):
    job = submit("checkpoint.every=1")
    job.trained(4)
    mine = str(tmp_path)
    ranks = [one for one in psutil.process_iter(["cmdline", "cwd", "environ"]) if one.info["cwd"] == mine]
    (victim,) = [
        one for one in ranks if "run" in (one.info["cmdline"] or ()) and (one.info["environ"] or {}).get("RANK") == "1"
    ]
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(signal.SIGKILL)
    found = job.ended()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), job.said
    assert read_status(tmp_path / "out")["state"] == "done"
    alone = trained(2, lambda out: sft(tiny, rows, out, steps=20, checkpoint={"every": 1}), tmp_path, "whole")
    equal(tmp_path / "out", alone, 0.0)


def test_a_job_that_is_asked_to_stop_stops_and_is_not_queued_again(submit, tmp_path):
    job = submit(steps=200)
    job.trained(3)
    subprocess.run(["scancel", "--signal=TERM", job.number], env=job.env, check=True)
    found = job.ended()
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "75:0"), job.said
    assert read_status(tmp_path / "out")["state"] == "stopped"
