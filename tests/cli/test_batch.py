"""A file of prompts to a file of answers: in order, over a stop, and nothing of another question."""

import json

import pytest

from llmkit.cli import batch
from llmkit.cli.text import generate, generate_file

HOW = {"max_tokens": 4, "temperature": 0.0, "seed": 0}


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
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW, False, False)
    capsys.readouterr()
    made = lines(tmp_path / "out.jsonl")
    assert [row.get("id") for row in made] == [0, 1, 2, 3, 4, 5, 6, None, None]
    generate(str(tiny), made[3]["prompt"], 4, 0.0, 0, False, False, False)
    assert capsys.readouterr().out == made[3]["completion"] + "\n"
    assert all(row["finish_reason"] in ("stop", "length") and row["completion_tokens"] <= 4 for row in made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "out.jsonl"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_one_goes_on_to_the_same_answers(tiny, asked, tmp_path, monkeypatch, temperature):
    how = HOW | {"temperature": temperature}
    monkeypatch.setattr(batch, "CHUNK", 2)
    generate_file(str(tiny), str(asked), str(tmp_path / "whole.jsonl"), how, False, False)
    real, calls = batch._lines, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            yield '{"torn": '
            raise KeyboardInterrupt
        yield from real(*args)

    monkeypatch.setattr(batch, "_lines", dies)
    with pytest.raises(KeyboardInterrupt):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), how, False, False)
    assert not (tmp_path / "out.jsonl").exists() and len(lines(tmp_path / "out.jsonl.part")) == 4
    with (tmp_path / "out.jsonl.part").open("a") as file:
        file.write('{"id": 4, "half a li')
    with pytest.raises(Exception, match=r"out.jsonl.part: was begun with another max_tokens"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), how | {"max_tokens": 9}, False, False)
    monkeypatch.setattr(batch, "_lines", lambda *args: calls.append(2) or real(*args))
    generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), how, False, False)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert calls.count(2) == 3, "two of five chunks were there"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"question": "b"}\n', r"asked.jsonl:2: asks nothing; fix: give messages, prompt, or text"),
        ('{"prompt": "a"}\n{"prompt": \n', r"asked.jsonl:2"),
        ("", r"asked.jsonl: holds no rows"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', r"asked.jsonl:1: asks nothing"),
    ],
)
def test_rows_that_ask_nothing_are_named_before_anything_is_written(tiny, asked, tmp_path, text, said):
    asked.write_text(text)
    with pytest.raises(Exception, match=said):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW, False, False)
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]


def test_an_output_that_is_there_is_left_alone(tiny, asked, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(Exception, match="out.jsonl: is there already; fix: name another --output"):
        generate_file(str(tiny), str(asked), str(tmp_path / "out.jsonl"), HOW, False, False)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
