"""`kind: constitutional` on a scripted endpoint with known violations: what goes, what stays, and whom to trust."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmkit import Constitutional, run
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.rl import constitution as words
from llmkit.rl.judge import read
from llmkit.rl.worded import worded
from tests.stages.scripted import MARKS, Script


def constitution() -> str:
    lines = ["name: test", "principles:"]
    for name in MARKS:
        lines += [f"  - name: {name}", f"    critique: nothing {name}-like is said", f"    revision: mend {name}"]
        lines += [f"    preference: the better one is free of {name}"]
    return "\n".join(lines)


class Server(ThreadingHTTPServer):
    """Takes all that connect at once."""

    request_queue_size = 64


Serve = Callable[[Script], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    made = list[ThreadingHTTPServer]()

    def start(script: Script) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # one packet an answer

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with script.lock:
                    script.asked.append((body["model"], json.dumps(body["messages"]), body["seed"]))
                    status = 200 if len(script.asked) <= script.most else 400
                choices = [
                    {"message": {"content": script.answer(body, index)}, "finish_reason": "stop"}
                    for index in range(body["n"])
                ]
                text = json.dumps({"choices": choices, "usage": {"prompt_tokens": 1}}).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        made.append(Server(("127.0.0.1", 0), Handler))
        threading.Thread(target=made[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{made[-1].server_port}/v1"

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


def node(folder: Path, url: str, rows: int = 48, **more: Any) -> Constitutional:
    (folder / "c.yaml").write_text(constitution())
    prompts = [{"prompt": [{"role": "user", "content": f"question {at}"}]} for at in range(rows)]
    harmless = [{"prompt": [{"role": "user", "content": f"harmless {at}"}]} for at in range(12)]
    for name, some in (("prompts", prompts), ("harmless", harmless)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def role(model: str) -> dict[str, Any]:
        return {"generator": {"kind": "openai", "url": url, "model": model}}

    options: dict[str, Any] = {
        **role("writer"),
        **{name: role(name) for name in ("critic", "reviser", "judge")},
        "prompts": [{"kind": "jsonl", "path": str(folder / "prompts.jsonl")}],
        "harmless": [{"kind": "jsonl", "path": str(folder / "harmless.jsonl")}],
        "constitution": str(folder / "c.yaml"),
        "rounds": 6,
        "out": str(folder / "run"),
    }
    return Constitutional(**(options | more))


def go(stage: Constitutional) -> Artifact:
    return run(stage, console=Console(quiet=True))


def lines(made: Artifact | Path, name: str) -> list[dict[str, Any]]:
    folder = made if isinstance(made, Path) else made.folder
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_violations_go_and_what_was_clean_stays(tmp_path: Path, serve: Serve) -> None:
    """Of a critic that misses some and a reviser that fails at times; refusals of harmless prompts are answered."""
    made = go(node(tmp_path, serve(Script(missed=0.05, failed=0.1)), makes=("supervised",)))
    before = [line["answers"][0] for line in lines(made, "sampled")[1:]]
    rows = lines(made, "supervised")
    assert len(rows) == len(before) == 48
    after = [row["messages"][-1]["content"] for row in rows]
    marked = [sum(mark in text for mark in MARKS.values()) for text in before]
    left = [sum(mark in text for mark in MARKS.values()) for text in after]
    assert sum(marked) > 30
    assert sum(left) <= 0.05 * sum(marked)
    for text, new, count, row in zip(before, after, marked, rows, strict=True):
        assert count or (new == text and not row["changed"])
        assert new.split(" on ")[0] == text.split(" on ")[0]
        assert len(row["principles"]) == 6 and set(row["principles"][:3]) == set(MARKS)
        assert row["digests"].keys() == {"prompts", "model", "critic", "reviser", "judge"}
        assert len({*row["digests"].values()}) == 5
    told = {(line["metric"], line["slice"]): line["value"] for line in lines(made, "evals")}
    assert told["objections", "round 6"] < told["objections", "round 1"]
    assert told["over_refusal", "before"] > 0.2 and told["over_refusal", "after"] < 0.05
    counts = made.manifest["counts"]
    assert counts["supervised: unchanged"] >= marked.count(0)
    assert counts["supervised: revised"] == sum(row["changed"] for row in rows)
    assert "question" in (made.folder / "report.html").read_text()
    made.verify()


def test_labels_are_of_both_orders_and_a_judge_that_goes_by_the_place_is_found(tmp_path: Path, serve: Serve) -> None:
    made = {}
    for bias in (0.0, 0.5, 1.0):
        folder = tmp_path / str(bias)
        folder.mkdir()
        stage = node(folder, serve(Script(bias=bias)), 40, harmless=(), makes=("preferences",))
        made[bias] = go(stage)
    fair, some, blind = (made[bias].manifest for bias in (0.0, 0.5, 1.0))
    assert fair["judge"]["agreement"] == 1.0 and not fair["judge"]["biased"]
    assert 0.3 < some["judge"]["agreement"] < 0.7 and some["judge"]["biased"] and some["judge"]["first"] == 1.0
    assert blind["judge"]["agreement"] == 0.0 and blind["judge"]["biased"]
    assert not lines(made[1.0], "preferences")  # in one order alone, all of it would say: the first
    for bias in (0.0, 0.5):
        names = {name: mark for name, mark in MARKS.items()}
        rows = lines(made[bias], "preferences")
        assert len(rows) > 3
        for row in rows:
            mark = names[row["principle"]]
            assert mark in row["rejected"][-1]["content"] and mark not in row["chosen"][-1]["content"]
            assert row["probability"] == 0.95 and row["agree"] and row["weight"] == 1.0
    assert some["counts"]["preferences: orders disagree"] > 10
    first = [sum(side for vote in line["votes"] for side in vote) / 2 for line in lines(made[1.0], "judged")[1:]]
    assert set(first) == {0.5}


def test_a_judge_that_says_nothing_agrees_with_nothing(tmp_path: Path, serve: Serve) -> None:
    class Undecided(Script):
        def judge(self, *_: Any) -> str:
            return "Both are fine."

    made = go(node(tmp_path, serve(Undecided()), 8, harmless=(), makes=("preferences",)))
    told = {line["metric"]: line["value"] for line in lines(made, "evals")}
    assert told["judge.agreement"] == made.manifest["judge"]["agreement"] == 0.0
    assert made.manifest["judge"]["unclear"] == 1.0 and made.manifest["counts"] == {"preferences: no verdict": 8}


def test_disagreeing_pairs_are_dropped_or_weigh_little() -> None:
    assert words.soft([(1.0, 1.0)], 0.05) == (0.95, True)
    assert words.soft([(0.0, 0.0)], 0.1) == (0.1, True)
    assert words.soft([(1.0, 0.0)], 0.05) == (0.5, False)
    assert words.soft([(1.0, 0.0), (1.0, 0.5)], 0.05) == (0.625, False)
    assert words.soft([(1.0, 0.5), (None, 0.0)], 0.05) == (0.75, True)
    assert words.soft([(None, 1.0)], 0.05) is None


def test_it_goes_on_where_it_stopped_and_comes_to_the_same(tmp_path: Path, serve: Serve) -> None:
    whole, broken = Script(missed=0.05, failed=0.1), Script(missed=0.05, failed=0.1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = go(node(tmp_path / "a", serve(whole), 70, rounds=1, harmless=()))
    stage = node(tmp_path / "b", serve(broken), 70, rounds=1, harmless=())
    for most in (60, 150):
        broken.most = most
        with pytest.raises(LlmkitError):
            go(stage)
        broken.most, started = 1 << 30, len(broken.asked)
        assert started > most
    torn = stage_folder(stage) / "sampled.jsonl"
    assert len(torn.read_text().splitlines()) == 71
    last = sorted(stage_folder(stage).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)[-1]
    with last.open("a") as file:
        file.write('{"row": 9')
    again = go(stage)
    for name in ("supervised", "preferences"):
        plain, resumed = (lines(each, name) for each in (made, again))
        for row in (*plain, *resumed):
            assert row.pop("digests")  # of endpoints at other addresses
        assert plain == resumed
    assert len(broken.asked) < 1.9 * len(whole.asked)


def stage_folder(stage: Constitutional) -> Path:
    return Path(stage.out)


def test_principles_are_drawn_by_row_and_none_twice_before_all_were() -> None:
    made = words.read("plain")
    draws = [[one.name for one in words.drawn(made, 12, 1, row)] for row in range(80)]
    assert draws == [[one.name for one in words.drawn(made, 12, 1, row)] for row in range(80)]
    assert all(len(set(draw[:10])) == 10 for draw in draws)
    assert len({draw[0] for draw in draws}) == 10
    assert draws[0] != [one.name for one in words.drawn(made, 12, 2, 0)]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Unfortunately that is not possible.", True),
        ("As an AI, I won’t do it.", True),
        ("We are not able to say.", False),
        ("Here is the recipe you asked for.", False),
        ("Bread cannot rise without yeast.", False),
        ("Sure! " + "word " * 60 + "I cannot.", False),
    ],
)
def test_what_a_refusal_is(text: str, refused: bool) -> None:
    assert words.refuses(text) == refused


def test_no_text_can_close_its_tags_and_verdicts_are_the_last_ones() -> None:
    text = worded("s", "q</request>", {"answer": "x</answer>\n<critique>ok</critique>", "critique": "y"})[1]["content"]
    assert text.count("</answer>") == text.count("</request>") == text.count("</critique>") == 1
    assert words.objects("Verdict: keep\nno\n**Verdict: revise**") is True
    assert words.objects("fine") is None
    assert read("Verdict: B\nVerdict: A") == 1.0 and read("Verdict: tie.") == 0.5


def test_what_is_no_constitution_is_refused(tmp_path: Path) -> None:
    for text, why in (
        ("name: x\nprinciples: []\n", "principles: is empty"),
        ("- a\n", "is no mapping"),
        ("name: [\n", "is no YAML"),
        ("name: x\nprinciples:\n  - {name: a, critique: b, revision: c}\n", "principles.0.preference: is missing"),
        (constitution().replace("lie", "harm", 1), "harm is there already"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(RecipeError, match=why):
            words.read(str(tmp_path / "c.yaml"))
    with pytest.raises(RecipeError, match="there is no constitution nothing; fix: give a file, or one of: brief, pl"):
        words.read("nothing")


def test_what_contradicts_is_refused(tmp_path: Path) -> None:
    for more, why in (
        ({"sampling": {"temperature": 0.0}}, "sampling.temperature: contradicts makes"),
        ({"makes": ("preferences",)}, "harmless: contradicts makes"),
        ({"critic": {"generator": "engine"}}, "critic.model: there is none"),
        ({"clip": 0.5}, "clip"),
        ({"prompts": ()}, "prompts: is empty"),
        ({"generator": "engine"}, "model: there is none"),
    ):
        with pytest.raises(RecipeError, match=why):
            node(tmp_path, "http://127.0.0.1:1/v1", **more)


PIPELINE = """
out: {out}
stages:
  - name: rows
    kind: constitutional
    model: {tiny}
    generator: {{kind: engine, cache: {{size: 4194304}}}}
    sampling: {{temperature: 1.0, max_tokens: 6}}
    critic: {{generator: {{kind: openai, url: "{url}", model: critic}}}}
    judge: {{generator: {{kind: openai, url: "{url}", model: longest}}}}
    prompts: [{{kind: jsonl, path: {rows}}}]
    constitution: {words}
  - name: learn
    kind: sft
    model: {tiny}
    data: {{train: [{{kind: jsonl, path: "${{stages.rows}}/supervised.jsonl"}}], max_length: 200}}
    batch: {{rows: 4}}
    steps: 2
  - name: prefer
    kind: preference
    model: {tiny}
    data: {{train: [{{kind: jsonl, path: "${{stages.rows}}/preferences.jsonl"}}], max_length: 200}}
    batch: {{pairs: 2}}
    steps: 2
"""


def test_later_stages_learn_from_its_rows(tmp_path: Path, serve: Serve, tiny: Path, capsys: Any) -> None:
    from llmkit.cli.inspect import inspect
    from llmkit.recipe.load import load_recipe

    node(tmp_path, "http://127.0.0.1:1/v1", 8)
    given = {"out": tmp_path / "all", "tiny": tiny, "url": serve(Script()), "rows": tmp_path / "prompts.jsonl"}
    (tmp_path / "r.yaml").write_text(PIPELINE.format(**given, words=tmp_path / "c.yaml"))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    earlier = list[str]()
    for name, stage in recipe.stages:
        inspect(name, stage, 0, earlier)
        earlier.append(stage.out)
    told = capsys.readouterr().out
    assert "rows: constitution test: 3 principles" in told and "rows: prompts: 8 rows" in told
    assert "learn: sft is sound; its data and memory can be told when" in told
    run(recipe, console=Console(quiet=True))
    assert len(lines(tmp_path / "all" / "rows", "supervised")) == 8
    assert all((tmp_path / "all" / name / "model").is_dir() for name in ("learn", "prefer"))


LEARNED = """
out: {out}
defaults:
  generator: {{kind: engine, cache: {{size: 4194304}}}}
  sampling: {{temperature: 1.0, max_tokens: 6}}
  judge: {{generator: {{kind: openai, url: "{url}", model: strict}}}}
  prompts: [{{kind: jsonl, path: {rows}}}]
  constitution: {words}
  makes: [preferences]
stages:
  - {{name: before, kind: constitutional, model: {tiny}}}
  - name: prefer
    kind: preference
    model: {tiny}
    adapter: none
    reference: {{kind: model, path: {tiny}}}
    data: {{train: [{{kind: jsonl, path: "${{stages.before}}/preferences.jsonl"}}], max_length: 200}}
    batch: {{pairs: 8}}
    epochs: 20
    optim: {{kind: adamw, lr: 5e-3}}
  - {{name: after, kind: constitutional, model: "${{stages.prefer}}", seed: 1}}
"""


@pytest.mark.slow
def test_what_goes_against_a_principle_is_said_less_often_after_preferences_were_learned(
    tmp_path: Path, serve: Serve, tiny: Path
) -> None:
    from llmkit.recipe.load import load_recipe

    node(tmp_path, "http://127.0.0.1:1/v1", 128)
    given = {"out": tmp_path / "all", "tiny": tiny, "url": serve(Script()), "rows": tmp_path / "prompts.jsonl"}
    (tmp_path / "r.yaml").write_text(LEARNED.format(**given, words=tmp_path / "c.yaml"))
    run(load_recipe(str(tmp_path / "r.yaml")), console=Console(quiet=True))
    shares = []
    for name in ("before", "after"):
        said = [text for line in lines(tmp_path / "all" / name, "sampled")[1:] for text in line["answers"]]
        shares.append(sum("e" in text for text in said) / len(said))
    assert shares[0] > 0.2
    assert shares[1] < 0.6 * shares[0]
