"""Several ranks on one machine: forked children over gloo, each as a launcher would have started it."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmkit import Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError
from llmkit.core.ranks import Ranks, free_port
from llmkit.stages import build_training

TIMINGS = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "bubble")
QUIET = Console(quiet=True, mute=True)


def launched(world, work, said="/dev/null"):
    """Forks `world` ranks that do `work(rank)`; gives their pids. What they say on standard error goes to `said`."""
    port, pids = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ |= Ranks(rank, world, rank, world).environment(port)
            os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
            work(rank)
            code = 0
        except LlmkitError as error:
            os.write(2, f"{error}\n".encode())
            code = error.code
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return pids


def ended(pids, seconds=60.0):
    """The exit codes of ranks, which must come to an end by themselves; a signal's number is negative."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < until:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    left = set(pids) - codes.keys()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left, f"{len(left)} ranks did not end in {seconds} s"
    return [codes[pid] for pid in pids]


def together(world, work, tmp_path, seconds=60.0):
    """Does `work(rank)` on `world` ranks, all of which must end well."""
    said = tmp_path / "said.txt"
    codes = ended(launched(world, work, said), seconds)
    assert codes == [0] * world, f"{codes}: {said.read_text()[-4000:]}"


def sft(model, rows, out, /, **more):
    """A stage of 3 steps, packed and accumulated; plain SGD, whose weights say what the gradients were."""
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "adapter": {"kind": "lora", "rank": 4},
        "data": {"train": source, "max_length": 64},
        "batch": {"rows": 12},
        "micro_batch": 1,
        "steps": 3,
        "optim": {"kind": "sgd", "lr": 0.5, "momentum": 0.0},
        "schedule": {"kind": "constant"},
        "out": str(out),
    }
    return Sft(**(options | more))


def trained(world, make, tmp_path, name, seconds=60.0):
    """The folder of `make(out)` run on `world` ranks."""
    folder = tmp_path / f"{name}-{world}"
    if world == 1:
        run(make(folder), console=QUIET)
    else:
        together(world, lambda rank: run(make(folder), console=QUIET), tmp_path, seconds)
    return folder


def beside(world, model, rows, tmp_path, parallel, **more):
    """The folders of a run on several ranks, and of one process."""

    def make(out, **spread):
        return sft(model, rows, out, **(more | spread))

    several = trained(world, lambda out: make(out, parallel=parallel), tmp_path, "several")
    return several, trained(1, make, tmp_path, "one")


def noted(path):
    """Writes [step, the ids that this rank sees in it] into a file, step by step; in a child."""
    real = build_training._step_data

    def step_data(job, contexts, index, *given):
        found = real(job, contexts, index, *given)
        ids = [i for batch in found.batches if batch.weights.any() for i in batch.ids]
        with path.open("a") as file:
            file.write(json.dumps([index + 1, ids]) + "\n")
        return found

    build_training._step_data = step_data


def lines(folder, event="train"):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found if line["event"] == event]


def equal_evaluations(folder, other):
    """Losses of the evaluations of two runs, of which there are some."""
    measured, expected = lines(folder, "evaluate"), lines(other, "evaluate")
    assert len(measured) == len(expected) > 0
    for ours, theirs in zip(measured, expected, strict=True):
        assert abs(ours["valid.loss"] - theirs["valid.loss"]) < 1e-5 * theirs["valid.loss"]


def weights(folder):
    return load_file(next(Path(folder, "model").glob("*model.safetensors")))


def equal(folder, other, tol=1e-5):
    """Losses, gradient norms and weights of two runs, to `tol` of the largest value of each tensor."""
    for ours, theirs in zip(lines(folder), lines(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm"):
            assert abs(ours[key] - theirs[key]) <= tol * abs(theirs[key]), (key, ours, theirs)
        assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"])
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        gap = (ours[name] - tensor).abs().max()
        assert gap <= tol * tensor.abs().max(), f"{name}: {gap / tensor.abs().max():.2e}"
    return torch.cat([t.flatten() for t in ours.values()])


def the_same_steps(kind, tiny, place, names, own, parallel=None, world=2):
    """Sees to it that ranks draw the answers of one process, and that their steps are alike in these figures; gives the
    folders of one process and of several."""
    path = place / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i} of the model"}) + "\n" for i in range(8)))

    def make(out, **more):
        return kind(
            model=str(tiny),
            data={"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
            reward=[{"kind": "length", "shape": {"kind": "target", "length": 4, "slack": 24}, "unit": "characters"}],
            batch={"prompts": 3},
            micro_batch=1,
            steps=4,
            optim={"kind": "sgd", "lr": 1e-2},
            schedule={"kind": "constant"},
            out=str(out),
            **own,
            **more,
        )

    one = trained(1, make, place, "one")
    spread = {} if parallel is None else {"parallel": parallel}
    two = trained(world, lambda out: make(out, **spread), place, "several", 240.0)
    answers = [
        [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    assert [line["ids"] for line in answers[0]] == [line["ids"] for line in answers[1]]
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in names:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
    return one, two
