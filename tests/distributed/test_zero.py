"""DeepSpeed's ranks give what one process gives: stages, offload, adapters, families, resume."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from llmkit import Sft, load_recipe, run
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.parallel.node import Zero
from tests.adapters.properties import folder
from tests.distributed import QUIET, equal, lines, sft, together, trained, weights

LORA, FULL = {"kind": "lora", "rank": 4}, {"kind": "none"}
ADAMW = {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1, "clip": 0.5}
SMALL = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
CUT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000, "sub_group_size": 10_000}
CUT |= {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 1000}
"""No weight of a tiny model is small enough to stay whole, and buckets and groups have seams."""
AWAY = {"optimizer": "cpu", "params": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, for all forked ranks."""
    pytest.importorskip("deepspeed")
    from llmkit.parallel.zero_engine import imported

    imported("cpu")


def zero(tmp_path, stage, **offload):
    said = {"stage": stage, **SMALL, **(CUT if stage == 3 else {})}
    for key, place in offload.items():
        said["offload_optimizer" if key == "optimizer" else "offload_param"] = {"device": place}
    path = tmp_path / f"ds-{stage}-{len(offload)}.json"
    path.write_text(json.dumps({"zero_optimization": said, "gradient_clipping": "auto", "optimizer": {"lr": "auto"}}))
    return {"strategy": {"kind": "zero", "stage": stage, "offload": offload, "config": str(path)}}


def same(world, model, rows, tmp_path, parallel, tol=1e-5, **more):
    """Trains alone and by ranks that share; gives the folders."""

    def make(out):
        shared = {} if out.name == "run-1" else {"parallel": parallel}
        return sft(model, rows, out, **shared, **more)

    alone, several = trained(1, make, tmp_path, "run"), tmp_path / "shared"
    together(world, lambda rank: run(make(several), console=QUIET), tmp_path)
    equal(several, alone, tol)
    assert lines(alone)[0]["loss"] != lines(alone)[-1]["loss"]  # the control: it learns
    return alone, several


CASES = [(1, LORA, {}), (2, FULL, {}), (3, LORA, {}), (3, FULL, AWAY)]
MORE = [(1, FULL, {}), (2, LORA, {}), (3, FULL, {}), (1, FULL, {"optimizer": "cpu"}), (2, LORA, {"optimizer": "cpu"})]
MORE += [(3, LORA, {"optimizer": "cpu"}), (3, LORA, {"params": "cpu"})]


def named(case):
    return "-".join([str(case[0]), case[1]["kind"], *case[2]])


@pytest.mark.parametrize("case", CASES, ids=named)
def test_ranks_equal_one_process(case, tiny, rows, tmp_path):
    stage, adapter, offload = case
    same(2, tiny, rows, tmp_path, zero(tmp_path, stage, **offload), adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=named)
@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_and_places(world, case, tiny, rows, tmp_path):
    stage, adapter, offload = case
    same(world, tiny, rows, tmp_path, zero(tmp_path, stage, **offload), adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral", "qwen3_moe"])
def test_families(family, adapter, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}  # LoRA from its zero start is steep at a larger rate
    same(2, folder(family), rows, tmp_path, zero(tmp_path, 3), adapter=adapter, optim=optim)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "more",
    [
        {"memory": {"recompute": "full"}},
        {"adapter": FULL, "memory": {"recompute": "full"}},
        {"adapter": FULL, "precision": "bf16_mixed"},
        {"adapter": FULL, "precision": "bf16"},
        {"adapter": FULL, "precision": "fp16_mixed"},
        {"adapter": LORA | {"init": "pissa"}},
        {"adapter": LORA, "quant": {"kind": "bnb_nf4"}},
        {"adapter": FULL, "loss": {"label_smoothing": 0.1}},
        {"adapter": FULL, "optim": {"kind": "lion", "lr": 1e-3}},
    ],
    ids=["recompute-lora", "recompute-full", "bf16_mixed", "bf16", "fp16_mixed", "pissa", "nf4", "smooth", "lion"],
)
def test_ways(stage, more, tiny, rows, tmp_path):
    tol = 1e-5 if "precision" not in more else 3e-2  # 16-bit products of rows that lie otherwise
    same(2, tiny, rows, tmp_path, zero(tmp_path, stage), tol, **more)


@pytest.mark.slow
@pytest.mark.parametrize("world, stage", [(3, 3), (3, 2), (1, 3), (1, 2)])
def test_odd_worlds(world, stage, tiny, rows, tmp_path):
    offload = {"optimizer": "cpu"} if world == 1 else {}
    same(world, tiny, rows, tmp_path, zero(tmp_path, stage, **offload), adapter=FULL)


@pytest.mark.slow
def test_evaluation_and_samples_in_step(tiny, rows, tmp_path):
    source = [{"kind": "jsonl", "path": str(rows)}]
    data = {"train": source, "valid": source, "max_length": 64}
    more = {"data": data, "evaluate": {"every": 2, "samples": 2, "max_tokens": 4}, "adapter": FULL}
    folders = same(2, tiny, rows, tmp_path, zero(tmp_path, 3), **more)
    ours, theirs = (lines(made, "evaluate") for made in folders)
    assert len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["valid.loss"] == pytest.approx(other["valid.loss"], rel=1e-5)
    assert len({(made / "samples.jsonl").read_text() for made in folders}) == 1


def going_on(model, rows, out, parallel, **more):
    options = {"optim": ADAMW, "checkpoint": {"every": 1, "keep": 9}, "adapter": FULL}
    return sft(model, rows, out, parallel=parallel, **(options | more))


def launch(world, make, tmp_path, resume="auto"):
    if world == 1:
        run(make(), console=QUIET, resume=resume)
    else:
        together(world, lambda rank: run(make(), console=QUIET, resume=resume), tmp_path)


def resumed(tmp_path, model, rows, first, then):
    """Three steps in one go, and two of one strategy that another one ends: (world, parallel) each. AdamW with decay
    and clipping, so that what is lost of its state is seen."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    launch(1, lambda: going_on(model, rows, whole, {}), tmp_path)
    launch(first[0], lambda: going_on(model, rows, parted, first[1]), tmp_path)
    status = parted / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "stopped"}))
    launch(then[0], lambda: going_on(model, rows, parted, then[1]), tmp_path, str(parted / "checkpoints" / "step-2"))
    equal(parted, whole, 1e-4)  # AdamW divides by the root of small squares
    for name, tensor in weights(whole).items():
        assert (weights(parted)[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max()


def test_stage_3_goes_on_alone(tiny, rows, tmp_path):
    resumed(tmp_path, tiny, rows, (2, zero(tmp_path, 3)), (1, {}))


def test_replicas_go_on_in_stage_2(tiny, rows, tmp_path):
    resumed(tmp_path, tiny, rows, (2, {"strategy": "ddp"}), (2, zero(tmp_path, 2)))


@pytest.mark.slow
def test_one_process_goes_on_in_others(tiny, rows, tmp_path):
    for place, (world, parallel) in enumerate(
        [(2, zero(tmp_path, 3)), (3, zero(tmp_path, 3)), (2, zero(tmp_path, 1)), (2, zero(tmp_path, 3, **AWAY))]
    ):
        (tmp_path / str(place)).mkdir()
        resumed(tmp_path / str(place), tiny, rows, (1, {}), (world, parallel))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [{}, {"optimizer": "cpu"}], ids=["here", "away"])
def test_a_step_that_is_dropped_leaves_nothing(stage, offload, tiny, rows, tmp_path):
    """The first step of all looks like a spike: neither weights nor moments see it."""
    guard = {"nonfinite": "skip", "spike": 0.999}
    more = {"optim": ADAMW, "guard": guard, "adapter": FULL, "steps": 4}
    alone, several = same(2, tiny, rows, tmp_path, zero(tmp_path, stage, **offload), 1e-4, **more)
    skipped = [line["step"] for line in lines(several) if "skipped" in line]
    assert skipped == [line["step"] for line in lines(alone) if "skipped" in line]


def test_the_configuration_is_the_recipe_s(tiny, rows, tmp_path):
    made = Zero(offload={"optimizer": "cpu"}).settings("bf16_mixed")
    assert made["gradient_clipping"] == 0.0 and "bf16" not in made
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert Zero(stage=1).settings("bf16")["bf16"]["enabled"]


WRONG = [
    ({"train_batch_size": 8}, "batch"),
    ({"gradient_accumulation_steps": 4}, "micro_batch"),
    ({"gradient_clipping": 1.0}, "optim.clip"),
    ({"optimizer": {"type": "AdamW"}}, "optim"),
    ({"scheduler": {"type": "WarmupLR"}}, "schedule"),
    ({"fp16": {"enabled": True}}, "precision"),
    ({"bf16": {"enabled": True}}, "precision is fp32"),
    ({"zero_optimization": {"stage": 2}}, "parallel.strategy.stage is 3"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "parallel.strategy.offload.params"),
    ({"elasticity": {"enabled": True}}, "elasticity"),
    ({"zero_optimization": 3}, "zero_optimization is no JSON object"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer is no JSON object"),
    ({"zero_optimization": {"mics_shard_size": 1}}, "zero_optimization.mics_shard_size lays"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "drop zero_quantized_weights"),
]


def test_a_configuration_whose_values_deepspeed_does_not_take(tiny, rows, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": -5, "overlap_comm": "maybe"}}))
    node = sft(tiny, rows, tmp_path / "run", parallel={"strategy": {"kind": "zero", "config": str(path)}})
    with pytest.raises(RecipeError) as found:
        run(node, console=QUIET)
    assert "reduce_bucket_size: -5 is wrong" in str(found.value) and "overlap_comm: maybe is wrong" in str(found.value)


@pytest.mark.parametrize("said, ours", WRONG, ids=[next(iter(said)) for said, _ in WRONG])
def test_a_configuration_that_contradicts_the_recipe(said, ours, tiny, rows, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(said))
    strategy = {"kind": "zero", "config": str(path)}
    with pytest.raises(RecipeError) as found:
        sft(tiny, rows, tmp_path / "run", parallel={"strategy": strategy}, precision="fp32")
    assert "parallel.strategy.config" in str(found.value)
    assert ours in str(found.value)
    path.write_text(json.dumps(dict.fromkeys(said, "auto")))
    sft(tiny, rows, tmp_path / "run", parallel={"strategy": strategy}, precision="fp32")  # the control


@pytest.mark.parametrize(
    "more, key",
    [
        ({"optim": {"kind": "muon"}}, "optim.kind"),
        ({"optim": {"kind": "adamw_8bit"}}, "optim.kind"),
        ({"memory": {"offload_activations": True}}, "memory.offload_activations"),
        ({"parallel": {"strategy": {"kind": "zero", "stage": 4}}}, "parallel.strategy.stage"),
        ({"parallel": {"strategy": {"kind": "zero", "stage": 2, "offload": {"params": "cpu"}}}}, "offload.params"),
        ({"parallel": {"strategy": {"kind": "zero", "offload": {"optimizer": "nvme"}}}}, "offload.path"),
    ],
    ids=["muon", "8bit", "activations", "stage", "whole", "path"],
)
def test_what_does_not_go_together(more, key, tiny, rows, tmp_path):
    with pytest.raises(RecipeError, match=key):
        sft(tiny, rows, tmp_path / "run", **({"parallel": {"strategy": {"kind": "zero"}}} | more))


def test_degrees_that_zero_has_no_use_for(tiny, rows, tmp_path):
    node = sft(tiny, rows, tmp_path / "run", parallel={"strategy": "zero", "replicate": 2})
    with pytest.raises(RecipeError, match="parallel.replicate: zero shares one model among all ranks"):
        node.parallel.degrees(4)
    assert dataclasses.replace(node.parallel, replicate="auto").degrees(4).shard == 4


def test_a_disk(tiny, rows, tmp_path):
    from llmkit.parallel.zero_engine import check

    try:
        check("cpu", disk=True)
    except ResourceError as cause:
        assert "libaio" in str(cause)
        pytest.skip(str(cause))
    parallel = {"strategy": {"kind": "zero", "offload": {"optimizer": "nvme", "params": "nvme", "path": str(tmp_path)}}}
    same(2, tiny, rows, tmp_path, parallel, adapter=FULL)


def recipe(model, rows, out, tmp_path, stage=3):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"kind: sft\nmodel: {model}\nadapter: {{kind: lora, rank: 4}}\nout: {out}\nsteps: 3\nbatch: {{rows: 12}}\n"
        f"micro_batch: 1\ndata: {{train: [{{kind: jsonl, path: {rows}}}], max_length: 64}}\n"
        "optim: {kind: sgd, lr: 0.5, momentum: 0.0}\nschedule: {kind: constant}\n"
        f"parallel: {{strategy: {{kind: zero, stage: {stage}}}}}\n"
    )
    return path


def test_show_prints_it(tiny, rows, tmp_path, capsys):
    from llmkit.cli.recipes import show

    path = recipe(tiny, rows, tmp_path / "run", tmp_path)
    show(str(path), [], False, False)
    text = capsys.readouterr().out
    assert "# DeepSpeed configuration:" in text
    block = text.split("# DeepSpeed configuration:\n")[1].replace("# ", "")
    assert json.loads(block) == load_recipe(path).stages[0][1].parallel.strategy.settings("auto")
    show(str(path), [], True, False)
    assert json.loads(capsys.readouterr().out)["deepspeed"][""]["zero_optimization"]["stage"] == 3


@pytest.mark.slow
def test_deepspeed_s_own_launcher(tiny, rows, tmp_path):
    out = tmp_path / "run"
    path = recipe(tiny, rows, out, tmp_path)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29731"]
    launcher += ["--module", "llmkit", "run", str(path)]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = trained(1, lambda out: sft(tiny, rows, out, adapter=LORA), tmp_path, "alone")
    equal(out, alone)
    ours = [line for line in done.stdout.splitlines() if "[launch.py" not in line and "[runner.py" not in line]
    assert not [line for line in ours if "DeepSpeed" in line]


@pytest.mark.slow
def test_the_real_model(rows, tmp_path):
    model = "smollm2-135m-instruct-q4"
    more = {"adapter": FULL, "steps": 2, "batch": {"rows": 4}, "optim": {"kind": "sgd", "lr": 0.01, "momentum": 0.0}}
    same(2, model, rows, tmp_path, {"strategy": {"kind": "zero"}}, **more)
    assert isinstance(sft(model, rows, tmp_path / "x"), Sft) and torch.get_num_threads()
