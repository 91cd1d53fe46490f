"""What a report shows of pairs, of critique and revision, of best answers, and of long runs."""

import json
import re

import pytest

from llmkit.stages.chart import MOST, chart
from llmkit.stages.curves import curves
from llmkit.stages.report import write_report
from llmkit.stages.shown_pairs import shown_pairs
from tests.stages.test_overview import Cells
from tests.stages.test_rollouts_page import Page


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(at, margin, longer, reward=False):
    scores = {"reward_margin": margin, "length_chosen": 50.0 + longer, "length_rejected": 50.0}
    if reward:
        scores = {"chosen": margin, "rejected": 0.0, "tokens_chosen": 50.0 + longer, "tokens_rejected": 50.0}
    kind = {} if reward else {"kind": "preference"}
    texts = {"label": f"chosen {at}", "prediction": f"preferred {at}", "text": f"<ask> {at}"}
    return {"cluster_id": str(at), "slices": {"task": "valid", **kind}, "scores": scores, **texts}


@pytest.mark.parametrize("reward", [False, True], ids=["a policy", "a reward model"])
def test_accuracy_is_told_by_difference_of_lengths(reward, tmp_path):
    """Of whoever prefers the longer answer: wrong where the chosen one is shorter."""
    rows = [pair(at, 1.0 if at > 50 else -1.0, at - 50, reward) for at in range(100) if at != 50]
    write(tmp_path / "predictions.jsonl", rows)
    seen = Cells(shown_pairs(tmp_path / "predictions.jsonl"))
    head, *buckets = seen.tables[0]
    assert head[0].startswith("tokens that the chosen answer is longer") and sum(int(row[1]) for row in buckets) == 99
    assert [row[0] for row in buckets] == ["-50 to -31", "-30 to -11", "-10 to +9", "+10 to +29", "+30 to +49"]
    assert [float(row[2]) for row in buckets][:2] == [0.0, 0.0] and [float(row[2]) for row in buckets][3:] == [1.0, 1.0]
    low, high = map(float, re.findall(r"[\d.]+", buckets[2][3])[:2])
    assert low < float(buckets[2][2]) < high and 0.3 < float(buckets[2][2]) < 0.6
    shown = seen.tables[1][1:]
    assert len(shown) == 10 and shown[0][0] == "<ask> 0" and float(shown[0][3]) == -1 and float(shown[-1][3]) == 1


def test_calibration_is_drawn_where_there_are_several_chances(tmp_path):
    write(tmp_path / "a.jsonl", [pair(at, (at - 20) / 10, 0) for at in range(100)])
    write(tmp_path / "b.jsonl", [pair(at, 1.0, 0) for at in range(4)])
    assert "share that is right, by how sure" in shown_pairs(tmp_path / "a.jsonl")
    page = shown_pairs(tmp_path / "b.jsonl")
    assert "by how sure" not in page and "by difference" not in page and "Pairs, by margin" in page
    write(tmp_path / "c.jsonl", [{**pair(0, 0, 0), "scores": {"loss": 1.0}}])
    assert shown_pairs(tmp_path / "c.jsonl") == shown_pairs(tmp_path / "none.jsonl") == ""


def test_figures_of_a_pair_share_a_chart():
    names = ("reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected", "length_chosen", "length_rejected")
    own = {"reward_margin": 0.1, "accuracy": 0.5} | dict.fromkeys(names, 1.0)
    lines = [{"event": "train", "step": step, "loss": 0.1, "grad_norm": 1.0, "lr": 1e-3, **own} for step in (1, 2)]
    lines.append({"event": "evaluate", "step": 2, "valid.accuracy": 0.75})
    made = curves(lines, {})
    titles = re.findall(r'font-weight="600" fill="currentColor">([^<]*) </text>', made)
    pairs = ["rewards of a pair", "log-probabilities of a pair", "tokens of a pair"]
    assert titles == ["loss", "reward_margin", "accuracy", *pairs, "grad_norm", "lr"]
    assert "Shaded" not in made and curves(lines[2:], {}) == ""


def test_a_long_line_is_drawn_by_some_of_its_points_with_the_last():
    made = chart("x", {"a": [(float(x), float(x % 7)) for x in range(50_001)]})
    points = re.search(r'<polyline[^>]*points="([^"]*)"', made)[1].split()
    assert MOST / 2 < len(points) <= MOST + 1 and points[-1].startswith("480.0,") and "step 50000" in made


def test_a_band_lies_around_its_line_and_inside_of_the_axes():
    made = chart("x", {"a": [(1, 0.5), (2, 0.6)]}, bands={"a": [(1, 0.0, 1.0), (2, 0.25, 0.75)], "b": [(1, -9, 9)]})
    (points,) = re.findall(r'<polygon[^>]*points="([^"]*)"', made)
    assert points == "50.0,30.0 480.0,67.5 480.0,142.5 50.0,180.0"


def test_critique_and_revision_are_shown_round_by_round(tmp_path):
    head = {"of": "x"}
    write(tmp_path / "sampled.jsonl", [head, *({"row": row, "answers": [f"bad {row}"]} for row in range(4))])
    for turn, wrong in ((1, (0, 1)), (2, (0,))):
        said = [{"row": r, "principle": "p<", "critique": f"c{turn}.{r}", "objects": r in wrong} for r in range(4)]
        said[3]["objects"] = None
        write(tmp_path / f"critique-{turn}.jsonl", [head, *said])
        new = [{"row": row, "answer": f"better {turn}.{row}" if row in wrong else None} for row in range(4)]
        write(tmp_path / f"revision-{turn}.jsonl", [head, *new])
    page = write_report(tmp_path).read_text()
    (table,) = Cells(page).tables
    assert table[1:] == [
        ["1", "p<", "bad 0", "c1.0", "better 1.0"],
        ["1", "p<", "bad 1", "c1.1", "better 1.1"],
        ["2", "p<", "better 1.0", "c2.0", "better 2.0"],
    ]
    assert "Critique and revision</h2>" in page and ">0.6667<" in page and ">0.3333<" in page


def test_answers_of_which_the_best_are_kept_are_read_side_by_side(tmp_path):
    def answer(score):
        return {
            "text": f"worth {score}",
            "tokens": 3,
            "finish_reason": "length",
            "score": score,
            "scores": {"a": score},
        }

    lines = [{"of": "x"}, {"row": 0, "place": "r.jsonl:1", "answers": [answer(0.1), answer(0.9)], "figures": {}}]
    write(tmp_path / "answers.jsonl", lines)
    write(tmp_path / "predictions.jsonl", [{**pair(0, 0, 0), "scores": {"reward": 0.9}, "text": "<asked>"}])
    report = write_report(tmp_path).read_text()
    (group,) = Page((tmp_path / "rollouts.html").read_text()).groups
    assert group["asked"] == "<asked>" and [one["text"] for one in group["answers"]] == ["worth 0.9", "worth 0.1"]
    assert "2 answers in 1 groups." in report and "advantage" not in group["answers"][0]["head"]
