"""What is measured across ranks, and what of it is told."""

import json
import time

import pytest

from llmkit.core.errors import ResourceError
from llmkit.core.peers import Alone
from llmkit.core.ranks import ranks
from llmkit.parallel.group import joined
from llmkit.parallel.survey import findings, survey
from tests.distributed import together


def one(name, **more):
    facts = {"torch": "2.13.0"} | more.pop("facts", {})
    figures = {"compute_gflops": 50.0, "disk_mib_per_second": 400.0, "clock_seconds": 0.0}
    return {"name": name, "facts": facts, **figures, **more}


@pytest.mark.parametrize(
    ("second", "said", "disagree"),
    [
        ({"facts": {"torch": "2.12.0"}}, "b has torch 2.12.0, and a has 2.13.0", True),
        ({"facts": {"numpy": "2.0"}}, "b has numpy 2.0, and a has none", True),
        ({"clock_seconds": -3.0}, "the clock of b is -3.00 s from that of a", True),
        ({"compute_gflops": 20.0}, "b computes at 40% of the median rank", False),
        ({"disk_mib_per_second": 40.0}, "b writes at 10% of the median rank", False),
    ],
)
def test_what_one_rank_differs_in_is_told(second, said, disagree):
    found = findings([one("a"), one("b", **second), one("c")])
    assert found == [{"what": said, "disagree": disagree}]
    assert findings([one("a"), one("b"), one("c")]) == []


def test_one_process_is_surveyed_alone(tmp_path):
    found = survey(Alone(), "cpu", tmp_path, {})
    assert found["collectives"] == found["findings"] == [] and list(tmp_path.iterdir()) == []
    assert found["ranks"][0]["compute_gflops"] > 0 and found["ranks"][0]["disk_mib_per_second"] > 0


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ResourceError, match="writing"):
        survey(Alone(), "cpu", tmp_path / "nowhere", {})


def test_ranks_are_measured_together_and_a_clock_that_is_off_is_seen(tmp_path):
    def work(rank):
        mine = ranks()
        with joined(mine, "cpu") as peers:
            ahead = 5.0 * rank
            found = survey(peers, "cpu", tmp_path, {"torch": f"2.{rank}"}, lambda: time.time() + ahead)
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    together(3, work, tmp_path)
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3))
    assert all(other == first for other in others)
    assert [round(one["clock_seconds"]) for one in first["ranks"]] == [0, 5, 10]
    assert [row["bytes"] for row in first["collectives"]] == [4096, 65536, 1 << 20, 16 << 20]
    assert all(row["seconds"] > 0 and row["gb_per_second"] > 0 for row in first["collectives"])
    said = [one["what"] for one in first["findings"] if one["disagree"]]
    assert len(said) == 4 and "has torch 2.1, and" in said[0] and "+5.0" in said[2]
