"""Ranks that hold parts of a row give what one process gives."""

import json

import pytest

from tests.adapters.properties import folder
from tests.distributed import equal, lines, sft, trained

FULL, LORA = {"kind": "none"}, {"kind": "lora", "rank": 4}


def compared(model, rows, tmp_path, /, world, parallel, **more):
    alone = trained(1, lambda out: sft(model, rows, out, **more), tmp_path, "run")
    several = trained(world, lambda out: sft(model, rows, out, parallel=parallel, **more), tmp_path, "run")
    equal(several, alone)
    assert lines(alone)[0]["loss"] != lines(alone)[2]["loss"]  # the control: it learns


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_families(adapter, world, method, family, rows, tmp_path):
    parallel = {"context": world, "context_method": method}
    # at a rate of 0.5 Gemma's third step multiplies what the order of sums changes, also in one process
    optim = {"kind": "sgd", "lr": 0.05, "momentum": 0.0}
    compared(folder(family), rows, tmp_path, world, parallel, adapter=adapter, optim=optim)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_replicas_of_parts(micro_batch, method, family, rows, tmp_path):
    parallel = {"strategy": "ddp", "context": 2, "replicate": 2, "context_method": method}
    compared(folder(family), rows, tmp_path, 4, parallel, adapter=FULL, micro_batch=micro_batch)
