"""Stand-ins of Slurm's commands, as far as `launch/slurm.sh` uses them: they run the ranks on this machine.

`sbatch` runs the script (a copy, as Slurm does), sends SIGUSR1 to it alone when `$STAND_IN/when` (FILE LINES) comes
true, and runs it again where `scontrol requeue` was called. `srun` turns SIGTERM into SIGKILL of its tasks, as the real
one does; `scancel --signal` reaches the tasks alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
NOTES = HERE / "calls.txt"


def installed(folder):
    """Puts the commands into a folder for PATH."""
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)


def options(words):
    """(options, what follows them): every option here has its value behind `=` or as the next word."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        found[name] = value or words.pop(0)
    return found, words


def sbatch(words):
    given, (script, *words) = options(words)
    for line in reversed(Path(script).read_text().splitlines()):
        if line.startswith("#SBATCH ") and "=" in line:
            name, _, value = line.split()[1].partition("=")
            given.setdefault(name, value)
    NOTES.open("a").write(f"sbatch {sorted(given.items())}\n")
    assert given["--signal"].startswith("B:USR1@"), "the ranks would get the signal too"
    copy = shutil.copy(script, HERE / "slurm_script")
    nodes, tasks = int(given["--nodes"]), int(given["--ntasks-per-node"])
    env = dict(os.environ, SLURM_JOB_ID="4242", SLURM_JOB_NODELIST="127.0.0.1", SLURM_JOB_NUM_NODES=str(nodes))
    env |= {"SLURM_NTASKS": str(nodes * tasks), "SLURM_NNODES": str(nodes)}
    for pair in given.get("--export", "ALL").split(",")[1:]:
        env |= dict([pair.split("=", 1)])
    for count in range(9):
        (HERE / "requeue").unlink(missing_ok=True)
        batch = subprocess.Popen(
            ["bash", copy, *words], env=env | ({"SLURM_RESTART_COUNT": str(count)} if count else {})
        )
        while batch.poll() is None:
            when = HERE / "when"
            if when.exists():
                file, lines = when.read_text().split()
                if Path(file).exists() and len(Path(file).read_text().splitlines()) >= int(lines):
                    when.unlink()
                    batch.send_signal(signal.SIGUSR1)
            time.sleep(0.01)
        NOTES.open("a").write(f"batch script ended with {batch.returncode}\n")
        if not (HERE / "requeue").exists():
            return batch.returncode
    return 99


def srun(words):
    _, words = options(words)
    world = int(os.environ["SLURM_NTASKS"])
    local = world // int(os.environ["SLURM_JOB_NUM_NODES"])
    ids = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % local)} for n in range(world)]
    tasks = [subprocess.Popen(words, env={**os.environ, **mine}) for mine in ids]
    signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
    (HERE / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):  # --kill-on-bad-exit
            time.sleep(1)
            for task in tasks:
                task.kill()
        time.sleep(0.01)
    return max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks))


def scontrol(words):
    NOTES.open("a").write(f"scontrol {' '.join(words)}\n")
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write(words[2].replace(",", "\n") + "\n")
    elif words == ["requeue", "4242"]:
        (HERE / "requeue").touch()
    else:
        return 1
    return 0


def scancel(words):
    assert words == ["--signal=TERM", "4242"], words
    NOTES.open("a").write("scancel\n")
    for pid in (HERE / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](sys.argv[2:]))
