"""A run that goes on with another number of ranks is the run that it was."""

import json
import os
import signal

import pytest

from llmkit import run
from llmkit.checkpoint import state
from llmkit.stages import build_training
from tests.distributed import QUIET, ended, equal, launched, lines, noted, sft, trained

STEPS = 20
OPTIMS = {
    "sgd": {"kind": "sgd", "lr": 0.02, "momentum": 0.9},
    "adamw": {"kind": "adamw", "lr": 1e-4},
}


def make(tiny, rows, optim, out):
    return sft(
        tiny,
        rows,
        out,
        adapter={"kind": "none"},
        optim=OPTIMS[optim],
        steps=STEPS,
        checkpoint={"every": 3, "keep": 2},
        batch={"rows": 8},
    )


def stopping(after):
    """Asks to stop after a step; in a child."""
    show = build_training.show

    def shown(job, line):
        show(job, line)
        if line["event"] == "train" and line["step"] == after and job.run.main:
            os.kill(os.getpid(), signal.SIGTERM)

    build_training.show = shown


def leg(world, node, ledger, stop_after, said):
    """A part of a run by `world` ranks: {step: the ids of all ranks}, of the steps up to `stop_after`."""

    def work(rank):
        noted(ledger(rank))
        stopping(stop_after)
        run(node, console=QUIET)

    codes = ended(launched(world, work, said), 120)
    assert codes == [75 if stop_after else 0] * world, said.read_text()[-3000:]
    seen = {}
    for rank in range(world):
        for step, ids in map(json.loads, ledger(rank).read_text().splitlines()):
            seen.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in seen.items() if not stop_after or step <= stop_after}


@pytest.mark.parametrize(
    ("worlds", "optim"),
    [([1, 2, 4, 1], "sgd"), pytest.param([2, 3], "adamw", marks=pytest.mark.slow)],
    ids=["1-2-4-1", "2-3"],
)
def test_another_number_of_ranks_goes_on_as_the_same_run(worlds, optim, tiny, rows, tmp_path):
    alone = leg(1, make(tiny, rows, optim, tmp_path / "alone"), lambda rank: tmp_path / "ids", 0, tmp_path / "said")
    out, seen = tmp_path / "run", {}
    for number, world in enumerate(worlds):
        stop = 0 if number == len(worlds) - 1 else 5 * (number + 1)
        part = leg(
            world,
            make(tiny, rows, optim, out),
            lambda rank, number=number: tmp_path / f"ids-{number}-{rank}",
            stop,
            tmp_path / f"said-{number}",
        )
        seen |= part
        if stop:
            assert state.steps(out / "checkpoints")[0] == stop
            found = json.loads((out / "checkpoints" / f"step-{stop}" / "manifest.json").read_text())
            assert found["world"] == world and len(found["files"]) == world + 1
    assert seen == alone and sorted(seen) == list(range(1, STEPS + 1))
    equal(out, tmp_path / "alone", tol=1e-6)
    assert lines(out)[0]["loss"] != lines(out)[-1]["loss"]


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranks_share_what_is_written_and_the_best_is_the_result(background, tiny, rows, tmp_path):
    def node(out):
        source = [{"kind": "jsonl", "path": str(rows)}]
        return sft(
            tiny,
            rows,
            out,
            data={"train": source, "valid": source, "max_length": 64},
            evaluate={"every": 1, "rows": 4, "samples": 0},
            checkpoint={"best": "valid.loss", "keep": 1, "background": background},
            optim={"kind": "sgd", "lr": 0.5},
        )

    several, alone = (trained(n, node, tmp_path, "best") for n in (2, 1))
    equal(several, alone)
    found = state.steps(several / "checkpoints")[0]
    files = {path.name: path.stat().st_size for path in (several / "checkpoints" / f"step-{found}").glob("*.saf*")}
    assert sorted(files) == ["tensors-0-of-2.safetensors", "tensors-1-of-2.safetensors"]
    assert min(files.values()) > 0.7 * max(files.values())
