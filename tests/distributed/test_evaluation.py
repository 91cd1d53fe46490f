"""Ranks share an evaluation among them, and its figures are those of one process."""

import json
from functools import partial

import pytest

from llmkit import run
from llmkit.evals import run as evals
from tests.adapters.properties import folder
from tests.distributed import QUIET, lines, sft, together, trained

FULL = {"kind": "none"}


def made(model, rows, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    data = {"train": source, "valid": source, "max_length": 32}
    evaluate = {"every": 2, "samples": 0}

    def make(out):
        return sft(model, rows, out, data=data, evaluate=evaluate, **more)

    return make


def counted(world, make, out, tmp_path):
    """Trains; the number of micro-batches that each rank evaluated, of each evaluation."""

    def work(rank):
        real, seen = evals.micro_batches, []

        def counting(*given):
            found = real(*given)
            seen.append(len(found))
            return found

        evals.micro_batches = counting
        run(make(out), console=QUIET)
        (tmp_path / f"seen-{rank}").write_text(json.dumps(seen))

    together(world, work, tmp_path, 120.0)
    return [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(world)]


def same(folder, other, tol=1e-6):
    found, whole = lines(folder, "evaluate"), lines(other, "evaluate")
    assert [line["step"] for line in found] == [line["step"] for line in whole] == [0, 2, 3]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(abs(ours[key] - value) <= tol * abs(value) for key, value in theirs.items() if key != "event")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(evals, "FORWARD_TOKENS", 64)  # two rows a forward pass: several of them


def test_each_rank_of_two_makes_half(few, tiny, rows, tmp_path):
    make = made(tiny, rows)
    alone, both = (counted(world, make, tmp_path / f"run-{world}", tmp_path) for world in (1, 2))
    assert len(alone) == 1 and alone[0][0] > 3
    assert both[0] == both[1] == [-(-n // 2) for n in alone[0]]
    same(tmp_path / "run-2", tmp_path / "run-1")


OTHERS = [
    # world, parallel, tokens of a forward pass: at 4096 there is one pass for three ranks
    (3, {}, 4096),
    (2, {"strategy": "fsdp"}, 64),
    (3, {"strategy": "fsdp"}, 64),
    (2, {"strategy": "zero"}, 64),
    (4, {"tensor": 2}, 64),
    (4, {"context": 2}, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel", "tokens"), OTHERS, ids=lambda value: json.dumps(value))
def test_other_strategies(world, parallel, tokens, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(evals, "FORWARD_TOKENS", tokens)
    make = partial(made, folder("llama"), rows, adapter=FULL, optim={"kind": "sgd", "lr": 0.01, "momentum": 0.0})
    same(trained(world, make(parallel=parallel), tmp_path, "many", 240.0), trained(1, make(), tmp_path, "alone"))


@pytest.mark.slow
def test_a_classifier(tiny, tmp_path):
    from llmkit.stages.classify import Classify

    rows = tmp_path / "labelled.jsonl"
    said = [{"text": "hello world " * (1 + i % 4), "label": ["yes", "no", "perhaps"][i % 3]} for i in range(24)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    source = [{"kind": "jsonl", "path": str(rows)}]

    def make(out):
        return Classify(
            model=str(tiny),
            adapter={"kind": "lora", "rank": 4},
            data={"train": source, "valid": source, "max_length": 32},
            batch={"rows": 12},
            micro_batch=2,
            steps=3,
            optim={"kind": "sgd", "lr": 0.05, "momentum": 0.0},
            evaluate={"every": 2},
            out=str(out),
        )

    same(trained(2, make, tmp_path, "many", 120.0), trained(1, make, tmp_path, "alone"))
    told = [(tmp_path / f"{name}" / "predictions.jsonl").read_text().count("\n") for name in ("many-2", "alone-1")]
    assert told == [24, 24]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_reward_model(world, tiny, tmp_path):
    """Pairs are dealt whole: a rank that has none left runs one for which nothing counts."""
    from llmkit.stages.reward import Reward

    rows = tmp_path / "pairs.jsonl"
    said = [
        {"prompt": "hello " * (1 + i % 4), "chosen": "world " * (1 + i % 3) + str(i), "rejected": "the lazy dog"}
        for i in range(20)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    source = [{"kind": "jsonl", "path": str(rows)}]

    def make(out):
        return Reward(
            model=str(tiny),
            adapter={"kind": "lora", "rank": 4},
            loss={"kind": "bradley_terry", "center": 0.01},
            data={"train": source, "valid": source, "max_length": 32},
            batch={"pairs": 8},
            micro_batch=1,
            steps=3,
            optim={"kind": "sgd", "lr": 0.05, "momentum": 0.0},
            evaluate={"every": 2},
            out=str(out),
        )

    same(trained(world, make, tmp_path, "many", 120.0), trained(1, make, tmp_path, "alone"), 1e-4)
    told = [(tmp_path / f"{name}" / "predictions.jsonl").read_text() for name in (f"many-{world}", "alone-1")]
    assert [text.count("\n") for text in told] == [20, 20]
