"""The three records: read back as written, strict about what they do not know; the gate."""

import json

import pytest

from llmkit.core.errors import DataError
from llmkit.core.records import GateSpec, Prediction, RequestLog, read, write
from llmkit.core.types import Report


def report(metric, value, low, high, n=100):
    return Report(metric, "all", value, n, low, high)


def test_rows_come_back_and_unknown_ones_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [Prediction("a", "c", {"s": "x"}, "l", {"nll": 1.5}, "p", "t"), Prediction("b", "c")]
    write(path, rows)
    assert list(read(path, Prediction)) == rows
    said = json.loads(path.read_text().splitlines()[0])
    for change in ({"schema": 2}, {"more": 1}):
        path.write_text(json.dumps(said | change) + "\n")
        with pytest.raises(DataError, match=r"p\.jsonl:1: is no Prediction of version 1"):
            list(read(path, Prediction))


def test_a_request_log_has_its_fields(tmp_path):
    row = RequestLog("r", "u", "a", 0.5, "p1", "m1", "", {"length": 3.0}, 3, 4, 1.0, 0.1, 0.5, "stop")
    write(tmp_path / "r.jsonl", [row])
    assert list(read(tmp_path / "r.jsonl", RequestLog)) == [row]


@pytest.mark.parametrize(
    ("direction", "low", "high", "passes"),
    [("up", -0.01, 0.05, True), ("up", -0.03, 0.05, False), ("down", -0.05, 0.01, True), ("down", -0.05, 0.03, False)],
)
def test_a_gate_judges_the_far_end_of_the_interval(direction, low, high, passes):
    gate = GateSpec("m", direction, margin=0.02)
    assert gate.decide([report("m", 0.0, low, high)]).passed is passes


def test_a_gate_wants_enough_examples_its_metric_and_its_guardrails():
    guard = GateSpec("safety", "up", action="page")
    gate = GateSpec("m", "up", min_n=50, guardrails=(guard,))
    fine = report("m", 0.1, 0.05, 0.2)
    assert "safety was not measured" in gate.decide([fine]).reason
    assert gate.decide([fine, report("safety", -1, -2, -0.5)]).action == "page"
    assert "fewer than 50" in gate.decide([report("m", 1, 1, 1, n=9), report("safety", 1, 1, 1)]).reason
    assert gate.decide([fine, report("safety", 0.0, 0.0, 0.1)]).passed
    assert not GateSpec("m", "up").decide([report("m", float("nan"), float("nan"), float("nan"))]).passed
    assert "gives no interval" in GateSpec("m", "up").decide([report("m", 1.0, None, None)]).reason
    assert GateSpec("m", "up", test="point").decide([report("m", 1.0, None, None)]).passed
