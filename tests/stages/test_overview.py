"""The page over a pipeline: its stages in their order, whatever became of them, and evaluations side by side."""

import json
import re
from html.parser import HTMLParser

import pytest

from llmkit import run
from llmkit.cli.main import _guarded
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.recipe.load import load_recipe
from llmkit.stages.overview import order, write_overview

NAMES = ["zero", "tune", "after", "fold"]


class Cells(HTMLParser):
    """The tables of a page, as lists of rows of texts, and all that it points at."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.named = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.named.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip("\n")


def recipe(tiny, rows, folder, steps=3):
    source = f"[{{kind: jsonl, path: {rows}}}]"
    tasks = (
        f"tasks: [{{kind: perplexity, data: {source}}}, {{kind: generation, data: {source}, rows: 3, max_tokens: 2}}]"
    )
    tune = f"data: {{train: {source}, valid: {source}}}, steps: {steps}, evaluate: {{samples: 0}}"
    (folder / "p.yaml").write_text(
        f"out: o\nstages:\n- {{name: zero, kind: evaluate, model: {tiny}, {tasks}}}\n"
        f"- {{name: tune, kind: sft, model: {tiny}, {tune}}}\n"
        f"- {{name: after, kind: evaluate, model: '${{stages.tune}}', {tasks}}}\n"
        "- {name: fold, kind: merge, model: '${stages.tune}'}\n"
    )
    return load_recipe("p.yaml")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A whole pipeline's folder: do not write into it."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = folder / "rows.jsonl"
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the lazy dog"}]
    rows.write_text((json.dumps({"messages": said}) + "\n") * 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(recipe(tiny, rows, folder), console=Console(quiet=True))
    return folder / "o"


def test_the_end_of_a_pipeline_leaves_a_row_for_each_stage_and_its_evaluations_side_by_side(made):
    seen = Cells((made / "report.html").read_text())
    head, *rows = seen.tables[0]
    assert [row[:3] for row in rows] == [
        ["zero", "evaluate", "done"],
        ["tune", "sft", "done"],
        ["after", "evaluate", "done"],
        ["fold", "merge", "done"],
    ]
    assert re.search(r"valid\.loss [\d.]+ → [\d.]+.*steps 3", rows[1][3]) and "logit difference " in rows[3][3]
    assert seen.links == ["zero/report.html", "tune/report.html", "after/report.html"]  # a merge has no page yet
    assert all((made / link).is_file() for link in seen.links)
    head, *rows = seen.tables[1]
    assert head == ["", "zero", "after"] and rows[0][0] == "perplexity.perplexity"
    lines = {name: [json.loads(line) for line in (made / name / "evals.jsonl").open()] for name in ("zero", "after")}
    assert len(rows) == len(lines["zero"]) and all(re.fullmatch(r"\S+ \[\S+, \S+\]", c) for r in rows for c in r[1:])
    assert rows[0][1].split()[0] == f"{lines['zero'][0]['value']:.4g}" != rows[0][2].split()[0]
    assert not seen.named & {"script", "link", "img"}


def test_report_writes_all_pages_of_a_pipeline_again_in_its_order(made, capfd):
    before = (made / "report.html").read_bytes()
    (made / "report.html").unlink()
    assert _guarded(["report", str(made)], False) == 0
    said = capfd.readouterr().out.split()
    assert said == [*(str(made / name / "report.html") for name in NAMES), str(made / "report.html")]
    after = (made / "report.html").read_text()
    assert after.encode() != before and Cells(after).links[-1] == "fold/report.html"  # which there is now
    assert _guarded(["report", str(made / "tune")], False) == 0
    assert capfd.readouterr().out.split() == [str(made / "tune" / "report.html")]


def test_a_pipeline_that_fails_shows_what_failed_and_what_was_not_begun(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "<b>.jsonl"
    bad.write_text("no row\n")
    recipe(tiny, rows, tmp_path)
    whole = load_recipe("p.yaml", [f"stages.tune.data.valid=[{{kind: jsonl, path: {bad}}}]"])
    with pytest.raises(LlmkitError):
        run(whole, console=Console(quiet=True))
    page = (tmp_path / "o" / "report.html").read_text()
    shown = Cells(page).tables[0][1:]
    assert [row[0] for row in shown] == NAMES
    states = [row[2].partition(":")[0] for row in shown]
    assert states == ["done", "failed", "not begun", "not begun"]
    assert "<b>.jsonl:1" in shown[1][2] and Cells(page).links == ["zero/report.html"] and "b" not in Cells(page).named


def test_what_the_folder_holds_is_shown_as_text_and_a_strange_list_is_refused(tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({"stages": [{"name": "../<i>", "kind": "<script>"}]}))
    assert order(tmp_path) == [("<i>", "<script>")]
    page = write_overview(tmp_path).read_text()
    assert "<script>" not in page and "<i>" not in page and Cells(page).tables[0][1][1] == "<script>"
    assert order(tmp_path / "nowhere") == []
    for text in ("[", "[]", '{"stages": 1}', '{"stages": [{}]}'):
        (tmp_path / "stages.json").write_text(text)
        with pytest.raises(RecipeError, match=r"stages\.json: is no list of stages"):
            order(tmp_path)
