"""`llmkit doctor --cluster`."""

import json
import os
import sys

import pytest

from llmkit.cli import cluster
from llmkit.cli.main import _guarded
from llmkit.core.errors import PeerError
from tests.distributed import ended, launched


def test_alone_it_prints_a_table_or_one_object(call):
    code, said, _ = call("doctor", "--cluster")
    assert code == 0 and said.startswith("rank ") and said.endswith("1 ranks, nothing to look at\n")
    code, said, _ = call("doctor", "--cluster", "--json", "--disk", ".")
    assert code == 0 and json.loads(said)["world"] == 1


@pytest.mark.parametrize(("differ", "code"), [(False, 0), (True, 6)])
def test_ranks_that_disagree_exit_6_and_rank_0_says_so(differ, code, tmp_path, monkeypatch):
    shown = tmp_path / "shown.txt"
    facts = cluster._facts
    monkeypatch.setattr(cluster, "_facts", lambda kind: facts(kind) | ({"code": os.environ["RANK"]} if differ else {}))

    def work(rank):
        sys.stdout, sys.stderr = shown.open("a"), (tmp_path / "said.txt").open("a")
        os._exit(_guarded(["doctor", "--cluster", "--disk", str(tmp_path)], False))

    assert ended(launched(2, work, tmp_path / "said.txt")) == [code, code]
    said, table = (tmp_path / "said.txt").read_text(), shown.read_text()
    assert table.count("rank 0 (") >= 1 and "all-reduce" in table and table.count("GFLOP/s") == 1
    assert ("has code 1, and rank 0" in said and said.count("\n") == 1) if differ else said == ""


def test_the_first_disagreement_is_the_error(monkeypatch, call):

    monkeypatch.setattr(
        "llmkit.parallel.survey.survey",
        lambda *_: {"world": 1, "ranks": [], "collectives": [], "findings": [{"what": "x", "disagree": True}] * 3},
    )
    with pytest.raises(PeerError, match=r"x \(2 more\); fix: "):
        cluster.cluster(".", True)
