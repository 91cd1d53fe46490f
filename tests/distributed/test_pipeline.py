"""A model whose layers lie on several ranks gives what the whole one gives."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers as hf

from llmkit import Classify, run
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.files import write_json
from llmkit.models.families import tiny as tiny_of
from llmkit.models.heads import Scored
from llmkit.parallel.fits import stages_of
from llmkit.parallel.pipeline import Border, Gone, Stages, tried
from tests.adapters.properties import folder, opened
from tests.conftest import make_model, make_tokenizer
from tests.distributed import QUIET, beside, ended, equal, equal_evaluations, launched, lines, sft, together, trained

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
SLOW = pytest.mark.slow
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])


def both(world, model, rows, tmp_path, split=None, **more):
    """The folders of a run in stages, and of one process."""
    return beside(world, model, rows, tmp_path, split or {"pipeline": world}, **more)


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """Six layers, tied embeddings: do not write into it."""
    made = tmp_path_factory.mktemp("deep") / "model"
    make_model(num_hidden_layers=6).save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


@KINDS
def test_training_equals_one_process(adapter, tiny, rows, tmp_path):
    staged, whole = both(2, tiny, rows, tmp_path, adapter=adapter)
    equal(staged, whole)
    assert lines(whole)[0]["loss"] != lines(whole)[2]["loss"]  # the control: it learns


def test_four_stages_with_a_weight_in_the_first_and_the_last(deep, rows, tmp_path):
    assert hf.AutoConfig.from_pretrained(deep).tie_word_embeddings
    equal(*both(4, deep, rows, tmp_path, adapter=FULL, optim=SGD, guard={"checksum": 1}))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("world", [3, 4])
def test_more_stages(world, adapter, deep, rows, tmp_path):
    equal(*both(world, deep, rows, tmp_path, adapter=adapter, optim=SGD))


def test_two_copies_of_two_stages(tiny, rows, tmp_path):
    equal(*both(4, tiny, rows, tmp_path, {"pipeline": 2, "strategy": "ddp"}, adapter=LORA, optim=SGD))


@pytest.mark.slow
def test_two_copies_of_two_stages_learn_all_weights(deep, rows, tmp_path):
    equal(*both(4, deep, rows, tmp_path, {"pipeline": 2}, adapter=FULL, optim=SGD))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe"])
def test_families_equal_one_process(family, adapter, rows, tmp_path):
    equal(*both(2, folder(family), rows, tmp_path, adapter=adapter, optim=SGD))


STARTS = [{"init": "pissa"}, {"lora_fa": True}, {"rslora": True, "lora_plus": 4.0}, {"dora": True}]


@pytest.mark.slow
@pytest.mark.parametrize("more", STARTS, ids=["pissa", "lora_fa", "lora_plus", "dora"])
def test_kinds_of_lora(more, tiny, rows, tmp_path):
    equal(*both(2, tiny, rows, tmp_path, adapter=LORA | more, optim=SGD))


OTHERS = [{"kind": "ia3"}, {"kind": "vera", "rank": 4}, {"kind": "bottleneck"}]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", OTHERS, ids=[each["kind"] for each in OTHERS])
def test_other_methods(adapter, tiny, rows, tmp_path):
    equal(*both(2, tiny, rows, tmp_path, adapter=adapter, optim=SGD))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "adafactor", "schedule_free", "lion"])
def test_optimizers_of_whole_matrices(kind, deep, rows, tmp_path):
    """Rates by layer and by group too: a stage knows what the others hold. Muon makes its directions in bf16."""
    optim = {"kind": kind, "lr": 1e-4, "layer_decay": 0.9, "groups": [{"match": "*layers.0.*", "factor": 0.5}]}
    equal(*both(2, deep, rows, tmp_path, adapter=FULL, optim=optim), tol=5e-4)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_recompute_noise_and_evaluation(world, tiny, rows, tmp_path):
    """With copies too. Evaluations go through the stages; what the metrics say is what one process says."""
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 64, "packing": {"kind": "none"}}
    data["valid"] = data["train"]
    more = {"memory": {"recompute": "full"}, "data": data, "evaluate": {"every": 2, "samples": 0}, "neftune": 5.0}
    staged, whole = both(world, tiny, rows, tmp_path, {"pipeline": 2}, **more, optim=SGD)
    equal(staged, whole)
    equal_evaluations(staged, whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed", "bf16"])
def test_in_sixteen_bits(precision, tiny, rows, tmp_path):
    """What stages send is of the type that the whole model has between its layers, so that it is the same sum."""
    staged, whole = both(2, tiny, rows, tmp_path, adapter=FULL, optim=SGD, precision=precision)
    equal(staged, whole, tol=1e-2 if precision == "bf16" else 1e-3)  # norms are in 16 bits there


@pytest.mark.slow
def test_classifiers(tiny, tmp_path):
    """The head of a classifier lies in the last stage; its table is what one process writes."""
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"text": "hello world {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(24)))
    given = [{"kind": "jsonl", "path": str(path)}]

    def make(out, **more):
        options = {
            "model": str(tiny),
            "data": {"train": given, "valid": given, "max_length": 64},
            "batch": {"rows": 12},
        }
        options |= {"micro_batch": 4, "steps": 3, "optim": SGD, "schedule": {"kind": "constant"}, "out": str(out)}
        return Classify(**(options | more))

    staged = trained(2, lambda out: make(out, parallel={"pipeline": 2}), tmp_path, "staged")
    whole = trained(1, make, tmp_path, "whole")
    equal(staged, whole)
    assert (staged / "predictions.jsonl").read_text().count("\n") == 24
    measured, expected = lines(staged, "evaluate"), lines(whole, "evaluate")
    assert [line["valid.loss"] for line in measured] == pytest.approx([line["valid.loss"] for line in expected], 1e-5)


def test_all_ranks_log_the_same_and_say_how_long_they_are_idle(tiny, rows, tmp_path):
    staged = trained(2, lambda out: sft(tiny, rows, out, parallel={"pipeline": 2}), tmp_path, "staged")
    first, second = ((path / "metrics.jsonl").read_text().splitlines() for path in (staged, staged / "ranks" / "1"))
    assert len(first) == len(second) > 0
    said = [line for line in first if '"bubble"' in line]
    assert len(said) == 3
    assert lines(staged) == lines(staged / "ranks" / "1")


@pytest.mark.parametrize(
    ("path", "adapter"),
    [
        ([2, 1, 2], LORA),
        pytest.param([2, 1, 2], FULL, marks=SLOW),
        pytest.param([1, 4, 2], FULL, marks=SLOW),
        pytest.param([4, 2, 1], LORA, marks=SLOW),
    ],
)
def test_going_on_with_other_stages(path, adapter, deep, rows, tmp_path):
    """From the checkpoint of a run that was dealt otherwise, twice: the same weights in the end."""

    def go(world, folder):
        more = {"parallel": {"pipeline": world}} if world > 1 else {}
        stage = sft(
            deep, rows, folder, adapter=adapter, optim=ADAMW, steps=3, checkpoint={"every": 1, "keep": 9}, **more
        )
        if world == 1:
            run(stage, console=QUIET)
        else:
            together(world, lambda rank: run(stage, console=QUIET), tmp_path)

    go(1, tmp_path / "straight")
    out = tmp_path / "stopped"
    for done, world in enumerate(path):
        go(world, out)
        if done < 2:  # as if it had ended after so many steps
            for step in range(done + 2, 4):
                shutil.rmtree(out / "checkpoints" / f"step-{step}")
            shutil.rmtree(out / "model")
            write_json(out / "status.json", {"state": "stopped", "step": done + 1})
    equal(out, tmp_path / "straight")


def test_more_stages_than_layers_are_refused_before_any_model_is_loaded(tiny, rows, tmp_path):
    layers = hf.AutoConfig.from_pretrained(tiny).num_hidden_layers
    said, out = tmp_path / "said.txt", tmp_path / "out"
    stage = sft(tiny, rows, out, parallel={"pipeline": layers + 1})
    assert ended(launched(layers + 1, lambda rank: run(stage, console=QUIET), said), 30) == [2] * (layers + 1)
    assert f"{layers + 1} stages cannot share {layers} layers" in said.read_text()
    assert f"use at most {layers}" in said.read_text()


DATA = {"train": [{"kind": "jsonl", "path": "a"}], "valid": [{"kind": "jsonl", "path": "a"}]}
REFUSED = [
    ({"adapter": {"kind": "prompt_tuning"}, "data": DATA | {"packing": "none"}}, "adapter.kind"),
    ({"quant": {"kind": "bnb_nf4"}}, "quant.kind"),
    ({"adapter": FULL, "memory": {"optimizer_in_backward": True}, "micro_batch": 12}, "memory.optimizer_in_backward"),
    ({"parallel": {"strategy": "zero"}}, "parallel.strategy"),
    ({"parallel": {"strategy": "fsdp"}}, "parallel.strategy"),
    ({"parallel": {"tensor": 2}}, "parallel.tensor"),
    ({"parallel": {"context": 2}}, "parallel.context"),
    ({"data": DATA}, "evaluate.samples"),
]


@pytest.mark.parametrize(("more", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_what_cannot_run_in_stages_is_refused(more, key, tiny, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.5, "momentum": 0.0, "clip": 0.0}
    given = {"optim": optim, "evaluate": {"samples": 0} if key != "evaluate.samples" else {}} | more
    with pytest.raises(RecipeError, match=r"parallel\.pipeline") as refused:
        sft(tiny, rows, tmp_path / "out", **(given | {"parallel": more.get("parallel", {}) | {"pipeline": 2}}))
    assert any(problem.key == key for problem in refused.value.problems), refused.value
    sft(tiny, rows, tmp_path / "out", **given)  # the control


def test_a_stage_that_dies_is_named(tiny, rows, tmp_path):
    said = tmp_path / "said.txt"
    stage = sft(tiny, rows, tmp_path / "out", parallel={"pipeline": 2}, steps=2000, micro_batch=1)
    pids = launched(2, lambda rank: run(stage, console=QUIET), said)
    wait_for(tmp_path / "out" / "metrics.jsonl", 3)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    assert ended(pids, 20) == [6, -9]
    assert time.monotonic() - began < 10
    assert "died in" in said.read_text()


def test_layers_are_dealt_evenly_with_the_head():
    assert stages_of([5] * 8, 0, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert stages_of([5] * 8, 10, 2) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert stages_of([1, 1, 1, 1, 8], 0, 2) == [0, 0, 0, 0, 1]
    assert stages_of([1] * 3, 1000, 3) == [0, 1, 2]
    with pytest.raises(RecipeError, match="4 stages cannot share 3 layers"):
        stages_of([1] * 3, 0, 4)


def test_a_rank_keeps_its_own_layers_alone(deep):
    model = opened(deep).model
    whole = sum(p.numel() for p in model.parameters())
    stages = Stages(model, 3)
    held = {}
    for stage in range(3):
        stages.show(stage)
        held[stage] = dict(model.named_parameters())
    assert any("embed_tokens" in name for name in held[0]) and not any("embed_tokens" in name for name in held[1])
    assert "lm_head.weight" in held[2] and "model.norm.weight" in held[2]
    stages.show(None)
    stages.settle(1)
    left = sum(p.numel() for p in held[0].values()) + sum(p.numel() for p in held[2].values())
    assert left == 0 < sum(p.numel() for p in model.parameters()) < whole / 2


@pytest.mark.parametrize(
    ("family", "why"),
    [("Granite", "does more than to go through its layers"), ("GPT-2", "no plan"), ("Gemma-3n", "does not speak of")],
)
def test_families_that_cannot_run_in_stages_are_refused_by_name(family, why):
    """Granite scales what it is given before its layers: in every stage anew."""
    model = tiny_of(family)
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot run in 2 stages: .*{why}"):
        tried(Stages(model, 2), Scored(model, 8), nullcontext)


def test_what_stages_come_to_is_what_the_whole_gives():
    model = tiny_of("Llama")
    borders = tried(Stages(model, 2), Scored(model, 8), nullcontext)
    assert borders == [Border(model.config.hidden_size, torch.float32)]
    assert not any(isinstance(module, Gone) for module in model.modules())  # it is whole again


@pytest.mark.slow
def test_a_run_in_stages_stops_and_goes_on(deep, rows, tmp_path):
    """SIGTERM to one stage: all save the last step and say stopped; the next start ends as one that never stopped."""
    out, said = tmp_path / "out", tmp_path / "said.txt"
    make = partial(sft, deep, rows, parallel={"pipeline": 2}, optim=SGD, steps=12)
    pids = launched(2, lambda rank: run(make(out), console=QUIET), said)
    wait_for(out / "metrics.jsonl", 2)
    os.kill(pids[1], signal.SIGTERM)
    assert ended(pids, 40) == [75, 75], said.read_text()
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    together(2, lambda rank: run(make(out), console=QUIET), tmp_path, 180)
    straight = trained(2, make, tmp_path, "straight", 180)
    equal(out, straight, tol=1e-6)
    assert [line["step"] for line in lines(out)] == list(range(1, 13))


def wait_for(metrics, count):
    until = time.monotonic() + 40
    while time.monotonic() < until and not (metrics.is_file() and metrics.read_text().count("\n") > count):
        time.sleep(0.02)
