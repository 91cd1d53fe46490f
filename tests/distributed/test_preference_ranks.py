"""Pairs over several ranks: figures and weights are those of one process."""

import json

import pytest

from llmkit import Preference
from llmkit.core.usercode import allowed
from tests.distributed import equal, lines, trained


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    rows = [
        {"prompt": "hello world " * (1 + i % 3), "chosen": f" the lazy dog {i}" * (1 + i % 2), "rejected": f" fox {i}"}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def maker(model, rows, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "adapter": {"kind": "lora", "rank": 4},
        "data": {"train": source, "valid": source, "max_length": 64},
        "batch": {"pairs": 5},
        "micro_batch": 1,
        "steps": 3,
        "optim": {"kind": "sgd", "lr": 0.5},
        "schedule": {"kind": "constant"},
        "evaluate": {"samples": 0},
        "guard": {"spike": 0},
    }
    return lambda out: Preference(**(options | more), out=str(out))


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (3, {}),
        pytest.param(2, {"reference": "precomputed", "adapter": "none"}, marks=pytest.mark.slow),
        pytest.param(2, {"reference": "model", "adapter": "none"}, marks=pytest.mark.slow),
    ],
    ids=["adapter off", "precomputed", "model"],
)
def test_replicas_equal_one_process(world, more, tiny, pairs, tmp_path):
    alone, several = (trained(n, maker(tiny, pairs, **more), tmp_path, "run", 200.0) for n in (1, world))
    equal(several, alone)
    for ours, theirs in zip(lines(several, "evaluate"), lines(alone, "evaluate"), strict=True):
        assert ours["valid.loss"] == pytest.approx(theirs["valid.loss"], rel=1e-5)
        assert ours["valid.accuracy"] == theirs["valid.accuracy"]


OWN = """from torch.nn.functional import logsigmoid


def dpo(policy, reference):
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return -logsigmoid(0.1 * chosen - 0.1 * rejected)
"""


@pytest.mark.slow
def test_replicas_with_a_loss_of_ones_own_equal_one_process_with_ours(tiny, pairs, tmp_path, monkeypatch):
    """Each rank reads the function, and looks whether it is allowed."""
    (tmp_path / "allowed-python").mkdir()
    monkeypatch.setattr("llmkit.core.usercode.cache", lambda: tmp_path)
    (tmp_path / "my.py").write_text(OWN)
    allowed(own := f"{tmp_path}/my.py:dpo", True)
    ours = trained(1, maker(tiny, pairs), tmp_path, "ours")
    equal(trained(2, maker(tiny, pairs, loss={"kind": "python", "ref": own}), tmp_path, "own", 400.0), ours)


CUTS = {
    "fsdp": {"strategy": "fsdp"},
    "zero 2": {"strategy": {"kind": "zero", "stage": 2}},
    "zero 3": {"strategy": {"kind": "zero", "stage": 3}},
    "tensor": {"tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("reference", ["adapter_off", "model", "precomputed"])
def test_parts_equal_one_process(cut, reference, tiny, pairs, tmp_path):
    alone = trained(1, maker(tiny, pairs, reference=reference), tmp_path, "run")
    cut = maker(tiny, pairs, reference=reference, parallel=CUTS[cut])
    equal(trained(2, cut, tmp_path, "cut", 200.0), alone)


def labelled(place):
    path = place / "labelled.jsonl"
    rows = [
        {"prompt": "hello world " * (1 + i % 3), "completion": f" the lazy dog {i}" * (1 + i % 2), "label": i != 3}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "parallel", [{}, pytest.param({"strategy": "fsdp"}, marks=pytest.mark.slow)], ids=["ddp", "fsdp"]
)
def test_the_baseline_of_kto_is_that_of_all_ranks(parallel, tiny, tmp_path):
    """Five rows a step, in micro-batches of one packed row: two ranks have different ones, and as many turns."""
    more = {"loss": {"kind": "kto", "beta": 0.5}, "batch": {"rows": 5}, "steps": 4}
    rows = labelled(tmp_path)
    alone = trained(1, maker(tiny, rows, **more), tmp_path, "run", 200.0)
    several = trained(2, maker(tiny, rows, **more, parallel=parallel), tmp_path, "run", 200.0)
    equal(several, alone)
    ours, theirs = (lines(one, "train") for one in (several, alone))
    assert [x["baseline"] for x in ours] == pytest.approx([x["baseline"] for x in theirs], rel=1e-3, abs=1e-6)
    assert max(x["baseline"] for x in theirs) > 1e-3 and theirs[-1]["baseline"] == 0.0  # of one row there is none
    for mine, other in zip(lines(several, "evaluate"), lines(alone, "evaluate"), strict=True):
        assert mine["valid.loss"] == pytest.approx(other["valid.loss"], rel=1e-5)
