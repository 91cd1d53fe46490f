"""While ranks train: one that is slow is named, and a trace is made on request."""

import gzip
import json
import time

import pytest

from llmkit import run
from llmkit.cli.status import status
from llmkit.core.errors import RecipeError
from llmkit.stages import pulse
from llmkit.stages.profiled import REQUEST, ask, asked
from llmkit.train import fit
from tests.distributed import QUIET, ended, equal, launched, lines, sft, trained


def slowed(world, slow, tiny, rows, tmp_path):
    """Runs with some ranks slow in their forward pass; what was said of them."""

    def work(rank):
        pulse.SECONDS = 0.0  # reports after every step
        real = fit.reseed
        fit.reseed = lambda *given: (time.sleep(0.4 * (rank in slow)), real(*given))
        run(sft(tiny, rows, tmp_path / "run", steps=8, batch={"rows": 4}, micro_batch=4), console=QUIET)

    assert ended(launched(world, work, tmp_path / "said.txt"), 120.0) == [0] * world
    return [line for line in lines(tmp_path / "run", "slow") if line["what"] == "forward"]


def test_a_slow_rank_is_named(tiny, rows, tmp_path):
    said, *_ = slowed(2, [1], tiny, rows, tmp_path)
    assert said["rank"] == 1 and said["step"] >= 3 and "computes in" in said["said"] and said["ratio"] > 1.3
    assert said["said"] in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.slow
def test_ranks_that_are_all_slow_are_not_named(tiny, rows, tmp_path):
    assert slowed(2, [0, 1], tiny, rows, tmp_path) == []


def traces(folder):
    found = {}
    for path in sorted((folder / "profile").iterdir()):
        with gzip.open(path) as file:
            found[path.name] = json.load(file)["traceEvents"]
    return found


def test_a_trace_of_every_rank_without_a_stop(tiny, rows, tmp_path):
    def work(rank):
        pulse.SECONDS = 0.0
        real = fit.reseed

        def step(seed, at, index):
            if rank == 0 and at == 2 and index == 0:
                ask(tmp_path / "run-2", 2)
            real(seed, at, index)

        fit.reseed = step
        run(sft(tiny, rows, tmp_path / "run-2", steps=6), console=QUIET)

    assert ended(launched(2, work, tmp_path / "said.txt"), 120.0) == [0, 0]
    found = traces(tmp_path / "run-2")
    assert list(found) == ["rank0-step3.json.gz", "rank1-step3.json.gz"]
    for events in found.values():
        assert any(event.get("name", "").startswith("aten::") for event in events)
    assert not (tmp_path / "run-2" / REQUEST).exists()
    equal(tmp_path / "run-2", trained(1, lambda out: sft(tiny, rows, out, steps=6), tmp_path, "plain"))


def test_status_asks_a_run_that_runs(tiny, rows, tmp_path, monkeypatch, capsys):
    out, told = tmp_path / "out", []
    with pytest.raises(RecipeError, match="is absent: no process runs"):
        status(str(out), [], False, 3)
    monkeypatch.setattr(pulse, "SECONDS", 0.0)
    real = fit.reseed

    def step(seed, at, index):
        if at == 2 and not told:
            told.append(status(str(out), [], False, 1))
        real(seed, at, index)

    monkeypatch.setattr(fit, "reseed", step)
    run(sft(tiny, rows, out, steps=4), console=QUIET)
    assert told == [0] and list(traces(out)) == ["rank0-step3.json.gz"]
    assert "asked for a trace of 1 steps" in capsys.readouterr().err


def test_a_request_is_taken_once_and_a_broken_one_is_none(tmp_path):
    assert asked(tmp_path) == 0
    ask(tmp_path, 3)
    assert (asked(tmp_path), asked(tmp_path)) == (3, 0)
    for text in ("{", "[]", '{"steps": "many"}', '{"steps": -1}'):
        (tmp_path / REQUEST).write_text(text)
        assert (asked(tmp_path), (tmp_path / REQUEST).exists()) == (0, False)
