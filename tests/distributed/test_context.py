"""Ranks that hold parts of a row give what one process gives."""

import json
import shutil

import pytest

from llmkit import run
from llmkit.build.context import chosen
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_json
from llmkit.parallel.fits import check_context
from tests.adapters.properties import folder
from tests.conftest import make_model, make_tokenizer
from tests.distributed import QUIET, ended, equal, launched, lines, sft, together, trained

FULL, LORA = {"kind": "none"}, {"kind": "lora", "rank": 4}
ALONE = {}
"""The folders of runs of one process, by what they were asked for."""


def compared(model, rows, tmp_path, /, world, parallel, **more):
    """Compares a run on several ranks with that of one process; gives the folder of the first."""
    key = repr((str(model), rows.read_text(), more))
    if key not in ALONE:
        ALONE[key] = trained(1, lambda out: sft(model, rows, out, **more), tmp_path, "run")
    several = trained(world, lambda out: sft(model, rows, out, parallel=parallel, **more), tmp_path, "run", 240.0)
    equal(several, ALONE[key])
    assert lines(several)[0]["loss"] != lines(several)[2]["loss"]  # the control: it learns
    return several


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_parts_equal_one_process(method, adapter, tiny, rows, tmp_path):
    compared(tiny, rows, tmp_path, 2, adapter=adapter, parallel={"context": 2, "context_method": method})


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_part_without_a_trained_token_under_an_adapter_on_the_head(method, tiny, tmp_path):
    rows = tmp_path / "late.jsonl"
    with rows.open("w") as file:
        for i in range(24):  # one to a row of 64 tokens, which ends with the answer
            file.write(json.dumps({"prompt": "hello world " * 12 + str(i), "completion": f" dog {i}"}) + "\n")
    adapter = LORA | {"targets": ["lm_head", "q_proj"]}
    parallel = {"context": 2, "context_method": method}
    compared(tiny, rows, tmp_path, 2, parallel, adapter=adapter, batch={"rows": 3})


LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.5, 4.0, 8.0]}


@pytest.mark.parametrize(
    ("rope", "method"),
    [
        ({"kind": "dynamic"}, "ring"),
        pytest.param({"kind": "dynamic"}, "ulysses", marks=pytest.mark.slow),
        pytest.param({"kind": "longrope", **LONG}, "ring", marks=pytest.mark.slow),
    ],
    ids=["dynamic-ring", "dynamic-ulysses", "longrope-ring"],
)
def test_rotations_that_follow_the_length(rope, method, tiny, rows, tmp_path):
    model = {"name": str(tiny), "rope": {"factor": 8.0, "original_max_position_embeddings": 32, **rope}}
    compared(tiny, rows, tmp_path, 2, {"context": 2, "context_method": method}, model=model)


OTHERS = {
    "ddp": {"strategy": "ddp", "context": 2},
    "fsdp": {"strategy": "fsdp", "context": 2},
    "tensor": {"tensor": 2, "context": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_whole_runs_under_other_strategies(method, other, adapter, rows, tmp_path):
    """Of a family with windows; `test_context_compositions.py` has the other families and ways."""
    # at a rate of 0.5 Gemma's third step multiplies what the order of sums changes, also in one process
    optim = {"kind": "sgd", "lr": 0.05, "momentum": 0.0}
    parallel = OTHERS[other] | {"context_method": method}
    compared(folder("gemma3"), rows, tmp_path, 4, parallel, adapter=adapter, optim=optim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, {"context": 2}), (4, OTHERS["tensor"])),
        ((4, OTHERS["tensor"]), (1, {})),
        ((4, OTHERS["fsdp"]), (2, {"context": 2})),
    ],
    ids=["context to tensor", "tensor to one", "fsdp to context"],
)
def test_going_on_with_other_ranks(first, then, tiny, rows, tmp_path):
    """From the checkpoint of a run that was spread otherwise: the same weights in the end."""
    options = {"adapter": FULL, "optim": {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}, "steps": 4}
    options["checkpoint"] = {"every": 2, "keep": 4}

    def go(world, parallel, folder):
        stage = sft(tiny, rows, folder, parallel=parallel, **options)
        together(world, lambda rank: run(stage, console=QUIET), tmp_path, 240.0)

    whole = trained(1, lambda out: sft(tiny, rows, out, **options), tmp_path, "whole")
    folder = tmp_path / "stopped"
    go(*first, folder)
    for path in (folder / "checkpoints" / "step-4", folder / "model"):
        shutil.rmtree(path)
    write_json(folder / "status.json", {"state": "stopped", "step": 2})
    go(*then, folder)
    equal(folder, whole)


MORE = {
    "recompute": {"memory": {"recompute": "full"}},
    "neftune": {"neftune": 5.0},
    "padded": {"data": {"packing": "none", "max_length": 64}},
    "smoothing": {"loss": {"kind": "cross_entropy", "label_smoothing": 0.1, "z_loss": 1e-3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_what_else_a_recipe_asks_for(method, more, tiny, rows, tmp_path):
    options = dict(MORE[more])
    if "data" in options:
        options["data"] = options["data"] | {"train": [{"kind": "jsonl", "path": str(rows)}]}
    compared(tiny, rows, tmp_path, 4, {"context": 4, "context_method": method}, **options)


def test_heads_that_do_not_divide_are_refused_before_any_group(tmp_path, rows):
    """3 heads by 2: every rank ends by itself, with the numbers that fit; a ring takes them."""
    made = make_model(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    made.save_pretrained(tmp_path / "three")
    make_tokenizer().save_pretrained(tmp_path / "three")
    said, out = tmp_path / "said.txt", tmp_path / "out"
    stage = sft(tmp_path / "three", rows, out, parallel={"context": 2, "context_method": "ulysses"})
    assert ended(launched(2, lambda rank: run(stage, console=QUIET), said), 30) == [2, 2]
    assert "parallel.context: ulysses deals heads out, and 2 ranks cannot share 3 of llama evenly" in said.read_text()
    assert "use 1 or 3, or set parallel.context_method=ring or auto" in said.read_text()
    assert not out.exists()
    compared(tmp_path / "three", rows, tmp_path, 2, {"context": 2})
    asked = [chosen(made.config, "auto", 2), chosen(made.config, "auto", 3), chosen(made.config, "ring", 3)]
    assert asked == ["ring", "ulysses", "ring"]
    with pytest.raises(RecipeError):
        chosen(made.config, "ulysses", 2)


def test_numbers_that_fit():
    check_context({"num_attention_heads": 8, "num_key_value_heads": 1}, "ulysses", 4, 2)
    check_context({"num_attention_heads": 8}, "ring", 3)
    for config, context, tensor, fix in (
        ({"num_attention_heads": 8}, 4, 4, "use 1 or 2, or"),
        ({"text_config": {"num_attention_heads": 9}}, 2, 1, "use 1, 3 or 9, or"),
        ({"num_attention_heads": 8, "attention_dropout": 0.1}, 2, 1, "set parallel.context=1"),
    ):
        with pytest.raises(RecipeError, match=fix):
            check_context(config, "ulysses", context, tensor)


SHORT = {"data": {"max_length": 6}}
VIRTUAL = {"adapter": {"kind": "prompt_tuning"}, "data": {"max_length": 64, "packing": "none"}}


@pytest.mark.parametrize(
    ("count", "more", "what"),
    [(4, SHORT, "too short for 4 ranks"), (2, VIRTUAL, "the ranks hold parts of one row")],
    ids=["short", "virtual"],
)
def test_misfits_are_told(count, more, what, tiny, rows, tmp_path):
    more = {**more, "data": {**more["data"], "train": [{"kind": "jsonl", "path": str(rows)}]}}
    with pytest.raises(RecipeError, match=what):
        sft(tiny, rows, tmp_path / "run", parallel={"context": count}, **more)
    sft(tiny, rows, tmp_path / "run", parallel={"context": 1}, **more)  # the control
