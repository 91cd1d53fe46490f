"""The command line as users and scripts meet it: exit statuses, one line an error, what is not imported."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import llmkit as llmkit_package
from llmkit.recipe.shipped import recipes

GOOD = "kind: sft\nmodel: {model}\ndata:\n  train: [{{kind: jsonl, path: {rows}}}]\nsteps: 1\nout: {out}\n"


def llmkit(*words, cwd=None, **env):
    command = [sys.executable, "-m", "llmkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


def test_help_and_a_broken_recipe_import_no_torch(tmp_path):
    (tmp_path / "r.yaml").write_text("kind: sft\nmodle: x\n")
    code = (
        "import sys; sys.argv = ['llmkit', *{words}]\n"
        "from llmkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as done: sys.stderr.write(repr((done.code, sorted(set(sys.modules) & "
        "{{'torch', 'transformers', 'peft', 'numpy', 'datasets'}}))))"
    )
    for words, status in ((["--help"], 0), (["check", "r.yaml"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(words=words)], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.stderr.endswith(f"({status}, [])")


def test_every_error_is_one_line_and_nothing_is_created(tmp_path):
    (tmp_path / "r.yaml").write_text("kind: sft\nmodle: x\nout: made\n")
    done = llmkit("run", "r.yaml", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 3
    assert all(line.startswith("llmkit: error: ") and "; fix: " in line for line in lines)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["nonsense"], 2),
        (["run"], 2),
        (["run", "missing.yaml"], 2),
        (["generate", "no-such-model", "hi"], 4),
        (["report", "."], 2),
        (["recipes", "nothing"], 2),
        (["evaluate", "x", "--tasks", "nothing"], 2),
    ],
)
def test_usage_and_model_errors_have_their_exit_status(words, status, tmp_path):
    done = llmkit(*words, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.count("llmkit: error: ") == 1 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_version_and_usage_errors_lead_to_the_help_of_the_verb(call):
    assert call("--version")[:2] == (0, f"llmkit {version('llmkit')}\n")
    for words, where in (
        (["run"], "llmkit run"),
        (["run", "r.yaml", "--bogus"], "llmkit run"),
        (["nonsense"], "llmkit"),
    ):
        code, _, said = call(*words)
        assert code == 2 and said.endswith(f"; fix: see {where} --help\n") and said.count("\n") == 1
    assert call("check", "r.yaml", "--show", "-1")[0] == 2
    assert "Fine-tune, evaluate and ship" in call("--help")[1]


def test_the_public_names_are_listed():
    assert {"Sft", "run", "load_recipe"} <= set(dir(llmkit_package))


@pytest.mark.parametrize("level", ["0", "2"])
def test_m14_errors_are_the_same_without_asserts(level, tmp_path):
    (tmp_path / "r.yaml").write_text("kind: sft\nmodel: {}\nmodle: x\nsteps: -1\n")
    done = llmkit("check", "r.yaml", cwd=tmp_path, PYTHONOPTIMIZE=level)
    assert done.returncode == 2 and done.stderr.count("llmkit: error: ") == 5, done.stderr
    assert llmkit("generate", "nothing", "x", PYTHONOPTIMIZE=level).returncode == 4


def test_a_launchers_words_before_the_verb_are_accepted():
    assert llmkit("--local_rank=0", "recipes").returncode == 0


def test_run_show_diff_runs_generate_and_report(tiny, rows, tmp_path, call):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.yaml").write_text(
            GOOD.format(model=tiny, rows=rows, out=f"runs/{name}") + f"seed: {seed}\n"
        )
    first = llmkit("run", "a.yaml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip().endswith("runs/a")
    assert call("run", "b.yaml")[0] == 0
    assert json.loads(call("diff", "runs/a", "runs/b", "--json")[1])["recipe.seed"] == [0, 1]
    listed = json.loads(call("runs", "--json")[1])["runs"]
    assert [(r["folder"], r["state"], r["step"]) for r in listed] == [("runs/a", "done", 1), ("runs/b", "done", 1)]
    made = json.loads(call("generate", "runs/a", "hello", "--max-tokens", "4", "--json")[1].splitlines()[-1])
    assert len(made["token_ids"]) <= 4
    (tmp_path / "runs/a/report.html").unlink()
    assert call("report", "runs/a")[0] == 0 and (tmp_path / "runs/a/report.html").exists()
    assert call("check", "a.yaml", "--show", "1")[1].count("trained") >= 2


def test_a_finished_run_is_left_alone_and_another_recipe_names_the_line(tiny, rows, tmp_path, call):
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="o") + "seed: 0\n")
    assert call("run", "r.yaml")[0] == 0
    before = (tmp_path / "o" / "manifest.json").read_bytes()
    code, _, said = call("run", "r.yaml")
    assert code == 0 and "is done already" in said
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="o") + "seed: 1\n")
    code, _, said = call("run", "r.yaml")
    assert code == 2 and said.startswith("llmkit: error: r.yaml:7:7: seed: is 1, and o was made with 0; fix: ")
    assert (tmp_path / "o" / "manifest.json").read_bytes() == before


def test_r8_a_secret_is_in_no_file_of_a_run(tiny, rows, tmp_path, call, monkeypatch):
    """The secret is the name of a chat template's file: nothing but the recipe can bring it into the run."""
    monkeypatch.setenv("WORD", "s3cret")
    (tmp_path / "s3cret.jinja").write_text((tiny / "chat_template.jinja").read_text())
    model = f"model: {{name: {tiny}, template: '${{env:WORD}}.jinja'}}"
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="o").replace(f"model: {tiny}", model))
    assert call("run", "r.yaml")[0] == 0
    folder = tmp_path / "o"
    held = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert b"${env:WORD}.jinja" in held["resolved.yaml"] and b"${env:WORD}.jinja" in held["manifest.json"]
    assert not [name for name, raw in held.items() if b"s3cret" in raw]
    assert "s3cret" not in "".join(map(str, call("show", "r.yaml")[1:] + call("show", "r.yaml", "--json")[1:]))


def test_show_tells_the_origin_of_every_value(tmp_path, call):
    (tmp_path / "r.yaml").write_text(GOOD.format(model="tiny", rows="a.jsonl", out="o"))
    code, out, _ = call("show", "r.yaml", "steps=4")
    assert code == 0 and "model:\n  name: tiny  # r.yaml:2\n" in out and "steps: 4  # command line" in out
    said = json.loads(call("show", "r.yaml", "--json")[1])
    assert said["recipe"]["data"]["train"][0]["path"] == "a.jsonl" and said["origins"]["seed"] == "default"
    assert json.loads(call("show", "--schema")[1])["title"] == "llmkit recipe"


def test_check_of_a_pipeline_waits_for_models_that_are_not_made_yet(tiny, rows, tmp_path, call):
    stage = f"kind: sft, data: {{train: [{{kind: jsonl, path: {rows}}}]}}"
    stages = f"  - {{name: a, model: {tiny}, {stage}}}\n  - {{name: b, model: '${{stages.a}}', {stage}}}\n"
    (tmp_path / "p.yaml").write_text(f"out: o\nstages:\n{stages}")
    code, out, said = call("check", "p.yaml")
    assert code == 0 and "b: sft is sound; its data and memory can be told when o/a is made" in out, said
    assert not (tmp_path / "o").exists()


def test_runs_lists_a_loss_that_is_not_a_number(tiny, rows, tmp_path, call):
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="runs/a"))
    assert call("run", "r.yaml")[0] == 0
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | {"loss": "nan"} if line["event"] == "train" else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, said = call("runs", "runs")
    assert code == 0 and " nan" in out, said


def test_check_refuses_what_a_run_would_refuse(tiny, rows, tmp_path, call):
    good = GOOD.format(model=tiny, rows=rows, out="o")
    (tmp_path / "r.yaml").write_text(good)
    assert call("check", "r.yaml", "batch.rows=24")[0] == 0
    code, _, said = call("check", "r.yaml", "batch.rows=500")
    assert code == 3 and "24 examples do not fill one step of 500; fix: set batch.rows=24" in said
    assert call("run", "r.yaml")[0] == 0
    code, _, said = call("check", "r.yaml", "model=o", "out=p")
    assert code == 4 and "model: o is an adapter" in said and call("run", "r.yaml", "model=o", "out=p")[2] == said
    for text, wrong in (("rows: 3", "rows"), ("samples: 2", "samples"), ("max_tokens: 9", "max_tokens")):
        (tmp_path / "e.yaml").write_text(good + f"evaluate: {{{text}}}\n")
        code, _, said = call("check", "e.yaml")
        assert (
            code == 2 and f"evaluate.{wrong}: contradicts data.valid (line 4): there are no validation rows" in said
        ), said


def test_check_reads_the_model_and_the_rows_of_an_evaluation_and_a_merge(tiny, rows, tmp_path, call):
    kinds = ("perplexity", "generation")
    tasks = ", ".join(f"{{kind: {kind}, data: [{{kind: jsonl, path: {rows}}}]}}" for kind in kinds)
    (tmp_path / "e.yaml").write_text(f"kind: evaluate\nmodel: {tiny}\ntasks: [{tasks}]\nout: o\n")
    code, out, said = call("check", "e.yaml")
    assert code == 0 and "tasks.perplexity: 24 rows" in out and "tasks.generation: 24 rows" in out, said
    assert call("check", "e.yaml", "model=nothing")[0] == 4
    (tmp_path / "m.yaml").write_text(f"kind: merge\nmodel: {tiny}\nout: m\n")
    code, _, said = call("check", "m.yaml")
    assert code == 4 and "is no adapter" in said
    rows.unlink()
    assert call("check", "e.yaml")[0] == 3
    assert not (tmp_path / "o").exists()


def test_recipes_are_listed_and_copied_once(tmp_path, call):
    assert "sft/lora" in call("recipes")[1]
    assert call("recipes", "sft/lora")[0] == 0 and (tmp_path / "lora.yaml").is_file()
    assert call("recipes", "sft/lora")[0] == 2


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_copied_alone_is_whole(name, call, tmp_path):
    assert call("recipes", name)[0] == 0
    assert call("show", *os.listdir(tmp_path))[0] == 0


@pytest.mark.parametrize("name", ["sft/lora", "sft/lora.yaml", "recipes/sft/lora.yaml", "lora.yaml"])
def test_a_missing_recipe_that_is_shipped_says_how_to_get_it(name, call):
    assert "fix: copy it with llmkit recipes sft/lora\n" in call("run", name)[2]
    assert "lists some" in call("run", "nothing.yaml")[2]


def test_a_fault_of_our_own_is_one_line_and_a_traceback_only_if_asked_for():
    code = "import sys, llmkit.cli.setup as setup\nsetup.recipes = lambda name: 1 / 0\n"
    code += "from llmkit.cli.main import main\nmain()"
    for more, traced in (([], False), (["--debug"], True)):
        command = [sys.executable, "-c", code, "recipes", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and ("Traceback" in done.stderr) is traced
        assert done.stderr.splitlines()[-1].startswith(
            "llmkit: error: llmkit met a fault of its own (ZeroDivisionError:"
        )


@pytest.mark.parametrize("words", [["show", "--schema"], ["recipes"]])
def test_a_reader_that_goes_away_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llmkit", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_d5_nothing_left_to_learn_is_an_error_before_the_model_loads(tiny, rows, tmp_path, call):
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="o"))
    code, _, said = call("run", "r.yaml", "data.max_length=2")
    assert code == 3 and "no row is left to learn from" in said


def test_chat_speaks_until_an_empty_line(tiny, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\n"))
    code, out, said = call("chat", tiny, "--max-tokens", "3")
    assert code == 0 and out.count("\n") >= 2, said


def test_ctrl_c_in_any_verb_is_one_line_and_75(call, monkeypatch):
    from llmkit.cli import recipes

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "check", interrupted)
    code, _, said = call("check", "r.yaml")
    assert code == 75 and said == "llmkit: error: stopped by SIGINT; fix: run the same command again to go on\n"
