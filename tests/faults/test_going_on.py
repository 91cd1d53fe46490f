"""What a run that goes on must share with the one that it continues, and what it ends as."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from llmkit.checkpoint import state
from llmkit.core.errors import RecipeError
from llmkit.core.run import Grants
from llmkit.recipe.load import load_recipe
from llmkit.stages import build_training, resume
from tests.faults import TIMINGS, go, in_child, killed_after, sft


def test_resume_from_a_folder_is_for_the_stage_that_it_is_of(tiny, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = f"kind: sft, model: {tiny}, data: {{train: [{{kind: jsonl, path: {world[0]}}}]}}, batch: {{rows: 8}}"
    more = "steps: 3, checkpoint: {every: 1, keep: 9}"
    (tmp_path / "p.yaml").write_text(
        f"out: o\nstages:\n- {{name: a, {stage}, {more}}}\n- {{name: b, {stage}, {more}, seed: 1}}\n"
    )
    go(load_recipe("p.yaml"))
    shutil.copytree("o/a/checkpoints/step-1", "elsewhere/step-1")
    for out in ("a", "b"):  # as if both had been killed at the end
        (tmp_path / "o" / out / "status.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"--resume elsewhere/step-1 is of no stage; fix: give o/NAME/checkpoints"):
        go(load_recipe("p.yaml"), resume="elsewhere/step-1")
    go(load_recipe("p.yaml"), resume="o/b/checkpoints/step-1")
    said = [(tmp_path / "o" / name / "run.log").read_text() for name in ("a", "b")]
    assert "going on from step 3 of 3" in said[0] and "going on from step 1 of 3" in said[1]


@pytest.mark.parametrize("accepted", [True, False])
def test_c13_a_micro_batch_and_a_recompute_that_are_accepted_are_used(accepted, tiny, world, half):
    node = sft(tiny, world[0], half, micro_batch=1, memory={"recompute": "full"})
    facts = json.loads((half / "checkpoints" / "step-4" / "state.json").read_text())
    assert (facts["micro_batch"], facts["recompute"]) == (2, False)
    if not accepted:
        with pytest.raises(RecipeError) as caught:
            go(node)
        assert {p.key for p in caught.value.problems} == {"recipe.micro_batch", "recipe.memory.recompute"}
        return
    made = go(node, grants=Grants(accept=("micro_batch", "memory.recompute", "micro_bach", "recompute", "xyz")))
    log = (half / "run.log").read_text()
    for strange in (
        "micro_bach names no key of this run, did you mean micro_batch?",
        "recompute names no key",
        "xyz names",
    ):
        assert f"--accept {strange}" in log
    assert "--accept micro_batch" not in log  # the control
    assert (made.manifest["micro_batch"], made.manifest["recompute"]) == (1, "full")


HELD = {
    "adamw_8bit": {"adapter": "none", "optim": {"kind": "adamw_8bit", "lr": 1e-3}},
    "nf4": {"quant": "bnb_nf4", "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "bf16": {"precision": "bf16", "adapter": "none"},
    "bf16_mixed": {"precision": "bf16_mixed"},
}


@pytest.mark.parametrize("name", HELD)
def test_a_killed_run_ends_as_if_it_had_not_been_whatever_it_holds(name, tiny, world, tmp_path):
    def node(out):
        return sft(tiny, world[0], tmp_path / out, **HELD[name])

    go(node("whole"))
    assert in_child(lambda: killed_after(4, lambda: go(node("killed")))) == -signal.SIGKILL
    go(node("killed"))
    kinds = {value.dtype for value in state.load(tmp_path / "whole" / "checkpoints" / "step-6")[0].values()}
    assert {"adamw_8bit": torch.uint8, "bf16": torch.bfloat16}.get(name, torch.float32) in kinds  # it is what it says
    ends = [state.load(tmp_path / out / "checkpoints" / "step-6") for out in ("whole", "killed")]
    assert all(torch.equal(value, ends[1][0][key]) for key, value in ends[0][0].items())
    lines = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("whole", "killed")]
    kept = [[{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in found] for found in lines]
    assert kept[0] == kept[1]


def test_c11_each_sample_once_an_epoch_although_killed_in_the_middle_of_it(tiny, world, tmp_path):
    """The ledger is written by the loop's own data hook; of a step that was done twice the last time counts."""
    from llmkit.stages import build_training

    ledger, out, real = tmp_path / "ledger", tmp_path / "run", build_training._step_data

    def noted(job, contexts, index):
        data = real(job, contexts, index)
        with ledger.open("a") as file:
            file.write(json.dumps([index, data.epoch, sorted(i for batch in data.batches for i in batch.ids)]) + "\n")
        return data

    def work(kill):
        build_training._step_data = noted
        node = sft(tiny, world[0], out, steps=9)  # 20 rows in steps of 8: three epochs of three steps
        killed_after(kill, lambda: go(node)) if kill else go(node)

    assert [in_child(lambda kill=kill: work(kill)) for kill in (3, 6, 0)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(lines) > 9  # some steps were done twice
    last = {index: (epoch, ids) for index, epoch, ids in lines}
    assert sorted(last) == list(range(9))
    assert all(last[index] == (epoch, ids) for index, epoch, ids in lines)
    for epoch in range(3):
        seen = [i for e, ids in last.values() if e == epoch for i in ids]
        assert sorted(seen) == list(range(20))


def test_c13_every_changed_key_must_be_named(tiny, world, half, capfd):
    changed = sft(tiny, world[0], half, optim={"kind": "adamw", "lr": 1e-3}, seed=5)
    for accept, left in (
        ((), {"recipe.optim.lr", "recipe.seed"}),
        (("optim.lr",), {"recipe.seed"}),
        (("recipe.optim",), {"recipe.seed"}),
        (("optim.l", "see"), {"recipe.optim.lr", "recipe.seed"}),
    ):
        with pytest.raises(RecipeError) as caught:
            go(changed, grants=Grants(accept=accept))
        assert {problem.key for problem in caught.value.problems} == left
        assert all("was " in problem.what and " and is " in problem.what for problem in caught.value.problems)
    capfd.readouterr()
    go(changed, grants=Grants(accept=("optim.lr", "seed")))
    said = capfd.readouterr().err
    assert "going on with a change: recipe.optim.lr: 0.0002 -> 0.001" in said
    assert "going on with a change: recipe.seed: 0 -> 5" in said and "going on from step 4 of 6" in said


@pytest.fixture
def written(world, tmp_path, monkeypatch):
    """A recipe that takes its rate and its model from the environment, and the folder of its run."""
    monkeypatch.setenv("LR", "2e-4")
    text = (world[1] / "resolved.yaml").read_text()
    assert "  lr: 0.0002  #" in text
    (tmp_path / "r.yaml").write_text(text.replace("  lr: 0.0002  #", "  lr: ${env:LR}  #"))
    return lambda: load_recipe(tmp_path / "r.yaml", [f"out={tmp_path / 'run'}"])


def test_c13_another_value_of_the_environment_is_named_and_not_shown(written, tmp_path, monkeypatch, capfd):
    assert in_child(lambda: killed_after(4, lambda: go(written()))) == -signal.SIGKILL
    monkeypatch.setenv("LR", "0.0314159")
    with pytest.raises(RecipeError) as caught:
        go(written())
    (problem,) = caught.value.problems
    assert problem.key == "environment.optim.lr" and problem.what.count("${env:LR} (") == 2
    assert "0314159" not in str(problem)
    capfd.readouterr()
    made = go(written(), grants=Grants(accept=("optim.lr",)))
    assert "going on with a change: environment.optim.lr: ${env:LR} (" in capfd.readouterr().err
    trained = [json.loads(line) for line in (made.folder / "metrics.jsonl").open() if '"train"' in line]
    assert trained[3]["lr"] < 2e-4 and trained[4]["lr"] > 2e-4
    assert not [p for p in made.folder.rglob("*.json") if "0314159" in p.read_text()]


@pytest.mark.parametrize(("name", "key"), [("processor", "processor"), ("rows", "kernels.rms_norm")])
def test_c13_another_kind_of_machine_is_named_and_can_be_accepted(name, key, tiny, world, half, monkeypatch):
    other = {"processor": "Another CPU", "rows": {"rms_norm": "torch: no compiler"}}[name]
    monkeypatch.setattr(resume, name, lambda: other)
    with pytest.raises(RecipeError) as caught:
        go(sft(tiny, world[0], half))
    assert key in {problem.key for problem in caught.value.problems}
    go(sft(tiny, world[0], half), grants=Grants(accept=(key.partition(".")[0],)))


def test_c13_another_attention_than_the_one_that_was_used_is_named(tiny, world, half, monkeypatch):
    real = build_training.build

    def other(*args):
        made = real(*args)
        return replace(made, loaded=replace(made.loaded, attention="eager"))

    monkeypatch.setattr(build_training, "build", other)
    with pytest.raises(RecipeError, match="attention: was .* when the run began and is eager; fix: restore it, or"):
        go(sft(tiny, world[0], half))


def test_c14_a_finished_run_names_another_value_of_the_environment(written, monkeypatch):
    go(written())
    go(written())  # the control
    monkeypatch.setenv("LR", "1e-3")
    with pytest.raises(RecipeError, match=r"optim\.lr: is \$\{env:LR\} \(\w{8}\), and .* was made with \$\{env:LR\} "):
        go(written())


def test_c14_a_finished_run_says_where_it_ended_and_nothing_of_it_changes(tiny, world, capfd):
    held = {path: path.stat().st_mtime_ns for path in world[1].rglob("*")}
    assert go(sft(tiny, world[0], world[1])).manifest["step"] == 6
    assert capfd.readouterr().err == f"llmkit: {world[1]} is done already, at step 6 of 6\n"
    assert {path: path.stat().st_mtime_ns for path in world[1].rglob("*")} == held
