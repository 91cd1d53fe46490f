"""What is cut over ranks gives what one process gives."""

import pytest

from tests.distributed import equal, lines, sft, trained

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
FSDP = {"strategy": {"kind": "fsdp"}}


def same(world, model, rows, tmp_path, parallel=FSDP, **options):
    """Runs of one process and of `world` ranks, which must be equal."""

    def alone(out):
        return sft(model, rows, out, **options)

    def several(out):
        return sft(model, rows, out, parallel=parallel, **options)

    ours, theirs = trained(world, several, tmp_path, "run"), trained(1, alone, tmp_path, "run")
    equal(ours, theirs)
    return ours


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world, adapter, tiny, rows, tmp_path):
    seen = lines(same(world, tiny, rows, tmp_path, adapter=adapter))
    assert seen[0]["loss"] != seen[2]["loss"]  # the control: it learns
