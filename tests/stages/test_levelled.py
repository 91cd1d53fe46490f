"""Ranks whose free memory differs take the sizes and the strategy that fit all of them."""

import json
from dataclasses import replace

import pytest

from llmkit import run
from llmkit.stages import build_training
from tests.distributed import QUIET, equal, sft, together, trained


def unlike(tiny, rows, out, said):
    """What a rank does whose own account came to `said[rank]`."""
    plain = build_training.sizes

    def work(rank):
        def sizes(*given):
            shape, choice = plain(*given)
            return shape, replace(choice, **said[rank])

        build_training.sizes = sizes
        run(sft(tiny, rows, out), console=QUIET)

    return work


@pytest.mark.parametrize(
    "said",
    [({"rows": 3}, {"rows": 1, "recompute": 1}), ({"rows": 2}, {"rows": 2, "strategy": "fsdp"})],
    ids=["sizes", "strategy"],
)
def test_what_fits_every_rank_is_what_all_do(said, tiny, rows, tmp_path):
    out = tmp_path / "two"
    together(2, unlike(tiny, rows, out, said), tmp_path)
    made = json.loads((out / "manifest.json").read_text())
    assert made["micro_batch"] == min(one["rows"] for one in said)
    assert made["recompute"] == ("full" if "recompute" in said[1] else "none")
    equal(out, trained(1, lambda folder: sft(tiny, rows, folder), tmp_path, "one"))
