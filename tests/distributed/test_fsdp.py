"""What is cut over ranks gives what one process gives."""

import json
import shutil

import pytest

from llmkit import run
from llmkit.core.errors import RecipeError
from tests.adapters.properties import folder
from tests.distributed import QUIET, equal, lines, sft, trained

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
FSDP = {"strategy": {"kind": "fsdp"}}
HYBRID = {"strategy": {"kind": "fsdp"}, "replicate": 2, "shard": 2}


def same(world, model, rows, tmp_path, parallel=FSDP, tol=1e-5, seconds=60.0, **options):
    """The folder of a run on `world` ranks, which equals that of one process."""

    def alone(out):
        return sft(model, rows, out, **options)

    def several(out):
        return sft(model, rows, out, parallel=parallel, **options)

    ours, theirs = trained(world, several, tmp_path, "run", seconds), trained(1, alone, tmp_path, "run")
    equal(ours, theirs, tol)
    return ours


def slow(*values):
    """A case that is not among the fast ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("world", "adapter"),
    [(2, FULL), (3, LORA), slow(2, LORA), slow(3, FULL)],
    ids=["2-full", "3-lora", "2-lora", "3-full"],
)
def test_ranks_equal_one_process(world, adapter, tiny, rows, tmp_path):
    seen = lines(same(world, tiny, rows, tmp_path, adapter=adapter))
    assert seen[0]["loss"] != seen[2]["loss"]  # the control: it learns


@pytest.mark.parametrize("family", ["qwen3_moe", slow("qwen3"), slow("gemma3"), slow("mixtral")])
def test_families(family, rows, tmp_path):
    same(2, folder(family), rows, tmp_path, adapter=FULL)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("world", [3, 4])
def test_families_on_more_ranks(world, adapter, family, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}  # LoRA from its zero start is steep at a larger rate
    same(world, folder(family), rows, tmp_path, adapter=adapter, optim=optim)


@pytest.mark.parametrize("adapter", [FULL, slow(LORA)], ids=["full", "lora"])
def test_copies_of_what_is_cut(adapter, tiny, rows, tmp_path):
    same(4, tiny, rows, tmp_path, HYBRID, adapter=adapter)


@pytest.mark.parametrize("recompute", ["full", slow("selective")])
def test_recompute(recompute, tiny, rows, tmp_path):
    same(2, tiny, rows, tmp_path, adapter=FULL, memory={"recompute": recompute})


@pytest.mark.parametrize("more", [{"offload": "cpu"}, slow({"reshard": False})], ids=["offload", "kept"])
def test_where_weights_lie(more, tiny, rows, tmp_path):
    same(2, tiny, rows, tmp_path, {"strategy": {"kind": "fsdp", **more}}, adapter=FULL)


@pytest.mark.parametrize(
    ("world", "adapter"), [(4, FULL), slow(2, FULL), slow(4, LORA)], ids=["4-full", "2-full", "4-lora"]
)
def test_rows_split_over_ranks(world, adapter, tiny, rows, tmp_path):
    same(world, tiny, rows, tmp_path, FSDP | {"context": 2}, adapter=adapter)


@pytest.mark.parametrize("adapter", [FULL, slow(LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("parallel", [FSDP, slow(HYBRID)], ids=["fsdp", "hybrid"])
def test_mixed_types(parallel, adapter, tiny, rows, tmp_path):
    world = 4 if parallel is HYBRID else 2
    same(world, tiny, rows, tmp_path, parallel, tol=2e-3, adapter=adapter, precision="bf16_mixed")


def test_quantised_base(tiny, rows, tmp_path):
    same(2, tiny, rows, tmp_path, quant={"kind": "bnb_nf4"})


@pytest.mark.slow
def test_more_ranks_than_rows(tiny, rows, tmp_path):
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "packing": {"kind": "none"}}
    same(3, tiny, rows, tmp_path, batch={"rows": 2}, data=data)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "sgd", "lion", "schedule_free"])
def test_optimizers(optim, tiny, rows, tmp_path):
    settings = {"kind": optim, "lr": 1e-3} | ({"eps": 1e-3} if optim in ("adamw", "schedule_free") else {})
    same(2, tiny, rows, tmp_path, adapter=FULL, optim=settings, tol=1e-4)


@pytest.mark.parametrize("optim", ["adamw_8bit", "muon", "adafactor", "lion_8bit", "galore", "apollo"])
def test_optimizers_that_need_whole_matrices_are_refused(optim, tiny, rows, tmp_path):
    with pytest.raises(RecipeError, match=f"{optim} needs whole matrices"):
        run(sft(tiny, rows, tmp_path / "run", optim={"kind": optim}, parallel=FSDP), console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"memory": {"optimizer_in_backward": True}, "optim": {"kind": "sgd", "clip": 0}}, "applies each before"),
        ({"quant": {"kind": "bnb_int8"}}, "scales of 8-bit weights"),
        ({"parallel": {"strategy": "fsdp", "shard": 3}}, "shard 3 is 3, and there are 1 ranks"),
    ],
    ids=["in backward", "int8", "ranks"],
)
def test_misfits_are_told_before_ranks_join(more, said, tiny, rows, tmp_path):
    with pytest.raises(RecipeError, match=said):
        run(sft(tiny, rows, tmp_path / "run", **({"parallel": FSDP} | more)), console=QUIET)


def measured(tiny, rows, tmp_path, **more):
    """Options of a run that is evaluated and answers after each step, on rows that it learns nothing of."""
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(json.dumps({"prompt": "hello", "completion": f" zqx {i} jk"}) for i in range(6)) + "\n")
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "valid": [{"kind": "jsonl", "path": str(odd)}]}
    evaluate = {"every": 1, "samples": 3, "max_tokens": 6}
    return {"data": data | {"max_length": 64}, "evaluate": evaluate} | more


@pytest.mark.parametrize(("adapter", "lr"), [(FULL, 2.0), slow(LORA, 0.5)], ids=["full", "lora"])
def test_evaluations_answers_and_the_best_checkpoint(adapter, lr, tiny, rows, tmp_path):
    more = {"adapter": adapter, "optim": {"kind": "sgd", "lr": lr, "momentum": 0.0}}
    options = measured(tiny, rows, tmp_path, checkpoint={"best": "valid.loss", "every": 1}, **more)
    ours = same(2, tiny, rows, tmp_path, **options)
    best, theirs = (json.loads((tmp_path / f"run-{n}" / "manifest.json").read_text())["best_step"] for n in (2, 1))
    assert best == theirs and (best < 3) == (adapter == FULL)  # the control: one goes back, one does not
    check_measured(ours, tmp_path / "run-1")


def check_measured(ours, theirs):
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text() != ""
    found = [lines(folder, "evaluate") for folder in (ours, theirs)]
    assert [line["valid.loss"] for line in found[0]] == pytest.approx([line["valid.loss"] for line in found[1]], 1e-5)
    assert len(found[0]) == 4


@pytest.mark.slow
def test_evaluations_see_averaged_weights_and_steps_do_not(tiny, rows, tmp_path):
    optim = {"kind": "schedule_free", "lr": 1e-2, "eps": 1e-3}
    ours = same(2, tiny, rows, tmp_path, tol=1e-4, **measured(tiny, rows, tmp_path, adapter=FULL, optim=optim))
    check_measured(ours, tmp_path / "run-1")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_starts(init, tiny, rows, tmp_path):
    same(2, tiny, rows, tmp_path, adapter={"kind": "lora", "rank": 4, "init": init})


ALONE, DDP = {}, {"strategy": "ddp"}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, DDP), (3, FSDP)),
        slow((2, FSDP), (2, FSDP)),
        slow((2, FSDP), (2, DDP)),
        slow((2, FSDP), (1, ALONE)),
        slow((1, ALONE), (4, HYBRID)),
    ],
    ids=["ddp to fsdp", "fsdp", "fsdp to ddp", "fsdp to one", "one to hybrid"],
)
def test_going_on(first, then, tiny, rows, tmp_path):
    optim = {"kind": "adamw", "lr": 1e-2, "eps": 1e-3}
    options = {"adapter": FULL, "optim": optim, "steps": 4, "checkpoint": {"every": 2, "keep": 4}}
    whole = trained(1, lambda out: sft(tiny, rows, out, **options), tmp_path, "whole")
    begun = trained(first[0], lambda out: sft(tiny, rows, out, parallel=first[1], **options), tmp_path, "begun")
    folder = tmp_path / f"begun-{then[0]}"
    if folder != begun:
        begun.rename(folder)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    shutil.rmtree(folder / "model")
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    equal(
        trained(then[0], lambda out: sft(tiny, rows, out, parallel=then[1], **options), tmp_path, "begun"), whole, 1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "tol"), [(LORA, 1.6e-5), (FULL, 1e-5)], ids=["lora", "full"])
def test_a_real_model(adapter, tol, rows, tmp_path):
    """With LoRA to twice what one process differs by from itself where it takes two rows a forward."""
    optim = {"kind": "sgd", "lr": 1e-2, "momentum": 0.0}
    batch = {"batch": {"rows": 4}, "steps": 3}
    same(2, "smollm2-135m-instruct-q4", rows, tmp_path, tol=tol, seconds=1200.0, adapter=adapter, optim=optim, **batch)
