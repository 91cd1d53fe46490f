"""`kind: best_of`, from its recipe to its rows."""

import json
import os
import signal
import subprocess
import sys

import pytest

from llmkit import BestOf, run
from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError, Stopped
from llmkit.core.run import Grants
from llmkit.stages import build_best


@pytest.fixture
def asked(tmp_path):
    """Prompts as messages and as text, with a column that rewards read."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"hello world {n}"}], "answer": "fox", "n": n} for n in range(5)]
    rows += [{"prompt": "the quick brown", "answer": "fox"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def node(tiny, asked, tmp_path, **more):
    said = {"samples": 4, "sampling": {"temperature": 1.0, "max_tokens": 6}, "max_length": 96, "seed": 3}
    said |= {"reward": {"kind": "length", "unit": "characters", "shape": {"kind": "target", "length": 8, "slack": 40}}}
    said |= {"data": [{"kind": "jsonl", "path": str(asked)}], "out": str(tmp_path / "out")}
    return BestOf(model=str(tiny), **(said | more))


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def go(made, **more):
    return run(made, console=Console(quiet=True), **more)


def test_the_best_answer_to_each_prompt_is_a_row_and_all_are_kept_with_their_scores(tiny, asked, tmp_path):
    rewards = [node(tiny, asked, tmp_path).reward, {"kind": "regex", "pattern": "z", "weight": 0.5}]
    folder = go(node(tiny, asked, tmp_path, reward=rewards)).folder
    lines, rows = read(folder, "answers.jsonl")[1:], read(folder, "rows.jsonl")
    assert len(lines) == len(rows) == 6 and all(len(line["answers"]) == 4 for line in lines)
    for line, row in zip(lines, rows, strict=True):
        for one in line["answers"]:
            assert one["scores"]["length"] == pytest.approx(max(0, 1 - abs(len(one["text"]) - 8) / 40))
            assert one["scores"]["regex"] == float("z" in one["text"])
            assert one["score"] == pytest.approx(one["scores"]["length"] + 0.5 * one["scores"]["regex"])
        best = max(line["answers"], key=lambda one: one["score"])
        assert row["score"] == best["score"] and row["scores"] == best["scores"] and row["answer"] == "fox"
        said = row["completion"]
        assert (said if isinstance(said, str) else said[0]["content"]) == best["text"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "hello world 0"}] and rows[0]["n"] == 0
    assert isinstance(rows[5]["prompt"], str) and isinstance(rows[5]["completion"], str)
    figures = {one["metric"]: one for one in read(folder, "evals.jsonl")}
    every = [one["score"] for line in lines for one in line["answers"]]
    assert figures["best_of.reward"]["value"] == pytest.approx(sum(every) / 24)
    assert figures["best_of.best"]["value"] == pytest.approx(sum(row["score"] for row in rows) / 6)
    assert figures["best_of.kept"]["value"] == 1
    assert "best_of.reward.regex" in figures and "best_of" in (folder / "report.html").read_text()
    assert len({one["text"] for one in lines[0]["answers"]}) > 1  # four draws


def test_rows_train_what_comes_next(tiny, asked, tmp_path):
    from llmkit.data.groups import grouped
    from llmkit.data.node import Data
    from llmkit.data.prepare import prepare
    from tests.conftest import make_tokenizer

    def source(folder):
        return ({"kind": "jsonl", "path": str(folder / "rows.jsonl")},)

    folder = go(node(tiny, asked, tmp_path)).folder
    data = Data(train=source(folder), max_length=96, bad_share=1.0)
    assert len(prepare(data.train, data, make_tokenizer(), "data.train")) >= 5
    folder = go(node(tiny, asked, tmp_path, keep={"kind": "pairs"}, out=str(tmp_path / "pairs"))).folder
    data = Data(train=source(folder), max_length=96, bad_share=1.0)
    assert len(grouped(data.train, data, make_tokenizer())) == len(read(folder, "rows.jsonl")) >= 5


def test_a_run_goes_on_where_it_was_stopped_and_comes_to_the_same(tiny, asked, tmp_path, monkeypatch):
    whole = go(node(tiny, asked, tmp_path, out=str(tmp_path / "whole"))).folder
    monkeypatch.setattr(build_best, "AT_ONCE", 2)
    made = node(tiny, asked, tmp_path)

    class Impatient(Console):
        def step(self, what, done, total, figures=""):
            if done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(made, console=Impatient(quiet=True))
    out = tmp_path / "out"
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    held = len(read(out, "answers.jsonl")) - 1
    assert 2 <= held < 6
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"row": torn')
    asks = []
    plain = build_best._asks
    monkeypatch.setattr(build_best, "_asks", lambda node, asked, first: asks.append(first) or plain(node, asked, first))
    folder = go(made).folder
    assert asks == [held]
    digest = read(folder, "answers.jsonl")[1:] == read(whole, "answers.jsonl")[1:]
    assert digest and (folder / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()
    assert go(made).folder == folder and asks == [held]  # done already


def test_a_function_of_ones_own_needs_its_grant_before_anything_is_made(tiny, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.py").write_text("def score(completions, answer):\n    return [float(len(a)) for a in answer]\n")
    made = node(tiny, asked, tmp_path, reward={"kind": "python", "ref": f"{tmp_path}/my.py:score"})
    with pytest.raises(RecipeError, match=r"reward.ref: .*nobody allowed yet; fix: .*--allow-python"):
        go(made)
    assert not (tmp_path / "out").exists()
    assert {row["score"] for row in read(go(made, grants=Grants(python=True)).folder, "rows.jsonl")} == {3.0}


def test_how_many_failed_is_told(tiny, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.py").write_text("def score(completions, n=None):\n    return [1 / x for x in n or [1]]\n")
    made = node(
        tiny, asked, tmp_path, rows=2, reward={"kind": "python", "ref": f"{tmp_path}/my.py:score", "failed": 7.0}
    )
    folder = go(made, grants=Grants(python=True)).folder
    figures = {one["metric"]: one["value"] for one in read(folder, "evals.jsonl")}
    assert figures["best_of.reward.python.failed"] == 0.5
    assert figures["best_of.reward"] == pytest.approx((1 / 3 + 7) / 2)  # n is 0 and 3


def test_an_answer_without_a_score_ends_the_run_with_its_row(tiny, asked, tmp_path):
    with pytest.raises(DataError, match=r"prompts.jsonl:1: reward.column: its row has no column no"):
        go(node(tiny, asked, tmp_path, reward={"kind": "exact", "column": "no"}))


@pytest.mark.parametrize(
    "more, why",
    [
        ({"sampling": {"temperature": 0.0}}, "sampling.temperature: contradicts samples"),
        ({"samples": 1, "keep": {"kind": "pairs"}}, "samples: contradicts keep.kind: 1 answers are too few"),
        ({"sampling": {"n": 2, "temperature": 1.0}}, "sampling.n: contradicts samples"),
        ({"reward": []}, "reward: is empty"),
        ({"reward": [{"kind": "format", "name": "a"}] * 2}, "reward: two rewards are called a"),
        ({"reward": {"kind": "maths"}}, "'maths' is no kind of reward, did you mean math"),
    ],
)
def test_what_contradicts(tiny, asked, tmp_path, more, why):
    with pytest.raises(RecipeError, match=why):
        node(tiny, asked, tmp_path, **more)


@pytest.mark.slow
def test_the_command_line_checks_and_runs_a_recipe(tiny, asked, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"kind: best_of\nmodel: {tiny}\ndata: [{{kind: jsonl, path: {asked}}}]\nsamples: 2\nmax_length: 96\n"
        "sampling: {temperature: 1.0, max_tokens: 4}\nkeep: {kind: above, bar: 0}\n"
        f"reward: [{{kind: length, shape: {{kind: at_most, length: 4}}}}, {{kind: format}}]\nout: {tmp_path}/out\n"
    )
    done = subprocess.run([sys.executable, "-m", "llmkit", "check", recipe], capture_output=True, text=True, check=True)
    assert "data: 6 prompts, 12 answers" in done.stdout
    done = subprocess.run([sys.executable, "-m", "llmkit", "run", recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 rows of 6 prompts" in done.stderr or "rows of 6 prompts" in done.stderr
    assert done.stdout.strip() == f"{tmp_path}/out"
