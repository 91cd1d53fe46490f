"""`runs`, `diff` and `generate` over folders as they are left: sound, broken, killed, stopped."""

import fcntl
import json

import pytest

from llmkit.cli.runs import runs


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Leaves a run's folder below `runs`."""
    monkeypatch.chdir(tmp_path)

    def leave(name, state="done", losses=(), **files):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": state, "step": len(losses), "why": ""}))
        (folder / "resolved.yaml").write_text("kind: sft  # r.yaml:1\nmodel:\n  kind: none\n")
        lines = [json.dumps({"event": "train", "loss": loss}) + "\n" for loss in losses]
        (folder / "metrics.jsonl").write_text("".join(lines))
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return folder

    return leave


def listed(capsys):
    runs("runs", as_json=False)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"manifest_json": "{"}, "manifest.json: cannot be read (is not JSON)"),
        ({"manifest_json": "[]"}, "manifest.json: is no manifest"),
        ({"metrics_jsonl": "{\n"}, "metrics.jsonl: is damaged"),
        ({"status_json": "{"}, "status.json: cannot be read"),
    ],
)
def test_a_broken_run_says_what_is_broken_and_the_others_are_shown(files, what, left, call):
    left("a", losses=[2.0, 1.5])
    left("t_bad", **files)
    left("z", losses=["nan"])
    code, out, said = call("runs")
    assert code == 0, said
    _, good, bad, odd = out.splitlines()
    assert good.split() == ["runs/a", "sft", "done", "2", "1.5000"] and odd.split()[-1] == "nan"
    assert bad.split()[:3] == ["runs/t_bad", "sft", "broken"] and what in bad


def test_a_broken_manifest_is_one_line_of_diff_and_generate(left, call):
    (left("bad", manifest_json="{") / "model").mkdir()
    for words in (["diff", "runs/bad", "runs/bad"], ["generate", "runs/bad", "hi"]):
        code, _, said = call(*words)
        assert code == 4 and said.count("\n") == 1 and "manifest.json: cannot be read (is not JSON); fix: " in said


def test_a_running_run_that_nobody_holds_was_killed(left, capsys):
    folder = left("a", state="running")
    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert listed(capsys)[1][1:3] == ["sft", "running"]
    assert listed(capsys)[1][1:3] == ["sft", "killed"]


def test_long_names_are_never_squeezed(left, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    left("a-name-that-is-longer-than-the-terminal-is-wide", state="stopped")
    assert listed(capsys)[1][:3] == ["runs/a-name-that-is-longer-than-the-terminal-is-wide", "sft", "stopped"]


def test_a_folder_that_is_not_there_is_an_error(call):
    assert call("runs", "nope")[0] == 2 and "nope is no folder; fix: " in call("runs", "nope")[2]
