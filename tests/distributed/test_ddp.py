"""Replicas give what one process gives."""

from dataclasses import replace

import pytest
import torch

from llmkit import run
from llmkit.core.errors import RecipeError
from tests.distributed import equal, lines, sft, trained, weights

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world, adapter, tiny, rows, tmp_path):
    def make(out):
        return sft(tiny, rows, out, adapter=adapter)

    alone, several = (trained(n, make, tmp_path, "run") for n in (1, world))
    equal(several, alone)
    assert lines(alone)[0]["loss"] != lines(alone)[2]["loss"]  # the control: it learns


def test_more_ranks_than_rows(tiny, rows, tmp_path):
    def make(out):
        return sft(
            tiny,
            rows,
            out,
            batch={"rows": 2},
            data={"train": [{"kind": "jsonl", "path": str(rows)}], "packing": {"kind": "none"}},
        )

    equal(*(trained(n, make, tmp_path, "few") for n in (3, 1)))


@pytest.mark.parametrize(
    "loss",
    [{}, pytest.param({"label_smoothing": 0.1, "z_loss": 1e-3}, marks=pytest.mark.slow)],
    ids=["plain", "spread"],
)
def test_a_rank_without_rows_under_an_adapter_on_the_head(loss, tiny, rows, tmp_path):
    """Its backward pass goes through the head all the same: the others wait for those gradients."""

    def make(out):
        data = {"train": [{"kind": "jsonl", "path": str(rows)}], "packing": {"kind": "none"}}
        adapter = LORA | {"targets": ["lm_head", "q_proj"]}
        return sft(
            tiny, rows, out, batch={"rows": 2}, data=data, adapter=adapter, loss={"kind": "cross_entropy", **loss}
        )

    equal(*(trained(n, make, tmp_path, "few") for n in (3, 1)))


def test_what_differs_is_seen(tiny, rows, tmp_path):
    one, other = (
        trained(1, lambda out, seed=seed: sft(tiny, rows, out, seed=seed), tmp_path / str(seed), "s") for seed in (0, 1)
    )
    with pytest.raises(AssertionError):
        equal(one, other)
    assert weights(one)


@pytest.mark.parametrize(
    "adapter", [LORA | {"dropout": 0.1}, pytest.param(FULL, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_a_deterministic_run_has_the_same_bits_on_any_number_of_ranks(adapter, tiny, rows, tmp_path):
    def make(out):
        optim = {"kind": "adamw", "lr": 1e-2}
        return sft(tiny, rows, out, adapter=adapter, deterministic=True, optim=optim, parallel={"virtual": 4})

    alone, *several = (trained(n, make, tmp_path, "bits") for n in (1, 2, 4))
    for folder in several:
        assert lines(folder) == lines(alone)
        ours, theirs = weights(folder), weights(alone)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = trained(1, lambda out: replace(make(out), deterministic=False), tmp_path, "other")
    assert not all(torch.equal(a, b) for a, b in zip(weights(other).values(), weights(alone).values(), strict=True))


def test_ranks_that_do_not_divide_the_shards_are_told_before_any_group_forms(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        RecipeError, match="parallel.virtual: 3 ranks .* 8 virtual shards .*; fix: use 1, 2, 4, 8 ranks"
    ):
        run(sft(tiny, rows, tmp_path / "out", deterministic=True))
    assert not (tmp_path / "out").exists()
