"""A file of prompts to a file of answers: in order, over a stop, and nothing of another question."""

import json
import signal
import subprocess
import sys
import time

import pytest

from llmkit.cli import batch
from llmkit.cli.text import Asking, generate
from llmkit.cli.text import generate_file as to_file
from llmkit.core.errors import DataError
from llmkit.inference.request import RequestError

HOW = {"max_tokens": 4}


def generate_file(model, rows, output, said):
    to_file(Asking(model, said), rows, output)


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": " ".join(["hello world"] * (i % 4 + 1)) + f" {i}", "id": i} for i in range(7)]
    rows += [
        {"messages": [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog"}]},
        {"text": "the"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_single_prompts_in_order(tiny, asked, tmp_path, capsys):
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    capsys.readouterr()
    made = lines(tmp_path / "out.jsonl")
    assert [row.get("id") for row in made] == [0, 1, 2, 3, 4, 5, 6, None, None]
    generate(Asking(str(tiny), HOW), made[3]["prompt"], False)
    assert capsys.readouterr().out == made[3]["completion"] + "\n"
    assert all(row["finish_reason"] in ("stop", "length") and row["completion_tokens"] <= 4 for row in made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "out.jsonl"]


@pytest.mark.parametrize("generator", ["engine", "{kind: transformers, batch: 2}"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_one_goes_on_to_the_same_answers(tiny, asked, tmp_path, monkeypatch, temperature, generator):
    how = HOW | {"temperature": temperature}

    def ask(output, how=how):
        to_file(Asking(str(tiny), how, generator=generator), str(asked), str(tmp_path / output))

    ask("whole.jsonl")
    real, calls = batch._answered, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(batch, "_answered", dies)
    with pytest.raises(KeyboardInterrupt):
        ask("out.jsonl")
    assert not (tmp_path / "out.jsonl").exists() and len(lines(tmp_path / "out.jsonl.part")) == 4
    with (tmp_path / "out.jsonl.part").open("a") as file:
        file.write('{"id": 4, "half a li')
    with pytest.raises(
        Exception,
        match=r"another max_tokens; fix: .* remove out.jsonl.part and out.jsonl.part.json",
    ):
        ask("out.jsonl", how | {"max_tokens": 9})
    monkeypatch.setattr(batch, "_answered", lambda *args: calls.append(2) or real(*args))
    ask("out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert calls.count(2) == 5, "four of nine answers were there"


def test_a_row_that_the_model_cannot_take_is_named(tiny, asked, tmp_path):
    asked.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "hello world " * 400}) + "\n")
    with pytest.raises(Exception, match=r"asked.jsonl:2: prompt: has \d+ tokens; the model takes 512"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    asked.write_text('{"prompt": "a"}\n' * 300 + json.dumps({"prompt": "hello world " * 200}) + "\n")
    with pytest.raises(Exception, match=r"asked.jsonl:301: max_tokens: 400 after a prompt of \d+ is past the 512"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), {"max_tokens": 400})
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"], "it is found before the first answer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"question": "b"}\n', r"asked.jsonl:2: asks nothing; fix: give messages, prompt, or text"),
        ('{"prompt": "a"}\n{"prompt": x}\n', r"asked.jsonl:2: is not JSON .*; fix: mend the line$"),
        ("", r"asked.jsonl: holds no rows"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', r"asked.jsonl:1: asks nothing"),
        ('{"prompt": []}\n', r"asked.jsonl:1: asks nothing"),
        (
            '{"prompt": "a"}\n{"prompt": "a", "completion": "b", "reference": "c"}\n',
            r"asked.jsonl:2: has a completion, .* and a",
        ),
    ],
)
def test_rows_that_ask_nothing_are_named_before_anything_is_written(tiny, asked, tmp_path, text, said):
    asked.write_text(text)
    with pytest.raises(Exception, match=said):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]


def test_up_to_ten_rows_that_cannot_be_asked_are_told_in_one_go(tiny, asked, tmp_path):
    bad = ["{", '{"question": 1}', json.dumps({"prompt": "hello world " * 400})]
    asked.write_text('{"prompt": "a"}\n' + "\n".join(bad * 5) + '\n{"prompt": "a"}\n')
    with pytest.raises(DataError) as refused:
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    told = refused.value.problems
    assert [one.line for one in told] == list(range(2, 12)) and {one.file for one in told} == {str(asked)}
    assert [one.fix for one in told[:3]] == [
        "write one object a line",
        "give messages, prompt, or text",
        "ask for less",
    ]
    asked.write_text('{"prompt": "a"}\n' + "\n".join(bad) + "\n")
    with pytest.raises(DataError) as refused:
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    assert [one.line for one in refused.value.problems] == [2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]


def test_what_a_row_says_of_its_own_is_kept_beside_the_answer(tiny, asked, tmp_path):
    asked.write_text('{"prompt": "hello", "completion": "mine", "id": "\\ud800"}\n')
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    (made,) = lines(tmp_path / "out.jsonl")
    assert made["reference"] == "mine" != made["completion"] and made["id"] == "\ud800" and made["prompt"] == "hello"


@pytest.mark.parametrize("note", ["{}", "torn", "[1]"])
def test_a_note_without_answers_begins_anew(tiny, asked, tmp_path, note):
    generate_file(str(tiny), str(asked), str(tmp_path / "whole.jsonl"), HOW)
    (tmp_path / "out.jsonl.part.json").write_text(note)
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.part").write_text('{"id": 0}\n')
    (tmp_path / "out.jsonl.part.json").write_text(note)
    with pytest.raises(Exception, match="was begun with another"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)


def test_an_answer_that_fails_says_of_what(tiny, asked, tmp_path):
    how = {"max_tokens": 4, "min_tokens": 2, "allowed_ids": [2]}  # nothing but its end may be made, and not yet
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), how)
    assert all("no token may be made" in row["error"] for row in lines(tmp_path / "out.jsonl"))
    with pytest.raises(RequestError, match="an answer failed: .*no token may be made"):
        generate(Asking(str(tiny), how), "hello", False)


def test_an_output_that_is_there_is_left_alone(tiny, asked, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(Exception, match="out.jsonl: is there already; fix: name another --output"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_a_thousand_rows_survive_a_kill_in_their_midst(tiny, tmp_path):
    path, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"hello {i % 83}", "id": i}) + "\n" for i in range(1000)))
    said = {"max_tokens": 16, "temperature": 0.8, "seed": 3}
    generate_file(str(tiny), str(path), str(tmp_path / "whole.jsonl"), said)
    flags = [word for key, value in said.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words = [sys.executable, "-m", "llmkit", "generate", str(tiny), "--input", str(path), "--output", str(out), *flags]
    part = tmp_path / "out.jsonl.part"
    process = subprocess.Popen(words)
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 200):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 200 <= part.read_bytes().count(b"\n") < 1000
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "1000 answers" in done.stdout and "1000/1000" in done.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
    assert [row["id"] for row in lines(out)] == list(range(1000))
