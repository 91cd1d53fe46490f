"""The command line as users and scripts meet it: exit statuses, one line an error, what is not imported."""

import json
import subprocess
import sys

import pytest

GOOD = "kind: sft\nmodel: {model}\ndata:\n  train: [{{kind: jsonl, path: {rows}}}]\nsteps: 1\nout: {out}\n"


def llmkit(*words, cwd=None, **env):
    import os

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


@pytest.mark.parametrize("level", ["0", "2"])
def test_m14_errors_are_the_same_without_asserts(level, tmp_path):
    (tmp_path / "r.yaml").write_text("kind: sft\nmodel: {}\nmodle: x\nsteps: -1\n")
    done = llmkit("check", "r.yaml", cwd=tmp_path, PYTHONOPTIMIZE=level)
    assert done.returncode == 2 and done.stderr.count("llmkit: error: ") == 5, done.stderr
    assert llmkit("generate", "nothing", "x", PYTHONOPTIMIZE=level).returncode == 4


def test_a_launchers_words_before_the_verb_are_accepted():
    assert llmkit("--local_rank=0", "recipes").returncode == 0


def test_run_show_diff_runs_generate_and_report(tiny, rows, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.yaml").write_text(
            GOOD.format(model=tiny, rows=rows, out=f"runs/{name}") + f"seed: {seed}\n"
        )
    first = llmkit("run", "a.yaml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip().endswith("runs/a")
    assert llmkit("run", "b.yaml", cwd=tmp_path).returncode == 0
    changed = json.loads(llmkit("diff", "runs/a", "runs/b", "--json", cwd=tmp_path).stdout)
    assert changed["recipe.seed"] == [0, 1]
    listed = json.loads(llmkit("runs", "--json", cwd=tmp_path).stdout)["runs"]
    assert [(r["folder"], r["state"], r["step"]) for r in listed] == [("runs/a", "done", 1), ("runs/b", "done", 1)]
    made = json.loads(llmkit("generate", "runs/a", "hello", "--max-tokens", "4", "--json", cwd=tmp_path).stdout)
    assert len(made["token_ids"]) <= 4
    (tmp_path / "runs/a/report.html").unlink()
    assert llmkit("report", "runs/a", cwd=tmp_path).returncode == 0 and (tmp_path / "runs/a/report.html").exists()
    shown = llmkit("show", "a.yaml", cwd=tmp_path)
    assert "seed: 0  # a.yaml:7" in shown.stdout
    assert llmkit("check", "a.yaml", "--show", "1", cwd=tmp_path).stdout.count("trained") >= 2


def test_d5_nothing_left_to_learn_is_an_error_before_the_model_loads(tiny, rows, tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD.format(model=tiny, rows=rows, out="o"))
    done = llmkit("run", "r.yaml", "data.max_length=2", cwd=tmp_path)
    assert done.returncode == 3 and "no row is left to learn from" in done.stderr


def test_chat_speaks_until_an_empty_line(tiny, tmp_path):
    command = [sys.executable, "-m", "llmkit", "chat", str(tiny), "--max-tokens", "3"]
    done = subprocess.run(command, input="hello\nagain\n\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("\n") >= 2, done.stderr
