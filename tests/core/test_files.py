"""Lines, claims, the stop flag, the cache, memory: the small things that runs rest on."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from llmkit.core.artifact import publish
from llmkit.core.cache import cache
from llmkit.core.console import Console
from llmkit.core.errors import ModelError, Problem, RecipeError, ResourceError, Stopped
from llmkit.core.files import Disk, published, write_atomic
from llmkit.core.folder import claim, differences, read_status
from llmkit.core.memory import available, out_of_memory_named, peak
from llmkit.core.metrics import Lines
from llmkit.core.seed import mixed, reseed
from llmkit.core.stop import Stop


def test_a_problem_is_one_line_whatever_it_holds():
    said = str(Problem("a\nb\x1b[31m\ud800", "c", "f.yaml", 3, 4, "k"))
    assert said == r"f.yaml:3:4: k: a\nb\x1b[31m\ud800; fix: c"


def test_lines_are_strict_json_and_can_be_cut(tmp_path):
    lines = Lines(tmp_path / "m.jsonl")
    lines.add({"step": 1, "loss": 0.1 + 0.2, "grad_norm": float("nan"), "list": [float("inf")]})
    size = lines.size()
    lines.add({"step": 2})
    lines.path.open("ab").write(b'{"torn": ')
    assert lines.path.read_text().startswith(
        '{"step": 1, "loss": 0.30000000000000004, "grad_norm": "nan", "list": ["inf"]}\n'
    )
    assert [line["step"] for line in lines.read()] == [1, 2]
    lines.cut(size)
    assert [line["step"] for line in lines.read()] == [1] and lines.size() == size


def test_lines_after_a_head_are_of_what_it_says(tmp_path):
    lines, head = Lines(tmp_path / "m.jsonl"), {"of": "a", "width": 2}
    assert lines.after(head) == []
    lines.add({"at": 1})
    lines.path.open("ab").write(b'{"torn": ')
    assert lines.after(head) == [{"at": 1}]
    lines.add({"at": 2})
    assert lines.after(head) == [{"at": 1}, {"at": 2}]
    assert lines.after({"of": "b"}) == [] and lines.read() == [{"of": "b"}]
    for harm in (b"\0\0\0\n", b"[1]\n", b"\xff\n", b'{"at": \n'):
        lines.cut(0)
        assert lines.after(head) == []
        lines.add({"at": 1})
        lines.path.open("ab").write(harm + b'{"at": 3}\n')
        assert lines.after(head) == [{"at": 1}] == lines.read()[1:]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    class Full(Disk):
        def write(self, path, parts):
            path.write_bytes(b"ha")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(ResourceError, match="free some space"):
        write_atomic(path, b"new", Full())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.json"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for said in ("old", "new"):
        with published(folder) as aside:
            (aside / "x").write_text(said)
            assert not folder.exists() or (folder / "x").read_text() == "old"
        assert (folder / "x").read_text() == said and os.listdir(tmp_path) == ["model"]
    with pytest.raises(KeyboardInterrupt), published(folder) as aside:
        (aside / "x").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "x").read_text() == "new" and os.listdir(tmp_path) == ["model"]
    left = tmp_path / f".tmp-model-{os.getpid()}"
    left.mkdir()
    (left / "y").write_text("of a process that was killed")
    with published(folder) as aside:
        assert aside == left and not os.listdir(aside)


def test_an_older_folder_is_lost_neither_to_a_refusal_nor_to_a_kill(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x").write_text("old")

    class Refusing(Disk):
        def rename(self, old, new):
            if old.name.startswith(".tmp-"):
                raise OSError(errno.EIO, "no")
            super().rename(old, new)

    with pytest.raises(OSError, match="no"), published(folder, Refusing()) as aside:
        (aside / "x").write_text("new")
    assert (folder / "x").read_text() == "old" and os.listdir(tmp_path) == ["model"]
    folder.rename(tmp_path / ".old-model")  # a kill between the renames
    with pytest.raises(KeyboardInterrupt), published(folder):
        raise KeyboardInterrupt
    assert (folder / "x").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_what_killed_processes_wrote_aside_is_taken_away(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = [f".tmp-model-{os.getppid()}", f".tmp-model-2-{gone.pid}", ".tmp-model-x"]
    for name in (f".tmp-model-{gone.pid}", f".tmp-model-{os.getpid()}", *kept):
        (tmp_path / name / "part").mkdir(parents=True)
    with published(tmp_path / "model") as aside:
        assert not os.listdir(aside)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "model"])


def test_claims_are_exclusive_and_a_dead_ones_folder_is_taken_over(tmp_path, capfd):
    console = Console(quiet=True)
    held = claim(tmp_path / "run", "auto", console)
    held.status("running", 3)
    with pytest.raises(RecipeError, match=rf"in use by .*pid {os.getpid()}, since 20"):
        claim(tmp_path / "run", "auto", console)
    held.release()
    again = claim(tmp_path / "run", "auto", console)
    assert again.before["step"] == 3
    assert f"pid {os.getpid()}" in capfd.readouterr().err  # said whose it was
    again.release()
    with pytest.raises(RecipeError, match="--resume is never"):
        claim(tmp_path / "run", "never", console)
    assert read_status(tmp_path / "run")["state"] == "running"


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"no run's \(thesis\.tex\)"):
        claim(tmp_path, "auto", Console(quiet=True))
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(RecipeError, match="is a file"):
        claim(tmp_path / "thesis.tex", "auto", Console(quiet=True))


def test_a_manifest_names_every_file_and_notices_a_change(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_text("1")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "c").write_text("1")
    made = publish(tmp_path, {"kind": "sft"})
    assert list(made.manifest["files"]) == ["model/w"]
    made.verify()
    (tmp_path / "model" / "w").write_text("2")
    with pytest.raises(ModelError, match="model/w: has changed"):
        made.verify()
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()


def test_differences_go_down_to_the_key():
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "e": 1}) == [
        ("a.c", 2, 3),
        ("d", 1, None),
        ("e", None, 1),
    ]


def test_a_signal_is_remembered_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.check("here")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="stopped by SIGTERM in step 3"):
            stop.check("in step 3")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_console_outlives_its_reader():
    code = "from llmkit.core.console import Console\nc = Console()\n"
    code += "for i in range(2000): c.notice('x' * 100)\nprint('done')"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run.stderr.close()
    assert run.stdout.read() == "done\n" and run.wait() == 0


def test_s7_a_cache_that_others_may_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    assert cache().stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ResourceError, match="chmod go-w"):
        cache()


def test_t2_memory_that_gives_out_is_one_line_with_the_knob():
    import torch

    assert peak("cpu") > 1 << 20 and available("cpu") > 1 << 20
    with (
        pytest.raises(ResourceError, match=r"memory gave out .* MiB are free\); fix: lower it"),
        out_of_memory_named("cpu", "lower it"),
    ):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="other"), out_of_memory_named("cpu", "lower it"):
        raise RuntimeError("other")


def test_randomness_is_a_function_of_the_place():
    import torch

    draws = []
    for place in ((0, 1, 0), (0, 1, 1), (0, 1, 0)):
        reseed(*place)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[2] != draws[1]
    assert mixed(1, 23) != mixed(12, 3)


def test_json_of_status_is_whole_at_every_instant(tmp_path):
    held = claim(tmp_path / "run", "auto", Console(quiet=True))
    for step in range(5):
        held.status("running", step)
        assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == step
    held.release()
