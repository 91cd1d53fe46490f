"""A model cut over ranks gives what the whole one gives."""

import hashlib
import shutil

import pytest
import torch
import transformers as hf

from llmkit import run
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_json
from llmkit.core.ranks import ranks
from llmkit.losses.node import CrossEntropy
from llmkit.models.heads import Scored
from llmkit.parallel.grid import grid
from llmkit.parallel.group import joined
from llmkit.parallel.node import Parallel
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.steps import Parts
from llmkit.parallel.tensor import Place, cut
from tests.adapters.properties import FAMILIES, batches, folder, logits, opened
from tests.conftest import make_model, make_tokenizer
from tests.distributed import QUIET, beside, ended, equal, equal_evaluations, launched, lines, sft, together

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
ADAMW = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])


SLOW = pytest.mark.slow


def some(*cases, slow):
    """Parameters of a test, those that run with the fast ones first."""
    made = [pytest.param(*case, marks=mark) for group, mark in ((cases, ()), (slow, SLOW)) for case in group]
    names = {str(LORA): "lora", str(FULL): "full"}
    return [
        pytest.param(*m.values, marks=m.marks, id="-".join(names.get(str(v), str(v)) for v in m.values)) for m in made
    ]


def both(world, model, rows, tmp_path, split=None, **more):
    """The folders of a run cut over ranks, and of one process."""
    return beside(world, model, rows, tmp_path, split or {"tensor": world}, **more)


def tiny_of(config, tmp_path, **sizes):
    """A tiny model of a configuration, with the tokenizer of the others."""
    base = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**(base | sizes)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0, where adding one twice shows nothing
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def layer(model, path):
    return model.get_submodule(f"model.layers.0.{path}")


@pytest.mark.parametrize("world", [pytest.param(2, marks=SLOW), 4])
def test_logits_equal_the_whole_model(world, tmp_path):
    """Of every family; with 4 ranks there are fewer key-value heads than ranks."""
    wholes = {family: opened(folder(family)).model for family in FAMILIES}
    before = {family: logits(model) for family, model in wholes.items()}
    held = {family: sum(p.numel() for p in model.model.layers.parameters()) for family, model in wholes.items()}

    def work(rank):
        with joined(ranks(), "cpu"):
            place = Place(rank, world, torch.distributed.group.WORLD)
            for family, model in wholes.items():
                layout = cut(model, model._tp_plan, place)
                assert not layout.whole, layout.whole
                assert sum(p.numel() for p in model.model.layers.parameters()) < held[family] * (1 / world + 0.1)
                gap = (logits(model) - before[family]).abs().max() / before[family].abs().max()
                assert gap < 1e-5, (family, gap)
                if rank == world - 1:  # the control: every part is used
                    layer(model, "self_attn.o_proj").weight.data.mul_(2.0)
                assert (logits(model) - before[family]).abs().max() > 1e-4 * before[family].abs().max()

    together(world, work, tmp_path)


@pytest.mark.parametrize(("world", "adapter"), some((2, LORA), (4, FULL), slow=[(2, FULL), (4, LORA)]))
def test_training_equals_one_process(world, adapter, tiny, rows, tmp_path):
    split, whole = both(world, tiny, rows, tmp_path, adapter=adapter)
    equal(split, whole)
    assert lines(whole)[0]["loss"] != lines(whole)[2]["loss"]  # the control: it learns


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_equal_one_process(family, world, adapter, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}  # at more, a step of LoRA grows what rounding left tenfold
    equal(*both(world, folder(family), rows, tmp_path, adapter=adapter, optim=optim))


@pytest.mark.parametrize(
    ("strategy", "adapter"), some(("ddp", LORA), ("fsdp", FULL), slow=[("ddp", FULL), ("fsdp", LORA)])
)
def test_over_replicas_and_shards(strategy, adapter, tiny, rows, tmp_path):
    equal(*both(4, tiny, rows, tmp_path, {"tensor": 2, "strategy": strategy}, adapter=adapter))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_over_shards(family, adapter, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
    split = {"tensor": 2, "strategy": "fsdp"}
    equal(*both(4, folder(family), rows, tmp_path, split, adapter=adapter, optim=optim))


def test_shared_heads_over_shards(tmp_path, rows):
    """One key-value head on both ranks of a group, cut again by fsdp."""
    make_model(num_key_value_heads=1).save_pretrained(tmp_path / "one")
    make_tokenizer().save_pretrained(tmp_path / "one")
    split = {"tensor": 2, "strategy": "fsdp"}
    equal(*both(4, tmp_path / "one", rows, tmp_path, split, adapter=FULL))


BIASED = {
    "phi": (hf.PhiConfig, {}),
    "qwen2": (hf.Qwen2Config, {"num_key_value_heads": 2}),
    "gpt_neox": (hf.GPTNeoXConfig, {}),
    "starcoder2": (hf.Starcoder2Config, {"num_key_value_heads": 2, "use_bias": True}),
    "olmo2": (hf.Olmo2Config, {"num_key_value_heads": 2}),
}
"""Families whose linears have biases; the last has norms over all heads, so that its attention stays whole."""


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("family", sorted(BIASED))
def test_biases_are_added_once(family, adapter, rows, tmp_path):
    config, sizes = BIASED[family]
    model = tiny_of(config, tmp_path, **sizes)
    equal(*both(4, model, rows, tmp_path, adapter=adapter, optim={"kind": "sgd", "lr": 0.1, "momentum": 0.0}))


STARTS = [{"init": "pissa"}, {"init": "eva"}, {"lora_fa": True}, {"rslora": True, "lora_plus": 4.0}]


@pytest.mark.slow
@pytest.mark.parametrize("more", STARTS, ids=["pissa", "eva", "lora_fa", "lora_plus"])
def test_kinds_of_lora(more, tiny, rows, tmp_path):
    optim = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
    equal(*both(2, tiny, rows, tmp_path, adapter=LORA | more, optim=optim))


def test_recompute_and_evaluation(tiny, rows, tmp_path):
    """All ranks go through layers, evaluations and samples in step."""
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 64, "packing": {"kind": "none"}}
    data["valid"] = data["train"]
    more = {"memory": {"recompute": "full"}, "data": data, "evaluate": {"every": 2, "samples": 1, "max_tokens": 4}}
    split, whole = both(2, tiny, rows, tmp_path, **more)
    equal(split, whole)
    equal_evaluations(split, whole)
    assert (split / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("first", "then", "adapter"),
    some((2, 1, FULL), slow=[(1, 2, LORA), (2, 1, LORA), (1, 2, FULL), (4, 2, FULL), (4, 2, LORA)]),
)
def test_going_on_with_other_ranks(first, then, adapter, tiny, rows, tmp_path):
    """From the checkpoint of a run that was cut otherwise: the same weights in the end."""

    def go(world, folder):
        more = {"parallel": {"tensor": world}} if world > 1 else {}
        stage = sft(tiny, rows, folder, adapter=adapter, optim=ADAMW, steps=4, checkpoint={"every": 2}, **more)
        if world == 1:
            run(stage, console=QUIET)
        else:
            together(world, lambda rank: run(stage, console=QUIET), tmp_path)

    go(1, tmp_path / "straight")
    go(first, tmp_path / "stopped")
    for path in (tmp_path / "stopped" / "checkpoints" / "step-4", tmp_path / "stopped" / "model"):
        shutil.rmtree(path)
    write_json(tmp_path / "stopped" / "status.json", {"state": "stopped", "step": 2})
    go(then, tmp_path / "stopped")
    equal(tmp_path / "stopped", tmp_path / "straight")


def test_what_is_whole_stays_equal_on_all_ranks(tmp_path):
    """Bit for bit, under an optimizer that makes much of little: norms, embeddings, and shared key-value heads."""
    model = opened(folder("qwen3")).model

    def work(rank):
        with joined(ranks(), "cpu") as peers:
            params = dict(model.named_parameters())
            scored, split = Scored(model), Parallel(tensor=4)
            ways = grid(split.degrees(4), "cpu", peers)
            parts = Parts(scored, params, optimizer, base=model, plan=model._tp_plan)
            steps, given = split.stepper(parts, ways), batches()
            for _ in range(3):
                steps.accumulate(given, CrossEntropy(), 30.0, len(given))
                steps.step(1.0, 1.0, steps.grad_norm())
            pairs = ("k_proj", "v_proj")
            same = {n: p for n, p in params.items() if p.shape == before[n]}
            assert len(same) > 10
            seen = [
                [digest(p) for p in same.values()],
                [digest(p) for n, p in params.items() if n.split(".")[-2] in pairs],
            ]
            said = peers.gather(seen)
            assert all(whole == said[0][0] for whole, _ in said)
            assert said[0][1] == said[1][1] != said[2][1] == said[3][1]

    def optimizer(params):
        return Optimizers([torch.optim.AdamW(params.values(), lr=1e-2)])

    def digest(p):
        return hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()

    before = {name: p.shape for name, p in model.named_parameters()}
    together(4, work, tmp_path)


def test_heads_that_do_not_divide_are_refused_before_any_group(rows, tmp_path):
    """SmolLM2's 9 heads over 3, by 2: every rank ends by itself, with the numbers that fit."""
    made = make_model(num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=48)
    made.save_pretrained(tmp_path / "nine")
    make_tokenizer().save_pretrained(tmp_path / "nine")
    said, out = tmp_path / "said.txt", tmp_path / "out"
    stage = sft(tmp_path / "nine", rows, out, parallel={"tensor": 2})
    assert ended(launched(2, lambda rank: run(stage, console=QUIET), said), 20) == [2, 2]
    assert "2 ranks cannot share 9 heads, 3 key-value heads, intermediate_size 48" in said.read_text()
    assert "use 1 or 3" in said.read_text()
    assert not out.exists()
    fits = sft(tmp_path / "nine", rows, out, parallel={"tensor": 3})
    together(3, lambda rank: run(fits, console=QUIET), tmp_path)


REFUSED = [
    ({"adapter": {"kind": "lora", "dora": True}}, "adapter.dora"),
    ({"adapter": {"kind": "lora", "dropout": 0.1}}, "adapter.dropout"),
    ({"adapter": {"kind": "lora", "parameters": ["experts.down_proj"]}}, "adapter.parameters"),
    ({"adapter": {"kind": "ia3"}}, "adapter.kind"),
    ({"quant": {"kind": "bnb_nf4"}}, "quant.kind"),
    ({"adapter": FULL, "memory": {"optimizer_in_backward": True}, "micro_batch": 12}, "memory.optimizer_in_backward"),
    ({"parallel": {"strategy": "zero"}}, "parallel.strategy"),
    ({"optim": {"kind": "muon"}}, "optim.kind"),
]


@pytest.mark.parametrize(("more", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_what_cannot_be_cut_is_refused(more, key, tiny, rows, tmp_path):
    with pytest.raises(RecipeError, match="parallel.tensor") as refused:
        sft(tiny, rows, tmp_path / "out", **(more | {"parallel": more.get("parallel", {}) | {"tensor": 2}}))
    assert any(problem.key == key for problem in refused.value.problems), refused.value
    optim = {"kind": "sgd", "lr": 0.5, "momentum": 0.0, "clip": 0.0}
    sft(tiny, rows, tmp_path / "out", **({"optim": optim} | more))  # the control
