"""Faults of one process, each with a proof that it took effect and a control without it."""

import hashlib
import json
import os
import signal

from llmkit import Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError
from llmkit.evals import run as evals
from llmkit.stages import build_training as stage
from llmkit.stages import finished, measured

TIMINGS = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")


def sft(tiny, rows, out, **more):
    """A stage of 6 steps of a fraction of a second together, with checkpoints and evaluations in between."""
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(tiny),
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"train": source, "valid": source, "max_length": 64},
        "batch": {"rows": 8},
        "micro_batch": 2,
        "steps": 6,
        "evaluate": {"every": 3, "rows": 4, "samples": 1, "max_tokens": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "out": str(out),
    }
    return Sft(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def whole(tiny, folder):
    """(rows, the folder of an uninterrupted run over them)."""
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(20):
            said = [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "dog " * (1 + i % 4)}]
            file.write(json.dumps({"messages": said}) + "\n")
    go(sft(tiny, rows, folder / "whole"))
    return rows, folder / "whole"


def killed_after(step, work):
    """Does `work`, and dies in the step after `step`, which is one with a checkpoint: it is published by then."""
    from llmkit.stages import build_training

    show, saver, made = build_training.show, build_training._saver, []

    def noted(job):
        made.append(saver(job))
        return made[-1]

    def shown(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == step + 1:
            if made[-1].pending is not None:
                made[-1].pending.all.exception()
            os.kill(os.getpid(), signal.SIGKILL)

    build_training.show, build_training._saver = shown, noted
    work()


def in_child(work):
    """Does `work` in a forked child, whose exit status is the command line's: 0, that of its error, or 1."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        except LlmkitError as error:
            code = error.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """The weights' sha256 and every line of the metrics but the timings; the samples too."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    weights = hashlib.sha256((folder / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return weights, kept, (folder / "samples.jsonl").read_text()


def status(folder):
    """(state, exit code, step) as the run left them."""
    said = json.loads((folder / "status.json").read_text())
    return said["state"], said["exit_code"], said["step"]


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


def why(out):
    return json.loads((out / "status.json").read_text())["why"]
