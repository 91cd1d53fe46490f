"""The page of a policy's answers: all that it holds is there, in order, escaped, and no more than it has room for."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmkit.stages import rollouts, rollouts_page
from llmkit.stages.report import write_report
from llmkit.stages.rollouts import read

EVIL = "</script><script>alert(1)</script></pre>&amp;<b>\u2028\x00"


class Page(HTMLParser):
    """The groups of a page with their answers, and all tags and links that are there."""

    def __init__(self, text):
        super().__init__()
        self.groups, self.tags, self.links, self.scripts, self.inside = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.inside.append(tag)
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag == "section":
            self.groups.append({"data": given, "asked": "", "answers": []})
        if tag == "article":
            self.groups[-1]["answers"].append({"data": given, "text": "", "head": "", "tokens": [], "roles": []})
        if tag == "i":
            self.groups[-1]["answers"][-1]["tokens"].append((given.get("class"), given["title"]))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.inside:
            self.scripts += data
        elif "article" in self.inside:
            place = "head" if "header" in self.inside else "text"
            if self.inside[-1] == "b":
                self.groups[-1]["answers"][-1]["roles"].append(data)
            else:
                self.groups[-1]["answers"][-1][place] += data
        elif "section" in self.inside and "pre" in self.inside:
            self.groups[-1]["asked"] += data


def line(rollout=0, group=0, reward=1.0, text="an answer", **more):
    made = {"rollout": rollout, "group": group, "prompt": group, "row": f"rows.jsonl:{group + 1}", "ids": [5, 6, 7]}
    made |= {"text": text, "finish": "stop", "logps": [], "own": [], "turns": [], "given": 0.0, "prompt_ids": []}
    made |= {"reward": reward, "rewards": {"exact": reward}, "advantage": reward - 0.5, "old": None, "reference": None}
    return made | more


def train(step, **more):
    return {"event": "train", "step": step, "loss": 0.1, "grad_norm": 1.0, "lr": 1e-3, "reward": 0.5, **more}


def page_of(folder, lines, metrics=()):
    for name, some in (("rollouts", lines), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    report = write_report(folder).read_text()
    path = folder / "rollouts.html"
    return report, Page(path.read_text()) if path.is_file() else None


def test_groups_are_there_from_best_to_worst_with_what_was_asked(tmp_path):
    lines = [line(0, 0, 0.2, "low", question="what is it?"), line(0, 0, 0.9, "high"), line(0, 0, 0.5, "middle")]
    lines += [line(1, 0, 1.0, "x", finish="length", rewards={"exact": 1.0, "format": 0.25}), line(1, 1, 0.0, "y")]
    report, page = page_of(tmp_path, lines)
    assert [group["data"]["data-step"] for group in page.groups] == ["1", "2", "2"]
    first = page.groups[0]
    assert [one["text"] for one in first["answers"]] == ["high", "middle", "low"] and first["asked"] == "what is it?"
    assert first["data"]["data-spread"] == "0.7" and first["data"]["data-size"] == "0.4"
    cut = page.groups[1]["answers"][0]
    assert "exact 1, format 0.25" in cut["head"] and "3 tokens, cut short" in cut["head"]
    assert cut["data"]["data-cut"] == "1" and first["answers"][0]["data"]["data-cut"] == "0"
    assert 'href="rollouts.html"' in report and "5 answers in 3 groups." in report


def test_the_colour_is_by_sign_and_size(tmp_path):
    lines = [line(0, 0, r, advantage=a) for r, a in ((3, 2.0), (2, 0.4), (1, 0.0), (0, -1.0), (-1, None))]
    _, page = page_of(tmp_path, lines)
    shades = [one["data"].get("class") for one in page.groups[0]["answers"]]
    assert shades == ["p4", "p1", None, "n2", None]
    assert "advantage" not in page.groups[0]["answers"][-1]["head"]


def test_tokens_have_the_colours_of_their_own_advantages(tmp_path):
    own = line(0, 0, advantage=[1.0, -0.5, 0.0], pieces=["fo", "<ur", "."], text="fo<ur.")
    _, page = page_of(tmp_path, [own, line(0, 0, 0.1, advantage=[0.25], pieces=["no"], text="no")])
    first, second = page.groups[0]["answers"]
    assert first["tokens"] == [("p4", "+1"), ("n2", "-0.5"), (None, "+0")] and first["text"] == "fo<ur."
    assert second["tokens"] == [("p1", "+0.25")]
    assert "advantage +0.167" in first["head"]


def test_a_conversation_is_shown_in_turns_with_its_calls(tmp_path):
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+2"}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    turns += [{"role": "assistant", "content": "It is <4>."}]
    _, page = page_of(tmp_path, [line(turns=turns, text="It is <4>.", question=[{"role": "user", "content": "2+2?"}])])
    (answer,) = page.groups[0]["answers"]
    assert answer["roles"] == ["assistant", "tool", "assistant"]
    assert answer["text"] == '→ calculator({"expression": "2+2"})4It is <4>.'
    assert page.groups[0]["asked"] == "2+2?"


def test_nothing_that_is_said_is_markup(tmp_path):
    evil = line(text=EVIL, row=EVIL, question=EVIL, rewards={EVIL: 1.0, "b": 2.0}, advantage=[1.0], pieces=[EVIL])
    turns = [{"role": EVIL, "content": EVIL}]
    _, plain = page_of(tmp_path, [line()])
    _, page = page_of(tmp_path, [evil, line(0, 0, 0.5, turns=turns)])
    assert page.tags.count("script") == 1 and page.scripts == plain.scripts and not page.links
    assert "alert(1)" in page.groups[0]["answers"][0]["text"] and "alert(1)" not in page.scripts
    assert set(page.tags) <= set(plain.tags) | {"i", "b"}


def test_an_empty_file_has_no_page_and_a_torn_line_ends_it(tmp_path):
    report, page = page_of(tmp_path, [])
    assert page is None and "rollouts.html" not in report
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        file.write(json.dumps(line()) + "\n" + json.dumps(line(0, 1))[:40])
    write_report(tmp_path)
    assert len(Page((tmp_path / "rollouts.html").read_text()).groups) == 1


def test_figures_that_are_not_finite_are_shown_and_spoil_no_curve(tmp_path):
    odd = line(0, 0, 0.0) | {"reward": "nan", "rewards": {"exact": "nan"}}
    report, page = page_of(tmp_path, [odd, line(0, 0, 0.5, advantage="inf"), line(1, 0, 0.5)], [train(1), train(2)])
    heads = [one["head"] for one in page.groups[0]["answers"]]
    assert "reward 0.5 · advantage +inf" in heads[0] and "reward nan" in heads[1]
    assert page.groups[0]["data"]["data-best"] == "0.5" and "nan" not in report.partition("<svg")[2]


def test_long_runs_are_thinned_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "PAGE", 60_000)
    monkeypatch.setattr(rollouts_page, "PAGE", 60_000)
    lines = [line(at // 40, at // 4 % 10, at % 4, f"answer {at} " + "w" * 200) for at in range(4000)]
    report, page = page_of(tmp_path, lines)
    size = (tmp_path / "rollouts.html").stat().st_size
    steps = [int(group["data"]["data-step"]) for group in page.groups]
    assert 30_000 < size < 120_000 and steps == sorted(steps) and steps[0] == 1 and steps[-1] > 90
    said = f"{4 * len(steps)} answers in {len(steps)} groups, of 4,000 in 1,000"
    assert said in report and said in (tmp_path / "rollouts.html").read_text()


def test_large_groups_show_both_ends_and_long_texts_their_beginning(tmp_path):
    lines = [line(0, 0, at, f"answer {at}") for at in range(100)] + [line(1, 0, text="v" * 10_000)]
    report, page = page_of(tmp_path, lines)
    rewards = [float(one["data"]["data-reward"]) for one in page.groups[0]["answers"]]
    assert rewards == [*range(99, 83, -1), *range(15, -1, -1)]
    assert page.groups[1]["answers"][0]["text"].endswith("v … and 6,000 more letters")
    assert (
        "33 answers in 2 groups, of 101 in 2" in report
        and "68 between them left out" in (tmp_path / "rollouts.html").read_text()
    )


@pytest.mark.slow
def test_a_hundred_thousand_answers_have_a_page_of_bounded_size(tmp_path):
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        for at in range(100_000):
            file.write(json.dumps(line(at // 64, at // 8 % 8, at % 8, "<&> " * 100)) + "\n")
    write_report(tmp_path)
    size = (tmp_path / "rollouts.html").stat().st_size
    assert rollouts.PAGE / 2 < size < 2.5 * rollouts.PAGE


def test_bands_are_the_ends_of_groups_in_the_mean_at_the_step_that_learns_from_them(tmp_path):
    lines = [line(0, 0, 0.0), line(0, 0, 1.0), line(0, 1, 0.5), line(0, 1, 0.7), line(1, 0, 2.0, ids=[1])]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    bands = read(tmp_path / "rollouts.jsonl", reuse=2).bands()
    assert bands["reward"] == bands["reward.exact"] == [(1, 0.25, 0.85), (3, 2.0, 2.0)]
    assert bands["length"] == [(1, 3.0, 3.0), (3, 1.0, 1.0)]


def test_the_report_draws_every_figure_and_the_band(tmp_path):
    more = {"kl": 0.1, "entropy": 2.0, "clipped": 0.0, "unended": 0.5, "length": 3.0, "reward.exact": 0.5}
    metrics = [train(step, value_loss=1.0, **more) for step in (1, 2)]
    (tmp_path / "resolved.yaml").write_text("rollout: {reuse: 2}\n")
    lines = [line(0, 0, 0.0), line(0, 0, 1.0), line(1, 0, 0.5), line(1, 0, 1.5)]
    report, _ = page_of(tmp_path, lines, metrics)
    for name in ("reward", "reward.exact", "kl", "length", "entropy", "clipped", "unended", "value_loss", "loss"):
        assert f">{name} </text>" in report
    assert report.count("<polygon") == 3 and "Shaded: " in report and "step 3</text>" in report


NODE = shutil.which("node")
HARNESS = """
const fs = require("fs");
const said = JSON.parse(fs.readFileSync(0, "utf-8"));
const node = (data, more) => ({dataset: data, hidden: false, ...more});
const groups = said.groups.map((one) => {
  const answers = one.answers.map((data) => node(data));
  return node(one.data, {textContent: one.text, querySelectorAll: () => answers, answers});
});
const main = {children: groups, append: (...some) => { main.children = some; }};
const listeners = {};
const listen = (prefix) => ({addEventListener: (name, then) => { listeners[prefix + name] = then; }});
const names = ["step0", "step1", "reward0", "reward1", "advantage0", "advantage1", "text"];
const elements = Object.fromEntries(names.map((name) => [name, {value: ""}]));
elements.cut = {checked: false};
elements.sort = {value: "step", ...listen("sort.")};
const form = {elements, ...listen("")};
const found = {};
const document = {querySelector: (name) => (name === "form" ? form : main), getElementById: () => found};
new Function("document", said.script)(document);
const made = [];
for (const turn of said.turns) {
  for (const [name, value] of Object.entries(turn)) {
    if (name === "cut") elements.cut.checked = value; else elements[name].value = value;
  }
  listeners["input"](); listeners["sort.change"]();
  made.push([main.children.filter((one) => !one.hidden).map((one) => one.dataset.step), found.textContent]);
}
console.log(JSON.stringify(made));
"""


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_page_sorts_and_sifts(tmp_path):
    def group(step, text, *answers):
        rewards = [reward for reward, _, _ in answers]
        data = {"step": str(step), "best": str(max(rewards)), "worst": str(min(rewards))}
        data |= {"spread": str(max(rewards) - min(rewards)), "size": str(max(abs(a or 0) for _, a, _ in answers))}
        made = [
            {"reward": str(r), "cut": str(int(cut)), **({"advantage": str(a)} if a is not None else {})}
            for r, a, cut in answers
        ]
        return {"data": data, "text": text, "answers": made}

    groups = [group(1, "Alpha", (0.1, -1, 0), (0.9, 1, 0)), group(2, "beta", (0.5, None, 1), (0.6, None, 0))]
    groups.append(group(10, "gamma", (2.0, 3, 0)))
    turns = [{}, {"sort": "-best"}, {"sort": "-spread"}, {"sort": "worst"}, {"sort": "step", "text": "ALPHA"}]
    turns += [{"text": "", "step0": "2", "step1": "9"}, {"step0": "", "step1": "", "reward0": "0.55"}]
    turns += [{"reward0": "", "advantage0": "0"}, {"advantage0": "", "cut": True}, {"text": "nothing"}]
    script = Path(rollouts_page.__file__).with_name("rollouts.js").read_text()
    given = json.dumps({"groups": groups, "turns": turns, "script": script})
    made = subprocess.run([NODE, "-e", HARNESS], input=given, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == [
        [["1", "2", "10"], "5 answers"],
        [["10", "1", "2"], "5 answers"],
        [["1", "2", "10"], "5 answers"],
        [["1", "2", "10"], "5 answers"],
        [["1"], "2 answers"],
        [["2"], "2 answers"],
        [["1", "2", "10"], "3 answers"],
        [["1", "10"], "2 answers"],
        [["2"], "1 answers"],
        [[], "0 answers"],
    ]
