"""Parts of parts: a model cut over the ranks of `tensor`, and each part again by fsdp or copied by ddp."""

import json
import shutil

import pytest
import transformers as hf

from llmkit import Classify, run
from llmkit.core.files import write_json
from tests.adapters.properties import folder
from tests.distributed import QUIET, equal, lines, sft, together, trained
from tests.distributed.test_tensor import tiny_of

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
ALONE = (1, {})
FSDP, DDP = (4, {"tensor": 2, "strategy": "fsdp"}), (4, {"tensor": 2, "strategy": "ddp"})
TENSOR, SHARDS, ZERO = (2, {"tensor": 2}), (3, {"strategy": "fsdp"}), (2, {"strategy": {"kind": "zero", "stage": 3}})
NAMES = {id(ALONE): "one", id(FSDP): "fsdp", id(DDP): "ddp", id(TENSOR): "tensor", id(SHARDS): "shards"}
NAMES |= {id(ZERO): "zero", str(FULL): "full", str(LORA): "lora"}
UNPACKED = {"packing": {"kind": "none"}}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def name(value):
    return NAMES.get(id(value)) or NAMES.get(str(value)) or str(value)


def same(way, model, rows, tmp_path, tol=1e-5, **more):
    """The folders of a run of some ranks and of one process, which are equal."""
    world, parallel = way
    options = {"optim": SGD} | more
    ours = trained(world, lambda out: sft(model, rows, out, parallel=parallel, **options), tmp_path, "cut", 180.0)
    theirs = trained(1, lambda out: sft(model, rows, out, **options), tmp_path, "whole")
    equal(ours, theirs, tol)
    return ours, theirs


def source(rows):
    return [{"kind": "jsonl", "path": str(rows)}]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_families_over_replicas(family, adapter, rows, tmp_path):
    same(DDP, folder(family), rows, tmp_path, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "qwen3_moe"])
def test_rows_without_packing(family, way, adapter, rows, tmp_path):
    data = {"train": source(rows), "max_length": 64, **UNPACKED}
    same(way, folder(family), rows, tmp_path, adapter=adapter, data=data, micro_batch=2, batch={"rows": 11})


@pytest.mark.slow
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_fewer_rows_than_ranks(way, rows, tmp_path):
    data = {"train": source(rows), **UNPACKED}
    same(way, folder("llama"), rows, tmp_path, adapter=FULL, data=data, batch={"rows": 1})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
@pytest.mark.parametrize(
    "way",
    [
        (6, {"tensor": 2, "strategy": "fsdp"}),
        (8, {"tensor": 2, "strategy": "fsdp", "replicate": 2, "shard": 2}),
        (4, {"tensor": 4, "strategy": "fsdp"}),
        (6, {"tensor": 2, "strategy": "ddp"}),
    ],
    ids=["shard 3", "copies", "shard 1", "replicate 3"],
)
def test_other_grids(way, family, adapter, rows, tmp_path):
    same(way, folder(family), rows, tmp_path, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("way", [FSDP, DDP, (6, FSDP[1])], ids=["fsdp", "ddp", "fsdp over 3"])
def test_fused_projections_of_one_shared_head(way, adapter, rows, tmp_path):
    """Of the rows of q, k and v in one, those of q lie on one rank each, and those of k and v on both."""
    model = tiny_of(hf.Phi3Config, tmp_path, num_key_value_heads=1)
    same(way, model, rows, tmp_path, adapter=adapter, guard={"checksum": 1})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize(
    "more",
    [{"memory": {"recompute": "full"}}, {"memory": {"recompute": "selective"}}, {"guard": {"checksum": 1}}],
    ids=["full", "selective", "checksum"],
)
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_levers(way, more, adapter, rows, tmp_path):
    same(way, folder("phi3"), rows, tmp_path, adapter=adapter, **more)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "eva"])
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_starts_that_read_the_weights(way, init, tiny, rows, tmp_path):
    same(way, tiny, rows, tmp_path, adapter=LORA | {"init": init})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_a_classifier(way, adapter, tiny, tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [{"text": "the quick fox " * (1 + i % 4) + "abc"[i % 3], "label": "abc"[i % 3]} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = {"model": str(tiny), "data": {"train": source(path), "max_length": 64}, "adapter": adapter, "optim": SGD}
    common |= {"batch": {"rows": 8}, "micro_batch": 2, "steps": 3}

    def make(out, **more):
        return Classify(out=str(out), **common, **more)

    ours = trained(way[0], lambda out: make(out, parallel=way[1]), tmp_path, "cut", 180.0)
    equal(ours, trained(1, make, tmp_path, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"offload": "cpu"}, {"reshard": False}], ids=["offload", "kept"])
def test_where_weights_lie(more, rows, tmp_path):
    way = (4, {"tensor": 2, "strategy": {"kind": "fsdp", **more}})
    same(way, folder("qwen3"), rows, tmp_path, adapter=FULL)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=name)
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_mixed_types(way, adapter, rows, tmp_path):
    """The parts of a product are rounded to 16 bits before they are summed: to 2^-8 of a number, a few times over."""
    same(way, folder("qwen3"), rows, tmp_path, 2e-2, adapter=adapter, precision="bf16_mixed")


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "lion", "schedule_free"])
@pytest.mark.parametrize("way", [FSDP, DDP], ids=name)
def test_optimizers(way, optim, rows, tmp_path):
    settings = {"kind": optim, "lr": 1e-3} | ({} if optim == "lion" else {"eps": 1e-3})
    same(way, folder("qwen3"), rows, tmp_path, 1e-4, adapter=FULL, optim=settings)


@pytest.mark.parametrize(
    ("way", "adapter"), [(FSDP, FULL), slow(FSDP, LORA), slow(DDP, FULL), slow(DDP, LORA)], ids=name
)
def test_evaluations_answers_and_the_best_checkpoint(way, adapter, tiny, rows, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(json.dumps({"prompt": "hello", "completion": f" zqx {i} jk"}) for i in range(6)) + "\n")
    data = {"train": source(rows), "valid": source(odd), "max_length": 64}
    lr = 2.0 if adapter == FULL else 0.5
    more = {"data": data, "evaluate": {"every": 1, "samples": 2, "max_tokens": 4}, "optim": SGD | {"lr": lr}}
    ours, theirs = same(
        way, tiny, rows, tmp_path, adapter=adapter, checkpoint={"best": "valid.loss", "every": 1}, **more
    )
    best = [json.loads((folder / "manifest.json").read_text())["best_step"] for folder in (ours, theirs)]
    assert best[0] == best[1] and (best[0] < 3) == (adapter == FULL)  # the control: one goes back, one does not
    found = [[line["valid.loss"] for line in lines(folder, "evaluate")] for folder in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], 1e-5) and len(found[0]) == 4
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text() != ""


WAYS = [(FSDP, TENSOR), (FSDP, ALONE), (FSDP, DDP), (FSDP, SHARDS), (FSDP, ZERO)]
WAYS += [(ALONE, FSDP), (DDP, FSDP), (SHARDS, FSDP), (ZERO, FSDP), (FSDP, FSDP), (DDP, SHARDS), (ZERO, DDP)]


MORE = [(a, b, adapter, family) for a, b in WAYS for adapter in (FULL, LORA) for family in ("phi3", "qwen3")]


@pytest.mark.parametrize(("first", "then", "adapter", "family"), [slow(*case) for case in MORE], ids=name)
def test_going_on(first, then, adapter, family, rows, tmp_path):
    optim = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}

    def go(way, out):
        more = {"adapter": adapter, "optim": optim, "steps": 4, "checkpoint": {"every": 2}}
        stage = sft(folder(family), rows, out, parallel=way[1], **more)
        if way[0] == 1:
            run(stage, console=QUIET)
        else:
            together(way[0], lambda rank: run(stage, console=QUIET), tmp_path, 180.0)

    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    go(ALONE, straight)
    go(first, stopped)
    for path in (stopped / "checkpoints" / "step-4", stopped / "model"):
        shutil.rmtree(path)
    write_json(stopped / "status.json", {"state": "stopped", "step": 2})
    go(then, stopped)
    equal(stopped, straight)
