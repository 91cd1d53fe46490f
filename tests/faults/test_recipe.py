"""Bad recipes as the command line meets them: one line a problem, exit 2, and nothing is made or changed."""

import os
import platform
import re
import threading
import time

import psutil
import pytest

from llmkit.cli.main import _guarded
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError
from llmkit.core.folder import claim
from llmkit.recipe.load import load_recipe
from llmkit.recipe.show import resolved
from tests.faults import in_child

GOOD = "kind: sft\nmodel: tiny\ndata:\n  train: [{kind: jsonl, path: a.jsonl}]\nout: runs/x\n"
BAD = {
    "r1": GOOD + "optim: {kind: adamw, learing_rate: 1}\n",
    "r1 deep": GOOD.replace("path: a", "pth: b, path: a") + "evaluate: {evry: 1}\n",
    "r1 merge key": GOOD + "<<: {seed: 1}\n",
    "r2": GOOD + "seed: 1\nseed: 2\n",
    "r2 deep": GOOD.replace("path: a.jsonl", "path: a.jsonl, path: a.jsonl"),
    "r4 aliases": "a: &a [1]\n" + "".join(f"b{i}: [*a, *a]\n" for i in range(9)),
    "r4 depth": "a: " + "[" * 10_000 + "]" * 10_000,
    "r4 size": "a: " + "x" * (50 << 20),
    "r5": GOOD + "precision: no\nsteps: 012\n",
    "r5 numbers": GOOD + "optim: {kind: adamw, lr: .inf, clip: 0x1}\nseed: 1:30\nsteps: 1e3\n",
    "r5 date": GOOD.replace("runs/x", "2024-01-02"),
    "r7": GOOD + "quant: bnb_nf4\nadapter: none\n",
    "r7 best": GOOD + "checkpoint: {best: valid.loss}\n",
    "r8 missing": GOOD.replace("tiny", "${env:NOBODY_SET_THIS}"),
    "r8 reference": GOOD.replace("runs/x", "${out}"),
    "r8 stage": GOOD.replace("tiny", "${stages.tune}"),
    "r8 circle": "extends: r.yaml\n",
    "r8 outside": "extends: ../../etc/passwd\n",
    "r10 tab": "kind: sft\nmodel:\n\tname: x\n",
    "r10 nul": "kind: sft\nmodel: a\x00b\n",
    "r10 utf8": b"kind: sft\nmodel: \xff\n",
    "r10 bidi": "kind: sft\nmodel: \u202etiny\n",
    "r10 homoglyph": "k\u0456nd: sft\n",
    "r10 empty": "",
    "r10 list": "- kind: sft\n",
    "r10 two": GOOD + "---\n" + GOOD,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOBODY_SET_THIS", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_r_rows_are_one_line_a_problem_with_exit_2_and_nothing_is_made(name, here, capfd):
    text = BAD[name]
    (here / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = (here / "r.yaml").stat().st_mtime_ns
    assert _guarded(["run", "r.yaml"], False) == 2
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert lines and not said.out
    for line in lines:
        assert re.match(r"llmkit: error: r\.yaml:\d+:(\d+:)? .+; fix: .+", line), line
    assert os.listdir(here) == ["r.yaml"] and (here / "r.yaml").stat().st_mtime_ns == before


def test_r_rows_control_the_good_one_is_read(here):
    (here / "r.yaml").write_text(GOOD)
    assert load_recipe("r.yaml").stages[0][1].kind == "sft"


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("r4")])
def test_r4_a_bomb_costs_less_than_a_second(name, here):
    (here / "r.yaml").write_text(BAD[name])
    began = time.process_time()
    with pytest.raises(RecipeError):
        load_recipe("r.yaml")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("r4")])
def test_r4_a_bomb_costs_less_than_100_mb(name, here):
    (here / "r.yaml").write_text(BAD[name])

    def work():
        before = psutil.Process().memory_info().rss
        watched = Peak()
        try:
            load_recipe("r.yaml")
        finally:
            if watched.stop() - before > 100 << 20:
                os._exit(99)

    assert in_child(work) == 2


class Peak(threading.Thread):
    """The most memory that this process has had, libyaml's too, looked at every millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()
        self.start()

    def run(self):
        process = psutil.Process()
        while not self.ended.wait(0.001):
            self.most = max(self.most, process.memory_info().rss)

    def stop(self):
        self.ended.set()
        self.join()
        return max(self.most, psutil.Process().memory_info().rss)


def test_r4_control_what_is_watched_is_seen():
    watched, before = Peak(), psutil.Process().memory_info().rss
    held = b"x" * (150 << 20)
    time.sleep(0.05)
    assert held and watched.stop() - before > 100 << 20


def test_r8_what_the_environment_holds_is_not_read_again(here, monkeypatch):
    monkeypatch.setenv("ONE", "${env:TWO}")
    monkeypatch.setenv("TWO", "s3cret")
    monkeypatch.setenv("SELF", "a${env:SELF}")
    for name in ("ONE", "SELF"):
        (here / "r.yaml").write_text(GOOD.replace("runs/x", f"${{env:{name}}}"))
        recipe = load_recipe("r.yaml")
        assert recipe.stages[0][1].out == os.environ[name] and "s3cret" not in resolved(recipe)


def test_r11_a_live_run_is_named_by_host_pid_and_start_and_a_dead_one_gives_one_notice(here, capfd):
    held = claim(here / "run", "auto", Console(quiet=True))
    held.status("running", 3)
    before = (here / "run" / "status.json").read_bytes()
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(RecipeError, match=rf"in use by {platform.node()}, pid {os.getpid()}, since {since}; fix: "):
        claim(here / "run", "auto", Console(quiet=True))
    assert (here / "run" / "status.json").read_bytes() == before
    held.release()
    capfd.readouterr()
    claim(here / "run", "auto", Console(quiet=True)).release()
    assert capfd.readouterr().err.count("taking it over") == 1
