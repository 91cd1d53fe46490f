"""Replicas give what one process gives."""

import pytest

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


def test_what_differs_is_seen(tiny, rows, tmp_path):
    one, other = (trained(1, lambda out: sft(tiny, rows, out, seed=seed), tmp_path / str(seed), "s") for seed in (0, 1))
    with pytest.raises(AssertionError):
        equal(one, other)
    assert weights(one)
