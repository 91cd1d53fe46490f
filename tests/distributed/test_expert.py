"""A mixture model whose experts lie on several ranks trains as on one."""

import copy
import shutil

import pytest
import torch
import torch.distributed as dist

from llmkit import run
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_json
from llmkit.core.ranks import ranks
from llmkit.models.families import FAMILIES, tiny
from llmkit.models.plans import plans_experts
from llmkit.parallel.expert import cut
from llmkit.parallel.fits import check_experts
from llmkit.parallel.group import joined
from llmkit.parallel.sums import buckets
from llmkit.parallel.tensor import Place
from tests.adapters.properties import folder
from tests.distributed import QUIET, beside, ended, equal, equal_evaluations, launched, lines, sft, together

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
OF_EXPERTS = {"kind": "lora", "rank": 3, "parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADAPTERS = {"full": FULL, "lora": LORA, "experts": OF_EXPERTS}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
SLOW = pytest.mark.slow


def both(world, family, rows, tmp_path, split=None, **more):
    """The folders of a run on several ranks, and of one process."""
    split = {"expert": world} if split is None else split
    return beside(world, folder(family), rows, tmp_path, split, **({"optim": SGD} | more))


FAST = {(2, "mixtral", "full"), (4, "qwen3_moe", "experts")}
CASES = [(world, family, name) for world in (2, 4) for family in ("mixtral", "qwen3_moe") for name in ADAPTERS]


@pytest.mark.parametrize(
    ("world", "family", "adapter"), [pytest.param(*case, marks=() if case in FAST else SLOW) for case in CASES]
)
def test_training_equals_one_process(world, family, adapter, rows, tmp_path):
    """Packed and accumulated; every weight, LoRA on linears, and LoRA on experts too."""
    split, whole = both(world, family, rows, tmp_path, adapter=ADAPTERS[adapter])
    equal(split, whole)
    assert lines(whole)[0]["loss"] != lines(whole)[2]["loss"]  # the control: it learns


SPLITS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "copies": {"strategy": "fsdp", "replicate": 2, "shard": 1},
    "ulysses": {"context": 2, "context_method": "ulysses"},
    "ring": {"context": 2, "context_method": "ring"},
}


@pytest.mark.parametrize(
    ("split", "adapter"),
    [
        pytest.param(split, adapter, marks=() if (split, adapter) == ("ddp", "full") else SLOW)
        for split in SPLITS
        for adapter in ADAPTERS
    ],
)
def test_over_replicas_shards_and_parts_of_rows(split, adapter, rows, tmp_path):
    split = {"expert": 2} | SPLITS[split]
    more = {"adapter": ADAPTERS[adapter], "guard": {"checksum": 1}}  # what several ranks hold is the same, to the bit
    equal(*both(4, "qwen3_moe", rows, tmp_path, split, **more))


OTHERS = [
    {"adapter": LORA | {"dora": True}},
    {"adapter": LORA | {"dropout": 0.1}},
    {"adapter": LORA | {"init": "pissa"}},
    {"adapter": OF_EXPERTS | {"lora_fa": True}},
    {"adapter": {"kind": "ia3"}},
    {"adapter": {"kind": "vera"}},
    {"adapter": LORA, "quant": {"kind": "bnb_nf4"}},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", OTHERS, ids=lambda more: "-".join(str(v) for one in more.values() for v in one.values())
)
def test_other_methods(more, rows, tmp_path):
    """What is not of experts lies whole on every rank, so that any method can train it."""
    equal(*both(2, "qwen3_moe", rows, tmp_path, **more))


@pytest.mark.slow
def test_recompute_and_evaluation(rows, tmp_path):
    """All ranks go through layers, evaluations and samples in step; padded rows."""
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 64, "packing": {"kind": "none"}}
    data["valid"] = data["train"]
    more = {"memory": {"recompute": "full"}, "data": data, "evaluate": {"every": 2, "samples": 1, "max_tokens": 4}}
    split, whole = both(2, "qwen3_moe", rows, tmp_path, adapter=FULL, **more)
    equal(split, whole)
    equal_evaluations(split, whole)
    assert (split / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("worlds", "adapter"),
    [((2, 1, 2), "full"), pytest.param((4, 2, 1), "experts", marks=SLOW), pytest.param((1, 4, 2), "full", marks=SLOW)],
)
def test_going_on_with_other_ranks(worlds, adapter, rows, tmp_path):
    """Each two steps by another number of ranks, from the checkpoint of those before: the same weights in the end."""
    model = folder("mixtral")

    def go(world, out, steps):
        split = {"parallel": {"expert": world}} if world > 1 else {}
        more = {"optim": ADAMW, "steps": 6, "checkpoint": {"every": 2, "keep": 9}, "adapter": ADAPTERS[adapter]}
        stage = sft(model, rows, out, **more, **split)
        if world == 1:
            run(stage, console=QUIET)
        else:
            together(world, lambda rank: run(stage, console=QUIET), tmp_path)
        for path in (out / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > steps:
                shutil.rmtree(path)
        if steps < 6:
            shutil.rmtree(out / "model")
            write_json(out / "status.json", {"state": "stopped", "step": steps})

    go(1, tmp_path / "straight", 6)
    for world, steps in zip(worlds, (2, 4, 6), strict=True):
        go(world, tmp_path / "stopped", steps)
    equal(tmp_path / "stopped", tmp_path / "straight")


MISFITS = [
    ("mixtral", 3, "3 ranks cannot share the 4 experts of mixtral evenly; fix: use 1, 2 or 4"),
    ("llama", 2, "llama has no experts to share"),
]


@pytest.mark.parametrize(("family", "world", "why"), MISFITS, ids=[family for family, _, _ in MISFITS])
def test_what_does_not_fit_is_refused_before_any_group(family, world, why, rows, tmp_path):
    said, out = tmp_path / "said.txt", tmp_path / "out"
    stage = sft(folder(family), rows, out, parallel={"expert": world})
    assert ended(launched(world, lambda rank: run(stage, console=QUIET), said), 20) == [2] * world
    assert said.read_text().count("parallel.expert:") == world and why in said.read_text()
    assert not out.exists()


REFUSED = [
    ({"parallel": {"tensor": 2}}, "parallel.tensor"),
    ({"parallel": {"strategy": "zero"}}, "parallel.strategy"),
    ({"parallel": {"pipeline": 2}}, "parallel.expert"),
    ({"precision": "fp8", "adapter": FULL}, "precision"),
    ({"adapter": FULL, "memory": {"optimizer_in_backward": True}, "micro_batch": 12}, "memory.optimizer_in_backward"),
    ({"optim": {"kind": "muon"}}, "optim.kind"),
]


@pytest.mark.parametrize(("more", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_what_cannot_be_beside_it_is_refused(more, key, rows, tmp_path):
    model = folder("mixtral")
    with pytest.raises(RecipeError, match="parallel.expert") as refused:
        sft(model, rows, tmp_path / "out", **(more | {"parallel": more.get("parallel", {}) | {"expert": 2}}))
    assert any(problem.key == key for problem in refused.value.problems), refused.value
    optim = {"kind": "sgd", "lr": 0.5, "momentum": 0.0, "clip": 0.0}
    sft(model, rows, tmp_path / "out", **({"optim": optim} | more))  # the control


def test_a_family_without_a_plan_is_refused():
    llama4 = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 4}}
    assert [plans_experts({"model_type": kind}) for kind in ("mixtral", "gpt_oss", "llama", "of_its_own")] == [
        True,
        True,
        False,
        None,
    ]
    with pytest.raises(RecipeError, match="no plan for the experts of llama4_text"):
        check_experts(llama4, 2, plans_experts(llama4))
    check_experts({"model_type": "of_its_own", "num_experts": 4}, 2, None)  # asked again when it is cut


def mixed(model):
    return any(path.endswith("experts") for path, _ in model.named_modules())


@pytest.mark.slow
def test_gradients_of_every_family_that_has_a_plan(tmp_path):
    """Two ranks with other rows each, against one process with both."""
    models = {name: tiny(name).eval() for name in FAMILIES}
    models = {name: model for name, model in models.items() if model._ep_plan and mixed(model)}
    assert len(models) > 10
    tokens = torch.arange(1, 25).view(2, 12) * 7 % 60

    def grads(model, some):
        model(input_ids=some, use_cache=False).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def work(rank):
        with joined(ranks(), "cpu"):
            place = Place(rank, 2, dist.group.WORLD)
            for name, model in models.items():
                expected = grads(copy.deepcopy(model), tokens)
                layout = cut(model, model._ep_plan, place)
                assert layout.cuts and not layout.whole, (name, layout.whole)
                made = {id(tensor): one for tensor, one in layout.cuts}
                found = grads(model, tokens[rank : rank + 1])
                assert found.keys() == expected.keys(), name
                for key, p in model.named_parameters():
                    if key not in expected:
                        continue
                    whole, mine = expected[key], found[key]
                    if id(p) in made:
                        whole = made[id(p)].of(whole)
                        assert whole.abs().max() > 0, (name, key)  # the control
                    else:
                        dist.all_reduce(mine)
                    gap = (mine - whole).abs().max()
                    assert gap <= 1e-4 * expected[key].abs().max() + 1e-7, (name, key, float(gap))

    together(2, work, tmp_path, 300)


def test_gradients_are_summed_some_at_a_time():
    some = [torch.zeros(n, dtype=kind) for n, kind in ((3, torch.float32), (2, torch.bfloat16), (9, torch.float32))]
    some += [torch.zeros(2), torch.zeros(2)]
    made = [[tensor.numel() for tensor in bucket] for bucket in buckets(some, 16)]
    assert made == [[3], [9], [2, 2], [2]] and list(buckets([])) == []
