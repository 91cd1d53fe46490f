"""A list of objects in one file: every object with its line, from any place on, and each fault by name."""

import json

import pytest

from llmkit.core.errors import DataError
from llmkit.data import json_list
from llmkit.data.json_list import read_json
from llmkit.data.source_nodes import Json

ROWS = [{"instruction": f"ünd {i}", "output": "x" * (i * 7), "deep": [{"a": [1, 2]}]} for i in range(40)]


@pytest.fixture(params=[4, 1 << 18], ids=["small pieces", "one piece"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(json_list, "PIECE", request.param)


@pytest.mark.parametrize(
    "text", [json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False), "﻿ " + json.dumps(ROWS)]
)
def test_every_object_is_read_and_reading_goes_on_behind_any(tmp_path, pieces, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    made = list(read_json(path))
    assert [row.values for row in made] == ROWS
    lines = text.splitlines()
    assert all('"instruction"' in "".join(lines[row.line - 1 : row.line + 1]) for row in made)
    for index in (0, 17, 39):
        assert [row.values for row in read_json(path, made[index].at)] == ROWS[index + 1 :]
    source = Json(path=str(path), take=5)
    rows = list(source.rows())
    assert [row.values for row in rows] == ROWS[:5] and [r.values for r in source.rows(rows[2].at)] == ROWS[3:5]


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_an_empty_list_has_no_rows(tmp_path, pieces, text):
    (tmp_path / "rows.json").write_text(text)
    assert list(read_json(tmp_path / "rows.json")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": 2}', "rows.json:1: holds objects and no list of them at byte 0; fix: use kind: jsonl"),
        ("", "rows.json:1: is no list of objects"),
        ("hello", "rows.json:1: is no list of objects"),
        ('[{"a": 1}\n{"a": 2}]', r"rows.json:2: is not JSON \(no comma"),
        ('[{"a": 1},\n{"a": "2', "rows.json:2: is torn off at byte 11"),
        ('[{"a": 1}', "rows.json:1: is torn off"),
        ('[{"a": 1}] x', "rows.json:1: goes on behind its list"),
        ("[{'a': 1}]", r"rows.json:1: is not JSON"),
        ('[{"a": ' + "9" * 5000 + "}]", "cannot be read"),
        ("[" * 100_000, "nests too deep"),
    ],
)
def test_a_broken_list_is_named_with_its_place(tmp_path, pieces, text, said):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=said):
        list(read_json(tmp_path / "rows.json"))


def test_what_is_no_object_is_one_bad_row(tmp_path, pieces):
    (tmp_path / "rows.json").write_text('[{"a": 1}, 1234567890, [2], "x", {"b": 2}]')
    made = list(read_json(tmp_path / "rows.json"))
    assert [getattr(row, "values", None) for row in made] == [{"a": 1}, None, None, None, {"b": 2}]
    assert made[1].text == b"1234567890"


def test_an_object_without_end_is_not_read_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "MOST", 1000)
    monkeypatch.setattr(json_list, "PIECE", 64)
    (tmp_path / "rows.json").write_text('[{"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(DataError, match="holds an object of more than 0 MiB"):
        list(read_json(tmp_path / "rows.json"))
